"""The second launch of a recurrence by tiles whose decays are of keys or of heads, or that has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith, math

from spikingbrain.passes.kernels.builders import (
    add,
    compare,
    f32,
    get,
    index,
    larger,
    less,
    load,
    loop,
    minimum,
    mul,
    no_larger,
    put,
    rem,
    sub,
)
from spikingbrain.passes.kernels.recurrence_base import Operands, Problem
from spikingbrain.passes.kernels.recurrence_operands import Computed
from spikingbrain.passes.wave_kernels.builders import (
    TILE,
    WAVE,
    any_infinite,
    choose,
    element_at,
    matrix_multiply,
    matrix_zero,
    over_lanes,
    registers,
    shared,
)
from spikingbrain.passes.wave_kernels.recurrence_base import element
from spikingbrain.passes.wave_kernels.recurrence_outputs import LARGEST, PAD, SMALLEST, Outputs
from spikingbrain.passes.wave_kernels.recurrence_tiles import QUARTER, Schedule


@dataclass(frozen=True)
class Update:
    """What a step adds to the state: its ``key`` times a value. ``rows`` are those of a chunk, ``scores`` the lane's."""

    key: Computed
    rows: ir.Value
    scores: ir.Value


class KeyOutputs(Outputs):
    """The rows of queries and keys carry the decays, so that scores do.

    Queries count from the start of the block, and move before earlier blocks as their scores are made. With a rank-one part
    a step has two updates: k and v, erase and what was predicted.
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
        self.updates = [Update(self.named["k"], self.rows, self.scores)]
        if problem.rank_one:
            more = shared([schedule.chunk, rows + PAD], kind), registers(parts * QUARTER, kind)
            self.updates.append(Update(self.named["erase"], *more))

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
                for update in self.updates:
                    key = self.key(update.key, place, arith.andi(inside, in_keys))
                    put(arith.mulf(key, product), update.rows, [at, row])
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
        any_left = self._any_channel_left()
        for update in self.updates:
            self._own_scores_of(update, any_left)

    def _own_scores_of(self, update: Update, any_left: ir.Value) -> None:
        def multiply(at: ir.Value, sums: ir.Value) -> list[ir.Value]:
            column = add(mul(at, TILE), self.four)
            keys = load(update.rows, [self.own_row, column], QUARTER)
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

        def left(earlier: ir.Value) -> Callable[..., ir.Value]:
            def add_it(score: ir.Value, reads: ir.Value, token: ir.Value) -> ir.Value:
                more = arith.andi(reads, any_left)
                return choose(more, lambda: [self._left_over(score, token, earlier, update.key)], [score])[0]

            return add_it

        for i in range(QUARTER):
            earlier = add(self.four, i)
            bonus = update is self.updates[0]
            put(self._mask(element_at(sums, i), earlier, left(earlier), bonus), update.scores, [index(i)])

    def _any_channel_left(self) -> ir.Value:
        """Returns whether a channel of the block counts as 0 in the products of tiles; the same in all lanes."""
        lane = rem(self.thread, WAVE)

        def visit(row: ir.Value, found: ir.Value) -> list[ir.Value]:
            is_left = no_larger(get(self.inverses, [self.wave, row]), f32(0.0))
            return [arith.select(is_left, f32(1.0), found)]

        (found,) = loop(lane, self.schedule.rows, WAVE, visit, [f32(0.0)])
        return less(f32(0.0), over_lanes(larger, found))

    def _left_over(self, score: ir.Value, token: ir.Value, earlier: ir.Value, key: Computed) -> ir.Value:
        """Adds the channels that count as 0 so far to a score, decays multiplied one by one."""
        first = add(self.first, mul(self.wave, TILE))
        written = self.token(add(first, earlier))
        last = self.row if self.problem.exclusive else add(self.row, 1)

        def channel(row: ir.Value, total: ir.Value) -> list[ir.Value]:
            def add_it() -> list[ir.Value]:
                term = arith.mulf(
                    element(self.named["q"], self.of_query(token, self.query, row)),
                    element(key, self.of_state(written, row)),
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

        def multiply(at: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            column, found = add(mul(at, TILE), self.four), list(sums)
            keys = [load(update.rows, [row, column], QUARTER) for update in self.updates]
            products = load(self.products, [part, column], QUARTER)
            for i in range(QUARTER):
                place = [add(mul(at, QUARTER), i)]
                query = get(self.x, place)
                for n, four in enumerate(keys):
                    found[n] = matrix_multiply("f32", element_at(four, i), query, found[n])
                put(arith.mulf(query, element_at(products, i)), self.x, place)
            return found

        sums = self._each_tile_of_keys(multiply, [matrix_zero() for _ in self.updates])
        for update, found in zip(self.updates, sums, strict=True):
            for i in range(QUARTER):
                put(element_at(found, i), update.scores, [index(back * QUARTER + i)])

    # Outputs

    def _values(self, back: int, column: ir.Value) -> list[list[ir.Value]]:
        """Returns for each update the values that the lane holds of the block ``back`` blocks ago."""
        steps = self._steps(back)
        found = [[self.value(token, column, inside) for token, inside in steps]]
        if self.problem.rank_one:
            found.append([])
            in_columns = compare("slt", column, index(self.problem.value_size))
            safe_column = minimum(column, self.problem.value_size - 1)
            first = add(mul(sub(self.wave, back), TILE), add(self.four, self.problem.key_size))
            for i, (_, inside) in enumerate(steps):
                place = [self.batch, self.chunk, self.number, add(first, i), safe_column]
                inside = arith.andi(inside, in_columns)
                found[-1].append(arith.select(inside, get(self.state, place), f32(0.0)))
        return found

    def _add_earlier(self, sums: ir.Value, back: int, column: ir.Value) -> list[ir.Value]:
        for update, values in zip(self.updates, self._values(back, column), strict=True):
            sums = self._multiply(sums, update.scores, back, values)
        return [sums]

    def _add_own(self, sums: ir.Value, column: ir.Value) -> ir.Value:
        found = list(zip(self.updates, self._values(0, column), strict=True))
        together = sums
        for update, values in found:
            together = self._multiply(together, update.scores, 0, values)

        def by_steps() -> list[ir.Value]:
            added = sums
            for update, values in found:
                added = self._add_by_steps(added, update.scores, values)
            return [added]

        return choose(any_infinite([v for _, values in found for v in values]), by_steps, [together])[0]
