"""What the schedules of linear recurrences share: the op's operands, the order of time, and pieces of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch_mlir import ir

from spikingbrain.passes.kernels.builders import Index, add, exp, index, loop, mul, multiply_add, size, sub

if TYPE_CHECKING:
    from spikingbrain.passes.kernels.recurrence import Problem, Schedule

SCRATCH_BYTES = 32 << 10  # IREE allows a dispatch 32 KB of stack unless told otherwise
UNROLLED = 8  # more query heads of one state are visited by a loop


class Piece(NamedTuple):
    """A run of elements: ``count`` tiles of ``vectors`` vectors of ``lanes`` elements, from ``start`` on."""

    start: int
    count: int
    lanes: int
    vectors: int

    @property
    def width(self) -> int:
        return self.lanes * self.vectors


def pieces(length: int, lanes: int, vectors: int = 1) -> list[Piece]:
    """Cuts a length into tiles of whole vectors, narrower ones for what is left, down to single elements."""
    result, start = [], 0
    while start < length:
        rest = length - start
        while lanes > rest:
            lanes //= 2
        fitting = min(vectors, rest // lanes)
        count = rest // (lanes * fitting)
        result.append(Piece(start, count, lanes, fitting))
        start += count * lanes * fitting
    return result


def each_tile(runs: Sequence[Piece], body: Callable[[Piece, ir.Value], None]) -> None:
    """Emits ``body(piece, start)`` for every tile of every piece."""
    for piece in runs:
        end = piece.start + piece.count * piece.width
        if piece.count == 1:
            body(piece, index(piece.start))
        else:
            loop(piece.start, end, piece.width, functools.partial(body, piece))


class RecurrenceKernel:
    """The body of one kernel function; emits at the current insertion point.

    A workgroup takes a block of value columns of one state.
    """

    def __init__(
        self,
        problem: Problem,
        schedule: Schedule,
        workgroup: Sequence[ir.Value],
        operands: Mapping[str, ir.Value],
    ):
        self.problem, self.schedule = problem, schedule
        self.block, self.number, self.batch = workgroup
        self.q, self.k, self.v, self.state, self.o = (operands[n] for n in ("q", "k", "v", "state", "o"))
        self.decay, self.erase, self.predict, self.bonus = (
            operands.get(n) for n in ("decay", "erase", "predict", "bonus")
        )
        self.length = size(self.q, 1)

    def build(self) -> None:
        """Emits the body."""
        raise NotImplementedError

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return multiply_add(a, b, c, self.schedule.fused)

    def factor(self, decay: ir.Value) -> ir.Value:
        """Returns what the state is multiplied with, for a vector of the op's decay operand."""
        return exp(decay, self.schedule.fused) if self.problem.log_decay else decay

    def token(self, step: Index) -> ir.Value:
        """Returns the token that a step of the recurrence takes."""
        return sub(sub(self.length, 1), step) if self.problem.reverse else index(step)

    def head(self, query: Index) -> ir.Value:
        """Returns the head of a query of the workgroup's state."""
        return add(mul(self.number, self.problem.group), query)

    def each_query(self, body: Callable[[Index], None]) -> None:
        """Emits ``body(g)`` for every query of the state."""
        if self.problem.group > UNROLLED:
            loop(0, self.problem.group, 1, body)
        else:
            for g in range(self.problem.group):
                body(g)
