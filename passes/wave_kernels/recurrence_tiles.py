"""What the two launches of a recurrence by tiles share: how it is cut, and a lane's place in a tile."""

from __future__ import annotations

from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes.kernels.builders import (
    Index,
    compare,
    f32,
    floor_div,
    index,
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
        self.row, self.four = rem(lane, TILE), mul(floor_div(lane, TILE), QUARTER)

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
        """Returns what a step multiplies a row of the state with, 1 beyond time."""
        if self.problem.decay_axis == "none":
            return f32(1.0)
        place = self.of_state(token, row)
        if self.problem.decay_axis == "head":
            place = place[:3]
        return arith.select(inside, self.factor(element(self.named["decay"], place)), f32(1.0))
