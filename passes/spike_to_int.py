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
from spikingbrain.passes.wave_kernels import row_values, spike_counts
from spikingbrain.passes.wave_kernels import spike_grouped_linear as wave_grouped
from spikingbrain.passes.wave_kernels import spike_linear as wave
from spikingbrain.passes.wave_kernels.group_rows import Tiles
from spikingbrain.passes.wave_kernels.grouped_linear import refusal as refusal_of_experts
from spikingbrain.passes.wave_kernels.spike_codes import Codes
from spikingbrain.passes.wave_kernels.spike_encode import emit_spike_encode as emit_wave_encode
from spikingbrain.target import Target

_Encoded = dict[tuple[int, "Encoding | spike_counts.Encoding"], "Spikes | _WaveEncoder"]


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
            by_channel = form(silent_share(op)) == "events" and not context.target.wave_kernels
            dot = _choose(context.target, op, by_channel)
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
            dot = _choose(context.target, op, by_channel)
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
            made = [_threshold(spikes) for (encode, _), spikes in encoded.items() if encode == hash(op)]
            if made and made[0] is not None:
                with ir.InsertionPoint.after(made[0].owner), op.location:
                    _replace_threshold(op, made[0])
            if any(list(result.uses) for result in op.results):
                with ir.InsertionPoint(op), op.location:
                    _counts(op)
                context.record(self, "lowered", op, "linalg")
            op.erase()


def _threshold(spikes: Spikes | _WaveEncoder) -> ir.Value | None:
    """Returns the thresholds of an encoder in memory, if they are there."""
    counts = spikes.made if isinstance(spikes, _WaveEncoder) else spikes
    return None if counts is None else counts.threshold


def _choose(target: Target, op: ir.Operation, by_channel: bool) -> Dot | Codes | None:
    """Returns how the target multiplies counts with the codes of a projection; None where it has no kernels for it."""
    bits = op.attributes["bits"].value
    if target.wave_kernels:
        channels, groups = (ir.RankedTensorType(op.operands[i].type).shape[-1] for i in (2, 3))
        return Codes(bits, channels, groups)
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
        packed = _with_steps(table, dot.recipe(), dot.stored_type(rows))
        value = emit_rows_of_words(ids, packed, rows, op.results[0].type, dot)
        op.results[0].replace_all_uses_with(value)
        op.erase()
    else:
        packed = _with_steps(table, [dot.recipe()], dot.stored_type(rows, channels))
        op.results[0].replace_all_uses_with(emit_rows(ids, packed, rows, op.results[0].type, dot))
        op.erase()
    _erase_unused(stored)


def _merge_encoders(module: ir.Module) -> None:
    """Lets encoders of one value, one for each projection in the model's code, be one; nothing asks them for sizes."""
    first: dict[tuple[int, ...], ir.Operation] = {}
    for op in torch_ir.operations(module, "spikingbrain.spike_encode"):
        for user in [use.owner.operation for result in op.results for use in result.uses]:
            if user.name == "tensor.dim":  # sizes are those of x
                user.operands[0] = op.operands[0]
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
    if isinstance(dot, Codes):
        if reason := wave.refusal(dot):
            return reason
    elif groups > 1 and channels // groups % dot.chunk:
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
    _, _, weight, scale, *bias = op.operands
    encoder = _WaveEncoder.of(op, codes, encoded)
    columns = ir.RankedTensorType(weight.type).shape[0]
    shape = wave.Shape(
        encoder.cut, codes.groups, columns, encoder.rows, bool(bias), addend is not None, target.tuning
    )
    packed = _with_steps(weight, codes.recipe(), codes.stored_type(columns))
    scales = _with_steps(scale, [codes.scale_recipe()], shape.scale_type())
    residual = None if addend is None else build.flatten_leading(addend)
    stored = wave.Stack(packed, scales, bias[0] if bias else None, residual)
    y = wave.emit_spike_linear(
        encoder.flat, encoder.counts, stored, codes, shape, encoder.computed, encoder.is_private
    )
    return build.unflatten_leading(y, op.results[0].type, encoder.x)


def _wave_grouped_kernel(
    op: ir.Operation, codes: Codes, target: Target, encoded: _Encoded, tiles: Tiles
) -> ir.Value:
    _, _, weight, scale, expert = op.operands
    encoder = _WaveEncoder.of(op, codes, encoded)
    experts, columns, _ = ir.RankedTensorType(weight.type).shape
    each = wave.Shape(encoder.cut, codes.groups, columns, encoder.rows, tuning=target.tuning)
    shape = wave_grouped.Shape(experts, each)
    kept = zip((weight, scale), wave_grouped.recipes(codes), shape.stored(codes), strict=True)
    stored = wave.Stack(*(_with_steps(value, steps, type_) for value, steps, type_ in kept))
    return wave_grouped.emit_spike_grouped_linear(
        encoder.flat,
        encoder.counts,
        stored,
        expert,
        codes,
        shape,
        tiles,
        encoder.computed,
        encoder.is_private,
    )


@dataclass
class _WaveEncoder:
    """The encoder of projections, for wave kernels: its counts are emitted where something needs them in memory.

    Attributes:
        x: what it encodes, before that is flattened to ``flat``.
        computed: how x is computed, if nothing else reads it.
        is_private: whether nothing but projections reads its counts and thresholds.
    """

    op: ir.Operation
    cut: spike_counts.Encoding
    x: ir.Value
    computed: row_values.RowValues | None
    is_private: bool
    made: spike_counts.Counts | None = None

    @staticmethod
    def of(op: ir.Operation, codes: Codes, encoded: _Encoded) -> _WaveEncoder:
        encode = torch_ir.defining(op.operands[0])
        assert encode is not None
        k, lower, upper = (encode.attributes[name].value for name in ("k", "lower", "upper"))
        cut = spike_counts.Encoding(codes.channels, codes.largest_code, k, lower, upper, codes.gaps)
        key = (hash(encode), cut)
        if key not in encoded:
            others = [e for (made, _), e in encoded.items() if made == hash(encode)]
            x = encode.operands[0]
            if others and isinstance(others[0], _WaveEncoder):
                computed = others[0].computed
            else:
                users = [use.owner.operation for use in x.uses if use.owner.operation.name != "tensor.dim"]
                computed = row_values.find(x, users) if all(user == encode for user in users) else None
            readers = {use.owner.operation.name for result in encode.results for use in result.uses}
            is_private = readers <= {"spikingbrain.spike_linear", "spikingbrain.spike_grouped_linear"}
            encoded[key] = _WaveEncoder(encode, cut, x, computed, is_private)
        found = encoded[key]
        assert isinstance(found, _WaveEncoder)
        return found

    @property
    def rows(self) -> int | None:
        """Returns the number of rows; None for any."""
        shape = ir.RankedTensorType(self.x.type)
        return math.prod(shape.shape[:-1]) if all(n >= 0 for n in shape.shape[:-1]) else None

    @property
    def flat(self) -> ir.Value:
        """Emits x as ``[M, K]``."""
        return build.flatten_leading(self.x)

    def counts(self) -> spike_counts.Counts:
        """Returns counts in memory, emitted behind x."""
        if self.made is None:
            with ir.InsertionPoint(self.op), self.op.location:
                self.made = emit_wave_encode(self.flat, self.cut, self.computed)
        return self.made


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
