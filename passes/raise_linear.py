"""raise-linear: ``torch.aten.linear`` becomes ``spikingbrain.linear``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.casts import builtin_type, from_builtin, to_builtin
from spikingbrain.target import Target


@dataclass(frozen=True)
class RaiseLinear:
    """Raises projections whose weight is a stored matrix: of float32, and of 16 bits where the target has kernels for them.

    In: torch dialect. Out: ``spikingbrain.linear`` between ``torch_c`` casts; a bias stays a torch add.
    Not handled: other element types and weights computed by the model (upstream lowers those).
    """

    name: ClassVar[str] = "raise-linear"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "torch.aten.linear"):
            reason = _refusal(op, context.target)
            if reason:
                context.record(self, "refused", op, reason)
                continue
            _rewrite(op)
            context.record(self, "raised", op)
            op.erase()


def _refusal(op: ir.Operation, target: Target) -> str:
    x, weight, _ = op.operands
    shape = torch_ir.shape(weight)
    cast = torch_ir.defining(weight, "torch_c.from_builtin_tensor")
    if cast is None or torch_ir.defining(cast.operands[0], "spikingbrain.parameter") is None:
        return "the weight is computed by the model, not stored"
    if shape is None or len(shape) != 2 or torch_ir.shape(x) is None or not torch_ir.shape(x):
        return "the weight is not a matrix or the input has no rank"
    kinds = {torch_ir.element_type(x), torch_ir.element_type(weight)}
    has_kernels = target.wave_kernels or target.vector_bits
    if kinds not in ([{"f32"}, {"f16"}, {"bf16"}] if has_kernels else [{"f32"}]):
        known = "only f32, f16 and bf16 have kernels" if has_kernels else "only f32 is packed"
        return f"element type {torch_ir.element_type(weight)}; {known}"
    return ""


def _rewrite(op: ir.Operation) -> None:
    x, weight, bias = op.operands
    columns = (torch_ir.shape(weight) or [0])[0]
    with ir.InsertionPoint(op), op.location:
        i64 = ir.IntegerType.get_signless(64)
        result = builtin_type(op.results[0].type)
        linear = ir.Operation.create(
            "spikingbrain.linear",
            [result],
            [to_builtin(x), to_builtin(weight)],
            {"columns": ir.IntegerAttr.get(i64, columns)},
        )
        value = from_builtin(linear.result, op.results[0].type)
        if not torch_ir.is_none(bias):
            one = ir.Operation.create(
                "torch.constant.int",
                [ir.Type.parse("!torch.int")],
                attributes={"value": ir.IntegerAttr.get(i64, 1)},
            ).result
            value = ir.Operation.create(
                "torch.aten.add.Tensor", [op.results[0].type], [value, bias, one]
            ).result
    op.results[0].replace_all_uses_with(value)
