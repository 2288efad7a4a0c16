"""lower-recurrence: recurrences over matrices become kernel launches, or linalg where there is no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from spikingbrain.errors import OptionError, UnsupportedOp
from spikingbrain.passes import dialect_fused, torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.dialect_fused import FusedRecurrence
from spikingbrain.passes.kernels.recurrence import emit_fused_launch, emit_recurrence_launch
from spikingbrain.passes.kernels.recurrence_portable import lower_recurrence_portable
from spikingbrain.passes.kernels.recurrence_unfused import unfuse


@dataclass(frozen=True)
class LowerRecurrence:
    """Lowers ``spikingbrain.linear_recurrence``: to the kernel where the target has vectors or waves, else to linalg by chunks.

    ``fused_recurrence`` as well, which is taken apart where there is no kernel for it.

    In: our dialect. Out: ``spikingbrain_control.launch`` and kernel functions, or linalg, tensor and scf.
    The option ``steps`` is the length of a chunk in the linalg form, a power of two; 0 takes the default.
    """

    name: ClassVar[str] = "lower-recurrence"
    steps: int = 0

    def run(self, module: ir.Module, context: PassContext) -> None:
        if self.steps < 0 or self.steps & (self.steps - 1):
            raise OptionError(f"steps of lower-recurrence is a power of two, not {self.steps}")
        for op in torch_ir.operations(module, dialect_fused.NAME):
            try:
                context.record(self, "lowered", op, "kernel")
                emit_fused_launch(FusedRecurrence(op), context.target)
            except UnsupportedOp as refusal:
                context.records.pop()
                context.record(self, "lowered", op, f"apart: {refusal.what}")
                unfuse(FusedRecurrence(op))
        for op in torch_ir.operations(module, "spikingbrain.linear_recurrence"):
            why = "the target has no kernels"
            if context.target.vector_bits or context.target.wave_kernels:
                try:
                    context.record(self, "lowered", op, "kernel")
                    emit_recurrence_launch(op.opview, context.target)
                    continue
                except UnsupportedOp as refusal:
                    context.records.pop()
                    why = refusal.what
            context.record(self, "lowered", op, f"linalg: {why}")
            lower_recurrence_portable(op.opview, self.steps)
