"""Chains of writes into one tensor (``o[:, t] = y``), seen as one tensor put together from its pieces.

Tracing makes of each write a new tensor: ``select_scatter(o, y, dim, t)``. A chain of T of them is T tensors of T entries;
here it is a table from place to piece that all of them share, each with the version at which it reads it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Protocol

from spikingbrain.passes.recurrence.graph import Slot, Value

FEWEST = (
    4  # a tensor that is only partly written is put together from pieces when this many and half of it are
)


class Maker(Protocol):
    """Makes normal forms (``normalise.py``)."""

    def settled(self, source: Source) -> Value: ...
    def select(self, x: Value, dim: int, index: int) -> Value: ...
    def slice(self, x: Value, dim: int, start: int, end: int, step: int = 1) -> Value: ...
    def stack(self, parts: list[Value], dim: int) -> Value: ...
    def finish(self, parts: list[Value], dim: int) -> Value: ...
    def cast(self, x: Value, dtype: str) -> Value: ...
    def make(
        self,
        op: str,
        inputs: list[Value],
        literals: tuple[object, ...],
        shape: tuple[int, ...] | None,
        dtype: str,
    ) -> Value: ...


@dataclass(eq=False)
class Writes:
    """What was written where along ``dim`` of ``base``; width 0: one entry without the dim, else windows of that width."""

    base: Value
    dim: int
    width: int
    size: int
    log: dict[int, list[tuple[int, Source]]] = field(default_factory=dict)
    places: list[tuple[int, Source]] = field(default_factory=list)
    written: dict[int, Value] = field(default_factory=dict)
    covered: list[int] = field(default_factory=lambda: [0])

    def at(self, start: int, version: int) -> Source | None:
        found = self.log.get(start, [])
        k = bisect_right([n for n, _ in found], version)
        return found[k - 1][1] if k else None

    def settle(self, version: int, last: bool, maker: Maker) -> Value:
        """Returns the tensor at a version: from its pieces when it is the chain's end and mostly written, else write by write."""
        done = self.covered[version]
        if last and (done == self.size or (version >= FEWEST and 2 * done >= self.size)):
            return self._from_pieces(version, maker)
        known = max((n for n in self.written if n <= version), default=0)
        x = self.written.get(known, self.base)
        for number in range(known, version):
            start, piece = self.places[number]
            y = maker.settled(piece)
            if self.width:
                end = start + self.extent(y)
                x = maker.make(
                    "slice_scatter", [x, y], (Slot(0), Slot(1), self.dim, start, end), x.shape, x.dtype
                )
            else:
                x = maker.make(
                    "select_scatter", [x, y], (Slot(0), Slot(1), self.dim, start), x.shape, x.dtype
                )
        self.written = {version: x}
        return x

    def extent(self, piece: Value) -> int:
        assert piece.shape is not None
        return piece.shape[self.dim] if self.width else 1

    def _from_pieces(self, version: int, maker: Maker) -> Value:
        parts: list[Value] = []
        start = 0
        while start < self.size:
            written = self.at(start, version)
            if written is not None:
                parts.append(maker.cast(maker.settled(written), self.base.dtype))
                start += self.extent(parts[-1])
            elif self.width:
                end = min((p for p in self.log if p > start), default=self.size)
                parts.append(maker.slice(self.base, self.dim, start, end))
                start = end
            else:
                parts.append(maker.select(self.base, self.dim, start))
                start += 1
        return maker.finish(parts, self.dim) if self.width else maker.stack(parts, self.dim)


@dataclass(eq=False)
class Pending:
    """The tensor after the first ``version`` writes; ``last``: nothing writes further. ``found``: what it came to, once asked."""

    writes: Writes
    version: int
    last: bool
    found: Value | None = None

    def accepts(self, dim: int, start: int, width: int) -> bool:
        """Whether one more write of that form keeps the table simple: same dim, windows on one grid."""
        w = self.writes
        if w.dim != dim or len(w.places) != self.version or bool(w.width) != bool(width):
            return False
        whole = width == w.width or start + width == w.size
        return not width or (start % w.width == 0 and width <= w.width and whole)

    def extend(self, start: int, piece: Source, last: bool) -> Pending:
        w = self.writes
        new = start not in w.log
        w.places.append((start, piece))
        w.log.setdefault(start, []).append((self.version + 1, piece))
        size = min(w.width, w.size - start) if w.width else 1
        w.covered.append(w.covered[-1] + size * new)
        return Pending(w, self.version + 1, last)

    def read(self, dim: int, start: int, width: int, rewrites: bool, maker: Maker) -> Source | None:
        """Returns what an entry or window holds while the chain is unfinished; None when it must be read from the whole.

        Unfinished: not all is written, or what was written last is read only to write a part of it anew (``rewrites``).
        """
        w = self.writes
        again = rewrites and self.version > 0 and w.places[self.version - 1][0] == start
        complete = w.covered[self.version] == w.size and not again
        if w.dim != dim or complete or bool(width) != bool(w.width):
            return None
        if not width:
            written = w.at(start, self.version)
            return written if written is not None else maker.select(w.base, dim, start)
        if start % w.width or width != min(w.width, w.size - start):
            return None
        written = w.at(start, self.version)
        return written if written is not None else maker.slice(w.base, dim, start, start + width)


Source = Value | Pending
