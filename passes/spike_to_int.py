"""spike-to-int: spiking projections become integer arithmetic, exact for every input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import parameters, torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.dialect_spikes import silent_share
from spikingbrain.passes.kernels import spike_grouped_linear as grouped
from spikingbrain.passes.kernels import spike_portable as portable
from spikingbrain.passes.kernels.group_rows import Routing, Routings
from spikingbrain.passes.kernels.spike_dot import ChannelDot, Dot, choose, choose_by_channel
from spikingbrain.passes.kernels.spike_encode import (
    EVENT_ROWS,
    LARGEST_CHANNELS,
    Encoding,
    Spikes,
    emit_spike_encode,
    encoding,
)
from spikingbrain.passes.kernels.spike_linear import Shape, emit_spike_linear, scale_recipe
from spikingbrain.passes.kernels.spike_rows import emit_rows
from spikingbrain.passes.spike_forms import form
from spikingbrain.target import Target

_Encoded = dict[tuple[int, Encoding], Spikes]


@dataclass(frozen=True)
class SpikeToInt:
    """Lowers ``spikingbrain.spike_linear`` and ``spikingbrain.spike_encode``, and ``spike_grouped_linear`` where it has a kernel.

    A stored weight is packed for the target's dot products, and its counts come as bytes or words from a kernel that all
    projections of one input share. Where most channels are silent, the weight is packed by channel and the kernel also lists
    the channels that fire (``spike_forms.py``). Where there is no such instruction, and for weights that the model computes and
    groups of other sizes than the instruction's, linear algebra. Counts and thresholds that something else asks for are computed
    too. Look-ups in codes that a projection has packed, a head's, read them as they are packed, so that they are stored once.
    In: our dialect on builtin tensors. Out: ``spikingbrain_control.launch`` and kernel functions, or linalg.
    """

    name: ClassVar[str] = "spike-to-int"

    def run(self, module: ir.Module, context: PassContext) -> None:
        _merge_encoders(module)
        encoded: _Encoded = {}
        packed: dict[str, Dot] = {}  # weights and scales, by what they were before
        for op in torch_ir.operations(module, "spikingbrain.spike_linear"):
            bits = op.attributes["bits"].value
            by_channel = form(silent_share(op)) == "events"
            dot = (choose_by_channel if by_channel else choose)(context.target, bits)
            reason = _refusal(op, dot)
            with ir.InsertionPoint(op), op.location:
                y = _kernel(op, dot, context.target, encoded) if dot and not reason else _linalg(op, context)
            op.results[0].replace_all_uses_with(y)
            way = f"kernel of events, {silent_share(op):.0%} silent" if by_channel else "kernel"
            context.record(self, "lowered", op, f"linalg: {reason}" if reason else way)
            stored = [parameters.parameter(value) for value in op.operands]
            if dot and not reason and not by_channel:
                packed |= {parameters.stored(p).key: dot for p in stored[2:4] if p}
            op.erase()
            for parameter in {hash(p): p for p in stored if p}.values():
                _erase_unused(parameter)  # only its packed form is to be kept
        routings: dict[int, Routings] = {}  # by block
        for op in torch_ir.operations(module, "spikingbrain.spike_grouped_linear"):
            dot = choose(context.target, op.attributes["bits"].value)
            reason = _refusal(op, dot)
            if dot is None or reason:
                context.record(self, "refused", op, f"{reason}; lower-grouped-linear makes it linalg")
                continue
            with ir.InsertionPoint(op), op.location:
                known = routings.setdefault(hash(op.block), {})
                y = _grouped_kernel(op, dot, context.target, encoded, known)
            op.results[0].replace_all_uses_with(y)
            context.record(self, "lowered", op, "kernel")
            stored = [parameters.parameter(value) for value in op.operands]
            op.erase()
            for parameter in {hash(p): p for p in stored if p}.values():
                _erase_unused(parameter)
        for op in torch_ir.operations(module, "spikingbrain.embedding"):
            table = parameters.parameter(op.operands[1])
            if table and (dot := packed.get(parameters.stored(table).key)):
                context.record(self, "packed", op, "shared with a spiking projection")
                with ir.InsertionPoint(op), op.location:
                    _share(op, dot)
        for op in torch_ir.operations(module, "spikingbrain.spike_encode"):
            made = [spikes for (encode, _), spikes in encoded.items() if encode == hash(op)]
            if made:
                with ir.InsertionPoint.after(made[0].threshold.owner), op.location:
                    _replace_threshold(op, made[0].threshold)
            if any(list(result.uses) for result in op.results):
                with ir.InsertionPoint(op), op.location:
                    _counts(op)
                context.record(self, "lowered", op, "linalg")
            op.erase()


def _erase_unused(parameter: ir.Operation) -> None:
    if not list(parameter.results[0].uses):
        parameter.erase()


def _share(op: ir.Operation, dot: Dot) -> None:
    """Lets a look-up in codes or scales read the form that a projection has stored them in."""
    ids, table = op.operands
    rows, channels = ir.RankedTensorType(table.type).shape
    stored = parameters.parameter(table)
    assert stored is not None
    if ir.RankedTensorType(table.type).element_type == ir.F32Type.get():  # scales: packed as any table is
        type_ = ir.RankedTensorType.get([-(-rows // dot.block), channels, dot.block], ir.F32Type.get())
        op.operands[1] = _with_steps(table, [scale_recipe(dot)], type_)
    else:
        packed = _with_steps(table, [dot.recipe()], dot.stored_type(rows, channels))
        op.results[0].replace_all_uses_with(emit_rows(ids, packed, rows, op.results[0].type, dot))
        op.erase()
    _erase_unused(stored)


def _merge_encoders(module: ir.Module) -> None:
    """Lets encoders of one value, one for each projection in the model's code, be one."""
    first: dict[tuple[int, ...], ir.Operation] = {}
    for op in torch_ir.operations(module, "spikingbrain.spike_encode"):
        settings = [hash(op.attributes[name]) for name in ("k", "lower", "upper")]
        kept = first.setdefault((hash(op.operands[0]), hash(op.block), *settings), op)
        if kept != op:
            for old, new in zip(op.results, kept.results, strict=True):
                old.replace_all_uses_with(new)
            op.erase()


def _refusal(op: ir.Operation, dot: Dot | None) -> str:
    """Returns why a projection has no kernel, or an empty text."""
    counts, threshold, weight, scale, *_ = op.operands  # then a bias, or the experts
    if dot is None:
        return "the target has no dot products of such integers"
    source = torch_ir.defining(counts, "spikingbrain.spike_encode")
    if source is None or counts != source.results[0] or threshold != source.results[1]:
        return "counts and threshold are not one encoder's"
    if parameters.parameter(weight) is None or parameters.parameter(scale) is None:
        return "weight and scale are computed by the model, not stored"
    channels = ir.RankedTensorType(weight.type).shape[-1]
    groups = ir.RankedTensorType(scale.type).shape[-1]
    chunk = dot.width * dot.steps_per_vector
    if groups > 1 and channels // groups % chunk:
        return f"groups of {channels // groups} channels; a step takes {chunk}"
    if channels > LARGEST_CHANNELS:
        return f"{channels} channels; sums may exceed 32 bits"
    return ""


def _kernel(op: ir.Operation, dot: Dot, target: Target, encoded: _Encoded) -> ir.Value:
    counts, _, weight, scale, *bias = op.operands
    columns, channels = ir.RankedTensorType(weight.type).shape
    groups = ir.RankedTensorType(scale.type).shape[1]
    encode = torch_ir.defining(counts)
    assert encode is not None
    rows = ir.RankedTensorType(encode.operands[0].type)
    m = math.prod(rows.shape[:-1]) if rows.has_static_shape else ir.ShapedType.get_dynamic_size()
    events = isinstance(dot, ChannelDot) and (m == ir.ShapedType.get_dynamic_size() or m <= EVENT_ROWS)
    spikes, cut = _encoded(encode, dot, channels, groups, events, encoded)
    shape = Shape(cut, columns, None if m == ir.ShapedType.get_dynamic_size() else m, bool(bias))
    panels = -(-columns // dot.block)
    scales = ir.RankedTensorType.get([panels, groups, dot.block], ir.F32Type.get())
    packed = _with_steps(weight, [dot.recipe()], dot.stored_type(columns, channels))
    packed_scale = _with_steps(scale, [scale_recipe(dot)], scales)
    y = emit_spike_linear(spikes, packed, packed_scale, bias[0] if bias else None, dot, shape, target)
    return build.unflatten_leading(y, op.results[0].type, encode.operands[0])


def _grouped_kernel(
    op: ir.Operation, dot: Dot, target: Target, encoded: _Encoded, routings: Routings
) -> ir.Value:
    counts, _, weight, scale, expert = op.operands
    experts, columns, channels = ir.RankedTensorType(weight.type).shape
    groups = ir.RankedTensorType(scale.type).shape[2]
    encode = torch_ir.defining(counts)
    assert encode is not None
    spikes, cut = _encoded(encode, dot, channels, groups, False, encoded)
    m = ir.RankedTensorType(spikes.x.type).shape[0]
    rows = None if m == ir.ShapedType.get_dynamic_size() else m
    shape = grouped.Shape(cut, columns, Routing(experts, rows))
    stored = zip((weight, scale), grouped.recipes(dot), shape.stored(dot), strict=True)
    codes, scales = (_with_steps(value, steps, type_) for value, steps, type_ in stored)
    return grouped.emit_spike_grouped_linear(spikes, codes, scales, expert, dot, shape, target, routings)


def _encoded(
    encode: ir.Operation, dot: Dot, channels: int, groups: int, events: bool, encoded: _Encoded
) -> tuple[Spikes, Encoding]:
    """Returns what an encoder's counts are for a kernel, and their form; projections that want the same share them."""
    k, lower, upper = (encode.attributes[name].value for name in ("k", "lower", "upper"))
    cut = encoding(dot, channels, groups, k, lower, upper, events)
    key = (hash(encode), cut)
    if key not in encoded:
        with ir.InsertionPoint(encode), encode.location:
            encoded[key] = emit_spike_encode(build.flatten_leading(encode.operands[0]), cut)
    return encoded[key], cut


def _with_steps(value: ir.Value, steps: list[str], type_: ir.Type) -> ir.Value:
    """Returns a stored tensor with more steps in its recipe."""
    op = parameters.parameter(value)
    assert op is not None
    old = parameters.stored(op)
    return parameters.create(old.sources, [*old.recipe, *steps], type_)


def _linalg(op: ir.Operation, context: PassContext) -> ir.Value:
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


def _counts(op: ir.Operation) -> None:
    """Emits counts and threshold themselves, in linear algebra."""
    (x,) = op.operands
    k, lower, upper = (op.attributes[name].value for name in ("k", "lower", "upper"))
    rows = build.flatten_leading(x)
    threshold = portable.threshold(rows, k, lower, upper)
    counts = build.unflatten_leading(portable.counts(rows, threshold), x.type, x)
    op.results[0].replace_all_uses_with(counts)
    _replace_threshold(op, threshold)


def _replace_threshold(op: ir.Operation, threshold: ir.Value) -> None:
    """Puts ``[M]`` for the threshold of an encoder."""
    if list(op.results[1].uses):
        sizes = build.dynamic_sizes(op.operands[0])
        op.results[1].replace_all_uses_with(build.unflatten(threshold, op.results[1].type, sizes))
