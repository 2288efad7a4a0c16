"""lower-linear: projections become kernel launches, or matrix products in linalg where there is no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.kernels.linear import emit_linear


@dataclass(frozen=True)
class LowerLinear:
    """Lowers ``spikingbrain.linear``: a packed weight to the CPU kernel, a plain one to linalg.

    In: our dialect. Out: ``spikingbrain_control.launch`` and kernel functions, or ``linalg.generic``.
    """

    name: ClassVar[str] = "lower-linear"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "spikingbrain.linear"):
            x, weight = op.operands
            packed = len(ir.RankedTensorType(weight.type).shape) == 3
            with ir.InsertionPoint(op), op.location:
                rows = build.flatten_leading(x)
                if packed:
                    y = emit_linear(rows, weight, op.attributes["columns"].value, context.target)
                else:
                    y = _product(rows, weight)
                y = build.unflatten_leading(y, op.results[0].type, x)
            op.results[0].replace_all_uses_with(y)
            context.record(self, "lowered", op, "kernel" if packed else "linalg")
            op.erase()


def _product(x: ir.Value, weight: ir.Value) -> ir.Value:
    """Emits ``y[m, n] = sum_k x[m, k] * w[n, k]``."""
    (m, _), (n, _) = (ir.RankedTensorType(v.type).shape for v in (x, weight))
    type_ = ir.RankedTensorType.get([m, n], ir.RankedTensorType(x.type).element_type)
    init = build.filled(
        type_, build.dynamic_sizes(x)[:1] if m == ir.ShapedType.get_dynamic_size() else [], 0.0
    )
    d = [ir.AffineDimExpr.get(i) for i in range(3)]
    maps = [ir.AffineMap.get(3, 0, e) for e in ([d[0], d[2]], [d[1], d[2]], [d[0], d[1]])]
    return build.generic(
        [x, weight],
        init,
        maps,
        ["parallel", "parallel", "reduction"],
        lambda a, b, total: arith.AddFOp(total, arith.MulFOp(a, b).result).result,
    )
