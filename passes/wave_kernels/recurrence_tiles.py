"""What the two launches of a recurrence by tiles share: how it is cut, and a lane's place in a tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith, vector

from spikingbrain.passes.kernels.builders import (
    Index,
    add,
    compare,
    f32,
    floor_div,
    index,
    loop,
    minimum,
    mul,
    rem,
    sub,
)
from spikingbrain.passes.kernels.recurrence_base import Operands, Problem
from spikingbrain.passes.kernels.recurrence_operands import Computed
from spikingbrain.passes.wave_kernels.builders import (
    TILE,
    WAVE,
    element_at,
    from_lane_xor,
    matrix_multiply,
    matrix_zero,
    thread,
)
from spikingbrain.passes.wave_kernels.recurrence_base import Places, element

MOST_VALUES = 512  # of an output's row, kept in the registers of 16 lanes until its sums are known
QUARTER = 4  # lanes that hold a row of a tile, and the numbers of it that each holds


@dataclass(frozen=True)
class Schedule:
    """How one recurrence is cut.

    Attributes:
        chunk: steps of a chunk, a multiple of 16.
        rows: rows of the state, up to a multiple of 16.
        waves: of a block of the first launch.
    """

    chunk: int
    rows: int
    waves: int

    @property
    def parts(self) -> int:
        """Blocks of 16 steps of a chunk."""
        return self.chunk // TILE

    def blocks(self, problem: Problem) -> int:
        """Returns how many blocks would have to share a row of outputs for registers to keep it."""
        return -(-problem.value_size // MOST_VALUES)


class Tiles(Places):
    """What both launches know of a lane: its row of a tile as an operand, and the first of its four as a result."""

    def __init__(self, problem: Problem, schedule: Schedule, operands: Operands):
        super().__init__(problem, operands)
        self.schedule, self.thread = schedule, thread()
        self.wave, lane = floor_div(self.thread, WAVE), rem(self.thread, WAVE)
        self.quarter = floor_div(lane, TILE)
        self.row, self.four = rem(lane, TILE), mul(self.quarter, QUARTER)
        self.on_values = problem.decay_axis == "value"

    def at_step(self, step: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Returns the token of a step, that of the last one beyond time, and whether the step is one of time."""
        return self.token(minimum(step, sub(self.length, 1))), compare("slt", step, self.length)

    def value(self, token: ir.Value, column: ir.Value, inside: ir.Value) -> ir.Value:
        """Returns an entry of v, 0 outside."""
        inside = arith.andi(inside, compare("slt", column, index(self.problem.value_size)))
        place = self.of_state(token, minimum(column, self.problem.value_size - 1))
        return arith.select(inside, element(self.named["v"], place), f32(0.0))

    def key(self, source: Computed, place: list[Index], inside: ir.Value) -> ir.Value:
        """Returns an entry of q or k, whose place is one of the operand, or 0."""
        return arith.select(inside, element(source, place), f32(0.0))

    def decay(self, token: ir.Value, row: Index, inside: ir.Value) -> ir.Value:
        """Returns what a step multiplies a row of the state with, or a column where decays are of values; 1 beyond time."""
        if self.problem.decay_axis == "none":
            return f32(1.0)
        place = self.of_state(token, row)
        if self.problem.decay_axis == "head":
            place = place[:3]
        return arith.select(inside, self.factor(element(self.named["decay"], place)), f32(1.0))

    def add_by_steps(
        self,
        sums: ir.Value,
        scores: Sequence[ir.Value],
        values: Sequence[ir.Value],
        reads_itself: bool,
        factor: Callable[[ir.Value], ir.Value] | None = None,
    ) -> ir.Value:
        """Returns the sums of a block's rows with its own values, one step after the other.

        A row that does not read a value stays as it is, whatever that is. ``scores`` and ``values`` are the lane's four.
        ``factor`` of a step is what it multiplies sums with, but for a bonus.
        """

        def quarter(n: ir.Value, sums: ir.Value) -> list[ir.Value]:
            is_mine = compare("eq", self.quarter, n)
            for i in range(QUARTER):
                score, value = (arith.select(is_mine, x[i], f32(0.0)) for x in (scores, values))
                terms = matrix_multiply("f32", score, value, matrix_zero())
                step = add(mul(n, QUARTER), i)
                decay = None if factor is None else factor(step)
                found = []
                for j in range(QUARTER):
                    before, row = element_at(sums, j), add(self.four, j)
                    decayed = before
                    if decay is not None:
                        decayed = arith.mulf(before, decay)
                        if self.problem.bonus:
                            decayed = arith.select(compare("eq", step, row), before, decayed)
                    after = arith.addf(decayed, element_at(terms, j))
                    reads = compare("sle" if reads_itself else "slt", step, row)
                    found.append(arith.select(reads, after, before))
                sums = vector.from_elements(sums.type, found)
            return [sums]

        return loop(0, QUARTER, 1, quarter, [sums])[0]

    def products_of(self, factors: Sequence[ir.Value]) -> Products:
        """Returns the products of a channel's 16 decays, of which the lane has four."""
        one = f32(1.0)
        before, behind = [one], [one]
        for factor in factors:
            before.append(arith.mulf(before[-1], factor))
        for factor in reversed(factors):
            behind.insert(0, arith.mulf(behind[0], factor))
        other = from_lane_xor(before[-1], TILE)
        pair = arith.mulf(before[-1], other)
        others = from_lane_xor(pair, 2 * TILE)
        is_first = compare("eq", rem(self.quarter, 2), index(0))
        in_first_half = compare("slt", self.quarter, index(2))
        first = arith.mulf(
            arith.select(is_first, one, other), arith.select(in_first_half, one, others)
        )  # the decays of the lanes with earlier steps
        last = arith.mulf(arith.select(is_first, other, one), arith.select(in_first_half, others, one))
        return Products(
            [arith.mulf(first, product) for product in before],
            [arith.mulf(product, last) for product in behind],
            arith.mulf(pair, others),
        )


@dataclass(frozen=True)
class Products:
    """Products of a channel's decays in a block of 16 steps: ``before[i]`` of those before the lane's i-th step.

    ``behind[i]`` are of those from its i-th step on; both have five entries. ``whole`` is of all.
    """

    before: list[ir.Value]
    behind: list[ir.Value]
    whole: ir.Value


def scaled(values: ir.Value, factor: ir.Value) -> ir.Value:
    """Returns a vector times a number."""
    elements = [arith.mulf(element_at(values, i), factor) for i in range(QUARTER)]
    return vector.from_elements(values.type, elements)
