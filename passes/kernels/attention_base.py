"""What the schedules of attention share: which keys a query sees, and scores as exponents of 2."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes.kernels.builders import (
    Index,
    add,
    compare,
    exp2,
    f32,
    folded,
    get,
    greater,
    i32,
    i32_type,
    index,
    lane_numbers,
    load,
    loop,
    minimum,
    multiply_add,
    put,
    reduced,
    size,
    splat,
    store,
    sub,
    when,
)

if TYPE_CHECKING:
    from spikingbrain.passes.kernels.attention import Schedule, _Problem

SCRATCH_BYTES = 32 << 10  # IREE allows a dispatch 32 KB of stack unless told otherwise

MAX_POSITION = 2**31 - 1
MASKED = -3.0e38  # score of a key that is not visible
FLOOR = -1.0e30  # first value of the running maximum; exp2(MASKED - FLOOR) is exactly 0


@dataclass(frozen=True)
class Block:
    """A block of keys in a kernel: where it starts, which part is visible, and whether to all queries."""

    keys: ir.Value
    values: ir.Value
    start: ir.Value
    begin: ir.Value  # first key that is visible to some query, from the block's start
    end: ir.Value  # one past the last
    whole: ir.Value

    @property
    def last_key(self) -> ir.Value:
        return sub(size(self.keys, 1), 1)


class AttentionKernel:
    """The body of one kernel function; emits at the current insertion point."""

    batch: ir.Value  # entry of the batch that the workgroup takes; a schedule sets it

    def __init__(self, problem: _Problem, schedule: Schedule, arguments: Sequence[ir.Value]):
        self.problem, self.schedule = problem, schedule
        self.workgroup = arguments[:3]
        self.query, self.query_positions, *rest, self.out = arguments[3:]
        segments = [rest[i : i + 3] for i in range(0, len(rest), 3)]
        # The cache holds the older tokens: visiting it first changes the running maximum less often.
        self.segments = segments[::-1]

    def build(self) -> None:
        """Emits the body."""
        raise NotImplementedError

    # Arithmetic

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return multiply_add(a, b, c, self.schedule.fused)

    def exp2(self, x: ir.Value) -> ir.Value:
        return exp2(x, self.schedule.fused)

    def score_scale(self) -> float:
        return self.problem.scale * math.log2(math.e)  # scores are kept as exponents of 2

    def inverse(self, total: ir.Value) -> ir.Value:
        """Returns 1 / total, and 0 for the total of a query that saw no key."""
        return arith.select(greater(total, f32(0.0)), arith.divf(f32(1.0), total), f32(0.0))

    # Positions and visibility

    def position(self, source: ir.Value, at: Sequence[Index]) -> ir.Value:
        return arith.trunci(i32_type(), get(source, at))

    def read_positions(
        self, source: ir.Value, start: ir.Value, count: ir.Value, block: int, scratch: ir.Value
    ) -> None:
        """Copies a block of key positions to scratch, -1 beyond ``count``."""
        lanes = self.schedule.lanes
        narrow = ir.VectorType.get([lanes], i32_type())

        def whole() -> None:
            for i in range(0, block, lanes):
                wide = load(source, [self.batch, add(start, i)], lanes)
                store(arith.trunci(narrow, wide), scratch, [i])

        def part() -> None:
            def copy(i: ir.Value) -> None:
                put(self.position(source, [self.batch, add(start, i)]), scratch, [i])

            for i in range(0, block, lanes):
                store(splat(-1, lanes), scratch, [i])
            loop(0, count, 1, copy)

        when(compare("eq", count, index(block)), whole, part)

    def visible(self, key: ir.Value, upper: ir.Value, lower: ir.Value) -> ir.Value:
        """Returns the lanes where 0 <= key <= upper and key > lower - window, sinks included; vectors of i32.

        With both bounds the position of one query, that is the rule; with the bounds of several queries it
        tells which keys all of them see, or some may see.
        """
        lanes = ir.VectorType(key.type).shape[0]
        seen = arith.andi(compare("sge", key, splat(0, lanes)), compare("sle", key, upper))
        if self.problem.window:
            near = compare("sgt", key, arith.subi(lower, splat(self.problem.window, lanes)))
            if self.problem.sinks:
                near = arith.ori(near, compare("slt", key, splat(self.problem.sinks, lanes)))
            seen = arith.andi(seen, near)
        return seen

    def visible_blocks(
        self,
        block: int,
        positions: ir.Value,
        first: ir.Value,
        last: ir.Value,
        body: Callable[[Block], None],
    ) -> None:
        """Visits every key block that some query between positions ``first`` and ``last`` may see.

        Emits ``body(block)`` with the positions of the block in scratch.
        """
        lanes = self.schedule.lanes

        def visit(segment: Sequence[ir.Value], start: ir.Value) -> None:
            keys, values, key_positions = segment
            count = minimum(sub(size(keys, 1), start), block)
            self.read_positions(key_positions, start, count, block, positions)
            low, high = splat(first, lanes), splat(last, lanes)
            parts = [load(positions, [i], lanes) for i in range(0, block, lanes)]
            some = [self.visible(part, high, low) for part in parts]

            def found() -> None:
                order = [lane_numbers(lanes, i) for i in range(0, block, lanes)]
                begins = [arith.select(m, n, splat(block, lanes)) for m, n in zip(some, order, strict=True)]
                ends = [arith.select(m, n, splat(-1, lanes)) for m, n in zip(some, order, strict=True)]
                begin = reduced("minsi", folded(arith.minsi, begins))
                end = arith.addi(reduced("maxsi", folded(arith.maxsi, ends)), i32(1))
                whole = folded(arith.andi, [self.visible(part, low, high) for part in parts])
                index_type = ir.IndexType.get()
                body(
                    Block(
                        keys,
                        values,
                        start,
                        arith.index_cast(index_type, begin),
                        arith.index_cast(index_type, end),
                        reduced("and", whole),
                    )
                )

            when(reduced("or", folded(arith.ori, some)), found)

        for segment in self.segments:
            loop(0, size(segment[0], 1), block, functools.partial(visit, segment))
