"""lower-linear: projections become kernel launches, or matrix products in linalg where there is no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.elementwise import VIEWS
from spikingbrain.passes.kernels.linear import emit_linear
from spikingbrain.passes.residuals import sums_with
from spikingbrain.passes.wave_kernels import linear as wave
from spikingbrain.passes.wave_kernels import row_values

_OP = "spikingbrain.linear"
MOST_ADDENDS = 4  # of a kernel for few rows


@dataclass(frozen=True)
class LowerLinear:
    """Lowers ``spikingbrain.linear``: a packed weight to the CPU kernel, a plain one to a wave kernel or to linalg.

    An elementwise sum of the result with another tensor (a residual) goes into the kernel, several into one for few rows.
    Wave kernels for few rows compute what nothing but projections reads: a norm, a gate, a slice.
    In: our dialect. Out: ``spikingbrain_control.launch`` and kernel functions, or ``linalg.generic``.
    """

    name: ClassVar[str] = "lower-linear"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, _OP):
            x, weight = op.operands
            packed = len(ir.RankedTensorType(weight.type).shape) == 3
            has_kernel = packed or context.target.wave_kernels
            # a sum with another value costs nothing in the kernel: it is what the accumulators start from or end with
            most = 1 if packed or not wave.has_few_rows(x) else MOST_ADDENDS
            if not has_kernel or (packed and build.is_half(op.results[0].type)):
                most = 0  # of 16 bits: the product is rounded before the sum, as written
            sums, addends = sums_with(op, most)
            total = sums[-1] if sums else op
            computed = None if packed or not has_kernel else _computed(x)
            with ir.InsertionPoint(total), op.location:
                rows = build.flatten_leading(x)
                others = [build.flatten_leading(addend) for addend in addends]
                if packed:
                    f32, columns = ir.F32Type.get(), op.attributes["columns"].value
                    y = emit_linear(build.converted(rows, f32), weight, columns, context.target, *others)
                    y = build.converted(y, ir.RankedTensorType(x.type).element_type)
                elif has_kernel:
                    y = wave.emit_linear(rows, weight, context.target.tuning, others, computed)
                else:
                    y = _product(rows, weight)
                y = build.unflatten_leading(y, op.results[0].type, x)
            total.results[0].replace_all_uses_with(y)
            context.record(
                self,
                "lowered",
                op,
                ("kernel" if has_kernel else "linalg")
                + (" with a sum" if addends else "")
                + (", few rows computed in it" if computed else ""),
            )
            for old in [*reversed(sums), op]:
                old.erase()


def _computed(x: ir.Value) -> row_values.RowValues | None:
    """Returns how the rows of a projection are computed, if nothing but projections reads them."""
    users = [use.owner.operation for use in x.uses if use.owner.operation.name != "tensor.dim"]
    block = next(user.block for user in users if user.name == _OP)
    if any(user.block != block or not (user.name == _OP or _is_for_many(user)) for user in users):
        return None
    return row_values.find(x, users)


def _is_for_many(view: ir.Operation) -> bool:
    """Returns whether an op is a view of rows for a kernel that reads them where there are many."""
    users = [use.owner.operation for use in view.results[0].uses] if view.name in VIEWS else []
    launches = [user for user in users if user.name == "spikingbrain_control.launch"]
    others = {user.name for user in users if user not in launches}
    return bool(launches) and others <= {"tensor.dim"} and all(map(wave.is_for_many, launches))


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
