"""lower-attention: attention becomes a kernel launch, or linalg where there is no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.kernels.attention import emit_attention_launch


@dataclass(frozen=True)
class LowerAttention:
    """Lowers ``spikingbrain.attention``: to the kernel where the target has vectors or waves, else to linalg.

    In: our dialect. Out: ``spikingbrain_control.launch`` and kernel functions, or linalg.
    """

    name: ClassVar[str] = "lower-attention"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "spikingbrain.attention"):
            view = op.opview
            why = "the target has no kernels"
            if context.target.vector_bits or context.target.wave_kernels:
                try:
                    context.record(self, "lowered", op, "kernel")
                    emit_attention_launch(view, context.target)
                    continue
                except UnsupportedOp as refusal:
                    context.records.pop()
                    why = refusal.what
            context.record(self, "lowered", op, f"linalg: {why}")
            from spikingbrain.passes.kernels.attention_portable import lower_attention_portable

            lower_attention_portable(view)
