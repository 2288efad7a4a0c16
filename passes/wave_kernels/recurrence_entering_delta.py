"""The launch of a delta rule by tiles that takes the state through time, and keeps what enters each chunk and is predicted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, vector

from spikingbrain.passes.kernels.builders import (
    Index,
    add,
    ceil_div,
    compare,
    f32,
    get,
    index,
    load,
    loop,
    mul,
    put,
    when,
)
from spikingbrain.passes.kernels.recurrence_base import Operands, Problem
from spikingbrain.passes.wave_kernels.builders import (
    TILE,
    any_infinite,
    choose,
    element_at,
    matrix_multiply,
    matrix_zero,
    registers,
)
from spikingbrain.passes.wave_kernels.recurrence_predictions import ERASES, KEYS, WHOLE
from spikingbrain.passes.wave_kernels.recurrence_tiles import QUARTER, Schedule, Tiles

SOLVED = "solved"  # the operand that the launch before has made


class EnteringDelta(Tiles):
    """A wave takes 16 columns of a state, all of their rows, through time.

    ``operands.o`` is [B, chunks, S, K + chunk, V]: the state that enters a chunk, and what its steps predict.
    """

    def __init__(
        self, problem: Problem, schedule: Schedule, workgroup: Sequence[ir.Value], operands: Operands
    ):
        super().__init__(problem, schedule, operands)
        tile, self.number, self.batch = workgroup
        (self.solved,) = (memory.memref for memory in self.named[SOLVED].memory)
        self.column = add(mul(add(mul(tile, schedule.waves), self.wave), TILE), self.row)
        self.in_columns = compare("slt", self.column, index(problem.value_size))
        self.entries = registers(schedule.rows // QUARTER, ir.F32Type.get())

    def build(self) -> None:
        """Emits the body."""
        chunk, parts = self.schedule.chunk, self.schedule.parts
        self._each_entry(lambda at, row, inside: put(self._initial(row, inside), self.entries, [at]))

        def walk(n: ir.Value) -> None:
            self._store(self.o, [self.batch, n, self.number])

            def block(part: ir.Value) -> None:
                self._block(add(mul(n, parts), part), [self.batch, n, self.number], mul(part, TILE))

            loop(0, parts, 1, block)

        loop(0, ceil_div(self.length, chunk), 1, walk)
        self._store(self.state, [self.batch, self.number])

    def _each_entry(self, body: Callable[[ir.Value, ir.Value, ir.Value], None]) -> None:
        """Emits ``body(at, row, inside)`` for the entries that the lane holds of its column."""
        size, rows = self.problem.key_size, self.schedule.rows

        def tile(n: ir.Value) -> None:
            for i in range(QUARTER):
                row = add(mul(n, TILE), add(self.four, i))
                inside = self.in_columns
                if rows > size:
                    inside = arith.andi(inside, compare("slt", row, index(size)))
                body(add(mul(n, QUARTER), i), row, inside)

        loop(0, rows // TILE, 1, tile)

    def _initial(self, row: ir.Value, inside: ir.Value) -> ir.Value:
        initial = self.initial
        if initial is None:
            return f32(0.0)
        place = [self.batch, self.number, row, self.column]
        return choose(inside, lambda: [get(initial, place)], [f32(0.0)])[0]

    def _store(self, target: ir.Value, place: Sequence[ir.Value]) -> None:
        def entry(at: ir.Value, row: ir.Value, inside: ir.Value) -> None:
            when(inside, lambda: put(get(self.entries, [at]), target, [*place, row, self.column]))

        self._each_entry(entry)

    def _block(self, block: ir.Value, chunk: list[ir.Value], first: ir.Value) -> None:
        """Moves the state by 16 steps; what they predict is kept at ``first`` of the chunk."""
        solved = [self.batch, block, self.number]
        steps = [self.at_step(add(mul(block, TILE), add(self.four, i))) for i in range(QUARTER)]
        values = [self.value(token, self.column, inside) for token, inside in steps]
        predicted = self._predicted(solved, values)
        for i in range(QUARTER):
            row = add(add(first, self.problem.key_size), add(self.four, i))
            store = functools.partial(put, element_at(predicted, i), self.o, [*chunk, row, self.column])
            when(self.in_columns, store)

        def update(n: ir.Value) -> None:
            column = add(mul(n, TILE), TILE)
            whole = load(self.solved, [*solved, WHOLE, add(column, self.four)], QUARTER)
            at = [[add(mul(n, QUARTER), i)] for i in range(QUARTER)]
            state = vector.from_elements(
                matrix_zero().type,
                [arith.mulf(get(self.entries, at[i]), element_at(whole, i)) for i in range(QUARTER)],
            )
            for rows, added in ((KEYS, values), (ERASES, [element_at(predicted, i) for i in range(QUARTER)])):
                for i in range(QUARTER):
                    place = [*solved, add(self.four, rows + i), add(column, self.row)]
                    state = matrix_multiply("f32", get(self.solved, place), added[i], state)
            for i in range(QUARTER):
                put(element_at(state, i), self.entries, at[i])

        loop(0, self.schedule.rows // TILE, 1, update)

    def _predicted(self, solved: list[ir.Value], values: list[ir.Value]) -> ir.Value:
        """Returns what the steps predict: the lane holds that of four steps, for its column."""

        def read(n: ir.Value, sums: ir.Value) -> list[ir.Value]:
            weights = self._row(solved, add(mul(n, TILE), TILE))
            for i in range(QUARTER):
                entry = get(self.entries, [add(mul(n, QUARTER), i)])
                sums = matrix_multiply("f32", element_at(weights, i), entry, sums)
            return [sums]

        (of_state,) = loop(0, self.schedule.rows // TILE, 1, read, [matrix_zero()])
        four = self._row(solved, 0)
        scores = [element_at(four, i) for i in range(QUARTER)]
        together = of_state
        for score, value in zip(scores, values, strict=True):
            together = matrix_multiply("f32", score, value, together)
        by_steps = lambda: [self.add_by_steps(of_state, scores, values, reads_itself=False)]  # noqa: E731
        return choose(any_infinite(values), by_steps, [together])[0]

    def _row(self, solved: list[ir.Value], column: Index) -> ir.Value:
        """Returns four numbers of the lane's row of what was solved."""
        return load(self.solved, [*solved, self.row, add(column, self.four)], QUARTER)
