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
    from_lane_xor,
    matrix_multiply,
    matrix_zero,
)
from spikingbrain.passes.wave_kernels.recurrence_tiles import QUARTER, Schedule, Tiles


class Entering(Tiles):
    """The first launch: a wave takes a tile of the state, transposed, through time.

    ``operands.o`` is where entering states go, [B, chunks, S, K, V].
    """

    def __init__(
        self, problem: Problem, schedule: Schedule, workgroup: Sequence[ir.Value], operands: Operands
    ):
        super().__init__(problem, schedule, operands)
        tile, self.number, self.batch = workgroup
        tiles = schedule.rows // TILE
        self.key_row = add(mul(rem(tile, tiles), TILE), self.row)
        self.first_column = mul(add(mul(floor_div(tile, tiles), schedule.waves), self.wave), TILE)
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

    def _each_entry(self, body: Callable[[int, ir.Value, ir.Value], None]) -> None:
        """Emits ``body(i, column, inside)`` for the four entries of the state that the lane holds."""
        for i in range(QUARTER):
            column = add(self.first_column, add(self.four, i))
            inside = compare("slt", column, index(self.problem.value_size))
            body(i, column, arith.andi(self.in_keys, inside))

    def _initial(self) -> ir.Value:
        initial, entries = self.initial, list[ir.Value]()
        if initial is None:
            return matrix_zero()

        def entry(i: int, column: ir.Value, inside: ir.Value) -> None:
            place = [self.batch, self.number, self.key_row, column]
            entries.extend(choose(inside, lambda: [get(initial, place)], [f32(0.0)]))

        self._each_entry(entry)
        return vector.from_elements(matrix_zero().type, entries)

    def _store(self, state: ir.Value, target: ir.Value, place: Sequence[ir.Value]) -> None:
        if self.problem.value_size % QUARTER == 0:
            column = add(self.first_column, self.four)
            inside = arith.andi(self.in_keys, compare("slt", column, index(self.problem.value_size)))
            when(inside, lambda: store(state, target, [*place, self.key_row, column]))
            return

        def entry(i: int, column: ir.Value, inside: ir.Value) -> None:
            when(inside, lambda: put(element_at(state, i), target, [*place, self.key_row, column]))

        self._each_entry(entry)

    def _block(self, first: ir.Value, state: ir.Value) -> ir.Value:
        """Returns the state after 16 steps; the lane takes four of them, for its row of the state and a column."""
        keys, values, factors = [], [], []
        for i in range(QUARTER):
            token, inside = self.at_step(add(first, add(self.four, i)))
            place = self.of_state(token, self.safe_row)
            keys.append(self.key(self.named["k"], place, arith.andi(inside, self.in_keys)))
            values.append(self.value(token, add(self.first_column, self.row), inside))
            factors.append(self.decay(token, self.safe_row, inside))
        if self.problem.decay_axis != "none":
            later = f32(1.0)
            for i in reversed(range(QUARTER)):
                keys[i] = arith.mulf(keys[i], later)
                later = arith.mulf(later, factors[i])
            whole, behind = self._over_quarters(later)
            keys = [arith.mulf(key, behind) for key in keys]
            state = scaled(state, [whole] * QUARTER)
        for key, value in zip(keys, values, strict=True):
            state = matrix_multiply("f32", value, key, state)
        return state

    def _over_quarters(self, product: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Returns the product over the lanes of a row, and over those with later steps only."""
        one, quarter = f32(1.0), floor_div(self.four, QUARTER)
        other = from_lane_xor(product, TILE)
        pair = arith.mulf(product, other)
        others = from_lane_xor(pair, 2 * TILE)
        is_first = compare("eq", rem(quarter, 2), index(0))
        behind = arith.select(is_first, other, one)
        in_first_half = compare("slt", quarter, index(2))
        behind = arith.mulf(behind, arith.select(in_first_half, others, one))
        return arith.mulf(pair, others), behind


def scaled(values: ir.Value, factors: Sequence[ir.Value]) -> ir.Value:
    """Returns a vector times numbers, element by element."""
    elements = [arith.mulf(element_at(values, i), f) for i, f in enumerate(factors)]
    return vector.from_elements(values.type, elements)
