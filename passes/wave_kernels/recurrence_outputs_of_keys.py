"""The second launch of a recurrence by tiles whose decays are of keys or of heads, or that has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, math

from spikingbrain.passes.kernels.builders import (
    add,
    f32,
    get,
    index,
    larger,
    less,
    load,
    loop,
    mul,
    no_larger,
    put,
    rem,
    sub,
)
from spikingbrain.passes.kernels.recurrence_base import Operands, Problem
from spikingbrain.passes.wave_kernels.builders import (
    TILE,
    WAVE,
    choose,
    element_at,
    matrix_multiply,
    matrix_zero,
    over_lanes,
    shared,
)
from spikingbrain.passes.wave_kernels.recurrence_base import element
from spikingbrain.passes.wave_kernels.recurrence_outputs import LARGEST, SMALLEST, Outputs, any_infinite
from spikingbrain.passes.wave_kernels.recurrence_tiles import QUARTER, Schedule


class KeyOutputs(Outputs):
    """The rows of queries and keys carry the decays, so that scores do.

    Queries count from the start of the block, and move before earlier blocks as their scores are made.
    """

    def __init__(
        self, problem: Problem, schedule: Schedule, workgroup: Sequence[ir.Value], operands: Operands
    ):
        super().__init__(problem, schedule, workgroup, operands)
        kind, parts, rows = ir.F32Type.get(), schedule.parts, schedule.rows
        self.products = shared([parts, rows], kind)
        self.inverses = shared(
            [parts, rows], kind
        )  # of the square root of the product, or 0 where that is not exact

    def _stage_queries(self) -> None:
        p = self.problem

        def channel(part: ir.Value, row: ir.Value, safe_row: ir.Value, in_keys: ir.Value) -> None:
            def step(u: ir.Value, product: ir.Value) -> list[ir.Value]:
                at = add(mul(part, TILE), u)
                token, inside = self.at_step(add(self.first, at))
                after = arith.mulf(product, self.decay(token, safe_row, inside))
                place = self.of_query(token, self.query, safe_row)
                query = self.key(self.named["q"], place, arith.andi(inside, in_keys))
                put(arith.mulf(query, product if p.exclusive else after), self.rows, [at, row])
                return [after]

            loop(0, TILE, 1, step, [f32(1.0)])

        self._stage(channel)

    def _stage_keys(self) -> None:
        def channel(part: ir.Value, row: ir.Value, safe_row: ir.Value, in_keys: ir.Value) -> None:
            def step(u: ir.Value, product: ir.Value, low: ir.Value, high: ir.Value) -> list[ir.Value]:
                at = add(mul(part, TILE), sub(TILE - 1, u))
                token, inside = self.at_step(add(self.first, at))
                place = self.of_state(token, safe_row)
                key = self.key(self.named["k"], place, arith.andi(inside, in_keys))
                put(arith.mulf(key, product), self.rows, [at, row])
                product = arith.mulf(product, self.decay(token, safe_row, inside))
                size = math.absf(product)
                return [product, arith.select(less(size, low), size, low), larger(size, high)]

            one = f32(1.0)
            product, low, high = loop(0, TILE, 1, step, [one, one, one])
            put(product, self.products, [part, row])
            size = math.absf(product)
            bounds = [  # of the products from any step on, and of those up to any step
                no_larger(f32(SMALLEST), low),
                no_larger(high, f32(LARGEST)),
                no_larger(arith.mulf(high, f32(SMALLEST)), size),
                no_larger(size, arith.mulf(low, f32(LARGEST))),
            ]
            safe = bounds[0]
            for bound in bounds[1:]:
                safe = arith.andi(safe, bound)
            put(arith.select(safe, math.rsqrt(size), f32(0.0)), self.inverses, [part, row])

        self._stage(channel)

    # Scores

    def _own_scores(self) -> None:
        """Leaves the scores of the block's own values."""

        def multiply(at: ir.Value, sums: ir.Value) -> list[ir.Value]:
            column = add(mul(at, TILE), self.four)
            keys = load(self.rows, [self.own_row, column], QUARTER)
            inverses = load(self.inverses, [self.wave, column], QUARTER)
            products = load(self.products, [self.wave, column], QUARTER)
            for i in range(QUARTER):
                inverse = element_at(inverses, i)
                is_left = no_larger(inverse, f32(0.0))
                key = arith.mulf(element_at(keys, i), inverse)
                inverse = math.copysign(inverse, element_at(products, i))
                query = arith.mulf(get(self.x, [add(mul(at, QUARTER), i)]), inverse)
                key, query = (arith.select(is_left, f32(0.0), x) for x in (key, query))
                sums = matrix_multiply("f32", key, query, sums)
            return [sums]

        (sums,) = self._each_tile_of_keys(multiply, [matrix_zero()])
        any_left = self._any_channel_left()

        def left(earlier: ir.Value) -> Callable[..., ir.Value]:
            def add_it(score: ir.Value, reads: ir.Value, token: ir.Value) -> ir.Value:
                more = arith.andi(reads, any_left)
                return choose(more, lambda: [self._left_over(score, token, earlier)], [score])[0]

            return add_it

        for i in range(QUARTER):
            earlier = add(self.four, i)
            put(self._mask(element_at(sums, i), earlier, left(earlier)), self.scores, [index(i)])

    def _any_channel_left(self) -> ir.Value:
        """Returns whether a channel of the block counts as 0 in the products of tiles; the same in all lanes."""
        lane = rem(self.thread, WAVE)

        def visit(row: ir.Value, found: ir.Value) -> list[ir.Value]:
            is_left = no_larger(get(self.inverses, [self.wave, row]), f32(0.0))
            return [arith.select(is_left, f32(1.0), found)]

        (found,) = loop(lane, self.schedule.rows, WAVE, visit, [f32(0.0)])
        return less(f32(0.0), over_lanes(larger, found))

    def _left_over(self, score: ir.Value, token: ir.Value, earlier: ir.Value) -> ir.Value:
        """Adds the channels that count as 0 so far to a score, decays multiplied one by one."""
        first = add(self.first, mul(self.wave, TILE))
        written = self.token(add(first, earlier))
        last = self.row if self.problem.exclusive else add(self.row, 1)

        def channel(row: ir.Value, total: ir.Value) -> list[ir.Value]:
            def add_it() -> list[ir.Value]:
                term = arith.mulf(
                    element(self.named["q"], self.of_query(token, self.query, row)),
                    element(self.named["k"], self.of_state(written, row)),
                )

                def decayed(u: ir.Value, term: ir.Value) -> list[ir.Value]:
                    between, inside = self.at_step(add(first, u))
                    return [arith.mulf(term, self.decay(between, row, inside))]

                return [arith.addf(total, loop(add(earlier, 1), last, 1, decayed, [term])[0])]

            is_left = no_larger(get(self.inverses, [self.wave, row]), f32(0.0))
            return choose(is_left, add_it, [total])

        return loop(0, self.problem.key_size, 1, channel, [score])[0]

    def _earlier_scores(self, back: int) -> None:
        """Leaves the scores of the values ``back`` blocks ago, and moves the query before that block."""
        part = sub(self.wave, back)
        row = add(mul(part, TILE), self.row)

        def multiply(at: ir.Value, sums: ir.Value) -> list[ir.Value]:
            column = add(mul(at, TILE), self.four)
            keys = load(self.rows, [row, column], QUARTER)
            products = load(self.products, [part, column], QUARTER)
            for i in range(QUARTER):
                place = [add(mul(at, QUARTER), i)]
                query = get(self.x, place)
                sums = matrix_multiply("f32", element_at(keys, i), query, sums)
                put(arith.mulf(query, element_at(products, i)), self.x, place)
            return [sums]

        (sums,) = self._each_tile_of_keys(multiply, [matrix_zero()])
        for i in range(QUARTER):
            put(element_at(sums, i), self.scores, [index(back * QUARTER + i)])

    # Outputs

    def _add_earlier(self, sums: ir.Value, back: int, column: ir.Value) -> ir.Value:
        steps = self._steps(back)
        return self._multiply(sums, back, [self.value(token, column, inside) for token, inside in steps])

    def _add_own(self, sums: ir.Value, column: ir.Value) -> ir.Value:
        values = [self.value(token, column, inside) for token, inside in self._steps(0)]
        together = self._multiply(sums, 0, values)
        return choose(any_infinite(values), lambda: [self._add_by_steps(sums, values)], [together])[0]
