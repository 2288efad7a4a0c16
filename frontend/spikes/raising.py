"""Writes the projections of spike counts in a graph as ``spikingbrain::spike_linear``: the one road of both doors.

Structure proposes and numbers decide: what multiplies the counts of a neuron (`neuron`) by something made of weights
(`projection`) is run on inputs of all sizes with the model's own weights, in the user's form and as the op, and raised if both
agree. The values then come from integers; gradients, where there are any, go through the user's own graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from spikingbrain.frontend.checks import user_line
from spikingbrain.frontend.recurrences.emit import Emitter
from spikingbrain.frontend.spikes.finite import Watch
from spikingbrain.frontend.spikes.neuron import Neuron, NotSpiking, find_neuron, through
from spikingbrain.frontend.spikes.projection import (
    Constants,
    Projection,
    Weight,
    evaluate,
    find_projections,
    find_weights,
    hint,
)
from spikingbrain.frontend.spikes.report import SpikeReport
from spikingbrain.models import spiking

aten = torch.ops.aten
_ENCODE = torch.ops.spikingbrain.spike_encode.default
_LINEAR = torch.ops.spikingbrain.spike_linear.default

_SIZES = (
    1.0,
    1e-7,
    300.0,
    1e6,
    0.0,
)  # of the rows that are tried: usual ones, and those whose threshold is clamped


def may_spike(graph: fx.Graph) -> bool:
    """Tells whether a graph, functional or not, may count spikes."""
    return any(
        n.op in ("call_function", "call_method")
        and str(getattr(n.target, "__name__", n.target)).partition(".")[0]
        in ("round", "round_", "spike_encode")
        for n in graph.nodes
    )


def raise_spikes(
    module: fx.GraphModule,
    tensors: Mapping[fx.Node, Tensor],
    training: bool = False,
    fixed: bool = False,
    watch: Watch | None = None,
) -> list[SpikeReport]:
    """Raises in place, in a functional graph of ATen ops; returns what was found.

    ``tensors`` are the weights that placeholders stand for. With ``training``, gradients may be asked for.
    ``fixed`` weights will not change, so that codes which fit 4 bits are stored in 4. A ``watch`` is told of every neuron.
    """
    neurons, reports = [], _calls(module.graph, tensors) if fixed else []
    for node in module.graph.nodes:
        try:
            neuron = None if node.op != "call_function" or node.meta.get("opaque") else find_neuron(node)
        except NotSpiking as why:
            reports.append(_left(node, str(why)))
            continue
        if neuron is not None:
            neurons.append(neuron)
    if not neurons and not reports:
        return reports
    constants = Constants(module.graph, tensors)
    raiser = _Raiser(module, constants, training, fixed)
    for encode in module.graph.find_nodes(op="call_function", target=_ENCODE) if watch is not None else []:
        x = encode.args[0]
        watch.add(raiser.emitter(), x, x.meta["val"].ndim - 1, encode)
    for neuron in neurons:
        if watch is not None and neuron.x not in constants:
            watch.add(raiser.emitter(), through(neuron.x, shapes=False), neuron.axis, neuron.counts)
        try:
            found = list(find_projections(neuron, constants))
        except NotSpiking as why:
            reports.append(_left(neuron.counts, str(why)))
            continue
        if not found and neuron.x not in constants:
            reports.append(_left(neuron.counts, "its counts are not multiplied by weights"))
        for projection in found:
            reports.append(raiser.carry_out(neuron, projection))
            constants.forget()
    if watch is not None:
        watch.append_to(module.graph)
    if (watch and watch.states) or any(r.status == "raised" for r in reports):
        module.graph.eliminate_dead_code(
            lambda n: bool(n.meta.get("opaque")) or n.op in ("placeholder", "output")
        )
        module.graph.lint()
        module.recompile()
    return reports


def _calls(graph: fx.Graph, tensors: Mapping[fx.Node, Tensor]) -> list[SpikeReport]:
    """Returns what a graph whose weights are fixed calls by the op already; codes that fit 4 bits are given 4."""
    reports: list[SpikeReport] = []
    widths: dict[fx.Node, int] = {}
    for node in graph.find_nodes(op="call_function", target=_LINEAR):
        counts, _, weight, scale, bias, bits, *_ = _arguments(node)
        encode = counts.args[0] if counts.target is operator.getitem else counts
        if bits == 8 and weight in tensors:
            if weight not in widths:
                widths[weight] = _bits(tensors[weight], fixed=True)
            bits = widths[weight]
            node.args, node.kwargs = (*node.args[:4], bias, bits, *node.args[6:]), {}
        (outputs, inputs), groups = weight.meta["val"].shape, scale.meta["val"].shape[1]
        k = _arguments(encode)[1] if encode.target is _ENCODE else 0.0
        where, reason = str(user_line(node) or ""), "a spiking layer of this package"
        reports.append(SpikeReport("raised", "spike_linear", where, reason, inputs, outputs, groups, bits, k))
    return reports


def _arguments(node: fx.Node) -> list[Any]:
    """Returns all arguments of a call of an op, with the defaults that tracing leaves out."""
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    return [given.get(a.name, a.default_value) for a in node.target._schema.arguments]


def _left(node: fx.Node, reason: str) -> SpikeReport:
    return SpikeReport("float", "", str(user_line(node) or ""), reason)


class _Raiser:
    """Carries out what was found in one graph; neurons of the same input are encoded once."""

    def __init__(self, module: fx.GraphModule, constants: Constants, training: bool, fixed: bool):
        self.module, self.constants, self.training, self.fixed = module, constants, training, fixed
        self.encoded: dict[Any, tuple[fx.Node, fx.Node]] = {}
        values = (n.meta.get("val") for n in module.graph.nodes)
        self.mode = next((m for v in values if (m := getattr(v, "fake_mode", None))), None)

    def emitter(self) -> Emitter:
        return Emitter(self.module.graph, self.mode)

    def carry_out(self, neuron: Neuron, projection: Projection) -> SpikeReport:
        where = str(user_line(projection.product) or "")
        try:
            result, weight, axis, bits = self._matched(neuron, projection)
            if self.training:
                self._require_float_form(projection, result, axis, neuron)
        except NotSpiking as why:
            return SpikeReport("float", "", where, str(why), k=neuron.k)
        self._emit(neuron, projection, result, weight, axis, bits)
        (outputs, channels), groups = weight.codes.shape, weight.scales.shape[1]
        form = "integers" if weight.source.meta["val"].dtype != torch.float32 else "floats that are rounded"
        reason = f"counts of an adaptive threshold times {form}"
        return SpikeReport("raised", "spike_linear", where, reason, channels, outputs, groups, bits, neuron.k)

    def _matched(self, neuron: Neuron, projection: Projection) -> tuple[fx.Node, Weight, int, int]:
        """Returns which result is that of the op, with which weight, the result's axis of outputs, and the codes' bits."""
        channels = hint(neuron.x.meta["val"].shape[neuron.axis])
        if not all(hint(s) for s in neuron.x.meta["val"].shape):
            raise NotSpiking("its input is empty")
        if not projection.results:
            raise NotSpiking("its result is not multiplied by the threshold")
        x, given = self._trial(neuron)
        rows = x.numel() // channels
        why = "no weights that are integers times scales give its result"
        for result in projection.results:
            outputs, rest = divmod(_numel(result), rows)
            axis = _output_axis(neuron, result, outputs)
            if rest or axis is None:
                continue
            wanted = evaluate(result, given, self.constants)
            for weight in find_weights(projection, result, self.constants, outputs, channels):
                try:
                    bits = _bits(weight.codes, self.fixed)
                    got = self._computed(neuron, projection, result, weight, given)
                except NotSpiking as reason:
                    why = str(reason)
                    continue
                got = got.movedim(-1, axis) if got.ndim == wanted.ndim else got.reshape(wanted.shape)
                if got.shape == wanted.shape and _agree(got, wanted, axis):
                    if not _is_stored_order(weight):
                        why = "its weights are stored transposed; the op takes [outputs, inputs]"
                        continue
                    return result, weight, axis, bits
        raise NotSpiking(why)

    def _trial(self, neuron: Neuron) -> tuple[Tensor, dict[fx.Node, Tensor]]:
        """Returns inputs of several sizes, and with them the values of what the region reads."""
        shape = [hint(s) for s in neuron.x.meta["val"].shape]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator)
        rows = x.movedim(neuron.axis, -1)
        sizes = torch.tensor(_SIZES)[torch.arange(rows[..., 0].numel()) % len(_SIZES)]
        x = (rows * sizes.reshape(rows.shape[:-1]).unsqueeze(-1)).movedim(-1, neuron.axis).contiguous()
        root = through(neuron.x, shapes=False)
        given = {root: x.to(root.meta["val"].dtype), neuron.x: x}
        if root.meta["val"].dtype != torch.float32:
            given[neuron.x] = given[root].float()
        counts = evaluate(neuron.counts, given, self.constants).movedim(neuron.axis, -1)
        x = given[neuron.x].movedim(neuron.axis, -1)
        expected, _ = spiking.spike_counts(x, neuron.k, neuron.lower, neuron.upper)
        # a mean in another order moves a threshold by its last bit, and a count in ten million by one
        if ((counts - expected).abs() > 1).any() and not torch.allclose(
            counts, expected, rtol=1e-5, atol=1.0
        ):
            raise NotSpiking("its counts are not those of round(x / clamp(mean |x| / k))")
        if (counts != expected).sum() > 1e-3 * counts.numel():
            raise NotSpiking("too many of its counts differ from round(x / clamp(mean |x| / k))")
        return x, given

    def _computed(
        self,
        neuron: Neuron,
        projection: Projection,
        result: fx.Node,
        weight: Weight,
        given: dict[fx.Node, Tensor],
    ) -> Tensor:
        """Returns what the op gives, channels last, for the counts and thresholds that the user's form has."""
        counts = evaluate(neuron.counts, given, self.constants).movedim(neuron.axis, -1)
        threshold = evaluate(neuron.threshold, given, self.constants).broadcast_to(given[neuron.x].shape)
        threshold = threshold.movedim(neuron.axis, -1)[..., :1]
        bias = projection.biases.get(result)
        values = self.constants.value(bias).flatten() if bias is not None else None
        if values is not None and values.numel() != weight.codes.shape[0]:
            raise NotSpiking(f"a bias of {values.numel()} values for {weight.codes.shape[0]} outputs")
        return spiking.spike_linear(counts, threshold, weight.codes, weight.scales, values, torch.float64)

    def _require_float_form(self, projection: Projection, result: fx.Node, axis: int, neuron: Neuron) -> None:
        """Raises NotSpiking unless gradients can be those of a product of what is multiplied, as the op's are."""
        plain = projection.product.target is aten.linear.default and result is projection.product
        last = axis == result.meta["val"].ndim - 1 and neuron.axis == neuron.x.meta["val"].ndim - 1
        if not (plain and last):
            raise NotSpiking(
                "gradients may be asked for, and it is no linear of floats; under torch.no_grad() it is raised"
            )

    def _emit(
        self,
        neuron: Neuron,
        projection: Projection,
        result: fx.Node,
        weight: Weight,
        axis: int,
        bits: int,
    ) -> None:
        graph, emit = self.module.graph, self.emitter()
        emit.trace = projection.product.meta.get("stack_trace")
        with graph.inserting_before(neuron.counts):
            counts, threshold = self._encode(emit, neuron)
        with graph.inserting_before(result):
            bias = projection.biases.get(result)
            if bias is not None and bias.meta["val"].ndim != 1:
                bias = emit.op(aten.flatten.using_ints, bias)
            scale = weight.scale
            if scale.meta["val"].ndim not in (2, 3):
                scale = emit.op(aten.reshape.default, scale, list(weight.scales.shape))
            gradients = (projection.activation, projection.weight) if self.training else (None, None)
            made = emit.op(_LINEAR, counts, threshold, weight.source, scale, bias, bits, *gradients)
            shape = result.meta["val"].shape
            if made.meta["val"].ndim != len(shape):
                made = emit.op(aten.reshape.default, made, [-1, *map(int, shape[1:])])
            elif axis != len(shape) - 1:
                made = emit.op(aten.movedim.int, made, -1, axis)
        result.replace_all_uses_with(made)

    def _encode(self, emit: Emitter, neuron: Neuron) -> tuple[fx.Node, fx.Node]:
        root = through(neuron.x, shapes=False)
        key = (root, neuron.axis, neuron.k, neuron.lower, neuron.upper)
        if key not in self.encoded:
            x = root if root.meta["val"].dtype == torch.float32 else neuron.x
            if neuron.axis != x.meta["val"].ndim - 1:
                x = emit.op(aten.movedim.int, x, neuron.axis, -1)
            if self.training:
                x = emit.op(aten.detach.default, x)
            both = emit.op(_ENCODE, x, neuron.k, neuron.lower, neuron.upper)
            parts = []
            for i in range(2):
                part = emit.graph.call_function(operator.getitem, (both, i))
                part.meta = {"val": both.meta["val"][i], "stack_trace": emit.trace}
                parts.append(part)
            self.encoded[key] = (parts[0], parts[1])
        return self.encoded[key]


def _numel(node: fx.Node) -> int:
    return math.prod(hint(s) for s in node.meta["val"].shape)


def _output_axis(neuron: Neuron, result: fx.Node, outputs: int) -> int | None:
    """Returns which axis of a result holds the outputs; None where its shape is not the input's otherwise."""
    before = [hint(s) for s in neuron.x.meta["val"].shape]
    after = [hint(s) for s in result.meta["val"].shape]
    rows = before[: neuron.axis] + before[neuron.axis + 1 :]
    if len(after) != len(before):
        joined = len(after) == 2 and after[1] == outputs and neuron.axis == len(before) - 1
        return 1 if joined else None
    for axis in dict.fromkeys((neuron.axis, len(after) - 1)):
        if after[axis] == outputs and after[:axis] + after[axis + 1 :] == rows:
            return axis
    return None


def _bits(codes: Tensor, fixed: bool) -> int:
    """Returns how many bits the codes take: 8 or 16, and 4 if they are ``fixed``."""
    low, high = (float(codes.min()), float(codes.max())) if codes.numel() else (0.0, 0.0)
    if codes.is_floating_point() and not bool((codes == codes.round()).all()):
        raise NotSpiking("its weights are no integers times scales")
    bits = next(
        (b for b in ((4, 8, 16) if fixed else (8, 16)) if low >= -(2 ** (b - 1)) and high < 2 ** (b - 1)),
        None,
    )
    if bits is None or (codes.dtype == torch.int8 and bits > 8):
        raise NotSpiking(f"a weight code of {max(-low, high):.0f}; up to 16 bits are")
    return 16 if codes.dtype == torch.int16 else bits


def _is_stored_order(weight: Weight) -> bool:
    return tuple(weight.source.meta["val"].shape) == tuple(weight.codes.shape)


def _agree(got: Tensor, wanted: Tensor, axis: int) -> bool:
    """Tells whether two results agree within the rounding of float32, row by row."""
    got, wanted = (t.double().movedim(axis, -1).reshape(-1, wanted.shape[axis]) for t in (got, wanted))
    size = wanted.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return bool(((got - wanted).abs() <= 2e-5 * size).all())
