"""Exponents that are sums of gates over spans of time, computed exactly.

An exponent such as ``cumsum(g)[i] - cumsum(g)[j]`` is linear in the gates g: it is built by running sums, differences, slices and
masks. Which linear function it is shows when whole numbers take the gates' place: the sums are then exact, and two linear
functions that agree at numbers drawn from 2^40 are the same, but for a chance of 2^-40. Axes that no op looks along (batch,
heads) keep size 1. ``-inf`` is kept as a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikingbrain.passes.recurrence.constants import Constants
from spikingbrain.passes.recurrence.graph import Value, argument

Array = NDArray[Any]
PADS = {"pad", "constant_pad_nd"}
_MOVES = {"unsqueeze", "squeeze", "permute", "expand", "view", "slice", "select"}
_LINEAR = _MOVES | PADS | {"cumsum", "masked_fill", "tril", "triu", "neg", "sub", "add"}
LARGEST = 1 << 24  # entries of a table


class NoSpan(Exception):
    """Raised for an exponent that is not such a sum, or is too large to tell."""


class _LookedAlong(Exception):
    def __init__(self, dim: int) -> None:
        self.dim = dim


@dataclass(frozen=True)
class Table:
    """``exp(numbers)`` where ``keep``, else 0; ``names[d]`` is the axis of the gates that axis d is, if none looked along it."""

    numbers: Array
    keep: Array
    names: tuple[int | None, ...]


def padding_of(v: Value) -> list[tuple[int, int]] | None:
    """Returns how many zeros a padding adds before and behind, for each axis; None for what is no padding with zeros."""
    widths = argument(v, 1, "pad", None)
    fill = argument(v, 2 if v.op == "constant_pad_nd" else 3, "value", None)
    mode = argument(v, 2, "mode", "constant") if v.op == "pad" else "constant"
    if v.op not in PADS or v.shape is None or not isinstance(widths, tuple) or fill or mode != "constant":
        return None
    if len(widths) % 2 or not all(isinstance(w, int) and w >= 0 for w in widths):
        return None
    pairs = list(zip(widths[::2], widths[1::2], strict=True))[::-1]
    return [(0, 0)] * (len(v.shape) - len(pairs)) + pairs


def gates_of(exponent: Value) -> set[Value]:
    """Returns the values that an exponent is a linear function of."""
    found, todo = set(), [exponent]
    while todo:
        v = todo.pop()
        if _goes_on(v):
            todo += v.inputs[:1] if v.op == "masked_fill" else v.inputs
        else:
            found.add(v)
    return found


def _goes_on(v: Value) -> bool:
    if v.op == "view":
        return [s for s in v.inputs[0].shape or () if s != 1] == [s for s in v.shape or () if s != 1]
    if v.op == "mul":
        return _whole_number(v) is not None
    if v.op in PADS:  # zeros behind the last step belong to the gates
        return any(before for before, _ in padding_of(v) or ())
    return v.op in _LINEAR


def _whole_number(v: Value) -> int | None:
    """Returns the number that a value is multiplied by, if it is a small whole one."""
    found = [x for x in v.literals[:2] if isinstance(x, (int, float))]
    return int(found[0]) if len(v.inputs) == len(found) == 1 and found[0] in range(-64, 65) else None


class Spans:
    """Computes exponents for one choice of ``gates``; ``numbers`` stand for these, of size 1 along axes not looked along."""

    def __init__(self, gates: Value | None, constants: Constants) -> None:
        self.gates, self.constants = gates, constants
        shape = (gates.shape if gates is not None else None) or ()
        self.untouched = {d for d, size in enumerate(shape) if size != 1}
        self.shape = shape
        self._restart()

    def _restart(self) -> None:
        shape = [1 if d in self.untouched else s for d, s in enumerate(self.shape)]
        if np.prod(shape, dtype=float) > LARGEST:
            raise NoSpan("too many gates")
        self.numbers = np.random.default_rng(7).integers(1, 1 << 40, size=shape)

    def tables(self, exponents: Sequence[Value]) -> dict[Value, Table]:
        """Returns the table of each exponent; raises ``NoSpan``."""
        while True:
            try:
                known: dict[Value, Table] = {}
                for v in exponents:
                    self._compute(v, known)
                return known
            except _LookedAlong as axis:
                self.untouched.discard(axis.dim)
                self._restart()

    def _compute(self, v: Value, known: dict[Value, Table]) -> Table:
        if v not in known:
            if v is self.gates:
                names = tuple(d if d in self.untouched else None for d in range(len(self.shape)))
                known[v] = Table(self.numbers, np.ones_like(self.numbers, dtype=bool), names)
            elif not _goes_on(v):
                raise NoSpan(f"{v.op} of the gates")
            else:
                inputs = v.inputs[:1] if v.op == "masked_fill" else v.inputs
                known[v] = self._apply(v, [self._compute(x, known) for x in inputs])
        return known[v]

    def _apply(self, v: Value, tables: Sequence[Table]) -> Table:
        x, shape = tables[0], v.shape or ()
        if v.op in _MOVES:
            return self._moved(v, x)
        if v.op == "cumsum":
            dim = argument(v, 1, "dim", 0) % len(shape)
            x = self._whole(x, [dim], v.inputs[0])
            self._finite(x, v)
            return Table(x.numbers.cumsum(dim), np.ones_like(x.keep), x.names)
        if v.op in PADS:
            widths = padding_of(v)
            assert widths is not None
            x = self._whole(x, [d for d, w in enumerate(widths) if any(w)], v.inputs[0])
            self._finite(x, v)
            return Table(np.pad(x.numbers, widths), np.pad(x.keep, widths, constant_values=True), x.names)
        if v.op == "masked_fill":
            mask = self.constants(v.inputs[1]) if len(v.inputs) == 2 else None
            return self._filled(x, v, mask, v.literals[2])
        if v.op in ("tril", "triu"):
            ones = np.ones(shape[-2:])
            diagonal = argument(v, 1, "diagonal", 0)
            return self._filled(
                x, v, (np.tril(ones, diagonal) if v.op == "tril" else np.triu(ones, diagonal)) == 0, 0
            )
        if v.op in ("neg", "mul"):
            self._finite(x, v)
            times = _whole_number(v) if v.op == "mul" else -1
            return Table(x.numbers * times, x.keep, x.names)
        if len(tables) != 2 or argument(v, 2, "alpha", 1) != 1:
            raise NoSpan(f"{v.op} of a number")
        y = tables[1]
        if v.op == "sub":
            self._finite(y, v)
        return self._joined(x, y, -1 if v.op == "sub" else 1)

    def _moved(self, v: Value, x: Table) -> Table:
        shape, before = v.shape or (), v.inputs[0].shape or ()
        if v.op == "permute":
            order = v.literals[1]
            return Table(
                x.numbers.transpose(order), x.keep.transpose(order), tuple(x.names[d] for d in order)
            )
        if v.op in ("slice", "select"):
            dim = v.literals[1]
            x = self._whole(x, [dim], v.inputs[0])
            place: Any = v.literals[2] if v.op == "select" else slice(*v.literals[2:])
            index = (slice(None),) * dim + (place,)
            names = x.names[:dim] + x.names[dim + 1 :] if v.op == "select" else x.names
            return Table(x.numbers[index], x.keep[index], names)
        if v.op == "expand":
            new = len(shape) - len(before)
            sizes = (1,) * new + x.numbers.shape
            return Table(x.numbers.reshape(sizes), x.keep.reshape(sizes), (None,) * new + x.names)
        # what is left adds or drops axes of size 1
        held = [(s, n) for s, n, size in zip(x.numbers.shape, x.names, before, strict=True) if size != 1]
        kept = iter(held)
        both = [next(kept) if size != 1 else (1, None) for size in shape]
        sizes = tuple(s for s, _ in both)
        return Table(x.numbers.reshape(sizes), x.keep.reshape(sizes), tuple(n for _, n in both))

    def _filled(self, x: Table, v: Value, mask: Array | None, fill: Any) -> Table:
        if mask is None or fill not in (0, -np.inf):
            raise NoSpan("the exponents are masked by what is no constant")
        mask = np.asarray(mask, dtype=bool)
        mask = mask.reshape((1,) * (len(x.names) - mask.ndim) + mask.shape)
        x = self._whole(x, [d for d, s in enumerate(mask.shape) if s != 1], v)
        numbers, keep = np.where(mask, 0, x.numbers), x.keep | mask if fill == 0 else x.keep & ~mask
        return Table(numbers, np.broadcast_to(keep, numbers.shape), x.names)

    def _joined(self, x: Table, y: Table, sign: int) -> Table:
        rank = max(len(x.names), len(y.names))
        x, y = (
            Table(t.numbers.reshape(s), t.keep.reshape(s), (None,) * (rank - len(t.names)) + t.names)
            for t in (x, y)
            for s in [(1,) * (rank - len(t.names)) + t.numbers.shape]
        )
        names: list[int | None] = []
        for d in range(rank):
            held = {n for n in (x.names[d], y.names[d]) if n is not None}
            if len(held) > 1:
                raise NoSpan("gates of two axes meet")
            for n in held:
                if max(x.numbers.shape[d], y.numbers.shape[d]) > 1:
                    raise _LookedAlong(n)
            names.append(next(iter(held), None))
        keep = x.keep & y.keep
        return Table(self._sized(x.numbers + sign * y.numbers), keep, tuple(names))

    def _whole(self, x: Table, dims: Sequence[int], v: Value) -> Table:
        """Returns a table with the sizes of ``v`` along ``dims``."""
        for d in dims:
            named = x.names[d]
            if named is not None:
                raise _LookedAlong(named)
        sizes = list(x.numbers.shape)
        for d in dims:
            sizes[d] = (v.shape or ())[d]
        if np.prod(sizes, dtype=float) > LARGEST:
            raise NoSpan("too long a sequence")
        return Table(np.broadcast_to(x.numbers, sizes), np.broadcast_to(x.keep, sizes), x.names)

    def _sized(self, numbers: Array) -> Array:
        if numbers.size > LARGEST:
            raise NoSpan("too long a sequence")
        return numbers

    def _finite(self, x: Table, v: Value) -> None:
        if not x.keep.all():
            raise NoSpan(f"{v.op} of exponents that are masked")
