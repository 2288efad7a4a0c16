"""Sums of products as one new value of a loop's body, where the normal form has room for one product only."""

from __future__ import annotations

from collections.abc import Sequence

from spikingbrain.passes.recurrence.form import Loop
from spikingbrain.passes.recurrence.graph import Slot, Value
from spikingbrain.passes.recurrence.terms import Axis, Part, Piece


def summed(loop: Loop, parts: Sequence[Part], sizes: dict[Axis, int], dtype: str) -> Part:
    """Returns the sum as a single part; its value is appended to the body of the loop when it takes more than one."""
    if not parts:
        return Part(0.0)
    if len(parts) == 1:
        return parts[0]
    maker = _Maker(loop, dtype)
    held = {a for p in parts for a in p.held()}
    order = sorted(held, key=lambda a: (isinstance(a, str), a))
    total: Value | None = None
    number = 0.0
    for part in parts:
        if not part.pieces:
            number += part.scalar
            continue
        made = maker.product(part, order, sizes)
        total = made if total is None else maker.both("add", total, made)
    if total is None:
        return Part(number)
    if number:
        total = maker.make("add", [total], (Slot(0), number), total.shape)
    return Part(1.0, (Piece(total, tuple(a if sizes[a] != 1 else None for a in order)),))


class _Maker:
    def __init__(self, loop: Loop, dtype: str) -> None:
        self.loop, self.dtype = loop, dtype

    def make(
        self, op: str, inputs: list[Value], literals: tuple[object, ...], shape: tuple[int, ...] | None
    ) -> Value:
        v = Value(op, inputs, literals, shape, self.dtype, (), len(self.loop.body))
        self.loop.body.append(v)
        return v

    def both(self, op: str, x: Value, y: Value) -> Value:
        assert x.shape is not None and y.shape is not None
        shape = tuple(max(a, b) for a, b in zip(x.shape, y.shape, strict=True))
        return self.make(op, [x, y], (Slot(0), Slot(1)), shape)

    def product(self, part: Part, order: Sequence[Axis], sizes: dict[Axis, int]) -> Value:
        total: Value | None = None
        for piece in part.pieces:
            x = self.aligned(piece, order)
            if total is None and piece.power < 0:
                total = self.make("full", [], (x.shape, 1.0), x.shape)
            total = x if total is None else self.both("mul" if piece.power > 0 else "div", total, x)
        assert total is not None
        if part.scalar != 1:
            total = self.make("mul", [total], (Slot(0), part.scalar), total.shape)
        return total

    def aligned(self, piece: Piece, order: Sequence[Axis]) -> Value:
        """Returns the factor with one axis for each of ``order``."""
        x = piece.value
        if x.dtype != self.dtype:
            x = self.make("cast", [x], (Slot(0),), x.shape)
        assert x.shape is not None
        gone = tuple(i for i, a in enumerate(piece.axes) if a is None)
        if gone:
            x = self.make(
                "squeeze", [x], (Slot(0), gone), tuple(s for i, s in enumerate(x.shape) if i not in gone)
            )
        held = [a for a in piece.axes if a is not None]
        wanted = [a for a in order if a in held]
        assert x.shape is not None
        if wanted != held:
            turn = tuple(held.index(a) for a in wanted)
            x = self.make("permute", [x], (Slot(0), turn), tuple(x.shape[d] for d in turn))
        for i, a in enumerate(order):
            if a not in held:
                assert x.shape is not None
                x = self.make("unsqueeze", [x], (Slot(0), i), (*x.shape[:i], 1, *x.shape[i:]))
        return x
