"""The kernel for linear recurrences with a rank-one part, as ``recurrence`` tells it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes.dialect_fused import OUT
from spikingbrain.passes.kernels.builders import (
    LINE_BYTES,
    Index,
    add,
    compare,
    get,
    has_fma,
    index,
    load,
    loop,
    minimum,
    scratch,
    splat,
    store,
    sub,
    when,
)
from spikingbrain.passes.kernels.recurrence_base import (
    SCRATCH_BYTES,
    Operands,
    Piece,
    Problem,
    RecurrenceKernel,
    each_tile,
    pieces,
    vector_lanes,
)
from spikingbrain.passes.kernels.recurrence_operands import Computed
from spikingbrain.target import Target

STEPS = (16, 8, 4, 2, 1)  # of a chunk; more than 16 gained nothing


@dataclass(frozen=True)
class Schedule:
    """How one recurrence is blocked for one target.

    Attributes:
        lanes: values per vector.
        vectors: vectors of each row in a block of columns.
        queries: queries of a state that are answered in one pass over it.
        steps: steps of a chunk.
        fused: whether the target multiplies and adds in one instruction.
    """

    lanes: int
    vectors: int
    queries: int
    steps: int
    fused: bool

    def blocks(self, problem: Problem) -> int:
        """Returns how many workgroups share a state."""
        return 1


def plan(problem: Problem, target: Target) -> Schedule:
    """Returns the blocking for an op. Raises UnsupportedOp when the kernel cannot serve it or the target."""
    lanes, registers = vector_lanes(target), target.vector_registers
    steps_allowed = [n for n in STEPS if n <= target.tuning.recurrence_steps]
    steps = next((n for n in steps_allowed if scratch_bytes(problem, n) <= SCRATCH_BYTES), 0)
    if not steps:
        raise UnsupportedOp(
            f"no recurrence kernel for states of {problem.key_size}x{problem.value_size}",
            why=f"one step exceeds {SCRATCH_BYTES} bytes of scratch",
            hint="the portable form",
        )

    # Measured: two vectors are best, but for one query with few registers, where operands come from memory anyway.
    wanted = 4 if problem.group == 1 and registers < 32 else 2
    vectors = next(n for n in (wanted, 2, 1) if n == 1 or n * lanes <= problem.value_size)
    return Schedule(
        lanes=lanes,
        vectors=vectors,
        # Outputs find registers beside the next predictions, a row and a few scalars.
        queries=min(problem.group, max(1, (registers - 6) // vectors - 1)),
        steps=steps,
        fused=has_fma(target),
    )


def _scratch_shapes(problem: Problem, steps: int) -> dict[str, list[int]]:
    """Returns the buffers of a kernel that takes so many steps at a time.

    What is computed for each row of the state is computed once, for all blocks of columns; outputs wait for the last block.
    """
    by_row: list[str] = [name for name in ("k", "erase", "predict") if name in problem.computed]
    by_row += ["decay"] if problem.decay_axis == "key" else []
    shapes = {"predictions": [problem.value_size]} | {name: [steps, problem.key_size] for name in by_row}
    if "q" in problem.computed:
        shapes["q"] = [steps, problem.group, problem.key_size]
    if OUT in problem.computed:
        shapes[OUT] = [steps, problem.group, problem.value_size]
    return shapes


def scratch_bytes(problem: Problem, steps: int) -> int:
    shapes = _scratch_shapes(problem, steps).values()
    return sum(math.prod(shape) * 4 + LINE_BYTES for shape in shapes) + LINE_BYTES


class Step(NamedTuple):
    """What the rows of a block share in one step: ``n`` of the chunk, at ``token``, before ``following``.

    ``predictions`` are ``predict^T S``, ``factors`` the decays where they are the same for all rows; by column vector.
    """

    n: ir.Value
    token: ir.Value
    following: ir.Value
    values: Sequence[ir.Value]
    predictions: Sequence[ir.Value]
    factors: Sequence[ir.Value]


class Kernel(RecurrenceKernel):
    """The sequential schedule.

    A step is one pass over a block of columns: a row is loaded, updated, read by the queries and by the next step's
    prediction, and stored. ``n`` counts steps from the chunk's first.
    """

    def __init__(
        self,
        problem: Problem,
        schedule: Schedule,
        workgroup: Sequence[ir.Value],
        operands: Operands,
    ):
        super().__init__(problem, schedule.lanes, schedule.fused, workgroup, operands)
        self.schedule = schedule
        self.blocks = pieces(problem.value_size, schedule.lanes, schedule.vectors)

    def build(self) -> None:
        shapes = _scratch_shapes(self.problem, self.schedule.steps)
        buffers = scratch([(shape, ir.F32Type.get()) for shape in shapes.values()])
        self.buffers = dict(zip(shapes, buffers, strict=True))
        self.predictions = self.buffers["predictions"]
        self.begin(0, self.problem.value_size)

        def start() -> None:
            if "predict" in self.buffers:
                self._prepare_rows(self._predict, self.token(0), index(0))
            each_tile(self.blocks, self._first_predictions)
            loop(0, self.length, self.schedule.steps, self._chunk)

        when(compare("ugt", self.length, index(0)), start)

    def _enter(self, piece: Piece, column: ir.Value) -> None:
        """Makes a block of columns the one that the functions below work on."""
        self.columns = [add(column, c * piece.lanes) for c in range(piece.vectors)]
        self.width, self.block_lanes = piece.vectors, piece.lanes

    def _first_predictions(self, piece: Piece, column: ir.Value) -> None:
        self._enter(piece, column)

        def row_sums(row: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            if "predict" in self.buffers:
                entry = get(self.buffers["predict"], [0, row])
            else:
                entry = self._predict.get(self.of_state(self.token(0), row))
            predict = splat(entry, piece.lanes)
            return [self.fma(predict, x, total) for x, total in zip(self._load(row), sums, strict=True)]

        zero = [splat(0.0, piece.lanes)] * piece.vectors
        for total, c in zip(loop(0, self.problem.key_size, 1, row_sums, zero), self.columns, strict=True):
            store(total, self.predictions, [c])

    def _chunk(self, first: ir.Value) -> None:
        self.first = first
        count = minimum(sub(self.length, first), self.schedule.steps)
        if set(self.buffers) - {"predictions", OUT}:
            loop(0, count, 1, self._prepare)

        def block(piece: Piece, column: ir.Value) -> None:
            self._enter(piece, column)
            predictions = [load(self.predictions, [c], piece.lanes) for c in self.columns]
            predictions = loop(0, count, 1, self._step, predictions)
            for prediction, c in zip(predictions, self.columns, strict=True):
                store(prediction, self.predictions, [c])

        each_tile(self.blocks, block)
        if OUT in self.buffers:
            loop(0, count, 1, self._finish)

    # Rows of the block

    def _load(self, row: Index) -> list[ir.Value]:
        place = [self.batch, self.number, row]
        return [load(self.state, [*place, c], self.block_lanes) for c in self.columns]

    def _store(self, values: Sequence[ir.Value], row: Index) -> None:
        for x, c in zip(values, self.columns, strict=True):
            store(x, self.state, [self.batch, self.number, row, c])

    def _scalar(self, source: Computed, step: Step, row: Index) -> ir.Value:
        """Returns a step's entry for a row, of ``predict`` that of the step to come."""
        if (name := source.part.name) in self.buffers:
            return splat(get(self.buffers[name], [step.n, row]), self.block_lanes)
        token = step.following if name == "predict" else step.token
        return splat(source.get(self.of_state(token, row)), self.block_lanes)

    @property
    def _predict(self) -> Computed:
        assert self.predict is not None
        return self.predict

    # Steps

    def _step(self, n: ir.Value, *predictions: ir.Value) -> list[ir.Value]:
        """Makes a step, given the predictions of its columns; returns those of the next step."""
        p, at = self.problem, add(self.first, n)
        token, following = self.token(at), self.later_token(at, 1)
        self._fetch_ahead(at)
        values = [self.v.load(self.of_state(token, c), self.block_lanes) for c in self.columns]
        step = Step(n, token, following, values, predictions, self._factors(token))
        first, rest = range(self.schedule.queries), range(self.schedule.queries, p.group)
        if p.exclusive:
            self._read_only(step, rest)
        sums = [splat(0.0, self.block_lanes)] * (self.width * (1 + len(first)))
        sums = loop(0, p.key_size, 1, lambda row, *sums: self._row(step, row, first, sums), sums)
        self._write_outputs(step, first, sums[self.width :])
        if not p.exclusive:
            self._read_only(step, rest)
        return sums[: self.width]

    def _row(self, step: Step, row: ir.Value, queries: range, sums: Sequence[ir.Value]) -> list[ir.Value]:
        """Updates a row; returns ``sums``, the next predictions and then the queries' outputs, with it added."""
        predictions, outputs = sums[: self.width], sums[self.width :]
        state = self._load(row)
        if self.problem.exclusive:
            outputs = self._read(step, row, queries, state, outputs)
        assert self.erase is not None
        erase, key = self._scalar(self.erase, step, row), self._scalar(self.k, step, row)
        factors = step.factors
        if "decay" in self.buffers:
            factors = [splat(get(self.buffers["decay"], [step.n, row]), self.block_lanes)] * self.width
        for c in range(self.width):
            x = arith.mulf(factors[c], state[c]) if factors else state[c]
            state[c] = self.fma(key, step.values[c], self.fma(erase, step.predictions[c], x))
        if not self.problem.exclusive:
            outputs = self._read(step, row, queries, state, outputs)
        predict = self._scalar(self._predict, step, row)
        self._store(state, row)
        return [self.fma(predict, x, total) for x, total in zip(state, predictions, strict=True)] + list(
            outputs
        )

    def _read(
        self,
        step: Step,
        row: ir.Value,
        queries: range,
        state: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
    ) -> list[ir.Value]:
        result = []
        for i, g in enumerate(queries):
            if "q" in self.buffers:
                entry = get(self.buffers["q"], [step.n, g, row])
            else:
                entry = self.q.get(self.of_query(step.token, g, row))
            q = splat(entry, self.block_lanes)
            sums = outputs[i * self.width : (i + 1) * self.width]
            result += [self.fma(q, x, total) for x, total in zip(state, sums, strict=True)]
        return result

    def _read_only(self, step: Step, queries: range) -> None:
        """Answers queries for which the pass that updates the state has no registers."""
        for start in range(0, len(queries), self.schedule.queries):
            some = queries[start : start + self.schedule.queries]

            def visit(row: ir.Value, *sums: ir.Value, some: range = some) -> list[ir.Value]:
                return self._read(step, row, some, self._load(row), sums)

            zero = [splat(0.0, self.block_lanes)] * (self.width * len(some))
            self._write_outputs(step, some, loop(0, self.problem.key_size, 1, visit, zero))

    def _write_outputs(self, step: Step, queries: range, outputs: Sequence[ir.Value]) -> None:
        for i, g in enumerate(queries):
            part = outputs[i * self.width : (i + 1) * self.width]
            if self.problem.bonus:
                weight = splat(self.bonus_weight(step.token, g), self.block_lanes)
                part = [self.fma(weight, v, o) for v, o in zip(step.values, part, strict=True)]
            for output, c in zip(part, self.columns, strict=True):
                if OUT in self.buffers:
                    store(output, self.buffers[OUT], [step.n, g, c])
                else:
                    store(output, self.o, self.of_query(step.token, g, c))

    def _finish(self, n: ir.Value) -> None:
        """Writes a step's outputs."""
        token, columns = self.token(add(self.first, n)), pieces(self.problem.value_size, self.lanes)

        def query(g: Index) -> None:
            outputs = lambda column, lanes: load(self.buffers[OUT], [n, g, column], lanes)  # noqa: E731
            self.write(token, g, 0, columns, outputs)

        self.each_query(query)

    # What is computed for rows

    def _prepare(self, n: ir.Value) -> None:
        """Leaves in scratch what a step computes for rows."""
        at = add(self.first, n)
        token, following = self.token(at), self.later_token(at, 1)
        for source in (self.k, self.erase, self.predict):
            if source is not None and source.part.name in self.buffers:
                self._prepare_rows(source, following if source.part.name == "predict" else token, n)

        def tile(piece: Piece, row: ir.Value) -> None:
            lanes = piece.lanes
            if "decay" in self.buffers:
                store(self.factor(self.row_decay(token, row, lanes)), self.buffers["decay"], [n, row])
            if "q" in self.buffers:
                self.each_query(lambda g: query(g, row, lanes))

        def query(g: Index, row: ir.Value, lanes: int) -> None:
            store(self.q.load(self.of_query(token, g, row), lanes), self.buffers["q"], [n, g, row])

        each_tile(pieces(self.problem.key_size, self.lanes), tile)

    def _prepare_rows(self, source: Computed, token: ir.Value, n: ir.Value) -> None:
        def tile(piece: Piece, row: ir.Value) -> None:
            value = source.load(self.of_state(token, row), piece.lanes)
            store(value, self.buffers[source.part.name], [n, row])

        each_tile(pieces(self.problem.key_size, self.lanes), tile)

    def _factors(self, token: ir.Value) -> list[ir.Value]:
        """Returns a step's factors of the block's columns, where they are the same for all rows."""
        lanes = self.block_lanes
        if self.problem.decay_axis == "head":
            return [self.factor(self.row_decay(token, 0, lanes))] * self.width
        if self.problem.decay_axis == "value":
            assert self.decay is not None
            decays = [self.decay.load(self.of_state(token, c), lanes) for c in self.columns]
            return [self.factor(decay) for decay in decays]
        return []

    def _fetch_ahead(self, step: ir.Value) -> None:
        """Asks for the operands of the next chunk's step; the first block of columns does it for all."""
        token = self.later_token(step, self.schedule.steps)

        def fetch() -> None:
            line = LINE_BYTES // 4
            loop(0, self.problem.key_size, line, lambda row: self.fetch_keys(token, row))
            loop(0, self.problem.value_size, line, lambda column: self.fetch_values(token, column))

        when(compare("eq", self.columns[0], index(0)), fetch)
