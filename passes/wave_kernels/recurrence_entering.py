"""The first launch of a recurrence by tiles: the state goes through time, and what enters each chunk is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, vector

from spikingbrain.passes.kernels.builders import (
    add,
    ceil_div,
    compare,
    f32,
    floor_div,
    get,
    index,
    loop,
    minimum,
    mul,
    put,
    rem,
    store,
    when,
)
from spikingbrain.passes.kernels.recurrence_base import Operands, Problem
from spikingbrain.passes.wave_kernels.builders import (
    TILE,
    choose,
    element_at,
    matrix_multiply,
    matrix_zero,
)
from spikingbrain.passes.wave_kernels.recurrence_tiles import QUARTER, Schedule, Tiles, scaled


class Entering(Tiles):
    """The first launch: a wave takes a tile of the state through time, with decays of keys transposed.

    So a lane's four entries share their decay. ``operands.o`` is where entering states go, [B, chunks, S, K, V].
    """

    def __init__(
        self, problem: Problem, schedule: Schedule, workgroup: Sequence[ir.Value], operands: Operands
    ):
        super().__init__(problem, schedule, operands)
        tile, self.number, self.batch = workgroup
        tiles = schedule.rows // TILE
        self.first_row = mul(rem(tile, tiles), TILE)
        self.first_column = mul(add(mul(floor_div(tile, tiles), schedule.waves), self.wave), TILE)
        self.key_row, self.column = add(self.first_row, self.row), add(self.first_column, self.row)
        self.in_keys = compare("slt", self.key_row, index(problem.key_size))
        self.safe_row = minimum(self.key_row, problem.key_size - 1)

    def build(self) -> None:
        """Emits the body."""
        chunk, parts = self.schedule.chunk, self.schedule.parts

        def walk(n: ir.Value, state: ir.Value) -> list[ir.Value]:
            self._store(state, self.o, [self.batch, n, self.number])
            return loop(
                0,
                parts,
                1,
                lambda part, state: [self._block(add(mul(n, chunk), mul(part, TILE)), state)],
                [state],
            )

        (state,) = loop(0, ceil_div(self.length, chunk), 1, walk, [self._initial()])
        self._store(state, self.state, [self.batch, self.number])

    def _each_entry(self, body: Callable[[int, list[ir.Value], ir.Value], None]) -> None:
        """Emits ``body(i, place, inside)`` for the four entries of the state that the lane holds."""
        for i in range(QUARTER):
            row, column = self.key_row, self.column
            if self.on_values:
                row = add(self.first_row, add(self.four, i))
            else:
                column = add(self.first_column, add(self.four, i))
            in_columns = compare("slt", column, index(self.problem.value_size))
            body(i, [row, column], arith.andi(compare("slt", row, index(self.problem.key_size)), in_columns))

    def _initial(self) -> ir.Value:
        initial, entries = self.initial, list[ir.Value]()
        if initial is None:
            return matrix_zero()

        def entry(i: int, place: list[ir.Value], inside: ir.Value) -> None:
            at = [self.batch, self.number, *place]
            entries.extend(choose(inside, lambda: [get(initial, at)], [f32(0.0)]))

        self._each_entry(entry)
        return vector.from_elements(matrix_zero().type, entries)

    def _store(self, state: ir.Value, target: ir.Value, place: Sequence[ir.Value]) -> None:
        if self.problem.value_size % QUARTER == 0 and not self.on_values:
            column = add(self.first_column, self.four)
            inside = arith.andi(self.in_keys, compare("slt", column, index(self.problem.value_size)))
            when(inside, lambda: store(state, target, [*place, self.key_row, column]))
            return

        def entry(i: int, at: list[ir.Value], inside: ir.Value) -> None:
            when(inside, lambda: put(element_at(state, i), target, [*place, *at]))

        self._each_entry(entry)

    def _block(self, first: ir.Value, state: ir.Value) -> ir.Value:
        """Returns the state after 16 steps; the lane takes four of them, for its row of the state and a column."""
        keys, values, factors = [], [], []
        channel = minimum(self.column, self.problem.value_size - 1) if self.on_values else self.safe_row
        for i in range(QUARTER):
            token, inside = self.at_step(add(first, add(self.four, i)))
            place = self.of_state(token, self.safe_row)
            keys.append(self.key(self.named["k"], place, arith.andi(inside, self.in_keys)))
            values.append(self.value(token, self.column, inside))
            factors.append(self.decay(token, channel, inside))
        if self.problem.decay_axis != "none":
            decayed, products = values if self.on_values else keys, self.products_of(factors)
            for i in range(QUARTER):
                decayed[i] = arith.mulf(decayed[i], products.behind[i + 1])
            state = scaled(state, products.whole)
        for key, value in zip(keys, values, strict=True):
            x, y = (key, value) if self.on_values else (value, key)
            state = matrix_multiply("f32", x, y, state)
        return state
