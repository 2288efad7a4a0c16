"""The launch before the others of a delta rule by tiles: what each block of 16 steps predicts, as a function of its start.

With p_t = predict_t^T S_(t-1), the rank-one part of a step is one more update, erase_t p_t^T. In a block that starts with S

    p = (1 - E)^-1 (A v + W S)

where row t of W is predict_t, decayed from the start of the block, and A and E hold the scores of predict against earlier k
and erase. 1 - E is unit lower triangular; forward substitution solves it for all columns of A and W at once. That knows
no state, so all blocks are solved at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch_mlir import ir
from torch_mlir.dialects import math

from spikingbrain.passes.kernels.builders import add, floor_div, get, index, load, loop, mul, put, rem
from spikingbrain.passes.kernels.recurrence_base import Operands, Problem
from spikingbrain.passes.wave_kernels.builders import TILE, WAVE, barrier, element_at, shared
from spikingbrain.passes.wave_kernels.recurrence_outputs import PAD
from spikingbrain.passes.wave_kernels.recurrence_outputs_of_keys import KeyOutputs
from spikingbrain.passes.wave_kernels.recurrence_tiles import QUARTER, Schedule

# Rows of a block's result: 16 of (1 - E)^-1 [A, W]; in the columns of W also k and erase, decayed to the end of the block,
# and the product of its decays.
KEYS, ERASES, WHOLE, ROWS = TILE, 2 * TILE, 3 * TILE, 3 * TILE + 1


def shared_bytes(rows: int) -> int:
    """Returns the shared memory of a block for a state of so many rows."""
    return 4 * (2 * TILE * (rows + PAD) + 2 * rows + TILE * (TILE + rows + PAD) + TILE * (TILE + PAD))


class Predictions(KeyOutputs):
    """A wave solves a block; its queries are ``predict``, read before each step.

    ``operands.o`` is [B, blocks, S, ROWS, 16 + K].
    """

    def __init__(
        self, problem: Problem, schedule: Schedule, workgroup: Sequence[ir.Value], operands: Operands
    ):
        super().__init__(problem, schedule, workgroup, operands)
        kind = ir.F32Type.get()
        self.columns = TILE + schedule.rows
        self.right = shared([TILE, self.columns + PAD], kind)
        self.from_erase = shared([TILE, TILE + PAD], kind)
        self.place = [self.batch, self.chunk, self.number]

    def build(self) -> None:
        """Emits the body."""
        self._take_queries()
        self._stage_keys()
        barrier()
        self._own_scores()

        def of_state(at: ir.Value) -> None:
            for i in range(QUARTER):
                column = add(mul(at, TILE), add(self.four, TILE + i))
                put(get(self.x, [add(mul(at, QUARTER), i)]), self.right, [self.row, column])

        self._each_tile_of_keys(of_state)
        for update, memory in zip(self.updates, (self.right, self.from_erase), strict=True):
            for i in range(QUARTER):
                put(get(update.scores, [index(i)]), memory, [self.row, add(self.four, i)])
        barrier()
        loop(self.thread, self.columns, WAVE, self._solve)
        self._copy_keys()

    def _solve(self, column: ir.Value) -> None:
        """Substitutes forward in one column, and writes it."""
        solved: list[ir.Value] = []
        for t in range(TILE):
            total = get(self.right, [t, column])
            for first in range(0, t, QUARTER):
                weights = load(self.from_erase, [t, first], QUARTER)
                for s in range(first, min(first + QUARTER, t)):
                    total = math.fma(element_at(weights, s - first), solved[s], total)
            solved.append(total)
            put(total, self.o, [*self.place, t, column])

    def _copy_keys(self) -> None:
        rows = self.schedule.rows
        for update, first in zip(self.updates, (KEYS, ERASES), strict=True):

            def copy(i: ir.Value, memory: ir.Value = update.rows, first: int = first) -> None:
                step, row = floor_div(i, rows), rem(i, rows)
                put(get(memory, [step, row]), self.o, [*self.place, add(step, first), add(row, TILE)])

            loop(self.thread, TILE * rows, WAVE, copy)

        def whole(row: ir.Value) -> None:
            put(get(self.products, [0, row]), self.o, [*self.place, WHOLE, add(row, TILE)])

        loop(self.thread, rows, WAVE, whole)
