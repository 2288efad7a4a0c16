"""The wave kernel of attention: tiles of 16 (token, head) rows against 64 keys at a time, online softmax, no barrier.

The query heads that share a key head are stacked: row ``t * G + g``. A wave takes a tile of rows, or of few rows one share of
the keys, and keeps queries, scores and outputs in registers. Both products are made transposed, keys by rows and channels by
rows: a lane then holds four scores, and four channels, of one row; what leaves the first product enters the second
as it is, and scaling a row needs no other lane. Steps of keys that no row of the tile sees are passed by; in long segments a
table of bounds tells where to look.
"""

from __future__ import annotations

import functools
import math as numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch_mlir import ir
from torch_mlir.dialects import arith, math, vector

from spikingbrain.passes.kernels.attention_base import FLOOR, MASKED, Segment
from spikingbrain.passes.kernels.attention_bounds import LARGEST, MAX_POSITION, SMALLEST
from spikingbrain.passes.kernels.builders import (
    Index,
    add,
    ceil_div,
    compare,
    f32,
    floor_div,
    get,
    i32,
    i32_type,
    index,
    larger,
    load,
    loop,
    minimum,
    mul,
    put,
    rem,
    size,
    store,
    sub,
    when,
)
from spikingbrain.passes.wave_kernels.attention_bounds import count_below
from spikingbrain.passes.wave_kernels.builders import (
    TILE,
    WAVE,
    any_lane,
    choose,
    element_at,
    matrix_multiply,
    matrix_zero,
    over_lanes,
    registers,
    thread,
)

if TYPE_CHECKING:
    from spikingbrain.passes.kernels.attention import Problem

KEYS = 64  # of a step: outputs are scaled once per step
QUARTER = 4  # lanes that share a row, and the numbers of a tile that each holds


@dataclass(frozen=True)
class Schedule:
    """How one attention op is spread over waves.

    Attributes:
        waves: of a block; they do not meet.
        shares: waves that share the keys of a tile; what they found is combined by another launch where there are several.
    """

    waves: int
    shares: int


@dataclass(frozen=True)
class Row:
    """The row of a lane: its place in the query, its position, and whether there is such a row."""

    place: list[Index]
    position: ir.Value
    inside: ir.Value


class Tiles:
    """The body of the kernel; emits at the current insertion point.

    ``results`` are the output [B, T, H, D]; or, with several shares, sums [B, Hk, shares, rows, D] that are not divided yet,
    and [B, Hk, shares, rows, 2] with the largest score and the sum of weights.
    """

    def __init__(
        self,
        problem: Problem,
        schedule: Schedule,
        workgroup: Sequence[ir.Value],
        query: ir.Value,
        positions: ir.Value,
        segments: Sequence[Segment],
        results: Sequence[ir.Value],
    ):
        self.problem, self.schedule, self.segments, self.results = problem, schedule, segments, results
        self.query, self.positions = query, positions
        block, self.key_head, self.batch = workgroup
        self.thread = thread()
        self.lane = rem(self.thread, WAVE)
        self.column, self.four = rem(self.lane, TILE), mul(floor_div(self.lane, TILE), QUARTER)
        unit = add(mul(block, schedule.waves), floor_div(self.thread, WAVE))
        self.share, tile = rem(unit, schedule.shares), floor_div(unit, schedule.shares)
        self.tiles = -(-problem.head_size // TILE)  # of channels
        kind = ir.F32Type.get()
        self.q, self.out = (registers(self.tiles * QUARTER, kind) for _ in range(2))
        self.scores = registers(KEYS // TILE * QUARTER, kind)
        self.number = add(mul(tile, TILE), self.column)  # of the row, in the key head
        self.row = self._row()

    def build(self) -> None:
        """Emits the body."""

        def start(tile: ir.Value) -> None:
            four = self._four(self.query, self.row.place, tile)
            for i in range(QUARTER):
                put(four[i], self.q, [add(mul(tile, QUARTER), i)])
                put(f32(0.0), self.out, [add(mul(tile, QUARTER), i)])

        loop(0, self.tiles, 1, start)
        held = arith.select(compare("slt", self.row.position, i32(0)), i32(MAX_POSITION), self.row.position)
        first = over_lanes(arith.minsi, held, TILE)
        last = over_lanes(arith.maxsi, self.row.position, TILE)
        found = [f32(FLOOR), f32(0.0)]
        for segment in self.segments:
            found = self._visit(segment, first, last, found)
        largest, total = found
        total = over_lanes(arith.addf, total, QUARTER, TILE)
        if self.schedule.shares > 1:
            self._write_share(largest, total)
        else:
            some = arith.cmpf(arith.CmpFPredicate.OGT, total, f32(0.0))
            inverse = arith.select(some, arith.divf(f32(1.0), total), f32(0.0))
            self._write(self.results[0], self.row.place, inverse)

    def _row(self) -> Row:
        p = self.problem
        time = size(self.query, 1)
        token, head = floor_div(self.number, p.group), rem(self.number, p.group)
        inside = compare("slt", token, time)
        token = minimum(token, sub(time, 1))
        position = arith.select(inside, self._position(self.positions, token), i32(-1))
        return Row([self.batch, token, add(mul(self.key_head, p.group), head)], position, inside)

    # Keys

    def _visit(
        self, segment: Segment, first: ir.Value, last: ir.Value, found: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """Returns the largest score so far, and the lane's part of the sum of weights, after a segment of keys."""
        count = size(segment.keys, 1)

        end, (old, skipped) = ceil_div(count, KEYS), (index(0), index(0))
        if segment.bounds is not None:
            end, old, skipped = self._within_bounds(segment.bounds, first, last)

        def step(n: ir.Value, *found: ir.Value) -> list[ir.Value]:
            start = mul(add(n, arith.select(compare("slt", n, old), index(0), skipped)), KEYS)
            position = self._key_position(segment, add(start, self.lane), count)
            seen = any_lane(self._visible(position, last, first))
            return choose(seen, lambda: self._step(segment, start, count, found), found)

        return loop(self.share, end, self.schedule.shares, step, found)

    def _within_bounds(
        self, bounds: ir.Value, first: ir.Value, last: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Returns how many steps may hold keys that are seen, how many of these hold sinks, and how many lie between."""
        window, sinks = self.problem.window, self.problem.sinks
        end = count_below(bounds, self.batch, SMALLEST, arith.addi(last, i32(1)))
        begin = old = index(0)
        if window:
            begin = minimum(count_below(bounds, self.batch, LARGEST, arith.subi(first, i32(window - 1))), end)
            if sinks:
                old = minimum(count_below(bounds, self.batch, SMALLEST, i32(sinks)), begin)
        skipped = sub(begin, old)
        return sub(end, skipped), old, skipped

    def _step(
        self, segment: Segment, start: ir.Value, count: ir.Value, found: Sequence[ir.Value]
    ) -> list[ir.Value]:
        largest, total = found

        def score(tile: ir.Value, highest: ir.Value) -> list[ir.Value]:
            sums = self._products(
                segment, minimum(add(add(start, mul(tile, TILE)), self.column), sub(count, 1))
            )
            for i in range(QUARTER):
                key = add(start, add(mul(tile, TILE), add(self.four, i)))
                value = arith.mulf(element_at(sums, i), f32(self.problem.scale * numbers.log2(numbers.e)))
                if segment.key_scales is not None:
                    value = arith.mulf(value, self._scale(segment.key_scales, key, count))
                seen = self._visible(
                    self._key_position(segment, key, count), self.row.position, self.row.position
                )
                value = arith.select(seen, value, f32(MASKED))
                put(value, self.scores, [add(mul(tile, QUARTER), i)])
                highest = larger(value, highest)
            return [highest]

        (highest,) = loop(0, KEYS // TILE, 1, score, [largest])
        highest = over_lanes(larger, highest, QUARTER, TILE)
        change = math.exp2(arith.subf(largest, highest))

        def weigh(tile: ir.Value, total: ir.Value) -> list[ir.Value]:
            for i in range(QUARTER):
                at = [add(mul(tile, QUARTER), i)]
                weight = math.exp2(arith.subf(get(self.scores, at), highest))
                total = arith.addf(total, weight)
                if segment.value_scales is not None:
                    key = add(start, add(mul(tile, TILE), add(self.four, i)))
                    weight = arith.mulf(weight, self._scale(segment.value_scales, key, count))
                put(weight, self.scores, at)
            return [total]

        (total,) = loop(0, KEYS // TILE, 1, weigh, [arith.mulf(total, change)])
        loop(0, self.tiles, 1, lambda tile: self._add_values(segment, start, count, tile, change))
        return [highest, total]

    def _products(self, segment: Segment, key: ir.Value) -> ir.Value:
        """Returns the products of 16 keys, of which ``key`` is the lane's, with the rows."""

        def multiply(tile: ir.Value, sums: ir.Value) -> list[ir.Value]:
            four = self._four(segment.keys, [self.batch, key, self.key_head], tile)
            for i in range(QUARTER):
                sums = matrix_multiply("f32", four[i], get(self.q, [add(mul(tile, QUARTER), i)]), sums)
            return [sums]

        return loop(0, self.tiles, 1, multiply, [matrix_zero()])[0]

    def _add_values(
        self, segment: Segment, start: ir.Value, count: ir.Value, tile: ir.Value, change: ir.Value
    ) -> None:
        """Scales a tile of channels of the outputs, and adds the weighed values of a step."""
        places = [[add(mul(tile, QUARTER), i)] for i in range(QUARTER)]
        channel = add(mul(tile, TILE), self.column)
        safe = minimum(channel, self.problem.head_size - 1)

        def multiply(part: ir.Value, sums: ir.Value) -> list[ir.Value]:
            for i in range(QUARTER):
                key = minimum(add(start, add(mul(part, TILE), add(self.four, i))), sub(count, 1))
                value = widened(get(segment.values, [self.batch, key, self.key_head, safe]))
                sums = matrix_multiply("f32", value, get(self.scores, [add(mul(part, QUARTER), i)]), sums)
            return [sums]

        sums = [arith.mulf(get(self.out, place), change) for place in places]
        (made,) = loop(0, KEYS // TILE, 1, multiply, [vector.from_elements(matrix_zero().type, sums)])
        for i, place in enumerate(places):
            put(element_at(made, i), self.out, place)

    def _scale(self, scales: ir.Value, key: ir.Value, count: ir.Value) -> ir.Value:
        return get(scales, [self.batch, minimum(key, sub(count, 1)), self.key_head])

    # Positions

    def _position(self, source: ir.Value, at: Index) -> ir.Value:
        return arith.trunci(i32_type(), get(source, [self.batch, at]))

    def _key_position(self, segment: Segment, key: ir.Value, count: ir.Value) -> ir.Value:
        """Returns the position of a key, -1 beyond the segment."""
        position = self._position(segment.positions, minimum(key, sub(count, 1)))
        return arith.select(compare("slt", key, count), position, i32(-1))

    def _visible(self, key: ir.Value, upper: ir.Value, lower: ir.Value) -> ir.Value:
        """Tells whether 0 <= key <= upper and key > lower - window, sinks included."""
        seen = arith.andi(compare("sge", key, i32(0)), compare("sle", key, upper))
        if self.problem.window:
            near = compare("sgt", key, arith.subi(lower, i32(self.problem.window)))
            if self.problem.sinks:
                near = arith.ori(near, compare("slt", key, i32(self.problem.sinks)))
            seen = arith.andi(seen, near)
        return seen

    # Memory

    def _four(self, source: ir.Value, place: Sequence[Index], tile: ir.Value) -> list[ir.Value]:
        """Returns the lane's four channels of a tile of a row of memory, 0 beyond the head."""
        heads = self.problem.head_size
        column = add(mul(tile, TILE), self.four)
        if heads % QUARTER == 0:
            four = load(source, [*place, minimum(column, heads - QUARTER)], QUARTER)
            found = [widened(element_at(four, i)) for i in range(QUARTER)]
        else:
            found = [
                widened(get(source, [*place, minimum(add(column, i), heads - 1)])) for i in range(QUARTER)
            ]
        if heads % TILE == 0:
            return found
        inside = [compare("slt", add(column, i), index(heads)) for i in range(QUARTER)]
        return [arith.select(i, x, f32(0.0)) for i, x in zip(inside, found, strict=True)]

    def _write(self, target: ir.Value, place: Sequence[Index], factor: ir.Value) -> None:
        """Writes the row's outputs times a factor."""
        heads = self.problem.head_size

        def write(tile: ir.Value) -> None:
            column = add(mul(tile, TILE), self.four)
            four = [arith.mulf(get(self.out, [add(mul(tile, QUARTER), i)]), factor) for i in range(QUARTER)]
            if heads % QUARTER == 0:
                inside = arith.andi(self.row.inside, compare("slt", column, index(heads)))
                made = vector.from_elements(matrix_zero().type, four)
                when(inside, lambda: store(made, target, [*place, column]))
                return
            for i, value in enumerate(four):
                channel = add(column, i)
                inside = arith.andi(self.row.inside, compare("slt", channel, index(heads)))
                when(inside, functools.partial(put, value, target, [*place, channel]))

        loop(0, self.tiles, 1, write)

    def _write_share(self, largest: ir.Value, total: ir.Value) -> None:
        sums, totals = self.results
        place = [self.batch, self.key_head, self.share, self.number]

        def write() -> None:
            put(largest, totals, [*place, 0])
            put(total, totals, [*place, 1])

        first = compare("eq", self.four, index(0))
        when(arith.andi(first, self.row.inside), write)
        self._write(sums, place, f32(1.0))


def combine(
    problem: Problem,
    workgroup: Sequence[ir.Value],
    sums: ir.Value,
    totals: ir.Value,
    out: ir.Value,
) -> None:
    """Emits the body of the second launch: a wave adds what the shares of the keys found for one row."""
    row, key_head, batch = workgroup
    shares = size(totals, 2)

    def at(share: ir.Value, number: Index) -> list[Index]:
        return [batch, key_head, share, row, number]

    def larger_one(share: ir.Value, largest: ir.Value) -> list[ir.Value]:
        return [larger(get(totals, at(share, 0)), largest)]

    (largest,) = loop(0, shares, 1, larger_one, [f32(FLOOR)])

    def add_up(term: Callable[[ir.Value], ir.Value]) -> ir.Value:
        def body(share: ir.Value, so_far: ir.Value) -> list[ir.Value]:
            weight = math.exp2(arith.subf(get(totals, at(share, 0)), largest))
            return [math.fma(term(share), weight, so_far)]

        return loop(0, shares, 1, body, [f32(0.0)])[0]

    total = add_up(lambda share: get(totals, at(share, 1)))
    some = arith.cmpf(arith.CmpFPredicate.OGT, total, f32(0.0))
    inverse = arith.select(some, arith.divf(f32(1.0), total), f32(0.0))
    token, head = floor_div(row, problem.group), rem(row, problem.group)

    def channel(number: ir.Value) -> None:
        value = add_up(lambda share: get(sums, at(share, number)))
        put(arith.mulf(value, inverse), out, [batch, token, add(mul(key_head, problem.group), head), number])

    loop(thread(), problem.head_size, WAVE, channel)


def widened(value: ir.Value) -> ir.Value:
    """Returns a number as f32."""
    if isinstance(value.type, ir.IntegerType):
        return arith.sitofp(ir.F32Type.get(), value)
    return value if isinstance(value.type, ir.F32Type) else arith.extf(ir.F32Type.get(), value)
