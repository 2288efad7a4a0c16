"""lower-grouped-linear: projections by experts become kernel launches, or gathering sums in linalg where there is no kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg, tensor

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.kernels.group_rows import Routings, known_expert
from spikingbrain.passes.kernels.grouped_linear import emit_grouped_linear
from spikingbrain.passes.kernels.spike_portable import spike_linear
from spikingbrain.passes.wave_kernels import grouped_linear as wave
from spikingbrain.passes.wave_kernels.group_rows import Tiles


@dataclass(frozen=True)
class LowerGroupedLinear:
    """Lowers ``spikingbrain.grouped_linear``: a packed weight to CPU kernels, a plain one to wave kernels or to linalg.

    Rows that go the same ways through several weights are sorted once. Floats of 16 bits are summed as f32.
    ``spike_grouped_linear`` becomes integer arithmetic in linalg.
    In: our dialect. Out: ``spikingbrain_control.launch`` and kernel functions, or ``linalg.generic``.
    """

    name: ClassVar[str] = "lower-grouped-linear"

    def run(self, module: ir.Module, context: PassContext) -> None:
        routings: dict[int, Routings] = {}  # by block
        tiles: dict[int, Tiles] = {}
        for op in torch_ir.operations(module, "spikingbrain.grouped_linear"):
            x, weight, expert = op.operands
            packed = len(ir.RankedTensorType(weight.type).shape) == 4
            reason = "" if packed else _refusal(op, context)
            with ir.InsertionPoint(op), op.location:
                if packed:
                    known = routings.setdefault(hash(op.block), {})
                    columns = op.attributes["columns"].value
                    rows = build.converted(x, ir.F32Type.get())
                    y = emit_grouped_linear(rows, weight, expert, columns, context.target, known)
                    y = build.converted(y, ir.RankedTensorType(x.type).element_type)
                elif reason:
                    y = _gathering(x, weight, expert, op.results[0].type)
                else:
                    sorted_rows = tiles.setdefault(hash(op.block), {})
                    y = wave.emit_grouped_linear(x, weight, expert, sorted_rows, context.target.tuning)
            op.results[0].replace_all_uses_with(y)
            context.record(self, "lowered", op, f"linalg: {reason}" if reason else "kernel")
            op.erase()
        for op in torch_ir.operations(module, "spikingbrain.spike_grouped_linear"):
            with ir.InsertionPoint(op), op.location:
                counts, threshold, weight, scale, expert = op.operands
                bits = op.attributes["bits"].value
                y = spike_linear(counts, threshold, weight, scale, None, bits, context.target, expert)
            op.results[0].replace_all_uses_with(y)
            context.record(self, "lowered", op, "linalg")
            op.erase()


def _refusal(op: ir.Operation, context: PassContext) -> str:
    """Returns why a product with plain weights has no kernel, or an empty text."""
    weight = ir.RankedTensorType(op.operands[1].type)
    if not context.target.wave_kernels:
        return "the target has no kernel for weights that are not packed"
    if str(weight.element_type) not in ("f32", "f16", "bf16"):
        return f"no kernel for {weight.element_type}"
    return wave.refusal(weight.shape[0])


def _gathering(x: ir.Value, weight: ir.Value, expert: ir.Value, type_: ir.Type) -> ir.Value:
    """Emits ``y[r, o] = sum_k x[r, k] * w[expert[r], o, k]``, each weight read where it is used."""
    result = ir.RankedTensorType(type_)
    element = result.element_type
    wide = ir.F32Type.get() if element.width < 32 else element
    experts = ir.RankedTensorType(weight.type).shape[0]
    zero, limit = build.constant_index(0), build.constant_index(experts)
    nan = arith.ConstantOp(wide, ir.FloatAttr.get(wide, math.nan)).result
    d = [ir.AffineDimExpr.get(i) for i in range(3)]
    maps = [ir.AffineMap.get(3, 0, e) for e in ([d[0], d[2]], [d[0]], [d[0], d[1]])]

    def widened(value: ir.Value) -> ir.Value:
        return value if wide == element else arith.extf(wide, value)

    def body(value: ir.Value, number: ir.Value, total: ir.Value) -> ir.Value:
        e = known_expert(number, experts)
        exists = arith.cmpi(arith.CmpIPredicate.ult, e, limit)
        at = [arith.select(exists, e, zero), linalg.IndexOp(1).result, linalg.IndexOp(2).result]
        product = arith.mulf(widened(value), widened(tensor.extract(weight, at)))
        return arith.addf(total, arith.select(exists, product, nan))

    sum_type = ir.RankedTensorType.get(result.shape, wide)
    init = build.filled(sum_type, build.dynamic_sizes(x), 0.0)
    y = build.generic([x, expert], init, maps, ["parallel", "parallel", "reduction"], body)
    if wide == element:
        return y
    same = ir.AffineMap.get_identity(2)
    empty = build.empty(result, build.dynamic_sizes(x))
    return build.generic(
        [y], empty, [same, same], ["parallel"] * 2, lambda value, _: arith.truncf(element, value)
    )
