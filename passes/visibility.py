"""Which keys a query sees, read off a mask's expression by algebra.

A mask is a boolean tensor over [B, 1, T, S] built from comparisons of integer positions. It is put into conjunctive
normal form over atoms that bound the key position, or its distance to the query's, by constants. The forms that
``spikingbrain.attention`` knows (see its docstring) are then recognised by their clauses, however they were spelled.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_mlir import ir

from spikingbrain.passes import torch_ir

KEY, DISTANCE = "key", "key - query"


@dataclass(frozen=True)
class Atom:
    """``low <= subject`` (bound ``low``) or ``subject <= high`` (bound ``high``), integers."""

    subject: str
    side: str  # "low" or "high"
    bound: int

    def __str__(self) -> str:
        return f"{self.subject} {'>=' if self.side == 'low' else '<='} {self.bound}"


Clause = frozenset[Atom]


@dataclass(frozen=True)
class Visibility:
    """The recognised rule: ``0 <= key <= query and (key > query - window or key < sinks)``; window 0 is unlimited."""

    query_positions: ir.Value  # [B, T] or [T]
    key_positions: ir.Value  # [B, S] or [S]
    window: int
    sinks: int


class NotShown(Exception):
    """Raised when the graph does not show that a mask has a known form; the text is the reason."""


@dataclass(frozen=True)
class _Position:
    root: ir.Value
    axes: tuple[int, ...]  # mask axes (of 4) that the root's dims lie on
    offset: int


def analyse(mask: ir.Value) -> Visibility:
    """Returns the rule that ``mask`` spells out; raises NotShown with the reason otherwise.

    A position tensor of size 1 may have been broadcast: the caller compares its sizes with those of queries and keys.
    """
    reader = _Reader()
    rank = len(torch_ir.shape(mask) or [])
    if not 2 <= rank <= 4:
        raise NotShown("the mask is not [..., T, S]")
    clauses = reader.clauses(mask, tuple(range(4 - rank, 4)))
    if reader.query is None or reader.key is None:
        raise NotShown("the mask does not compare key positions with query positions")
    window = sinks = 0
    seen_causal = False
    seen_lower = _is_never_negative(reader.key)
    for clause in sorted(clauses, key=lambda c: sorted(map(str, c))):  # the same reason in every run
        if any(other < clause for other in clauses):
            continue  # holds wherever the shorter one does
        atoms = {(a.subject, a.side): a.bound for a in clause}
        if len(atoms) != len(clause):
            raise NotShown("the mask repeats a bound within one alternative")
        if atoms == {(DISTANCE, "high"): 0}:
            seen_causal = True
        elif atoms.keys() == {(KEY, "low")} and atoms[KEY, "low"] == 0:
            seen_lower = True
        elif atoms.keys() == {(DISTANCE, "low")}:
            window, sinks = _once(window, 1 - atoms[DISTANCE, "low"]), 0
        elif atoms.keys() == {(DISTANCE, "low"), (KEY, "high")}:
            window, sinks = _once(window, 1 - atoms[DISTANCE, "low"]), max(0, atoms[KEY, "high"] + 1)
        else:
            raise NotShown(
                f"the mask holds a condition of another form: {' or '.join(sorted(map(str, clause)))}"
            )
    if not seen_causal:
        raise NotShown("the mask lets a token see later ones")
    if not seen_lower:
        raise NotShown("the mask does not exclude negative key positions (empty cache slots): add key >= 0")
    return Visibility(reader.query, reader.key, window, sinks)


def _once(before: int, window: int) -> int:
    if before:
        raise NotShown("the mask holds two windows")
    if window < 1:
        raise NotShown("the window is empty")
    return window


def _is_never_negative(root: ir.Value) -> bool:
    op = torch_ir.defining(root)
    if op is None or op.name not in (
        "torch.aten.arange",
        "torch.aten.arange.start",
        "torch.aten.arange.start_step",
    ):
        return False
    if op.name == "torch.aten.arange":
        return True
    start = torch_ir.constant(op.operands[0])
    step = torch_ir.constant(op.operands[2]) if op.name == "torch.aten.arange.start_step" else 1
    return start is not None and start >= 0 and step is not None and step > 0


class _Reader:
    """Walks a mask's expression; remembers the one key and the one query position tensor it may mention."""

    def __init__(self) -> None:
        self.key: ir.Value | None = None
        self.query: ir.Value | None = None

    def clauses(self, value: ir.Value, frame: tuple[int, ...]) -> set[Clause]:
        """Returns the conjunctive normal form of ``value``, whose dims lie on the axes ``frame`` of [B, 1, T, S]."""
        op = torch_ir.defining(value)
        if op is None:
            raise NotShown("the mask is an input of the model")
        frame = frame[len(frame) - len(torch_ir.shape(value) or []) :]
        if op.name in (
            "torch.aten.bitwise_and.Tensor",
            "torch.aten.logical_and",
            "torch.aten.__and__.Tensor",
        ):
            return self.clauses(op.operands[0], frame) | self.clauses(op.operands[1], frame)
        if op.name in ("torch.aten.bitwise_or.Tensor", "torch.aten.logical_or", "torch.aten.__or__.Tensor"):
            left, right = self.clauses(op.operands[0], frame), self.clauses(op.operands[1], frame)
            return {a | b for a in left for b in right}
        if op.name == "torch.aten.unsqueeze" and (axis := torch_ir.constant(op.operands[1])) is not None:
            at = int(axis) % len(frame)
            return self.clauses(op.operands[0], frame[:at] + frame[at + 1 :])
        if op.name in ("torch.aten.expand", "torch.aten.broadcast_to"):
            return self.clauses(op.operands[0], frame)
        return {frozenset({atom}) for atom in self._comparison(op, frame)}

    def _comparison(self, op: ir.Operation, frame: tuple[int, ...]) -> list[Atom]:
        kinds = {"torch.aten.ge": ">=", "torch.aten.gt": ">", "torch.aten.le": "<=", "torch.aten.lt": "<"}
        base, _, overload = op.name.rpartition(".")
        if base not in kinds or overload not in ("Scalar", "Tensor"):
            raise NotShown(f"the mask is computed with {op.name}")
        left = self._position(op.operands[0], frame)
        right = (
            self._position(op.operands[1], frame)
            if overload == "Tensor"
            else torch_ir.constant(op.operands[1])
        )
        if not isinstance(right, (int, _Position)):
            raise NotShown("a position is compared with a value that is not a constant integer")
        # left (kind) right  ->  low <= left - right  or  left - right <= high, over integers
        kind = kinds[base]
        side = "low" if kind in (">", ">=") else "high"
        bound = {">": 1, ">=": 0, "<": -1, "<=": 0}[kind]
        if not isinstance(right, _Position):
            self._note_key(left)
            return [Atom(KEY, side, bound + right - left.offset)]
        bound += right.offset - left.offset
        if self._is_key(left) and self._is_query(right):
            self._note_key(left)
            self._note_query(right)
            return [Atom(DISTANCE, side, bound)]
        if self._is_query(left) and self._is_key(right):
            self._note_key(right)
            self._note_query(left)
            return [Atom(DISTANCE, "high" if side == "low" else "low", -bound)]
        raise NotShown("a comparison is not between a key's and a query's position")

    @staticmethod
    def _is_key(position: _Position) -> bool:
        return position.axes[-1] == 3

    @staticmethod
    def _is_query(position: _Position) -> bool:
        return position.axes[-1] == 2

    def _note_key(self, position: _Position) -> None:
        if not self._is_key(position):
            raise NotShown("a query's position is compared with a constant")
        if self.key is not None and self.key != position.root:
            raise NotShown("the mask mentions two different key positions")
        self.key = position.root

    def _note_query(self, position: _Position) -> None:
        if self.query is not None and self.query != position.root:
            raise NotShown("the mask mentions two different query positions")
        self.query = position.root

    def _position(self, value: ir.Value, frame: tuple[int, ...]) -> _Position:
        """Returns ``value`` as root tensor plus constant, with the axes (of [B, 1, T, S]) that the root lies on."""
        sizes = torch_ir.shape(value)
        if sizes is None or torch_ir.element_type(value) != "si64":
            raise NotShown("a position is not an int64 tensor")
        axes = list(frame[len(frame) - len(sizes) :])
        offset = 0
        while True:
            op = torch_ir.defining(value)
            if op is not None and op.name in ("torch.aten.add.Scalar", "torch.aten.sub.Scalar"):
                number, alpha = torch_ir.constant(op.operands[1]), torch_ir.constant(op.operands[2])
                if not isinstance(number, int) or alpha != 1:
                    break
                offset += number if op.name.endswith("add.Scalar") else -number
                value = op.operands[0]
            elif op is not None and op.name == "torch.aten.unsqueeze":
                axis = torch_ir.constant(op.operands[1])
                if axis is None:
                    break
                del axes[int(axis) % len(axes)]
                value = op.operands[0]
            else:
                break
        if not axes or (len(axes) == 2 and axes[0] != 0) or len(axes) > 2 or axes[-1] not in (2, 3):
            raise NotShown("a position does not lie along the query or the key axis")
        return _Position(value, tuple(axes), offset)
