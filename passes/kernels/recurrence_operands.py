"""The operands and the output of a recurrence's kernel, which it may compute as it loads and stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith, vector

from spikingbrain.passes.dialect_fused import Part, linear
from spikingbrain.passes.kernels.bodies import inlined, is_half, spread, widened
from spikingbrain.passes.kernels.builders import Index, add, get, load, mul, prefetch


def is_computed(part: Part) -> bool:
    """Tells whether a part does more than to load an element."""
    return part.body is not None and len(part.body.operations) > 1


@dataclass(frozen=True)
class Memory:
    """A tensor in memory, read by a map from places; None: as it lies."""

    memref: ir.Value
    map: ir.AffineMap | None = None

    def load(self, place: Sequence[Index], lanes: int) -> ir.Value:
        """Returns elements from a place on, along the channels, as f32: a scalar for one lane."""
        at = self._indices(place)
        if lanes == 1 or not self.has_channels:
            return spread(widened(get(self.memref, at)), lanes)
        return widened(load(self.memref, at, lanes))

    def prefetch(self, place: Sequence[Index], write: bool = False) -> None:
        if self.has_channels:
            prefetch(self.memref, self._indices(place), write)

    @property
    def has_channels(self) -> bool:
        """Tells whether neighbours along the channels are neighbours in memory; they are one element otherwise."""
        return self.map is None or any(linear(e)[0][-1] for e in self.map.results)

    def _indices(self, place: Sequence[Index]) -> list[Index]:
        if self.map is None:
            return list(place)
        return [_applied(e, place) for e in self.map.results]


def _applied(expression: ir.AffineExpr, place: Sequence[Index]) -> Index:
    """Emits a linear form of indices."""
    factors, constant = linear(expression)
    total: Index | None = None
    for factor, i in zip(factors, [*place, 0], strict=False):
        if factor:
            term = i if factor == 1 else mul(i, factor)
            total = term if total is None else add(total, term)
    if total is None:
        return constant
    return add(total, constant) if constant else total


@dataclass(frozen=True)
class Computed:
    """A part, with the memory that it reads.

    Places are (batch, token, head or state, channel).
    """

    part: Part
    memory: Sequence[Memory]

    @property
    def is_computed(self) -> bool:
        return is_computed(self.part)

    def load(self, place: Sequence[Index], lanes: int, given: Sequence[ir.Value] = ()) -> ir.Value:
        """Returns a vector from a place on. ``given`` are the body's first arguments, vectors as well."""
        read = [m.load(place, lanes) for m in self.memory]
        if self.part.body is not None:
            before = [vector.extract(x, [], [0]) if lanes == 1 else x for x in given]
            read = inlined(self.part.body, [*before, *read], lanes, wide=True)
        (value,) = read
        return vector.broadcast(ir.VectorType.get([1], value.type), value) if lanes == 1 else value

    def get(self, place: Sequence[Index]) -> ir.Value:
        """Returns one element."""
        return vector.extract(self.load(place, 1), [], [0])

    def prefetch(self, place: Sequence[Index]) -> None:
        for memory in self.memory:
            memory.prefetch(place)


def narrowed(value: ir.Value, element: ir.Type) -> ir.Value:
    """Returns a vector of f32 as one of ``element``, f32 or a half float."""
    if not is_half(element):
        return value
    return arith.truncf(ir.VectorType.get(ir.VectorType(value.type).shape, element), value)
