"""raise-spikes: the spiking ops of torch become those of the dialect, their weights integers that are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import arith, tensor

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import parameters, torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.casts import builtin_type, from_builtin, to_builtin

_ENCODE, _LINEAR = "torch.spikingbrain.spike_encode", "torch.spikingbrain.spike_linear"


@dataclass(frozen=True)
class RaiseSpikes:
    """Raises ``torch.ops.spikingbrain.spike_encode`` and ``spike_linear`` to the ops of the dialect that have their names.

    In: ``torch.operator "torch.spikingbrain.*"``. Out: the dialect's op between ``torch_c`` casts. Float weights that are stored,
    with a scale that is, become codes by their recipe: rounded once, when the artifact is written. What the op takes for
    gradients is dropped. Not handled: weights that the model computes from floats, and arguments that are not constant;
    those keep the op, which no later pass lowers.
    """

    name: ClassVar[str] = "raise-spikes"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "torch.operator"):
            rewrite = {_ENCODE: _raise_encode, _LINEAR: _raise_linear}.get(op.attributes["name"].value)
            if rewrite is None:
                continue
            with ir.InsertionPoint(op), op.location:
                reason = rewrite(op)
            context.record(self, "refused" if reason else "raised", op, reason)
            if not reason:
                op.erase()


def _raise_encode(op: ir.Operation) -> str:
    x, *settings = op.operands
    numbers = [torch_ir.constant(v) for v in settings]
    if len(numbers) != 3 or any(not isinstance(n, (int, float)) for n in numbers):
        return "an argument that is not constant"
    shape = torch_ir.shape(x)
    if not shape or shape[-1] == -1:
        return "an unknown number of channels"
    f64 = ir.F64Type.get()
    attributes = {
        name: ir.FloatAttr.get(f64, float(n))  # type: ignore[arg-type]
        for name, n in zip(("k", "lower", "upper"), numbers, strict=True)
    }
    types = [builtin_type(r.type) for r in op.results]
    made = ir.Operation.create("spikingbrain.spike_encode", types, [to_builtin(x)], attributes)
    for old, new in zip(op.results, made.results, strict=True):
        old.replace_all_uses_with(from_builtin(new, old.type))
    return ""


def _raise_linear(op: ir.Operation) -> str:
    counts, threshold, weight, scale, bias, bits, _, _, silent, *flags = op.operands
    width, share = torch_ir.constant(bits), torch_ir.constant(silent)
    if not isinstance(width, int) or not isinstance(share, float):
        return "an argument that is not constant"
    turned = any(torch_ir.constant(flag) for flag in flags)
    codes = _plain(weight)
    if not isinstance(ir.RankedTensorType(codes.type).element_type, ir.IntegerType):
        scales = _float32(_scales(_plain(scale), codes, False))
        stored = parameters.parameter(codes), parameters.parameter(scales)
        if stored[0] is None or stored[1] is None:
            return "float weights, or a scale of them, that are not stored"
        codes = _rounded(*stored, 16 if width == 16 else 8)
    else:
        codes = _transposed(codes) if turned else codes
        scales = _ones(codes) if torch_ir.is_none(scale) else _float32(_scales(_plain(scale), codes, turned))
    operands = [to_builtin(counts), to_builtin(threshold), codes, scales]
    operands += [] if torch_ir.is_none(bias) else [to_builtin(bias)]
    attributes: dict[str, ir.Attribute] = {"bits": ir.IntegerAttr.get(ir.IntegerType.get_signless(64), width)}
    if share:
        attributes["silent"] = ir.FloatAttr.get(ir.F64Type.get(), share)
    made = ir.Operation.create(
        "spikingbrain.spike_linear", [builtin_type(op.results[0].type)], operands, attributes
    )
    op.results[0].replace_all_uses_with(from_builtin(made.results[0], op.results[0].type))
    return ""


def _plain(value: ir.Value) -> ir.Value:
    """Returns a torch tensor as a builtin one, and what is stored as the ``parameter`` that it is."""
    cast = torch_ir.defining(value, "torch_c.from_builtin_tensor")
    return cast.operands[0] if cast is not None else to_builtin(value)


def _scales(scale: ir.Value, codes: ir.Value, turned: bool) -> ir.Value:
    """Returns scales as [N, G], in whatever shape the model has them."""
    shape, outputs = list(ir.RankedTensorType(scale.type).shape), ir.RankedTensorType(codes.type).shape[0]
    if math.prod(shape) == outputs:
        return scale if shape == [outputs, 1] else _reshaped(scale, "column", [outputs, 1])
    if len(shape) == 3:
        scale = _reshaped(scale, "matrix", [n for i, n in enumerate(shape) if i != (1 if turned else 2)])
    return _transposed(scale) if turned else scale


def _ones(codes: ir.Value) -> ir.Value:
    """Returns scales [N, 1] of 1, stored where the codes [N, C] are."""
    type_ = ir.RankedTensorType.get([ir.RankedTensorType(codes.type).shape[0], 1], ir.F32Type.get())
    op = parameters.parameter(codes)
    if op is None:
        return arith.constant(
            type_, ir.DenseElementsAttr.get_splat(type_, ir.FloatAttr.get(ir.F32Type.get(), 1.0))
        )
    old = parameters.stored(op)
    return parameters.create(old.sources, [*old.recipe, "ones"], type_)


def _reshaped(value: ir.Value, step: str, shape: list[int]) -> ir.Value:
    """Returns a tensor in another shape: a stored one by a step of its recipe."""
    type_ = ir.RankedTensorType(value.type)
    result, op = ir.RankedTensorType.get(shape, type_.element_type), parameters.parameter(value)
    if op is not None:
        old = parameters.stored(op)
        return parameters.create(old.sources, [*old.recipe, step], result)
    flat = ir.RankedTensorType.get([math.prod(shape)], type_.element_type)
    everything = [list(range(type_.rank))]
    if type_.rank > 1:
        value = tensor.CollapseShapeOp(flat, value, build.reassociation(everything)).result
    axes = build.reassociation([list(range(len(shape)))])
    return tensor.ExpandShapeOp(result, value, axes, [], shape).result


def _transposed(matrix: ir.Value) -> ir.Value:
    type_ = ir.RankedTensorType(matrix.type)
    result = ir.RankedTensorType.get(list(type_.shape)[::-1], type_.element_type)
    op = parameters.parameter(matrix)
    if op is not None:
        old = parameters.stored(op)
        return parameters.create(old.sources, [*old.recipe, "transpose"], result)
    d0, d1 = (ir.AffineDimExpr.get(d) for d in range(2))
    maps = [ir.AffineMap.get(2, 0, [d1, d0]), ir.AffineMap.get(2, 0, [d0, d1])]
    return build.generic([matrix], build.empty(result, []), maps, ["parallel"] * 2, lambda value, _: value)


def _float32(value: ir.Value) -> ir.Value:
    """Returns a tensor of half floats as one of float32; a stored one is stored so."""
    type_ = ir.RankedTensorType(value.type)
    f32 = ir.F32Type.get()
    if type_.element_type == f32:
        return value
    wide, op = ir.RankedTensorType.get(list(type_.shape), f32), parameters.parameter(value)
    if op is None:
        return ir.Operation.create("arith.extf", [wide], [value]).result
    old = parameters.stored(op)
    return parameters.create(old.sources, [*old.recipe, "float32"], wide)


def _rounded(weight: ir.Operation, scale: ir.Operation, bits: int) -> ir.Value:
    """Returns the codes of a stored weight: a parameter made of both tensors."""
    w, s = parameters.stored(weight), parameters.stored(scale)
    steps = [step for step in s.recipe if step not in ("matrix", "column", "float32")]
    assert not w.recipe and not steps, "weights are rounded before anything else is done to them"
    element = ir.IntegerType.get_signless(bits)
    type_ = ir.RankedTensorType.get(list(w.shape), element)
    return parameters.create([*w.sources, *s.sources], [f"codes bits={bits}"], type_)
