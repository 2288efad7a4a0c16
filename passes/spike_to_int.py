"""spike-to-int: spiking projections become integer arithmetic, exact for every input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.kernels import spike_portable as portable


@dataclass(frozen=True)
class SpikeToInt:
    """Lowers ``spikingbrain.spike_linear`` and ``spikingbrain.spike_encode``.

    In: our dialect on builtin tensors. Out: linalg.
    """

    name: ClassVar[str] = "spike-to-int"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "spikingbrain.spike_linear"):
            with ir.InsertionPoint(op), op.location:
                y = _portable_linear(op, context)
            op.results[0].replace_all_uses_with(y)
            context.record(self, "lowered", op, "linalg")
            op.erase()
        for op in torch_ir.operations(module, "spikingbrain.spike_encode"):
            if any(list(result.uses) for result in op.results):
                with ir.InsertionPoint(op), op.location:
                    _portable_encode(op)
                context.record(self, "lowered", op, "linalg")
            op.erase()


def _portable_linear(op: ir.Operation, context: PassContext) -> ir.Value:
    counts, threshold, weight, scale, *bias = op.operands
    y = portable.spike_linear(
        build.flatten_leading(counts),
        build.flatten(threshold),
        weight,
        scale,
        bias[0] if bias else None,
        op.attributes["bits"].value,
        context.target,
    )
    return build.unflatten_leading(y, op.results[0].type, counts)


def _portable_encode(op: ir.Operation) -> None:
    (x,) = op.operands
    k, lower, upper = (op.attributes[name].value for name in ("k", "lower", "upper"))
    rows = build.flatten_leading(x)
    threshold = portable.threshold(rows, k, lower, upper)
    counts = build.unflatten_leading(portable.counts(rows, threshold), x.type, x)
    leading = build.dynamic_sizes(x)
    op.results[0].replace_all_uses_with(counts)
    op.results[1].replace_all_uses_with(build.unflatten(threshold, op.results[1].type, leading))
