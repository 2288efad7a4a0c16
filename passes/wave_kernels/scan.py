"""The wave kernel of pointwise scans: a thread goes through time for one point of the space.

What a point carries stays in registers, so that every tensor is read or written once, in the order of the loop: results are those
of the steps one after the other, whatever the body computes. Neighbouring threads have neighbouring points of the last axis.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch_mlir import ir

from spikingbrain.passes.dialect_scans import PointwiseScan, dims
from spikingbrain.passes.kernels.bodies import inlined, is_half
from spikingbrain.passes.kernels.builders import (
    Index,
    add,
    ceil_div,
    compare,
    floor_div,
    folded,
    get,
    index,
    launch,
    loop,
    mul,
    put,
    rem,
    round_down,
    size,
    sub,
    when,
)
from spikingbrain.passes.wave_kernels.builders import WAVE, kernel, memref_of, thread

THREADS = WAVE  # of a block: small blocks spread few points over many processors
READS_AHEAD = 8  # elements that a thread waits for together: a step needs the one before, its reads do not
MOST_OPS = 256  # of the steps whose reads are together


def emit_pointwise_scan(scan: PointwiseScan) -> list[ir.Value]:
    """Emits the launch of a scan's kernel, made on first use; returns the final and the stacked values.

    Any sizes, also dynamic ones and 0, any layout and any types of the body.
    """
    inputs, results = list(scan.op.operands), [v.type for v in scan.op.results]
    sizes, maps = scan.sizes(), scan.maps
    result_maps = [*maps[: len(scan.final)], *maps[len(inputs) :]]
    new = [
        sizes[p]
        for type_, map_ in zip(results, result_maps, strict=True)
        for p, n in zip(dims(map_), ir.RankedTensorType(type_).shape, strict=True)
        if n == ir.ShapedType.get_dynamic_size() and p is not None
    ]
    types = [*(v.type for v in inputs), *results]
    text = f"{scan.body}{maps}{types}{scan.backwards}{len(scan.initial)}{len(scan.scanned)}"
    name = f"pointwise_scan_{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def body(block: list[ir.Value], memory: list[ir.Value]) -> None:
        _Point(scan, memory, add(mul(block[0], THREADS), thread())).walk()

    kernel(name, [memref_of(t) for t in types], THREADS, body)
    grid = [ceil_div(folded(mul, [index(1), *sizes[1:]]), THREADS), index(1), index(1)]
    return list(launch(name, results, grid, inputs, new, [-1] * len(results)).results)


class _Point:
    """What one thread does; ``memory`` holds the operands of the scan, then its results."""

    def __init__(self, scan: PointwiseScan, memory: Sequence[ir.Value], number: ir.Value):
        self.scan, self.number = scan, number
        operands, carried = len(scan.op.operands), len(scan.initial)
        places = [dims(m) for m in scan.maps]
        places = [*places[:operands], *places[:carried], *places[operands:]]
        self.tensors = list(zip(memory, places, strict=True))
        found = {
            p: size(m, axis) for m, place in self.tensors for axis, p in enumerate(place) if p is not None
        }
        self.steps, self.sizes = found[0], [found[d] for d in range(1, scan.rank + 1)]
        self.initial, rest = self.tensors[:carried], self.tensors[carried:operands]
        self.scanned, self.invariant = rest[: len(scan.scanned)], rest[len(scan.scanned) :]
        self.final, self.stacked = (
            self.tensors[operands : operands + carried],
            self.tensors[operands + carried :],
        )

    def walk(self) -> None:
        """Builds the loop over time, for threads that have a point."""
        points = folded(mul, [index(1), *self.sizes])
        when(compare("ult", self.number, points), self._walk)

    def _walk(self) -> None:
        self.at: list[Index] = []
        left = self.number
        for n in reversed(self.sizes):
            self.at.insert(0, rem(left, n))
            left = floor_div(left, n)
        fixed = [get(m, self._where(place)) for m, place in self.invariant]
        state = [get(m, self._where(place)) for m, place in self.initial]
        ops = len(list(self.scan.body.operations))
        together = max(1, min(READS_AHEAD // len(self.scanned), MOST_OPS // ops))
        if any(is_half(value.type) for value in state):
            together = 1  # halves are computed in f32: they are rounded where a round of the loop ends, so at every step
        done: Index = 0
        for count in dict.fromkeys([together, 1]):
            until = round_down(self.steps, count) if count > 1 else self.steps

            def some(t: ir.Value, *state: ir.Value, count: int = count) -> list[ir.Value]:
                return self._steps([add(t, u) for u in range(count)], list(state), fixed)

            state = loop(done, until, count, some, state)
            done = until
        for value, (m, place) in zip(state, self.final, strict=True):
            put(value, m, self._where(place))

    def _steps(
        self, times: Sequence[ir.Value], state: list[ir.Value], fixed: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """Builds a few steps, all that they read first; returns what the last one carries."""
        backwards = self.scan.backwards
        whens = [[sub(sub(self.steps, 1), t) if b else t for b in backwards] for t in times]
        read = [
            [get(m, self._where(place, t)) for (m, place), t in zip(self.scanned, when_, strict=False)]
            for when_ in whens
        ]
        for values, when_ in zip(read, whens, strict=True):
            made = inlined(self.scan.body, [*state, *values, *fixed], 1)
            state, written = made[: len(state)], made[len(state) :]
            stacks = zip(written, self.stacked, when_[len(values) :], strict=True)
            for value, (m, place), t in stacks:
                put(value, m, self._where(place, t))
        return state

    def _where(self, place: Sequence[int | None], time: Index = 0) -> list[Index]:
        """Returns where the point lies in a tensor."""
        return [0 if p is None else time if p == 0 else self.at[p - 1] for p in place]
