"""What the schedules of linear recurrences share: the op's operands, the order of time, and pieces of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes.kernels.builders import (
    Index,
    add,
    exp,
    f32,
    get,
    index,
    load,
    loop,
    minimum,
    mul,
    multiply_add,
    prefetch,
    reduced_float,
    size,
    splat,
    store,
    sub,
)
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

    @property
    def group(self) -> int:
        return self.heads // self.states


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
        operands: Mapping[str, ir.Value],
    ):
        self.problem, self.lanes, self.fused = problem, lanes, fused
        self.block, self.number, self.batch = workgroup
        self.q, self.k, self.v, self.state, self.o = (operands[n] for n in ("q", "k", "v", "state", "o"))
        self.decay, self.erase, self.predict, self.bonus = (
            operands.get(n) for n in ("decay", "erase", "predict", "bonus")
        )
        self.initial = operands.get("initial")
        self.in_place = True
        self.length = size(self.q, 1)

    def build(self) -> None:
        """Emits the body."""
        raise NotImplementedError

    def begin(self, first: Index, columns: int) -> None:
        """Writes the initial state, or zeros without one, to a block of columns of the state, unless it is there already."""
        if self.in_place:
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
        if self.problem.decay_axis == "head":
            return splat(get(self.decay, [self.batch, token, self.number]), lanes)
        return load(self.decay, self.of_state(token, row), lanes)

    def bonus_weight(self, token: ir.Value, query: Index) -> ir.Value:
        """Returns ``q . (bonus * k)``."""
        weight = f32(0.0)
        for piece in pieces(self.problem.key_size, self.lanes):

            def tile(row: ir.Value, total: ir.Value, lanes: int = piece.lanes) -> list[ir.Value]:
                key = load(self.k, self.of_state(token, row), lanes)
                weighted = arith.mulf(load(self.bonus, [self.number, row], lanes), key)
                return [self.fma(load(self.q, self.of_query(token, query, row), lanes), weighted, total)]

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
                prefetch(source, self.of_state(token, row))
        self.each_query(lambda g: prefetch(self.q, self.of_query(token, g, row)))

    def fetch_values(self, token: ir.Value, column: Index) -> None:
        """Asks for what a later step takes of columns of the state, and for the place of its outputs."""
        prefetch(self.v, self.of_state(token, column))
        if self.problem.decay_axis == "value":
            prefetch(self.decay, self.of_state(token, column))
        self.each_query(lambda g: prefetch(self.o, self.of_query(token, g, column), write=True))
