"""What the schedules of attention share: which keys a query sees, and scores as exponents of 2."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes.kernels import bodies
from spikingbrain.passes.kernels.attention_bounds import LARGEST, SMALLEST, count_below
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
    mul,
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
    from spikingbrain.passes.kernels.attention import Problem, Schedule

SCRATCH_BYTES = 32 << 10  # IREE allows a dispatch 32 KB of stack unless told otherwise

MASKED = -3.0e38  # score of a key that is not visible
FLOOR = -1.0e30  # first value of the running maximum; exp2(MASKED - FLOOR) is exactly 0


@dataclass(frozen=True)
class Segment:
    """Keys ``[B, S, Hk, D]`` with their values and positions ``[B, S]``: tensors of an op, or memory of a kernel.

    Attributes:
        key_scales: of keys that are codes, what a code of 1 is worth, ``[B, S, Hk]``; values likewise.
        bounds: the table of ``attention_bounds``, where long segments have one.
    """

    keys: ir.Value
    values: ir.Value
    positions: ir.Value
    key_scales: ir.Value | None = None
    value_scales: ir.Value | None = None
    bounds: ir.Value | None = None

    @property
    def parts(self) -> list[ir.Value]:
        """Returns what there is of the segment, in order."""
        return [part for part in self._all() if part is not None]

    def like(self, parts: Iterator[ir.Value]) -> Segment:
        """Returns a segment with the same parts, taken from ``parts``."""
        return Segment(*(part if part is None else next(parts) for part in self._all()))

    def _all(self) -> list[ir.Value | None]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True)
class Span:
    """The keys of a block that some query of a range of positions may see.

    Attributes:
        begin: the first of them, counted from the start of the block.
        end: one past the last; 0 (and ``begin`` the size of the block) where there is none.
    """

    begin: ir.Value
    end: ir.Value


@dataclass(frozen=True)
class Block:
    """A block of keys in a kernel: where it starts, which part is visible, and whether to all queries."""

    segment: Segment
    start: ir.Value
    span: Span
    whole: ir.Value

    @property
    def last_key(self) -> ir.Value:
        return sub(size(self.segment.keys, 1), 1)


def is_narrow(memory: ir.Value) -> bool:
    """Tells whether memory holds halves or codes, which are computed with as f32."""
    return not isinstance(ir.MemRefType(memory.type).element_type, ir.F32Type)


def widened(value: ir.Value) -> ir.Value:
    """Returns a vector of f32, halves or signed codes as f32."""
    kind = ir.VectorType(value.type)
    if isinstance(kind.element_type, ir.IntegerType):
        return arith.sitofp(ir.VectorType.get(kind.shape, ir.F32Type.get()), value)
    return bodies.widened(value)


class AttentionKernel:
    """The body of one kernel function; emits at the current insertion point."""

    batch: ir.Value  # entry of the batch that the workgroup takes; a schedule sets it

    def __init__(
        self,
        problem: Problem,
        schedule: Schedule,
        arguments: Sequence[ir.Value],
        segments: Sequence[Segment],
    ):
        self.problem, self.schedule = problem, schedule
        self.workgroup = arguments[:3]
        self.query, self.query_positions, *rest, self.out = arguments[3:]
        parts = iter(rest)
        self.segments = [segment.like(parts) for segment in segments]

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

    def span(self, positions: ir.Value, block: int, first: ir.Value, last: ir.Value) -> Span:
        """Returns which keys of a block some query between positions ``first`` and ``last`` may see."""
        lanes = self.schedule.lanes
        low, high = splat(first, lanes), splat(last, lanes)
        begins, ends = [], []
        for i in range(0, block, lanes):
            some = self.visible(load(positions, [i], lanes), high, low)
            order = lane_numbers(lanes, i)
            begins.append(arith.select(some, order, splat(block, lanes)))
            ends.append(arith.select(some, order, splat(-1, lanes)))
        begin = reduced("minsi", folded(arith.minsi, begins))
        end = arith.addi(reduced("maxsi", folded(arith.maxsi, ends)), i32(1))
        return Span(*(arith.index_cast(ir.IndexType.get(), i) for i in (begin, end)))

    def all_visible(self, positions: ir.Value, block: int, first: ir.Value, last: ir.Value) -> ir.Value:
        """Tells whether every query between positions ``first`` and ``last`` sees the whole block."""
        lanes = self.schedule.lanes
        low, high = splat(first, lanes), splat(last, lanes)
        parts = [self.visible(load(positions, [i], lanes), low, high) for i in range(0, block, lanes)]
        return reduced("and", folded(arith.andi, parts))

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

        def visit(segment: Segment, start: ir.Value) -> None:
            count = minimum(sub(size(segment.keys, 1), start), block)
            self.read_positions(segment.positions, start, count, block, positions)
            span = self.span(positions, block, first, last)

            def found() -> None:
                body(Block(segment, start, span, self.all_visible(positions, block, first, last)))

            when(compare("slt", span.begin, span.end), found)

        for segment in self.segments:
            if segment.bounds is None:
                loop(0, size(segment.keys, 1), block, functools.partial(visit, segment))
            else:
                self._within_bounds(segment.bounds, block, first, last, functools.partial(visit, segment))

    def _within_bounds(
        self,
        bounds: ir.Value,
        block: int,
        first: ir.Value,
        last: ir.Value,
        visit: Callable[[ir.Value], None],
    ) -> None:
        """Visits the blocks that may hold sinks, then those that may hold keys within the window."""
        window, sinks = self.problem.window, self.problem.sinks
        end = count_below(bounds, self.batch, SMALLEST, arith.addi(last, i32(1)))
        begin = old = index(0)
        if window:
            begin = count_below(bounds, self.batch, LARGEST, arith.subi(first, i32(window - 1)))
            begin = minimum(begin, end)
            if sinks:
                old = minimum(count_below(bounds, self.batch, SMALLEST, i32(sinks)), begin)
        skipped = sub(begin, old)

        def at(number: ir.Value) -> None:
            behind = arith.select(compare("slt", number, old), index(0), skipped)
            visit(mul(add(number, behind), block))

        loop(0, sub(end, skipped), 1, at)
