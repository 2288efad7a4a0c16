"""The second launch of a recurrence by tiles: the queries of all chunks and heads are answered at once."""

from __future__ import annotations

import functools
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
    load,
    loop,
    minimum,
    mul,
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

    ``operands.state`` holds the entering states. Rows, of the queries and then of the keys, lie in shared memory. What
    depends on the decays' axis, the subclasses do.
    """

    def __init__(
        self, problem: Problem, schedule: Schedule, workgroup: Sequence[ir.Value], operands: Operands
    ):
        super().__init__(problem, schedule, operands)
        self.chunk, self.head, self.batch = workgroup
        self.number, self.query = floor_div(self.head, problem.group), rem(self.head, problem.group)
        kind, parts, rows = ir.F32Type.get(), schedule.parts, schedule.rows
        self.first = mul(self.chunk, schedule.chunk)  # step of the chunk
        self.own_row = add(mul(self.wave, TILE), self.row)
        self.rows = shared([schedule.chunk, rows + PAD], kind)
        self.x = registers(rows // QUARTER, kind)  # the row of a query
        self.scores = registers(parts * QUARTER, kind)
        self.tiles = -(-problem.value_size // TILE)
        self.sums = [source for source in operands.parts if source.part.name == SUM]
        self.kept = registers(self.tiles * QUARTER, kind) if self.sums else None

    def build(self) -> None:
        """Emits the body."""
        self._take_queries()
        self._stage_keys()
        barrier()
        self._own_scores()
        for back in range(1, self.schedule.parts):
            is_there = compare("sge", self.wave, index(back))
            when(is_there, functools.partial(self._earlier_scores, back))
        loop(0, self.tiles, 1, self._tile)
        if self.sums:
            self._write_with_sums()

    def _take_queries(self) -> None:
        """Leaves a row of the queries in the registers of its lanes; the memory of rows is free again."""
        self._stage_queries()
        barrier()

        def take(at: ir.Value) -> None:
            four = load(self.rows, [self.own_row, add(mul(at, TILE), self.four)], QUARTER)
            for i in range(QUARTER):
                put(element_at(four, i), self.x, [add(mul(at, QUARTER), i)])

        self._each_tile_of_keys(take)
        barrier()

    def _stage_queries(self) -> None:
        raise NotImplementedError

    def _stage_keys(self) -> None:
        raise NotImplementedError

    def _own_scores(self) -> None:
        """Leaves the scores of the block's own values."""
        raise NotImplementedError

    def _earlier_scores(self, back: int) -> None:
        """Leaves the scores of the values ``back`` blocks ago."""
        raise NotImplementedError

    def _add_earlier(self, sums: ir.Value, back: int, column: ir.Value) -> list[ir.Value]:
        """Returns the sums, decayed by the block ``back`` blocks ago, with its values: one vector."""
        raise NotImplementedError

    def _add_own(self, sums: ir.Value, column: ir.Value) -> ir.Value:
        """Returns the sums with the block's own values."""
        raise NotImplementedError

    # Shared memory

    def _stage(self, body: Callable[[ir.Value, ir.Value, ir.Value, ir.Value], None]) -> None:
        """Emits ``body(part, row, safe_row, inside)`` for the channels of each block of steps, one a thread."""
        rows = self.schedule.rows

        def visit(i: ir.Value) -> None:
            row = rem(i, rows)
            inside = compare("slt", row, index(self.problem.key_size))
            body(floor_div(i, rows), row, minimum(row, self.problem.key_size - 1), inside)

        loop(self.thread, self.schedule.parts * rows, self.schedule.parts * WAVE, visit)

    # Scores: how much of each earlier value a step reads. A lane holds those of its row's step for four values.

    def _each_tile_of_keys(
        self, body: Callable[..., Sequence[ir.Value] | None], carried: Sequence[ir.Value] = ()
    ) -> list[ir.Value]:
        return loop(0, self.schedule.rows // TILE, 1, body, carried)

    def _mask(
        self,
        product: ir.Value,
        earlier: ir.Value,
        left: Callable[..., ir.Value] | None = None,
        bonus: bool = True,
    ) -> ir.Value:
        """Returns how much of the value of step ``earlier`` of the block the lane's row reads, given the product with its key.

        ``left(score, reads, token)`` adds to a score, where the row reads that value.
        """
        token, inside = self.at_step(add(self.first, self.own_row))
        reads = compare("slt" if self.problem.exclusive else "sle", earlier, self.row)
        reads = arith.andi(reads, inside)
        score = arith.select(reads, product, f32(0.0))
        if left is not None:
            score = left(score, reads, token)
        if not self.problem.bonus or not bonus:
            return score
        itself = arith.andi(inside, compare("eq", earlier, self.row))
        return choose(itself, lambda: [self._bonus(score, token)], [score])[0]

    def _bonus(self, score: ir.Value, token: ir.Value) -> ir.Value:
        """Adds ``q . (bonus * k)`` to a score."""

        def channel(row: ir.Value, total: ir.Value) -> list[ir.Value]:
            query = element(self.named["q"], self.of_query(token, self.query, row))
            key = element(self.named["k"], self.of_state(token, row))
            weight = element(self.named["bonus"], [0, 0, self.number, row])
            return [math.fma(query, arith.mulf(weight, key), total)]

        return loop(0, self.problem.key_size, 1, channel, [score])[0]

    # Outputs: a lane holds those of four steps in one column of a tile.

    def _tile(self, tile: ir.Value) -> None:
        """Makes the outputs of 16 columns, and writes or keeps them."""
        column = add(mul(tile, TILE), self.row)
        sums = self._read_states(column)
        for back in reversed(range(1, self.schedule.parts)):
            is_there = compare("sge", self.wave, index(back))
            (sums,) = choose(is_there, functools.partial(self._add_earlier, sums, back, column), [sums])
        sums = self._add_own(sums, column)
        for i in range(QUARTER):
            if self.kept is not None:
                put(element_at(sums, i), self.kept, [add(mul(tile, QUARTER), i)])
            else:
                self._write(i, column, element_at(sums, i), [])

    def _read_states(self, column: ir.Value) -> ir.Value:
        """Returns what the queries read of the state that enters the chunk."""
        in_columns = compare("slt", column, index(self.problem.value_size))
        safe_column = minimum(column, self.problem.value_size - 1)

        def multiply(at: ir.Value, sums: ir.Value) -> list[ir.Value]:
            for i in range(QUARTER):
                row, inside = add(mul(at, TILE), add(self.four, i)), in_columns
                if self.schedule.rows > self.problem.key_size:
                    inside = arith.andi(inside, compare("slt", row, index(self.problem.key_size)))
                    row = minimum(row, self.problem.key_size - 1)
                place = [self.batch, self.chunk, self.number, row, safe_column]
                entry = arith.select(inside, get(self.state, place), f32(0.0))
                sums = matrix_multiply("f32", get(self.x, [add(mul(at, QUARTER), i)]), entry, sums)
            return [sums]

        return self._each_tile_of_keys(multiply, [matrix_zero()])[0]

    def _steps(self, back: int) -> list[tuple[ir.Value, ir.Value]]:
        """Returns the tokens of the lane's four steps of the block ``back`` blocks ago, and whether they are of time."""
        first = add(self.first, add(mul(sub(self.wave, back), TILE), self.four))
        return [self.at_step(add(first, i)) for i in range(QUARTER)]

    def _multiply(self, sums: ir.Value, scores: ir.Value, back: int, values: Sequence[ir.Value]) -> ir.Value:
        """Returns the sums with scores times values."""
        for i, value in enumerate(values):
            sums = matrix_multiply("f32", get(scores, [index(back * QUARTER + i)]), value, sums)
        return sums

    def _add_by_steps(
        self,
        sums: ir.Value,
        scores: ir.Value,
        values: Sequence[ir.Value],
        factor: Callable[[ir.Value], ir.Value] | None = None,
    ) -> ir.Value:
        """Returns the sums with the block's own values, as ``add_by_steps`` does."""
        p, own = self.problem, [get(scores, [index(i)]) for i in range(QUARTER)]
        reads_itself = p.bonus or not p.exclusive
        return self.add_by_steps(sums, own, values, reads_itself, factor)

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
