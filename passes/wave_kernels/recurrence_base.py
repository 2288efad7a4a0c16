"""What the wave kernels of linear recurrences share: the places of operands, and their entries one by one."""

from __future__ import annotations

from collections.abc import Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, math

from spikingbrain.passes.dialect_fused import element_of
from spikingbrain.passes.kernels.bodies import inlined, is_half
from spikingbrain.passes.kernels.builders import Index, add, index, mul, sub
from spikingbrain.passes.kernels.recurrence_base import Operands, Problem
from spikingbrain.passes.kernels.recurrence_operands import Computed


def element(source: Computed, place: Sequence[Index], given: Sequence[ir.Value] = ()) -> ir.Value:
    """Returns one element of an operand, or of the outputs, computed where the part says how; an f32."""
    read = [memory.load(place, 1) for memory in source.memory]
    if source.part.body is not None:
        read = inlined(source.part.body, [*given, *read], 1, wide=True)
    return read[0]


def finished(
    source: Computed | None, place: Sequence[Index], output: ir.Value, given: Sequence[ir.Value]
) -> ir.Value:
    """Returns what is stored for an output of the recurrence; ``given`` are the sums over its row."""
    if source is None:
        return output
    value, kind = element(source, place, [output, *given]), element_of(source.part)
    return arith.truncf(kind, value) if is_half(kind) else value


class Places:
    """The operands of a recurrence, and where their entries lie; a kernel sets ``batch`` and ``number``, the state."""

    batch: ir.Value
    number: ir.Value

    def __init__(self, problem: Problem, operands: Operands):
        self.problem = problem
        self.named = {computed.part.name: computed for computed in operands.parts}
        self.o, self.state, self.initial = operands.o, operands.state, operands.initial
        self.length = operands.length

    def token(self, step: Index) -> ir.Value:
        """Returns the token of a step: steps count in the order of the recurrence, tokens in that of memory."""
        return sub(sub(self.length, 1), step) if self.problem.reverse else index(step)

    def of_state(self, token: ir.Value, at: Index) -> list[Index]:
        """Returns the place of an entry of k, v and the like."""
        return [self.batch, token, self.number, at]

    def of_query(self, token: ir.Value, query: Index, at: Index) -> list[Index]:
        """Returns the place of an entry of q and o, for a query of the block's state."""
        return [self.batch, token, add(mul(self.number, self.problem.group), query), at]

    def factor(self, decay: ir.Value) -> ir.Value:
        """Returns what the state is multiplied with, for an entry of the decay; exactly 0 for a logarithm of -inf."""
        return math.exp(decay) if self.problem.log_decay else decay
