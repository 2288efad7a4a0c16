"""What the schedules of linear recurrences share: the op's operands, the order of time, and pieces of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes.dialect_fused import FLAGS, OUT, SUM, FusedRecurrence, element_of
from spikingbrain.passes.kernels.builders import (
    Index,
    add,
    exp,
    f32,
    index,
    load,
    loop,
    minimum,
    mul,
    multiply_add,
    prefetch,
    reduced_float,
    splat,
    store,
    sub,
)
from spikingbrain.passes.kernels.recurrence_operands import Computed, is_computed, narrowed
from spikingbrain.target import Target

SCRATCH_BYTES = 28 << 10  # IREE allows a dispatch 32 KB of stack, registers that are spilled included
UNROLLED = 4  # more query heads of one state are visited by a loop


@dataclass(frozen=True)
class Problem:
    """The static facts of a recurrence."""

    heads: int
    states: int
    key_size: int
    value_size: int
    decay_axis: str
    log_decay: bool
    exclusive: bool
    reverse: bool
    rank_one: bool
    bonus: bool
    time: int | None
    computed: tuple[str, ...] = ()  # what is more than loaded: operands, by name, and "o"

    @property
    def group(self) -> int:
        return self.heads // self.states


def problem_of(op: Any) -> Problem:
    """Returns the facts of a ``linear_recurrence``. Raises UnsupportedOp for what the kernels do not handle."""
    q, k, v = (ir.RankedTensorType(value.type) for value in (op.q, op.k, op.v))
    check(q.element_type, [q.shape[2], k.shape[2], q.shape[3], v.shape[3]], f"q is {q}, v is {v}")
    return Problem(
        heads=q.shape[2],
        states=k.shape[2],
        key_size=q.shape[3],
        value_size=v.shape[3],
        decay_axis=op.decay_axis.value,
        log_decay=bool(op.log_decay.value),
        exclusive=bool(op.exclusive.value),
        reverse=bool(op.reverse.value),
        rank_one=op.erase is not None,
        bonus=op.bonus is not None,
        time=None if q.is_dynamic_dim(1) else q.shape[1],
    )


def fused_problem_of(fused: FusedRecurrence) -> Problem:
    """Returns the facts of a ``fused_recurrence``. Raises UnsupportedOp for what the kernels do not handle."""
    y, state = (ir.RankedTensorType(value.type) for value in (fused.y, fused.final_state))
    flags = {name: fused.op.attributes[name].value for name in FLAGS}
    check(state.element_type, [y.shape[2], *state.shape[1:]], f"the state is {state}")
    return Problem(
        heads=y.shape[2],
        states=state.shape[1],
        key_size=state.shape[2],
        value_size=state.shape[3],
        rank_one="erase" in fused.names,
        bonus="bonus" in fused.names,
        time=None if y.is_dynamic_dim(1) else y.shape[1],
        computed=tuple(part.name for part in fused.parts if is_computed(part) and part.name != SUM),
        **flags,
    )


def check(element: ir.Type, sizes: Sequence[int], what: str) -> None:
    """Raises UnsupportedOp for types and sizes of a recurrence for which there is no kernel."""
    if str(element) != "f32":
        raise UnsupportedOp(
            "no recurrence kernel for this element type",
            why=f"values must be f32, not {element}",
            hint="the portable form",
        )
    if any(n <= 0 for n in sizes):
        raise UnsupportedOp(
            "no recurrence kernel for a dynamic or empty state", why=what, hint="static sizes of heads"
        )


class Piece(NamedTuple):
    """A run of elements: ``tiles`` times ``vectors`` vectors of ``lanes`` elements, from ``start`` on."""

    start: int
    tiles: int
    lanes: int
    vectors: int

    @property
    def width(self) -> int:
        return self.lanes * self.vectors

    @property
    def end(self) -> int:
        return self.start + self.tiles * self.width


def pieces(length: int, lanes: int, vectors: int = 1) -> list[Piece]:
    """Cuts a length into tiles of whole vectors, narrower ones for what is left, down to single elements."""
    result: list[Piece] = []
    start = 0
    while start < length:
        rest = length - start
        while lanes > rest:
            lanes //= 2
        fitting = min(vectors, rest // lanes)
        result.append(Piece(start, rest // (lanes * fitting), lanes, fitting))
        start = result[-1].end
    return result


def each_tile(runs: Sequence[Piece], body: Callable[[Piece, ir.Value], None]) -> None:
    """Emits ``body(piece, start)`` for every tile of every piece."""
    for piece in runs:
        if piece.tiles == 1:
            body(piece, index(piece.start))
        else:
            loop(piece.start, piece.end, piece.width, functools.partial(body, piece))


def vector_lanes(target: Target) -> int:
    """Returns the values per vector. Raises UnsupportedOp where kernels cannot be built for the target."""
    if target.vector_lanes_f32 < 4:
        raise UnsupportedOp(
            f"no recurrence kernel for target {target.name!r}",
            why="it has no vector registers",
            hint="the portable form",
        )
    return target.vector_lanes_f32


@dataclass(frozen=True)
class Operands:
    """What a kernel works on.

    Attributes:
        parts: what is read, and what is computed of the outputs.
        o: the memory of the outputs.
        state: that of the final state, which is updated step by step.
        initial: that of the state before the first step, the same for one in place; None for zeros.
        length: the number of tokens.
    """

    parts: Sequence[Computed]
    o: ir.Value
    state: ir.Value
    initial: ir.Value | None
    length: ir.Value


class RecurrenceKernel:
    """The body of one kernel function; emits at the current insertion point.

    A workgroup takes a block of value columns of one state of one batch entry.
    """

    def __init__(
        self,
        problem: Problem,
        lanes: int,
        fused: bool,
        workgroup: Sequence[ir.Value],
        operands: Operands,
    ):
        self.problem, self.lanes, self.fused = problem, lanes, fused
        self.block, self.number, self.batch = workgroup
        named = {computed.part.name: computed for computed in operands.parts}
        self.q, self.k, self.v = (named[n] for n in ("q", "k", "v"))
        self.decay, self.erase, self.predict, self.bonus = (
            named.get(n) for n in ("decay", "erase", "predict", "bonus")
        )
        self.sums = [computed for computed in operands.parts if computed.part.name == SUM]
        self.out = named.get(OUT)
        self.o, self.state, self.initial = operands.o, operands.state, operands.initial
        self.length = operands.length

    def build(self) -> None:
        """Emits the body."""
        raise NotImplementedError

    def begin(self, first: Index, columns: int) -> None:
        """Writes the initial state, or zeros without one, to a block of columns of the state, unless it is there already."""
        if self.initial is not None and self.initial == self.state:
            return
        whole = columns // self.lanes * self.lanes

        def column(row: ir.Value, at: ir.Value, lanes: int) -> None:
            place = [self.batch, self.number, row, add(first, at)]
            value = splat(0.0, lanes) if self.initial is None else load(self.initial, place, lanes)
            store(value, self.state, place)

        def rows(row: ir.Value) -> None:
            loop(0, whole, self.lanes, lambda at: column(row, at, self.lanes))
            loop(whole, columns, 1, lambda at: column(row, at, 1))

        loop(0, self.problem.key_size, 1, rows)

    # Arithmetic

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return multiply_add(a, b, c, self.fused)

    def factor(self, decay: ir.Value) -> ir.Value:
        """Returns what the state is multiplied with, for a vector of the op's decay operand."""
        return exp(decay, self.fused) if self.problem.log_decay else decay

    # The operands, by step (in the order of the recurrence) and by token (in the order of memory)

    def token(self, step: Index) -> ir.Value:
        return sub(sub(self.length, 1), step) if self.problem.reverse else index(step)

    def later_token(self, step: Index, distance: int) -> ir.Value:
        """Returns the token so many steps on; the last one where that is none."""
        return self.token(minimum(add(step, distance), sub(self.length, 1)))

    def of_state(self, token: ir.Value, at: Index) -> list[Index]:
        """Returns the place of an entry of k, v and the like."""
        return [self.batch, token, self.number, at]

    def of_query(self, token: ir.Value, query: Index, at: Index) -> list[Index]:
        """Returns the place of an entry of q and o, for a query of the workgroup's state."""
        return [self.batch, token, add(mul(self.number, self.problem.group), query), at]

    def row_decay(self, token: ir.Value, row: Index, lanes: int) -> ir.Value:
        """Returns the decays of rows of the state, of "head" or "key", as the op gives them."""
        assert self.decay is not None
        if self.problem.decay_axis == "head":
            return splat(self.decay.get([self.batch, token, self.number]), lanes)
        return self.decay.load(self.of_state(token, row), lanes)

    def bonus_weight(self, token: ir.Value, query: Index) -> ir.Value:
        """Returns ``q . (bonus * k)``."""
        assert self.bonus is not None
        weights, weight = self.bonus, f32(0.0)
        for piece in pieces(self.problem.key_size, self.lanes):

            def tile(row: ir.Value, total: ir.Value, lanes: int = piece.lanes) -> list[ir.Value]:
                key = self.k.load(self.of_state(token, row), lanes)
                weighted = arith.mulf(weights.load([0, 0, self.number, row], lanes), key)
                return [self.fma(self.q.load(self.of_query(token, query, row), lanes), weighted, total)]

            (total,) = loop(piece.start, piece.end, piece.lanes, tile, [splat(0.0, piece.lanes)])
            weight = arith.addf(weight, reduced_float(arith.addf, total))
        return weight

    def each_query(self, body: Callable[[Index], None]) -> None:
        """Emits ``body(g)`` for every query of the state."""
        if self.problem.group > UNROLLED:
            loop(0, self.problem.group, 1, body)
        else:
            for g in range(self.problem.group):
                body(g)

    # Fetching ahead

    def fetch_keys(self, token: ir.Value, row: Index) -> None:
        """Asks for what a later step takes of rows of the state; one cache line of each operand."""
        by_key = [self.k, self.erase, self.predict]
        by_key += [self.decay] if self.problem.decay_axis == "key" else []
        for source in by_key:
            if source is not None:
                source.prefetch(self.of_state(token, row))
        self.each_query(lambda g: self.q.prefetch(self.of_query(token, g, row)))

    def fetch_values(self, token: ir.Value, column: Index) -> None:
        """Asks for what a later step takes of columns of the state, and for the place of its outputs."""
        self.v.prefetch(self.of_state(token, column))
        if self.decay is not None and self.problem.decay_axis == "value":
            self.decay.prefetch(self.of_state(token, column))

        def output(g: Index) -> None:
            place = self.of_query(token, g, column)
            prefetch(self.o, place, write=True)
            for computed in [*self.sums, *([self.out] if self.out else [])]:
                computed.prefetch(place)

        self.each_query(output)

    # What is written

    def write(
        self,
        token: ir.Value,
        query: Index,
        first: Index,
        columns: Sequence[Piece],
        output: Callable[[ir.Value, int], ir.Value],
    ) -> None:
        """Writes the outputs of a query in some columns, from ``first`` on; all of them where there are row sums.

        ``output(column, lanes)`` returns a vector of outputs of the recurrence, columns counted from ``first``.
        """
        given: list[ir.Value] = []
        for computed in self.sums:
            total = f32(0.0)
            for piece in columns:
                total = arith.addf(total, self._row_sum(computed, token, query, piece, output, given))
            given.append(total)

        def tile(piece: Piece, column: ir.Value) -> None:
            place = self.of_query(token, query, add(first, column))
            value = output(column, piece.lanes)
            if self.out is not None:
                arguments = [value, *(splat(total, piece.lanes) for total in given)]
                value = narrowed(self.out.load(place, piece.lanes, arguments), element_of(self.out.part))
            store(value, self.o, place)

        each_tile(columns, tile)

    def _row_sum(
        self,
        computed: Computed,
        token: ir.Value,
        query: Index,
        piece: Piece,
        output: Callable[[ir.Value, int], ir.Value],
        given: Sequence[ir.Value],
    ) -> ir.Value:
        """Returns the part of a row sum that a piece of the columns makes; rows are whole, and begin at 0."""

        def tile(column: ir.Value, total: ir.Value) -> list[ir.Value]:
            arguments = [output(column, piece.lanes), *(splat(x, piece.lanes) for x in given)]
            place = self.of_query(token, query, column)
            return [arith.addf(total, computed.load(place, piece.lanes, arguments))]

        (total,) = loop(piece.start, piece.end, piece.width, tile, [splat(0.0, piece.lanes)])
        return reduced_float(arith.addf, total)
