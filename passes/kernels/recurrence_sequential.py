"""The kernel for linear recurrences with a rank-one part, as ``recurrence`` tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith

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
    mul,
    scratch,
    splat,
    store,
    when,
)
from spikingbrain.passes.kernels.recurrence_base import (
    SCRATCH_BYTES,
    Problem,
    RecurrenceKernel,
    pieces,
    vector_lanes,
)
from spikingbrain.target import Target

BLOCK_BYTES = 16 << 10  # of a block of the state: half of the first cache
AHEAD = 4  # steps between asking for operands and using them


@dataclass(frozen=True)
class Schedule:
    """How one recurrence is blocked for one target.

    Attributes:
        lanes: values per vector.
        vectors: vectors of a row of the workgroup's block of the state.
        rows: rows that one turn of the loop takes.
        queries: queries of a state that are answered in one pass over it.
        packed: whether the block is kept in scratch; else it is worked on where it is.
        fused: whether the target multiplies and adds in one instruction.
    """

    lanes: int
    vectors: int
    rows: int
    queries: int
    packed: bool
    fused: bool

    def blocks(self, problem: Problem) -> int:
        """Returns how many workgroups share a state."""
        return -(-problem.value_size // (self.lanes * self.vectors))


def plan(problem: Problem, target: Target) -> Schedule:
    """Returns the blocking for an op. Raises UnsupportedOp when the kernel cannot serve the target."""
    lanes, registers = vector_lanes(target), target.vector_registers
    row_bytes = 4 * lanes * problem.key_size
    vectors = 2 if 2 * row_bytes <= BLOCK_BYTES and 2 * lanes <= problem.value_size else 1
    decays = 4 * problem.key_size + LINE_BYTES
    packed = problem.time != 1 and vectors * row_bytes + decays + 2 * LINE_BYTES <= SCRATCH_BYTES
    # Registers: predictions now and next, values, and the state, of each vector; a few broadcast scalars.
    queries = max(1, (registers - 4 * vectors - 4) // vectors)
    return Schedule(
        lanes=lanes,
        vectors=vectors,
        rows=2,
        queries=min(problem.group, queries),
        packed=packed,
        fused=has_fma(target),
    )


class Kernel(RecurrenceKernel):
    """The sequential schedule.

    One pass over the block per step: a row is loaded, updated, read by the queries and by the next step's prediction,
    and stored. ``row`` counts from the state's first, and so does ``column``.
    """

    def __init__(
        self,
        problem: Problem,
        schedule: Schedule,
        workgroup: Sequence[ir.Value],
        operands: Mapping[str, ir.Value],
    ):
        super().__init__(problem, schedule.lanes, schedule.fused, workgroup, operands)
        self.schedule = schedule

    def build(self) -> None:
        p, s = self.problem, self.schedule
        width = s.lanes * s.vectors
        shapes = [[p.key_size, width]] * s.packed + [[p.key_size]] * (p.decay_axis == "key")
        buffers = scratch([(shape, ir.F32Type.get()) for shape in shapes]) if shapes else []
        self.packed = buffers[0] if s.packed else None
        self.decays = buffers[-1] if p.decay_axis == "key" else None
        whole = p.value_size // width * width
        first = mul(self.block, width)

        def rest() -> None:
            for piece in pieces(p.value_size - whole, s.lanes, s.vectors):
                for i in range(piece.count):
                    start = whole + piece.start + i * piece.width
                    self._block(index(start), piece.lanes, piece.vectors)

        if whole == p.value_size:
            self._block(first, s.lanes, s.vectors)
        elif whole:
            inside = compare("ult", first, index(whole))
            when(inside, lambda: self._block(first, s.lanes, s.vectors), rest)
        else:
            rest()

    def _block(self, column: ir.Value, lanes: int, vectors: int) -> None:
        """Takes a block of columns through all steps."""
        self.columns = [add(column, c * lanes) for c in range(vectors)]
        self.width, self.block_lanes = vectors, lanes
        zero = [splat(0.0, lanes)] * vectors

        def first_row(row: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            state = [load(self.state, [self.batch, self.number, row, c], lanes) for c in self.columns]
            if self.packed is not None:
                self._store(state, row)
            w = self._scalar(self.predict, self.token(0), row)
            return [self.fma(w, x, total) for x, total in zip(state, sums, strict=True)]

        def start() -> None:
            predictions = loop(0, self.problem.key_size, 1, first_row, zero)
            loop(0, self.length, 1, self._step, predictions)
            if self.packed is not None:
                loop(0, self.problem.key_size, 1, copy_back)

        def copy_back(row: ir.Value) -> None:
            for c, x in zip(self.columns, self._load(row), strict=True):
                store(x, self.state, [self.batch, self.number, row, c])

        when(compare("ugt", self.length, index(0)), start)

    # Rows of the block

    def _place(self, row: Index) -> tuple[ir.Value, list[list[Index]]]:
        if self.packed is not None:
            return self.packed, [[row, c * self.block_lanes] for c in range(self.width)]
        return self.state, [[self.batch, self.number, row, c] for c in self.columns]

    def _load(self, row: Index) -> list[ir.Value]:
        source, places = self._place(row)
        return [load(source, place, self.block_lanes) for place in places]

    def _store(self, state: Sequence[ir.Value], row: Index) -> None:
        target, places = self._place(row)
        for x, place in zip(state, places, strict=True):
            store(x, target, place)

    def _scalar(self, source: ir.Value, token: ir.Value, row: Index) -> ir.Value:
        return splat(get(source, self.of_state(token, row)), self.block_lanes)

    # Steps

    def _step(self, n: ir.Value, *predictions: ir.Value) -> list[ir.Value]:
        """Makes a step, given ``predict^T S`` of its columns; returns that of the next step."""
        p, s, lanes = self.problem, self.schedule, self.block_lanes
        token, following = self.token(n), self.later_token(n, 1)
        self._fetch_ahead(n)
        self._prepare_decays(token)
        values = [load(self.v, self.of_state(token, c), lanes) for c in self.columns]
        first, rest = list(range(p.group))[: s.queries], list(range(p.group))[s.queries :]
        if p.exclusive:
            self._read_only(token, rest, values)
        zero = splat(0.0, lanes)
        sums = [zero] * (self.width * (1 + len(first)))

        def rows(row: ir.Value, *sums: ir.Value, count: int = s.rows) -> list[ir.Value]:
            result = list(sums)
            for r in range(count):
                result = self._row(add(row, r), token, following, predictions, values, first, result)
            return result

        whole = p.key_size // s.rows * s.rows
        sums = loop(0, whole, s.rows, rows, sums)
        for row in range(whole, p.key_size):
            sums = rows(index(row), *sums, count=1)
        self._write_outputs(token, first, sums[self.width :], values)
        if not p.exclusive:
            self._read_only(token, rest, values)
        return sums[: self.width]

    def _row(
        self,
        row: ir.Value,
        token: ir.Value,
        following: ir.Value,
        predictions: Sequence[ir.Value],
        values: Sequence[ir.Value],
        queries: Sequence[int],
        sums: Sequence[ir.Value],
    ) -> list[ir.Value]:
        """Updates a row; returns ``sums``, the next predictions and then the queries' outputs, with it added."""
        next_predictions, outputs = list(sums[: self.width]), list(sums[self.width :])
        state = self._load(row)
        if self.problem.exclusive:
            outputs = self._read(row, token, queries, state, outputs)
        erase = self._scalar(self.erase, token, row)
        key = self._scalar(self.k, token, row)
        for c, decay in enumerate(self._decays_of(row)):
            x = state[c] if decay is None else arith.mulf(decay, state[c])
            state[c] = self.fma(key, values[c], self.fma(erase, predictions[c], x))
        if not self.problem.exclusive:
            outputs = self._read(row, token, queries, state, outputs)
        predict = self._scalar(self.predict, following, row)
        next_predictions = [self.fma(predict, x, t) for x, t in zip(state, next_predictions, strict=True)]
        self._store(state, row)
        return next_predictions + outputs

    def _read(
        self,
        row: ir.Value,
        token: ir.Value,
        queries: Sequence[int],
        state: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
    ) -> list[ir.Value]:
        result = []
        for i, g in enumerate(queries):
            q = splat(get(self.q, self.of_query(token, g, row)), self.block_lanes)
            sums = outputs[i * self.width : (i + 1) * self.width]
            result += [self.fma(q, x, total) for x, total in zip(state, sums, strict=True)]
        return result

    def _read_only(self, token: ir.Value, queries: Sequence[int], values: Sequence[ir.Value]) -> None:
        """Answers queries for which the pass that updates the state has no registers."""
        for start in range(0, len(queries), self.schedule.queries):
            some = queries[start : start + self.schedule.queries]

            def row(row: ir.Value, *sums: ir.Value, some: Sequence[int] = some) -> list[ir.Value]:
                return self._read(row, token, some, self._load(row), sums)

            zero = [splat(0.0, self.block_lanes)] * (self.width * len(some))
            self._write_outputs(token, some, loop(0, self.problem.key_size, 1, row, zero), values)

    def _write_outputs(
        self, token: ir.Value, queries: Sequence[int], outputs: Sequence[ir.Value], values: Sequence[ir.Value]
    ) -> None:
        for i, g in enumerate(queries):
            part = list(outputs[i * self.width : (i + 1) * self.width])
            if self.problem.bonus:
                weight = splat(self.bonus_weight(token, g), self.block_lanes)
                part = [self.fma(weight, v, o) for v, o in zip(values, part, strict=True)]
            for output, c in zip(part, self.columns, strict=True):
                store(output, self.o, self.of_query(token, g, c))

    # Decays

    def _prepare_decays(self, token: ir.Value) -> None:
        """Leaves a step's factors where its rows find them: in scratch or in registers."""
        axis, lanes = self.problem.decay_axis, self.block_lanes
        if axis == "key":
            for piece in pieces(self.problem.key_size, self.lanes):

                def tile(row: ir.Value, width: int = piece.lanes) -> None:
                    store(self.factor(self.row_decay(token, row, width)), self.decays, [row])

                loop(piece.start, piece.end, piece.lanes, tile)
        elif axis == "head":
            self.factors = [self.factor(self.row_decay(token, 0, lanes))] * self.width
        elif axis == "value":
            self.factors = [
                self.factor(load(self.decay, self.of_state(token, c), lanes)) for c in self.columns
            ]

    def _decays_of(self, row: ir.Value) -> Sequence[ir.Value | None]:
        if self.problem.decay_axis == "none":
            return [None] * self.width
        if self.problem.decay_axis == "key":
            return [splat(get(self.decays, [row]), self.block_lanes)] * self.width
        return self.factors

    def _fetch_ahead(self, n: ir.Value) -> None:
        token, step = self.later_token(n, AHEAD), LINE_BYTES // 4
        loop(0, self.problem.key_size, step, lambda row: self.fetch_keys(token, row))
        for c in self.columns:
            self.fetch_values(token, c)
