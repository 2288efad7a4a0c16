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
from spikingbrain.passes.wave_kernels import linear as wave


@dataclass(frozen=True)
class LowerLinear:
    """Lowers ``spikingbrain.linear``: a packed weight to the CPU kernel, a plain one to a wave kernel or to linalg.

    An elementwise sum of the result with another tensor (a residual) goes into the kernel.
    In: our dialect. Out: ``spikingbrain_control.launch`` and kernel functions, or ``linalg.generic``.
    """

    name: ClassVar[str] = "lower-linear"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "spikingbrain.linear"):
            x, weight = op.operands
            packed = len(ir.RankedTensorType(weight.type).shape) == 3
            has_kernel = packed or context.target.wave_kernels
            # a sum with another value costs nothing in the kernel: it is what the accumulators start from
            total, addend = _sum_with(op) if has_kernel else (op, None)
            with ir.InsertionPoint(total), op.location:
                rows = build.flatten_leading(x)
                residual = None if addend is None else build.flatten_leading(addend)
                if packed:
                    y = emit_linear(rows, weight, op.attributes["columns"].value, context.target, residual)
                elif has_kernel:
                    y = wave.emit_linear(rows, weight, residual)
                else:
                    y = _product(rows, weight)
                y = build.unflatten_leading(y, op.results[0].type, x)
            total.results[0].replace_all_uses_with(y)
            context.record(
                self,
                "lowered",
                op,
                ("kernel" if has_kernel else "linalg") + (" with a sum" if addend else ""),
            )
            if total != op:
                total.erase()
            op.erase()


def _sum_with(op: ir.Operation) -> tuple[ir.Operation, ir.Value | None]:
    """Returns the linalg.generic that only adds another tensor to the projection's result, and that tensor.

    Returns the projection itself and None where its result is used in another way.
    """
    users = [use.owner.operation for use in op.results[0].uses]
    if len(users) != 1 or users[0].name != "linalg.generic" or users[0].block != op.block:
        return op, None
    (user,) = users
    inputs = list(user.operands)
    maps = [m.value for m in user.attributes["indexing_maps"]]
    body = [o.operation for o in user.regions[0].blocks[0].operations]
    arguments = list(user.regions[0].blocks[0].arguments)
    identity = ir.AffineMap.get_identity(maps[0].n_dims)
    if (
        len(inputs) != 3
        or any(m != identity for m in maps)
        or [o.name for o in body] != ["arith.addf", "linalg.yield"]
    ):
        return op, None
    if {hash(v) for v in body[0].operands} != {hash(a) for a in arguments[:2]}:
        return op, None
    addend = inputs[1] if inputs[0] == op.results[0] else inputs[0]
    if addend == op.results[0] or addend.type != op.results[0].type:
        return op, None
    return user, addend


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
