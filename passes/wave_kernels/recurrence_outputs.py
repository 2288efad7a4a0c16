"""The second launch of a recurrence by tiles: the queries of all chunks and heads are answered at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, math

from spikingbrain.passes.dialect_fused import OUT, SUM
from spikingbrain.passes.kernels.builders import (
    add,
    compare,
    f32,
    floor_div,
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
    when,
)
from spikingbrain.passes.kernels.recurrence_base import Operands, Problem
from spikingbrain.passes.kernels.recurrence_operands import Computed
from spikingbrain.passes.wave_kernels.builders import (
    TILE,
    WAVE,
    barrier,
    choose,
    element_at,
    matrix_multiply,
    matrix_zero,
    over_lanes,
    registers,
    shared,
)
from spikingbrain.passes.wave_kernels.recurrence_base import element, finished
from spikingbrain.passes.wave_kernels.recurrence_tiles import QUARTER, Schedule, Tiles

PAD = 4  # numbers between rows of shared memory, so that lanes read different banks
SMALLEST, LARGEST = 1e-30, 1e30  # products of decays inside these are divided by


class Outputs(Tiles):
    """The second launch: a wave takes 16 steps of a chunk of one head.

    ``operands.state`` holds the entering states. Decayed rows, of the queries and then of the keys, lie in shared memory.
    """

    def __init__(
        self, problem: Problem, schedule: Schedule, workgroup: Sequence[ir.Value], operands: Operands
    ):
        super().__init__(problem, schedule, operands)
        self.chunk, self.head, self.batch = workgroup
        self.number, self.query = floor_div(self.head, problem.group), rem(self.head, problem.group)
        kind, parts, rows = ir.F32Type.get(), schedule.parts, schedule.rows
        self.first = mul(self.chunk, schedule.chunk)  # step of the chunk
        self.rows = shared([schedule.chunk, rows + PAD], kind)
        self.products = shared([parts, rows], kind)
        self.inverses = shared(
            [parts, rows], kind
        )  # of the square root of the product, or 0 where that is not exact
        self.x = registers(rows // QUARTER, kind)  # the row of a query, decayed
        self.scores = registers(parts * QUARTER, kind)
        self.tiles = -(-problem.value_size // TILE)
        self.sums = [source for source in operands.parts if source.part.name == SUM]
        self.kept = registers(self.tiles * QUARTER, kind) if self.sums else None

    def build(self) -> None:
        """Emits the body."""
        parts = self.schedule.parts
        self._stage_queries()
        barrier()
        own = add(mul(self.wave, TILE), self.row)

        def take(at: ir.Value) -> None:
            four = load(self.rows, [own, add(mul(at, TILE), self.four)], QUARTER)
            for i in range(QUARTER):
                put(element_at(four, i), self.x, [add(mul(at, QUARTER), i)])

        self._each_tile_of_keys(take)
        barrier()
        self._stage_keys()
        barrier()
        self._own_scores()
        for back in range(1, parts):
            self._earlier_scores(back)
        loop(0, self.tiles, 1, self._tile)
        if self.sums:
            self._write_with_sums()

    # Shared memory

    def _stage(self, body: Callable[[ir.Value, ir.Value, ir.Value, ir.Value], None]) -> None:
        """Emits ``body(part, row, safe_row, inside)`` for the channels of each block of steps, one a thread."""
        rows = self.schedule.rows

        def visit(i: ir.Value) -> None:
            row = rem(i, rows)
            inside = compare("slt", row, index(self.problem.key_size))
            body(floor_div(i, rows), row, minimum(row, self.problem.key_size - 1), inside)

        loop(self.thread, self.schedule.parts * rows, self.schedule.parts * WAVE, visit)

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

    # Scores: how much of each earlier value a step reads. A lane holds those of its row's step for four values.

    def _each_tile_of_keys(
        self, body: Callable[..., Sequence[ir.Value] | None], carried: Sequence[ir.Value] = ()
    ) -> list[ir.Value]:
        return loop(0, self.schedule.rows // TILE, 1, body, carried)

    def _own_scores(self) -> None:
        """Leaves the scores of the block's own values."""
        own = add(mul(self.wave, TILE), self.row)

        def multiply(at: ir.Value, sums: ir.Value) -> list[ir.Value]:
            column = add(mul(at, TILE), self.four)
            keys = load(self.rows, [own, column], QUARTER)
            inverses = load(self.inverses, [self.wave, column], QUARTER)
            products = load(self.products, [self.wave, column], QUARTER)
            for i in range(QUARTER):
                inverse = element_at(inverses, i)
                key = arith.mulf(element_at(keys, i), inverse)
                inverse = math.copysign(inverse, element_at(products, i))
                query = arith.mulf(get(self.x, [add(mul(at, QUARTER), i)]), inverse)
                sums = matrix_multiply("f32", key, query, sums)
            return [sums]

        (sums,) = self._each_tile_of_keys(multiply, [matrix_zero()])
        any_left = self._any_channel_left()
        for i in range(QUARTER):
            put(self._own_score(element_at(sums, i), add(self.four, i), any_left), self.scores, [index(i)])

    def _own_score(self, product: ir.Value, earlier: ir.Value, any_left: ir.Value) -> ir.Value:
        """Returns how much of the value of step ``earlier`` of the block the lane's row reads."""
        token, inside = self.at_step(add(self.first, add(mul(self.wave, TILE), self.row)))
        reads = compare("slt" if self.problem.exclusive else "sle", earlier, self.row)
        reads = arith.andi(reads, inside)
        score = arith.select(reads, product, f32(0.0))
        left = arith.andi(reads, any_left)
        (score,) = choose(left, lambda: [self._left_over(score, token, earlier)], [score])
        if not self.problem.bonus:
            return score
        itself = arith.andi(inside, compare("eq", earlier, self.row))
        return choose(itself, lambda: [self._bonus(score, token)], [score])[0]

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

    def _bonus(self, score: ir.Value, token: ir.Value) -> ir.Value:
        """Adds ``q . (bonus * k)`` to a score."""

        def channel(row: ir.Value, total: ir.Value) -> list[ir.Value]:
            query = element(self.named["q"], self.of_query(token, self.query, row))
            key = element(self.named["k"], self.of_state(token, row))
            weight = element(self.named["bonus"], [0, 0, self.number, row])
            return [math.fma(query, arith.mulf(weight, key), total)]

        return loop(0, self.problem.key_size, 1, channel, [score])[0]

    def _earlier_scores(self, back: int) -> None:
        """Leaves the scores of the values ``back`` blocks ago, 0 without any, and moves the query before that block."""
        is_there = compare("sge", self.wave, index(back))
        part = arith.select(is_there, sub(self.wave, back), index(0))
        row = add(mul(part, TILE), self.row)

        def multiply(at: ir.Value, sums: ir.Value) -> list[ir.Value]:
            column = add(mul(at, TILE), self.four)
            keys = load(self.rows, [row, column], QUARTER)
            products = load(self.products, [part, column], QUARTER)
            for i in range(QUARTER):
                place = [add(mul(at, QUARTER), i)]
                query = get(self.x, place)
                sums = matrix_multiply("f32", element_at(keys, i), query, sums)
                product = arith.select(is_there, element_at(products, i), f32(1.0))
                put(arith.mulf(query, product), self.x, place)
            return [sums]

        (sums,) = self._each_tile_of_keys(multiply, [matrix_zero()])
        for i in range(QUARTER):
            score = arith.select(is_there, element_at(sums, i), f32(0.0))
            put(score, self.scores, [index(back * QUARTER + i)])

    # Outputs: a lane holds those of four steps in one column of a tile.

    def _tile(self, tile: ir.Value) -> None:
        """Makes the outputs of 16 columns, and writes or keeps them."""
        column = add(mul(tile, TILE), self.row)
        in_columns = compare("slt", column, index(self.problem.value_size))
        safe_column = minimum(column, self.problem.value_size - 1)
        sums = matrix_zero()
        for back in range(self.schedule.parts):
            part = arith.maxsi(sub(self.wave, back), index(0))  # scores of no block are 0
            for i in range(QUARTER):
                at = add(mul(part, TILE), add(self.four, i))
                token, inside = self.at_step(add(self.first, at))
                value = self.value(token, column, inside)
                sums = matrix_multiply("f32", get(self.scores, [index(back * QUARTER + i)]), value, sums)

        def multiply(at: ir.Value, sums: ir.Value) -> list[ir.Value]:
            for i in range(QUARTER):
                row = add(mul(at, TILE), add(self.four, i))
                inside = arith.andi(in_columns, compare("slt", row, index(self.problem.key_size)))
                safe_row = minimum(row, self.problem.key_size - 1)
                place = [self.batch, self.chunk, self.number, safe_row, safe_column]
                entry = arith.select(inside, get(self.state, place), f32(0.0))
                sums = matrix_multiply("f32", get(self.x, [add(mul(at, QUARTER), i)]), entry, sums)
            return [sums]

        (sums,) = self._each_tile_of_keys(multiply, [sums])
        for i in range(QUARTER):
            if self.kept is not None:
                put(element_at(sums, i), self.kept, [add(mul(tile, QUARTER), i)])
            else:
                self._write(i, column, element_at(sums, i), [])

    def _write(self, i: int, column: ir.Value, output: ir.Value, given: Sequence[ir.Value]) -> None:
        token, inside = self.at_step(self._step(i))
        inside = arith.andi(inside, compare("slt", column, index(self.problem.value_size)))
        place = self.of_query(token, self.query, column)
        when(inside, lambda: put(finished(self.named.get(OUT), place, output, given), self.o, place))

    def _step(self, i: int) -> ir.Value:
        """Returns the step of one of the lane's four outputs."""
        return add(self.first, add(mul(self.wave, TILE), add(self.four, i)))

    def _write_with_sums(self) -> None:
        """Writes the outputs that were kept, given sums over their rows."""
        for i in range(QUARTER):
            given: list[ir.Value] = []
            for source in self.sums:
                given.append(self._row_sum(source, i, given))

            def write(tile: ir.Value, i: int = i, given: Sequence[ir.Value] = given) -> None:
                self._write(i, add(mul(tile, TILE), self.row), self._output(tile, i), given)

            loop(0, self.tiles, 1, write)

    def _output(self, tile: ir.Value, i: int) -> ir.Value:
        assert self.kept is not None
        return get(self.kept, [add(mul(tile, QUARTER), i)])

    def _row_sum(self, source: Computed, i: int, given: Sequence[ir.Value]) -> ir.Value:
        """Returns a sum over a row of outputs, in all lanes that hold a part of it."""
        token, _ = self.at_step(self._step(i))

        def term(tile: ir.Value, total: ir.Value) -> list[ir.Value]:
            column = add(mul(tile, TILE), self.row)
            inside = compare("slt", column, index(self.problem.value_size))
            place = self.of_query(token, self.query, minimum(column, self.problem.value_size - 1))
            value = element(source, place, [self._output(tile, i), *given])
            return [arith.addf(total, arith.select(inside, value, f32(0.0)))]

        return over_lanes(arith.addf, loop(0, self.tiles, 1, term, [f32(0.0)])[0], TILE)
