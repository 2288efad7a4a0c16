"""The wave kernel of linear recurrences that goes step by step: for few tokens, and for what only a step can do.

Every column of the state is spread over a few lanes of one wave, which keep their rows in registers for the whole launch: the
state is read and written once, and steps meet no barrier. What steps read is staged in shared memory for several of
them, computed where the operand says how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith, math

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes.dialect_fused import OUT, SUM
from spikingbrain.passes.kernels.builders import (
    Index,
    add,
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
    sub,
    when,
)
from spikingbrain.passes.kernels.recurrence_base import Operands, Problem
from spikingbrain.passes.kernels.recurrence_operands import Computed
from spikingbrain.passes.wave_kernels.builders import (
    SHARED_BYTES,
    WAVE,
    barrier,
    choose,
    over_lanes,
    registers,
    shared,
    thread,
)
from spikingbrain.passes.wave_kernels.recurrence_base import Places, element, finished
from spikingbrain.target import Target

MOST_ROWS = 64  # of the state in the registers of a lane
FEWEST_SHARES = 4  # of a column: 16 columns of a wave are a run of 64 bytes


@dataclass(frozen=True)
class Schedule:
    """How one recurrence is spread over threads.

    Attributes:
        waves: of a block.
        shares: lanes that share a column of the state.
        rows: rows of each of them.
        steps: steps that are staged at once.
    """

    waves: int
    shares: int
    rows: int
    steps: int

    @property
    def columns(self) -> int:
        """Value columns of a wave."""
        return WAVE // self.shares

    @property
    def threads(self) -> int:
        return self.waves * WAVE

    def blocks(self, problem: Problem) -> int:
        """Returns how many blocks share a state."""
        return -(-problem.value_size // (self.waves * self.columns))


def plan(problem: Problem, target: Target) -> Schedule:
    """Returns the schedule for an op: a block for a state, where it has threads enough. Raises UnsupportedOp for large heads."""
    shares = FEWEST_SHARES
    while problem.key_size > shares * MOST_ROWS and shares < WAVE:
        shares *= 2
    rows = -(-problem.key_size // shares)
    waves = min(target.tuning.step_waves, -(-problem.value_size // (WAVE // shares)))
    step_bytes = 4 * (sum(row_buffers(problem).values()) * rows * shares + 2 * waves * WAVE // shares + 1)
    most = target.tuning.staged_steps
    steps = min(most, (SHARED_BYTES - 4 * waves) // step_bytes, problem.time or most)
    if rows > MOST_ROWS or steps < 1:
        raise UnsupportedOp(
            f"no wave kernel for {problem.group} queries of a state of {problem.key_size}x{problem.value_size}",
            why=f"a column exceeds the registers of a wave, or a step {SHARED_BYTES} bytes of shared memory",
            hint="the portable form",
        )
    return Schedule(waves, shares, rows, steps)


def row_buffers(problem: Problem) -> dict[str, int]:
    """Returns how many numbers for each row of the state a step stages, by operand."""
    found = {"q": problem.group, "k": 1}
    if problem.decay_axis == "key":
        found["decay"] = 1
    if problem.rank_one:
        found |= {"erase": 1, "predict": 1}
    if problem.bonus:
        found["bonus"] = 1
    return found


class Kernel(Places):
    """The schedule: lane ``c + columns * r`` of a wave holds rows ``r + shares * i`` of its column c."""

    def __init__(
        self, problem: Problem, schedule: Schedule, workgroup: Sequence[ir.Value], operands: Operands
    ):
        super().__init__(problem, operands)
        self.schedule, kind = schedule, ir.F32Type.get()
        self.block, self.number, self.batch = workgroup
        self.columns, self.width = schedule.columns, schedule.waves * schedule.columns
        self.thread = thread()
        self.wave, self.lane = floor_div(self.thread, WAVE), rem(self.thread, WAVE)
        self.share = floor_div(self.lane, self.columns)
        self.own_column = add(mul(self.wave, self.columns), rem(self.lane, self.columns))  # in the block
        self.column = add(mul(self.block, self.width), self.own_column)
        self.in_columns = compare("slt", self.column, index(problem.value_size))
        self.safe_column = minimum(self.column, problem.value_size - 1)
        self.padded = schedule.rows * schedule.shares
        self.entries = registers(schedule.rows, kind)
        steps = schedule.steps
        self.by_row = {
            name: shared([steps, count * self.padded], kind) for name, count in row_buffers(problem).items()
        }
        by_column = ["v"] + (["decay"] if problem.decay_axis == "value" else [])
        self.by_column = {name: shared([steps, self.width], kind) for name in by_column}
        self.by_step = shared([steps], kind) if problem.decay_axis == "head" else None
        self.sums = [source for source in operands.parts if source.part.name == SUM]
        self.partial_sums = shared([schedule.waves], kind) if self.sums else None

    def build(self) -> None:
        """Emits the body."""
        steps = self.schedule.steps
        self._each_row(lambda i, row, inside: put(self._initial(row, inside), self.entries, [i]))

        def several(first: ir.Value) -> None:
            count = minimum(steps, sub(self.length, first))
            self._stage(first, count)
            barrier()
            loop(0, count, 1, lambda n: self._step(n, self.token(add(first, n))))
            barrier()

        loop(0, self.length, steps, several)

        def keep(i: ir.Value, row: ir.Value, inside: ir.Value) -> None:
            when(inside, lambda: put(get(self.entries, [i]), self.state, self._place(row)))

        self._each_row(keep)

    # Rows of the thread

    def _each_row(self, body: Callable[[ir.Value, ir.Value, ir.Value], None]) -> None:
        """Emits ``body(i, row, inside)`` for the rows of the thread; ``inside`` the state or beyond."""

        def visit(i: ir.Value) -> None:
            row = self._row(i)
            inside = arith.andi(self.in_columns, compare("slt", row, index(self.problem.key_size)))
            body(i, row, inside)

        loop(0, self.schedule.rows, 1, visit)

    def _row(self, i: Index) -> ir.Value:
        return add(mul(i, self.schedule.shares), self.share)

    def _place(self, row: ir.Value) -> list[Index]:
        return [self.batch, self.number, row, self.column]

    def _initial(self, row: ir.Value, inside: ir.Value) -> ir.Value:
        if self.initial is None:
            return f32(0.0)
        initial = self.initial
        return choose(inside, lambda: [get(initial, self._place(row))], [f32(0.0)])[0]

    # What steps read

    def _stage(self, first: ir.Value, count: ir.Value) -> None:
        """Leaves in shared memory what steps read; 0 for rows and columns that the state has not."""
        for name, buffer in self.by_row.items():
            self._stage_rows(name, buffer, first, count)
        for name, buffer in self.by_column.items():

            def column(i: ir.Value, name: str = name, buffer: ir.Value = buffer) -> None:
                n, c = floor_div(i, self.width), rem(i, self.width)
                at = add(mul(self.block, self.width), c)
                inside = compare("slt", at, index(self.problem.value_size))
                place = self.of_state(self.token(add(first, n)), at)
                value = self._staged(self.named[name], place, inside)
                put(self.factor(value) if name == "decay" else value, buffer, [n, c])

            self._each(mul(count, self.width), column)
        if self.by_step is not None:
            by_step = self.by_step

            def step(n: ir.Value) -> None:
                decay = element(self.named["decay"], [self.batch, self.token(add(first, n)), self.number])
                put(self.factor(decay), by_step, [n])

            self._each(count, step)

    def _stage_rows(self, name: str, buffer: ir.Value, first: ir.Value, count: ir.Value) -> None:
        width, p = ir.MemRefType(buffer.type).shape[1], self.problem

        def entry(i: ir.Value) -> None:
            n, at = floor_div(i, width), rem(i, width)
            row = rem(at, self.padded)
            token, inside = self.token(add(first, n)), compare("slt", row, index(p.key_size))
            if name == "q":
                place = self.of_query(token, floor_div(at, self.padded), row)
            else:
                place = self.of_state(token, row)
            if name == "bonus":  # what multiplies the keys is the same at all steps
                weight = self._staged(self.named["bonus"], [0, 0, self.number, row], inside)
                value = arith.mulf(weight, self._staged(self.named["k"], place, inside))
            else:
                value = self._staged(self.named[name], place, inside)
            put(self.factor(value) if name == "decay" else value, buffer, [n, at])

        self._each(mul(count, width), entry)

    def _staged(self, source: Computed, place: Sequence[Index], inside: ir.Value) -> ir.Value:
        return choose(inside, lambda: [element(source, place)], [f32(0.0)])[0]

    def _each(self, count: ir.Value, body: Callable[[ir.Value], None]) -> None:
        """Spreads ``body(i)``, for i below count, over the threads of the block."""
        loop(self.thread, count, self.schedule.threads, body)

    # A step

    def _step(self, n: ir.Value, token: ir.Value) -> None:
        p = self.problem
        value = get(self.by_column["v"], [n, self.own_column])
        prediction = self._product("predict", n, 0) if p.rank_one else None
        if p.exclusive:
            self._read(n, token, value)
        factor = self._column_factor(n)

        def update(i: ir.Value) -> None:
            row, x = self._row(i), get(self.entries, [i])
            if p.decay_axis == "key":
                x = arith.mulf(get(self.by_row["decay"], [n, row]), x)
            elif factor is not None:
                x = arith.mulf(factor, x)
            if prediction is not None:
                x = math.fma(get(self.by_row["erase"], [n, row]), prediction, x)
            put(math.fma(get(self.by_row["k"], [n, row]), value, x), self.entries, [i])

        loop(0, self.schedule.rows, 1, update)
        if not p.exclusive:
            self._read(n, token, value)

    def _column_factor(self, n: ir.Value) -> ir.Value | None:
        """Returns a step's factor of the thread's column, where it is the same for all rows."""
        if self.by_step is not None:
            return get(self.by_step, [n])
        return get(self.by_column["decay"], [n, self.own_column]) if "decay" in self.by_column else None

    def _product(self, name: str, n: ir.Value, query: Index) -> ir.Value:
        """Returns the product of a staged row, of q that of a query, with the thread's column of the state."""
        first = mul(query, self.padded)

        def term(i: ir.Value, total: ir.Value) -> list[ir.Value]:
            weight = get(self.by_row[name], [n, add(first, self._row(i))])
            return [math.fma(weight, get(self.entries, [i]), total)]

        return self._over_shares(loop(0, self.schedule.rows, 1, term, [f32(0.0)])[0])

    def _over_shares(self, value: ir.Value) -> ir.Value:
        return over_lanes(arith.addf, value, self.schedule.shares, self.columns)

    # Outputs

    def _read(self, n: ir.Value, token: ir.Value, value: ir.Value) -> None:
        """Writes the outputs of a step, in the first of the lanes that share a column."""

        def query(g: ir.Value) -> None:
            output = self._product("q", n, g)
            if self.problem.bonus:
                output = math.fma(self._bonus(n, g), value, output)
            self._write(self.of_query(token, g, self.safe_column), output)

        loop(0, self.problem.group, 1, query)

    def _bonus(self, n: ir.Value, query: ir.Value) -> ir.Value:
        """Returns ``q . (bonus * k)``."""
        first = mul(query, self.padded)

        def term(i: ir.Value, total: ir.Value) -> list[ir.Value]:
            row = self._row(i)
            weight = get(self.by_row["q"], [n, add(first, row)])
            return [math.fma(weight, get(self.by_row["bonus"], [n, row]), total)]

        return self._over_shares(loop(0, self.schedule.rows, 1, term, [f32(0.0)])[0])

    def _write(self, place: list[Index], output: ir.Value) -> None:
        """Writes an output, which all lanes of the column hold; sums over the row are made first."""
        given: list[ir.Value] = []
        for source in self.sums:
            term = arith.select(self.in_columns, element(source, place, [output, *given]), f32(0.0))
            given.append(self._over_columns(term))
        writes = arith.andi(self.in_columns, compare("eq", self.share, index(0)))
        when(writes, lambda: put(finished(self.named.get(OUT), place, output, given), self.o, place))

    def _over_columns(self, term: ir.Value) -> ir.Value:
        """Returns the sum over the columns of the block, in every thread."""
        total, sums = over_lanes(arith.addf, term, self.columns), self.partial_sums
        when(compare("eq", self.lane, index(0)), lambda: put(total, sums, [self.wave]))
        barrier()
        add_up = lambda wave, total: [arith.addf(total, get(sums, [wave]))]  # noqa: E731
        (total,) = loop(0, self.schedule.waves, 1, add_up, [f32(0.0)])
        barrier()
        return total
