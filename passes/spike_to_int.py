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
from spikingbrain.passes.kernels.spike_rows import emit_rows, emit_rows_of_words
from spikingbrain.passes.residuals import sum_with
from spikingbrain.passes.spike_forms import form
from spikingbrain.passes.wave_kernels import row_values
from spikingbrain.passes.wave_kernels import spike_encode as wave_encode
from spikingbrain.passes.wave_kernels import spike_grouped_linear as wave_grouped
from spikingbrain.passes.wave_kernels import spike_linear as wave
from spikingbrain.passes.wave_kernels.group_rows import Tiles
from spikingbrain.passes.wave_kernels.grouped_linear import refusal as refusal_of_experts
from spikingbrain.passes.wave_kernels.spike_codes import Codes
from spikingbrain.target import Target

_Encoded = dict[tuple[int, Encoding | wave_encode.Encoding], Spikes | wave_encode.Counts]


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
        packed: dict[str, Dot | Codes] = {}  # weights and scales, by what they were before
        for op in torch_ir.operations(module, "spikingbrain.spike_linear"):
            bits = op.attributes["bits"].value
            by_channel = form(silent_share(op)) == "events" and not context.target.wave_kernels
            dot = _choose(context.target, bits, by_channel)
            reason = _refusal(op, dot)
            total, addend = sum_with(op) if isinstance(dot, Codes) and not reason else (op, None)
            with ir.InsertionPoint(total), op.location:
                if dot is None or reason:
                    y = _linalg(op, context)
                elif isinstance(dot, Codes):
                    y = _wave_kernel(op, dot, context.target, encoded, addend)
                else:
                    y = _kernel(op, dot, context.target, encoded)
            total.results[0].replace_all_uses_with(y)
            if total != op:
                total.erase()
            context.record(self, "lowered", op, f"linalg: {reason}" if reason else _kind(op, by_channel))
            stored = [parameters.parameter(value) for value in op.operands]
            if dot and not reason and not by_channel:
                packed |= {parameters.stored(p).key: dot for p in stored[2:4] if p}
            op.erase()
            for parameter in {hash(p): p for p in stored if p}.values():
                _erase_unused(parameter)  # only its packed form is to be kept
        routings: dict[int, Routings] = {}  # by block
        tiles: dict[int, Tiles] = {}
        for op in torch_ir.operations(module, "spikingbrain.spike_grouped_linear"):
            by_channel = form(silent_share(op)) == "events" and not context.target.wave_kernels
            dot = _choose(context.target, op.attributes["bits"].value, by_channel)
            reason = _refusal(op, dot)
            if isinstance(dot, Codes) and not reason:
                reason = refusal_of_experts(ir.RankedTensorType(op.operands[2].type).shape[0])
            if dot is None or reason:
                context.record(self, "refused", op, f"{reason}; lower-grouped-linear makes it linalg")
                continue
            with ir.InsertionPoint(op), op.location:
                block = hash(op.block)
                if isinstance(dot, Codes):
                    rows = tiles.setdefault(block, {})
                    y = _wave_grouped_kernel(op, dot, context.target, encoded, rows)
                else:
                    known = routings.setdefault(block, {})
                    y = _grouped_kernel(op, dot, context.target, encoded, known)
            op.results[0].replace_all_uses_with(y)
            context.record(self, "lowered", op, _kind(op, by_channel))
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


def _choose(target: Target, bits: int, by_channel: bool = False) -> Dot | Codes | None:
    """Returns how the target multiplies counts with codes of ``bits`` bits; None where it has no kernels for it."""
    if target.wave_kernels:
        return Codes(bits)
    return (choose_by_channel if by_channel else choose)(target, bits)


def _kind(op: ir.Operation, by_channel: bool) -> str:
    return f"kernel of events, {silent_share(op):.0%} silent" if by_channel else "kernel"


def _erase_unused(parameter: ir.Operation) -> None:
    if not list(parameter.results[0].uses):
        parameter.erase()


def _share(op: ir.Operation, dot: Dot | Codes) -> None:
    """Lets a look-up in codes or scales read the form that a projection has stored them in."""
    ids, table = op.operands
    rows, channels = ir.RankedTensorType(table.type).shape
    stored = parameters.parameter(table)
    assert stored is not None
    if ir.RankedTensorType(table.type).element_type == ir.F32Type.get():  # scales: packed as any table is
        type_ = ir.RankedTensorType.get([-(-rows // dot.block), channels, dot.block], ir.F32Type.get())
        step = dot.scale_recipe() if isinstance(dot, Codes) else scale_recipe(dot)
        op.operands[1] = _with_steps(table, [step], type_)
    elif isinstance(dot, Codes):
        packed = _with_steps(table, dot.recipe(), dot.stored_type(rows, channels))
        value = emit_rows_of_words(ids, packed, rows, op.results[0].type, dot)
        op.results[0].replace_all_uses_with(value)
        op.erase()
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


def _refusal(op: ir.Operation, dot: Dot | Codes | None) -> str:
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
    if groups > 1 and channels // groups % dot.chunk:
        return f"groups of {channels // groups} channels; a step takes {dot.chunk}"
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


def _wave_kernel(
    op: ir.Operation, codes: Codes, target: Target, encoded: _Encoded, addend: ir.Value | None
) -> ir.Value:
    counts, _, weight, scale, *bias = op.operands
    columns, channels = ir.RankedTensorType(weight.type).shape
    encode = torch_ir.defining(counts)
    assert encode is not None
    rows, cut = _wave_encoded(encode, codes, channels, encoded)
    m = ir.RankedTensorType(rows.x.type).shape[0]
    groups = ir.RankedTensorType(scale.type).shape[1]
    known = None if m == ir.ShapedType.get_dynamic_size() else m
    shape = wave.Shape(cut, groups, columns, known, bool(bias), addend is not None, tuning=target.tuning)
    residual = None if addend is None else build.flatten_leading(addend)
    packed = _with_steps(weight, codes.recipe(), codes.stored_type(columns, channels))
    scales = _with_steps(scale, [codes.scale_recipe()], shape.scale_type())
    y = wave.emit_spike_linear(rows, packed, scales, bias[0] if bias else None, codes, shape, residual)
    return build.unflatten_leading(y, op.results[0].type, encode.operands[0])


def _wave_grouped_kernel(
    op: ir.Operation, codes: Codes, target: Target, encoded: _Encoded, tiles: Tiles
) -> ir.Value:
    counts, _, weight, scale, expert = op.operands
    experts, columns, channels = ir.RankedTensorType(weight.type).shape
    encode = torch_ir.defining(counts)
    assert encode is not None
    rows, cut = _wave_encoded(encode, codes, channels, encoded)
    m = ir.RankedTensorType(rows.x.type).shape[0]
    groups = ir.RankedTensorType(scale.type).shape[2]
    known = None if m == ir.ShapedType.get_dynamic_size() else m
    shape = wave_grouped.Shape(experts, wave.Shape(cut, groups, columns, known, tuning=target.tuning))
    stored = zip((weight, scale), wave_grouped.recipes(codes), shape.stored(codes), strict=True)
    packed, scales = (_with_steps(value, steps, type_) for value, steps, type_ in stored)
    return wave_grouped.emit_spike_grouped_linear(rows, packed, scales, expert, codes, shape, tiles)


def _wave_encoded(
    encode: ir.Operation, codes: Codes, channels: int, encoded: _Encoded
) -> tuple[wave_encode.Counts, wave_encode.Encoding]:
    """The same as ``_encoded`` for wave kernels."""
    settings = (encode.attributes[name].value for name in ("k", "lower", "upper"))
    cut = wave_encode.Encoding(channels, codes.largest_code, *settings)
    key = (hash(encode), cut)
    if key not in encoded:
        x = encode.operands[0]
        users = [use.owner.operation for use in x.uses if use.owner.operation.name != "tensor.dim"]
        computed = row_values.find(x, users) if all(user == encode for user in users) else None
        with ir.InsertionPoint(encode), encode.location:
            encoded[key] = wave_encode.emit_spike_encode(build.flatten_leading(x), cut, computed)
    counts = encoded[key]
    assert isinstance(counts, wave_encode.Counts)
    return counts, cut


def _grouped_kernel(
    op: ir.Operation, dot: Dot, target: Target, encoded: _Encoded, routings: Routings
) -> ir.Value:
    counts, _, weight, scale, expert = op.operands
    experts, columns, channels = ir.RankedTensorType(weight.type).shape
    groups = ir.RankedTensorType(scale.type).shape[2]
    encode = torch_ir.defining(counts)
    assert encode is not None
    m = ir.RankedTensorType(encode.operands[0].type).shape[0]
    routing = Routing(experts, None if m == ir.ShapedType.get_dynamic_size() else m)
    events = isinstance(dot, ChannelDot) and routing.has_few_rows
    spikes, cut = _encoded(encode, dot, channels, groups, events, encoded)
    shape = grouped.Shape(cut, columns, routing)
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
    spikes = encoded[key]
    assert isinstance(spikes, Spikes)
    return spikes, cut


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
