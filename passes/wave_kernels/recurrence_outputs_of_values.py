"""The second launch of a recurrence by tiles whose decays are of values: they multiply columns of sums, not rows of keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, math, vector

from spikingbrain.passes.kernels.builders import (
    add,
    compare,
    f32,
    folded,
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
    sub,
    when,
)
from spikingbrain.passes.kernels.recurrence_base import Operands, Problem
from spikingbrain.passes.kernels.recurrence_operands import Computed
from spikingbrain.passes.wave_kernels.builders import (
    TILE,
    any_infinite,
    any_lane,
    barrier,
    choose,
    element_at,
    from_lane_xor,
    matrix_multiply,
    matrix_zero,
    shared,
)
from spikingbrain.passes.wave_kernels.recurrence_outputs import LARGEST, PAD, SMALLEST, Outputs
from spikingbrain.passes.wave_kernels.recurrence_tiles import QUARTER, Products, Schedule, scaled


class ValueOutputs(Outputs):
    """Scores are those without decays. Sums over earlier values are decayed, column by column, on their way to the block.

    The values of a tile of columns, decayed to the end of their block, and their decays are shared by the waves.
    """

    def __init__(
        self, problem: Problem, schedule: Schedule, workgroup: Sequence[ir.Value], operands: Operands
    ):
        super().__init__(problem, schedule, workgroup, operands)
        kind = ir.F32Type.get()
        self.decayed = shared([schedule.chunk, TILE + PAD], kind)
        self.factors = shared([schedule.chunk, TILE + PAD], kind)
        self.wholes = shared([schedule.parts, TILE], kind)

    def _stage_queries(self) -> None:
        self._stage_rows(self.named["q"], lambda token, row: self.of_query(token, self.query, row))

    def _stage_keys(self) -> None:
        self._stage_rows(self.named["k"], self.of_state)

    def _stage_rows(self, source: Computed, place: Callable[[ir.Value, ir.Value], list[ir.Value]]) -> None:
        def channel(part: ir.Value, row: ir.Value, safe_row: ir.Value, in_keys: ir.Value) -> None:
            def step(u: ir.Value) -> None:
                at = add(mul(part, TILE), u)
                token, inside = self.at_step(add(self.first, at))
                entry = self.key(source, place(token, safe_row), arith.andi(inside, in_keys))
                put(entry, self.rows, [at, row])

            loop(0, TILE, 1, step)

        self._stage(channel)

    def _products_with(self, part: ir.Value) -> ir.Value:
        """Returns the products of the block's queries with the keys of a block."""
        keys_row = add(mul(part, TILE), self.row)

        def multiply(at: ir.Value, sums: ir.Value) -> list[ir.Value]:
            keys = load(self.rows, [keys_row, add(mul(at, TILE), self.four)], QUARTER)
            for i in range(QUARTER):
                query = get(self.x, [add(mul(at, QUARTER), i)])
                sums = matrix_multiply("f32", element_at(keys, i), query, sums)
            return [sums]

        return self._each_tile_of_keys(multiply, [matrix_zero()])[0]

    def _own_scores(self) -> None:
        products = self._products_with(self.wave)
        for i in range(QUARTER):
            put(self._mask(element_at(products, i), add(self.four, i)), self.scores, [index(i)])

    def _earlier_scores(self, back: int) -> None:
        products = self._products_with(sub(self.wave, back))
        for i in range(QUARTER):
            put(element_at(products, i), self.scores, [index(back * QUARTER + i)])

    def _tile(self, tile: ir.Value) -> None:
        column = add(mul(tile, TILE), self.row)
        channel = minimum(column, self.problem.value_size - 1)
        barrier()  # behind which the tile before is done
        steps = self._steps(0)
        self.values = [self.value(token, column, inside) for token, inside in steps]
        factors = [self.decay(token, channel, inside) for token, inside in steps]
        self.own = self.products_of(factors)
        for i in range(QUARTER):
            at = [add(mul(self.wave, TILE), add(self.four, i)), self.row]
            put(arith.mulf(self.values[i], self.own.behind[i + 1]), self.decayed, at)
            put(factors[i], self.factors, at)
        is_one = compare("eq", self.quarter, index(0))
        when(is_one, lambda: put(self.own.whole, self.wholes, [self.wave, self.row]))
        barrier()
        super()._tile(tile)

    def _add_earlier(self, sums: ir.Value, back: int, column: ir.Value) -> list[ir.Value]:
        part = sub(self.wave, back)
        first = add(mul(part, TILE), self.four)
        values = [get(self.decayed, [add(first, i), self.row]) for i in range(QUARTER)]
        before = scaled(sums, get(self.wholes, [part, self.row]))
        return [self._multiply(before, self.scores, back, values)]

    def _add_own(self, sums: ir.Value, column: ir.Value) -> ir.Value:
        values, products = self.values, self.own
        together = self._add_by_products(sums, values, products)

        def factor(step: ir.Value) -> ir.Value:
            return get(self.factors, [add(mul(self.wave, TILE), step), self.row])

        one_by_one = arith.ori(any_infinite(values), self._cannot_divide(products))
        return choose(
            one_by_one, lambda: [self._add_by_steps(sums, self.scores, values, factor)], [together]
        )[0]

    def _add_by_products(self, sums: ir.Value, values: list[ir.Value], products: Products) -> ir.Value:
        """Returns the sums with the block's own values, decays between as quotients of products."""
        p = self.problem
        inverse = math.rsqrt(math.absf(products.whole))
        decayed = [
            arith.mulf(value, arith.mulf(products.behind[i + 1], inverse)) for i, value in enumerate(values)
        ]
        found = matrix_zero()
        for i, value in enumerate(decayed):
            found = matrix_multiply("f32", self._score(i, of_itself=False), value, found)
        inverse = math.copysign(inverse, products.whole)
        until = products.before[:QUARTER] if p.exclusive else products.before[1:]
        found = vector.from_elements(
            sums.type,
            [
                arith.mulf(
                    arith.addf(element_at(sums, i), arith.mulf(inverse, element_at(found, i))), product
                )
                for i, product in enumerate(until)
            ],
        )
        if p.bonus:
            for i, value in enumerate(values):
                found = matrix_multiply("f32", self._score(i, of_itself=True), value, found)
        return found

    def _score(self, i: int, of_itself: bool) -> ir.Value:
        """Returns one of the lane's own scores; with a bonus, that of a step's own value or only the others."""
        score = get(self.scores, [index(i)])
        if not self.problem.bonus:
            return score
        itself = compare("eq", add(self.four, i), self.row)
        zero = f32(0.0)
        return arith.select(itself, score, zero) if of_itself else arith.select(itself, zero, score)

    def _cannot_divide(self, products: Products) -> ir.Value:
        """Returns whether products of decays of some channel leave the range in which quotients of them are exact."""
        sizes = [math.absf(product) for product in products.behind]
        low, high = folded(smaller, sizes), folded(larger, sizes)
        for distance in (TILE, 2 * TILE):
            low, high = (
                smaller(low, from_lane_xor(low, distance)),
                larger(high, from_lane_xor(high, distance)),
            )
        whole = math.absf(products.whole)
        bounds = [
            no_larger(f32(SMALLEST), low),
            no_larger(high, f32(LARGEST)),
            no_larger(arith.mulf(high, f32(SMALLEST)), whole),
            no_larger(whole, arith.mulf(low, f32(LARGEST))),
        ]
        one = arith.constant(ir.IntegerType.get_signless(1), 1)
        return any_lane(arith.xori(folded(arith.andi, bounds), one))


def smaller(a: ir.Value, b: ir.Value) -> ir.Value:
    """Returns the smaller of two floats."""
    return arith.select(less(a, b), a, b)
