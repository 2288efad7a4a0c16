"""The kernel for linear recurrences without a rank-one part, as ``recurrence`` tells it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes.kernels.builders import (
    LINE_BYTES,
    Index,
    add,
    folded,
    get,
    has_fma,
    index,
    load,
    loop,
    minimum,
    mul,
    no_larger,
    put,
    reduced,
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
from spikingbrain.target import Target

KEY_BLOCK = 32  # rows of the state whose keys and queries are prepared together
CHUNKS = (16, 12, 8, 6, 4, 3, 2, 1)  # steps; more than 16 gained nothing
SHORT_CHUNK = 4  # steps below which it is better to give a workgroup fewer columns

# A product of decays stays within 1e-13 .. 1e13 where it divides keys: the sum of its square and that of its inverse,
# over a chunk's steps, tells. Keys, values and states up to 1e12 each then keep clear of f32's range.
LARGEST_SQUARES = 1e26


@dataclass(frozen=True)
class Schedule:
    """How one recurrence is blocked for one target.

    Attributes:
        lanes: values per vector.
        rows: rows of the state held in registers, a power of two.
        vectors: vectors of each of them.
        steps: steps of a chunk.
        columns: value columns of a workgroup; divides the value size.
        fused: whether the target multiplies and adds in one instruction.
    """

    lanes: int
    rows: int
    vectors: int
    steps: int
    columns: int
    fused: bool

    def blocks(self, problem: Problem) -> int:
        """Returns how many workgroups share a state."""
        return problem.value_size // self.columns


def plan(problem: Problem, target: Target) -> Schedule:
    """Returns the blocking for an op. Raises UnsupportedOp when the kernel cannot serve it or the target."""
    lanes, size = vector_lanes(target), problem.value_size
    steps_allowed = [n for n in CHUNKS if n <= target.tuning.recurrence_steps]
    for columns in (size // parts for parts in range(1, size + 1) if size % parts == 0):
        steps = next((n for n in steps_allowed if scratch_bytes(problem, n, columns) <= SCRATCH_BYTES), 0)
        if steps >= SHORT_CHUNK or (steps and columns <= lanes):
            return Schedule(
                lanes=lanes,
                rows=4 if target.vector_registers >= 32 else 2,
                vectors=4,
                steps=steps if problem.time is None else max(1, min(steps, problem.time)),
                columns=columns,
                fused=has_fma(target),
            )
    raise UnsupportedOp(
        f"no recurrence kernel for {problem.group} queries of a state of {problem.key_size}x{size}",
        why=f"one step exceeds {SCRATCH_BYTES} bytes of scratch",
        hint="the portable form",
    )


def _scratch_shapes(problem: Problem, steps: int, columns: int) -> dict[str, list[int]]:
    """Returns the buffers of a kernel that takes so many steps and columns at a time."""
    rows, group = min(KEY_BLOCK, problem.key_size), problem.group
    shapes = {
        "values": [steps, columns],
        "outputs": [steps, group, columns],
        "keys": [steps, rows],
        "queries": [steps, group, rows],
    }
    if problem.decay_axis == "value":
        shapes |= {"decays": [steps, columns], "last": [columns]}
    elif problem.decay_axis != "none":
        shapes |= {"decays": [steps, rows], "last": [rows]}
    if problem.bonus:
        shapes["weights"] = [steps, group]
    return shapes


def scratch_bytes(problem: Problem, steps: int, columns: int) -> int:
    shapes = _scratch_shapes(problem, steps, columns).values()
    return sum(math.prod(shape) * 4 + LINE_BYTES for shape in shapes) + LINE_BYTES


class Product(NamedTuple):
    """The product of a chunk's decays before and after a step, the inverse of the latter, and a loop's next values."""

    before: ir.Value
    after: ir.Value
    inverse: ir.Value
    carried: list[ir.Value]


class Kernel(RecurrenceKernel):
    """The blocked schedule.

    Steps ``n`` count from the chunk's first; rows ``i`` from that of a key block, and columns from that of the
    workgroup. Decays are handled in one of two ways. *Scaled*: with A the product of the chunk's decays so far, the
    kernel holds ``S / A``, to which ``k / A`` is added and which ``q * A`` reads. *Plain*: the state is multiplied by
    each decay.
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
        self.first_column = mul(self.block, schedule.columns)
        self.columns = pieces(schedule.columns, schedule.lanes)
        self.by_row = problem.decay_axis in ("head", "key")
        self.by_column = problem.decay_axis == "value"

    def build(self) -> None:
        shapes = _scratch_shapes(self.problem, self.schedule.steps, self.schedule.columns)
        buffers = scratch([(shape, ir.F32Type.get()) for shape in shapes.values()])
        self.buffers = dict(zip(shapes, buffers, strict=True))
        self.begin(self.first_column, self.schedule.columns)
        loop(0, self.length, self.schedule.steps, self._chunk)

    def _chunk(self, first: ir.Value) -> None:
        p, safe = self.problem, None
        self.first, self.count = first, minimum(sub(self.length, first), self.schedule.steps)
        if self.by_column:
            safe = self._gather_values_scaled()
            unsafe = arith.xori(safe, arith.constant(safe.type, 1))
            when(unsafe, self._gather_values)
        else:
            self._gather_values()
        if p.bonus:
            self._each_step(
                lambda n, token, _: self.each_query(
                    lambda g: put(self.bonus_weight(token, g), self.buffers["weights"], [n, g])
                )
            )
        whole = p.key_size // KEY_BLOCK * KEY_BLOCK
        if whole:
            loop(0, whole, KEY_BLOCK, lambda row: self._key_block(row, KEY_BLOCK, safe))
        if p.key_size > whole:
            self._key_block(index(whole), p.key_size - whole, safe)
        if safe is None:
            self._scatter_outputs(scaled=False)
        else:
            when(
                safe,
                lambda: self._scatter_outputs(scaled=True),
                lambda: self._scatter_outputs(scaled=False),
            )

    def _each_step(self, body: Callable[[ir.Value, ir.Value, ir.Value], None]) -> None:
        """Emits ``body(n, token, later)`` for the chunk's steps; ``later`` is the token of the next chunk's step."""

        def step(n: ir.Value) -> None:
            at = add(self.first, n)
            body(n, self.token(at), self.later_token(at, self.schedule.steps))

        loop(0, self.count, 1, step)

    # Values and outputs

    def _gather_values(self) -> None:
        """Copies the chunk's values to scratch, with the factors of a value decay, and clears its outputs."""

        def step(n: ir.Value, token: ir.Value, later: ir.Value) -> None:
            def tile(piece: Piece, column: ir.Value) -> None:
                place = self.of_state(token, add(self.first_column, column))
                self.fetch_values(later, place[-1])
                store(self.v.load(place, piece.lanes), self.buffers["values"], [n, column])
                if self.decay is not None and self.by_column:
                    factor = self.factor(self.decay.load(place, piece.lanes))
                    store(factor, self.buffers["decays"], [n, column])
                self._clear_outputs(n, column, piece.lanes)

            each_tile(self.columns, tile)

        self._each_step(step)

    def _clear_outputs(self, n: ir.Value, column: ir.Value, lanes: int) -> None:
        self.each_query(lambda g: store(splat(0.0, lanes), self.buffers["outputs"], [n, g, column]))

    def _gather_values_scaled(self) -> ir.Value:
        """Copies values divided by the decays so far; returns whether that is safe.

        The factors in scratch are what outputs are to be multiplied with.
        """
        assert self.decay is not None
        decay, safe = self.decay, []

        def tile(column: int, lanes: int) -> None:
            def step(n: ir.Value, *carried: ir.Value) -> list[ir.Value]:
                at = add(self.first, n)
                place = self.of_state(self.token(at), add(self.first_column, column))
                self.fetch_values(self.later_token(at, self.schedule.steps), place[-1])
                now = self._decayed(decay.load(place, lanes), carried)
                value = arith.mulf(self.v.load(place, lanes), now.inverse)
                store(value, self.buffers["values"], [n, column])
                factor = now.before if self.problem.exclusive else now.after
                store(factor, self.buffers["decays"], [n, column])
                self._clear_outputs(n, index(column), lanes)
                return now.carried

            _, total, squares = loop(0, self.count, 1, step, self._undecayed(lanes))
            store(total, self.buffers["last"], [column])
            safe.append(self._is_safe(squares))

        for piece in self.columns:
            for i in range(piece.tiles):
                tile(piece.start + i * piece.width, piece.lanes)
        return folded(arith.andi, safe)

    def _scatter_outputs(self, scaled: bool) -> None:
        """Writes the chunk's outputs to the result."""

        def step(n: ir.Value, token: ir.Value, _: ir.Value) -> None:
            def query(g: Index) -> None:
                def output(column: ir.Value, lanes: int) -> ir.Value:
                    found = load(self.buffers["outputs"], [n, g, column], lanes)
                    if scaled:
                        found = arith.mulf(found, load(self.buffers["decays"], [n, column], lanes))
                    if self.problem.bonus:
                        value = self.v.load(self.of_state(token, add(self.first_column, column)), lanes)
                        weight = splat(get(self.buffers["weights"], [n, g]), lanes)
                        found = self.fma(weight, value, found)
                    return found

                self.write(token, g, self.first_column, self.columns, output)

            self.each_query(query)

        self._each_step(step)

    # Keys and queries

    def _key_block(self, row: ir.Value, rows: int, values_safe: ir.Value | None) -> None:
        """Adds what a block of the state's rows gives to the outputs, and moves these rows on by a chunk."""

        def plain() -> None:
            self._gather_keys(row, rows)
            self._tiles(row, rows, scaled=False)

        if self.by_row:
            safe = self._gather_keys_scaled(row, rows)
            when(safe, lambda: self._tiles(row, rows, scaled=True), plain)
        elif values_safe is not None:
            self._gather_keys(row, rows)
            when(
                values_safe,
                lambda: self._tiles(row, rows, scaled=True),
                lambda: self._tiles(row, rows, scaled=False),
            )
        else:
            plain()

    def _gather_keys(self, row: ir.Value, rows: int) -> None:
        """Copies the chunk's keys and queries to scratch, with the factors of a decay of rows."""

        def step(n: ir.Value, token: ir.Value, later: ir.Value) -> None:
            def tile(piece: Piece, i: ir.Value) -> None:
                at, lanes = add(row, i), piece.lanes
                self.fetch_keys(later, at)
                store(self.k.load(self.of_state(token, at), lanes), self.buffers["keys"], [n, i])
                if self.by_row:
                    factor = self.factor(self.row_decay(token, at, lanes))
                    store(factor, self.buffers["decays"], [n, i])

                def query(g: Index) -> None:
                    q = self.q.load(self.of_query(token, g, at), lanes)
                    store(q, self.buffers["queries"], [n, g, i])

                self.each_query(query)

            each_tile(pieces(rows, self.lanes), tile)

        self._each_step(step)

    def _gather_keys_scaled(self, row: ir.Value, rows: int) -> ir.Value:
        """Copies keys divided, and queries multiplied, by the decays so far; returns whether that is safe."""
        safe = []

        def tile(i: int, lanes: int) -> None:
            at = add(row, i)

            def step(n: ir.Value, *carried: ir.Value) -> list[ir.Value]:
                here = add(self.first, n)
                token = self.token(here)
                self.fetch_keys(self.later_token(here, self.schedule.steps), at)
                now = self._decayed(self.row_decay(token, at, lanes), carried)
                key = self.k.load(self.of_state(token, at), lanes)
                store(arith.mulf(key, now.inverse), self.buffers["keys"], [n, i])
                factor = now.before if self.problem.exclusive else now.after

                def query(g: Index) -> None:
                    q = self.q.load(self.of_query(token, g, at), lanes)
                    store(arith.mulf(q, factor), self.buffers["queries"], [n, g, i])

                self.each_query(query)
                return now.carried

            _, total, squares = loop(0, self.count, 1, step, self._undecayed(lanes))
            store(total, self.buffers["last"], [i])
            safe.append(self._is_safe(squares))

        for piece in pieces(rows, self.lanes):
            for i in range(piece.tiles):
                tile(piece.start + i * piece.lanes, piece.lanes)
        return folded(arith.andi, safe)

    # Products of decays: carried are their logarithm (or themselves), their value, and the sum of squares

    def _undecayed(self, lanes: int) -> list[ir.Value]:
        one = splat(1.0, lanes)
        return [splat(0.0, lanes) if self.problem.log_decay else one, one, splat(0.0, lanes)]

    def _decayed(self, decay: ir.Value, carried: Sequence[ir.Value]) -> Product:
        """Multiplies a step's decay in. Logarithms are summed, which is more exact than a product of powers."""
        total, before, squares = carried
        total = arith.addf(total, decay) if self.problem.log_decay else arith.mulf(total, decay)
        after = self.factor(total)
        inverse = arith.divf(splat(1.0, ir.VectorType(after.type).shape[0]), after)
        squares = self.fma(inverse, inverse, self.fma(after, after, squares))
        return Product(before, after, inverse, [total, after, squares])

    def _is_safe(self, squares: ir.Value) -> ir.Value:
        lanes = ir.VectorType(squares.type).shape[0]
        return reduced("and", no_larger(squares, splat(LARGEST_SQUARES, lanes)))

    # The state

    def _tiles(self, row: ir.Value, rows: int, scaled: bool) -> None:
        s = self.schedule

        def visit(i: ir.Value, height: int) -> None:
            each_tile(
                pieces(s.columns, s.lanes, s.vectors),
                lambda piece, column: self._tile(row, i, height, column, piece, scaled),
            )

        for piece in pieces(rows, s.rows):  # its lanes are rows
            loop(piece.start, piece.end, piece.lanes, functools.partial(visit, height=piece.lanes))

    def _tile(
        self, row: ir.Value, i: ir.Value, height: int, column: ir.Value, piece: Piece, scaled: bool
    ) -> None:
        """Takes a tile of the state through the chunk, in registers; outputs are summed in scratch."""
        p, lanes, buffers = self.problem, piece.lanes, self.buffers
        columns = [add(column, c * lanes) for c in range(piece.vectors)]
        rows = [add(i, r) for r in range(height)]
        places = [
            [self.batch, self.number, add(row, r), add(self.first_column, c)] for r in rows for c in columns
        ]

        def of_rows(buffer: str, *at: Index) -> list[ir.Value]:
            """Returns a scratch buffer's entries for the tile, the same for all columns."""
            return [splat(get(buffers[buffer], [*at, r]), lanes) for r in rows for _ in columns]

        def of_columns(buffer: str, *at: Index) -> list[ir.Value]:
            return [load(buffers[buffer], [*at, c], lanes) for c in columns] * height

        of_decays = of_rows if self.by_row else of_columns

        def updated(state: list[ir.Value], n: ir.Value) -> list[ir.Value]:
            if not scaled and p.decay_axis != "none":
                state = [arith.mulf(a, s) for a, s in zip(of_decays("decays", n), state, strict=True)]
            keys, values = of_rows("keys", n), of_columns("values", n)
            return [self.fma(k, v, s) for k, v, s in zip(keys, values, state, strict=True)]

        def read(state: list[ir.Value], n: ir.Value) -> None:
            def query(g: Index) -> None:
                queries = of_rows("queries", n, g)
                for c, at in enumerate(columns):
                    output = load(buffers["outputs"], [n, g, at], lanes)
                    for q, s in zip(queries[c :: piece.vectors], state[c :: piece.vectors], strict=True):
                        output = self.fma(q, s, output)
                    store(output, buffers["outputs"], [n, g, at])

            self.each_query(query)

        def step(n: ir.Value, *carried: ir.Value) -> list[ir.Value]:
            state = list(carried)
            if p.exclusive:
                read(state, n)
                return updated(state, n)
            state = updated(state, n)
            read(state, n)
            return state

        state = loop(0, self.count, 1, step, [load(self.state, place, lanes) for place in places])
        if scaled:
            state = [arith.mulf(a, s) for a, s in zip(of_decays("last"), state, strict=True)]
        for value, place in zip(state, places, strict=True):
            store(value, self.state, place)
