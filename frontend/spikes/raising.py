"""Writes the projections of spike counts in a graph as ``spikingbrain::spike_linear``: the one road of both doors.

Structure proposes and numbers decide: what multiplies the counts of a neuron (`neuron`) by something made of weights
(`projection`) is run on inputs of all sizes with the model's own weights, in the user's form and as the op, and raised if both
agree. The values then come from integers; gradients, where there are any, go through the user's own graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from spikingbrain.frontend.checks import user_line
from spikingbrain.frontend.recurrences.emit import Emitter
from spikingbrain.frontend.spikes.finite import Watch, module_path
from spikingbrain.frontend.spikes.functions import body_of, forget, is_function, write_forwards
from spikingbrain.frontend.spikes.neuron import (
    CASTS,
    OUTSIDE,
    Factor,
    Neuron,
    NotSpiking,
    find_neuron,
    through,
    whole,
)
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
from spikingbrain.passes.spike_forms import form

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


_ROUNDINGS = (
    "round",
    "round_",
    "floor",
    "floor_",
    "trunc",
    "trunc_",
    "ceil",
    "ceil_",
    "fix",
    "fix_",
    "spike_encode",
)


def may_spike(graph: fx.Graph) -> bool:
    """Tells whether a graph, functional or not, may count spikes."""
    return any(
        (
            n.op in ("call_function", "call_method")
            and str(getattr(n.target, "__name__", n.target)).partition(".")[0] in _ROUNDINGS
        )
        or (is_function(n) and (body := body_of(n)) is not None and may_spike(body.graph))
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
    raiser = _Raiser(module, tensors, training, fixed)
    functions = write_forwards(module, raiser.mode)
    raiser.constants = constants = Constants(module.graph, tensors)
    reports = _calls(module.graph, tensors) if fixed else []
    if watch is not None:
        for encode in module.graph.find_nodes(op="call_function", target=_ENCODE):
            x = encode.args[0]
            watch.add(raiser.emitter(), x, x.meta["val"].ndim - 1, encode)
    for neuron in [find_neuron(n) for n in module.graph.nodes]:
        if neuron is None or neuron.counts in constants or neuron.x in constants:
            continue
        try:
            found = list(find_projections(neuron, constants))
        except NotSpiking as why:
            reports.append(_left(neuron.counts, str(why)))
            continue
        if watch is not None and (found or neuron.settings or neuron.why):
            watch.add(raiser.emitter(), through(neuron.x, shapes=False), neuron.axis, neuron.counts)
        if not found and (neuron.settings or neuron.why) and not _goes_on(neuron.counts):
            reports.append(_left(neuron.counts, "its counts are not multiplied by weights"))
        for projection in found:
            reports.append(raiser.carry_out(neuron, projection))
            constants.forget()
    if watch is not None:
        watch.append_to(module.graph)
    forget(functions)
    if functions or (watch and watch.states) or any(r.status == "raised" for r in reports):
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
        silent = _silent(node)
        if silent:
            node.kwargs = {**node.kwargs, "silent": silent}
        (outputs, inputs), groups = weight.meta["val"].shape, scale.meta["val"].shape[1]
        k = _arguments(encode)[1] if encode.target is _ENCODE else 0.0
        where, reason = str(user_line(node) or ""), "a spiking layer of this package"
        reports.append(
            SpikeReport(
                "raised",
                "spike_linear",
                where,
                reason + _way(silent),
                inputs,
                outputs,
                groups,
                bits,
                k,
                module_path(node),
                silent,
            )
        )
    return reports


def _silent(product: fx.Node) -> float:
    """Returns the share of silent channels that the model tells of a product; 0 where it tells nothing."""
    return float((product.meta.get("custom") or {}).get(spiking.SILENT_NOTE, 0.0))


def _way(silent: float) -> str:
    return ", added for the channels that fire" if form(silent) == "events" else ""


def _arguments(node: fx.Node) -> list[Any]:
    """Returns all arguments of a call of an op, with the defaults that tracing leaves out."""
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    return [given.get(a.name, a.default_value) for a in node.target._schema.arguments]


def _goes_on(counts: fx.Node) -> bool:
    """Tells whether counts become other counts, as by a clamp, which are looked at for themselves."""
    return any(whole(user) is not None or (user.target in CASTS and _goes_on(user)) for user in counts.users)


def _left(node: fx.Node, reason: str) -> SpikeReport:
    return SpikeReport("float", "", str(user_line(node) or ""), reason)


class _Raiser:
    """Carries out what was found in one graph; neurons of the same input are encoded once."""

    def __init__(
        self, module: fx.GraphModule, tensors: Mapping[fx.Node, Tensor], training: bool, fixed: bool
    ):
        self.module, self.training, self.fixed = module, training, fixed
        self.constants = Constants(module.graph, tensors)
        self.encoded: dict[Any, tuple[fx.Node, fx.Node]] = {}
        values = (n.meta.get("val") for n in module.graph.nodes)
        self.mode = next((m for v in values if (m := getattr(v, "fake_mode", None))), None)

    def emitter(self) -> Emitter:
        return Emitter(self.module.graph, self.mode)

    def carry_out(self, neuron: Neuron, projection: Projection) -> SpikeReport:
        where = str(user_line(projection.product) or "")
        try:
            neuron, result, weight, axis, bits = self._decided(neuron, projection)
            if self.training:
                self._require_float_form(projection, result, axis, neuron)
            self._emit(neuron, projection, result, weight, axis, bits)
        except NotSpiking as why:
            return SpikeReport("float", "", where, str(why), k=neuron.k)
        (outputs, channels), groups = weight.codes.shape, weight.scales.shape[1]
        form = "integers" if not weight.source.meta["val"].is_floating_point() else "floats that are rounded"
        kind = "of an adaptive threshold" if neuron.settings else "computed as they are written"
        reason = f"counts {kind}{f' ({neuron.why})' if neuron.why else ''} times {form}"
        silent, layer = _silent(projection.product), module_path(projection.product)
        sizes = channels, outputs, groups, bits
        return SpikeReport(
            "raised", "spike_linear", where, reason + _way(silent), *sizes, neuron.k, layer, silent
        )

    def _decided(self, neuron: Neuron, projection: Projection) -> tuple[Neuron, fx.Node, Weight, int, int]:
        """Returns how the neuron is taken, and what ``_matched`` returns."""
        if neuron.settings:
            try:
                return neuron, *self._matched(neuron, projection, *self._trial(neuron))
            except _OtherCounts as why:
                neuron = replace(neuron, settings=None, axis=-1, threshold=None, why=str(why))
        base, reason = projection.base, "its shape tells no axis of channels"
        if base.meta["val"].dtype == torch.float64:
            raise NotSpiking("its counts are float64")
        for axis in reversed(range(base.meta["val"].ndim)):
            taken = replace(neuron, x=base, axis=axis, counts=base, threshold=projection.factor)
            try:
                return taken, *self._matched(taken, projection, *self._trial_of_counts(neuron, taken))
            except NotSpiking as why:
                reason = str(why) if axis == base.meta["val"].ndim - 1 else reason
        raise NotSpiking(reason)

    def _matched(
        self, neuron: Neuron, projection: Projection, x: Tensor, given: dict[fx.Node, Tensor]
    ) -> tuple[fx.Node, Weight, int, int]:
        """Returns which result is that of the op, with which weight, the result's axis of outputs, and the codes' bits."""
        channels = x.shape[-1]
        dtype = projection.product.meta["val"].dtype
        if dtype in (torch.bfloat16, torch.float16):
            raise NotSpiking(f"its product is in {str(dtype).removeprefix('torch.')}, the op's in float32")
        if not projection.results:
            raise NotSpiking("its result is not multiplied by the threshold")
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
                        shape = list(weight.source.meta["val"].shape)
                        why = f"its weights are stored as {shape}; the op takes [outputs, inputs]"
                        continue
                    return result, weight, axis, bits
        raise NotSpiking(why)

    def _drawn(self, node: fx.Node, axis: int, generator: torch.Generator) -> Tensor:
        """Returns values for a node, in rows of several sizes."""
        shape = [hint(s) for s in node.meta["val"].shape]
        if not all(shape):
            raise NotSpiking("its input is empty")
        rows = torch.randn(shape, generator=generator).movedim(axis, -1)
        sizes = torch.tensor(_SIZES)[torch.arange(rows[..., 0].numel()) % len(_SIZES)]
        return (rows * sizes.reshape(rows.shape[:-1]).unsqueeze(-1)).movedim(-1, axis).contiguous()

    def _trial(self, neuron: Neuron) -> tuple[Tensor, dict[fx.Node, Tensor]]:
        """Returns inputs of several sizes, channels last, and with them the values of what the region reads."""
        x = self._drawn(neuron.x, neuron.axis, torch.Generator().manual_seed(0))
        root = through(neuron.x, shapes=False)
        x = x.clamp(min=-(largest := torch.finfo(root.meta["val"].dtype).max), max=largest)
        given = {root: x.to(root.meta["val"].dtype), neuron.x: x}
        if root.meta["val"].dtype != torch.float32:
            given[neuron.x] = given[root].float()
        counts = evaluate(neuron.counts, given, self.constants).movedim(neuron.axis, -1)
        x = given[neuron.x].movedim(neuron.axis, -1)
        assert neuron.settings is not None
        expected, _ = spiking.spike_counts(x, *neuron.settings)
        # a mean in another order moves a threshold by its last bit, and a count in ten million by one
        if ((counts - expected).abs() > 1).any() and not torch.allclose(
            counts, expected, rtol=1e-5, atol=1.0
        ):
            raise _OtherCounts("not those of round(x / clamp(mean |x| / k))")
        if (counts != expected).sum() > 1e-3 * counts.numel():
            raise _OtherCounts("too many differ from round(x / clamp(mean |x| / k))")
        return x, given

    def _trial_of_counts(self, neuron: Neuron, taken: Neuron) -> tuple[Tensor, dict[fx.Node, Tensor]]:
        """Returns counts of several sizes, channels last, and with them the values of what is multiplied with them.

        An input that is added and subtracted again, as for a straight-through gradient, is taken for what counts stand for.
        """
        generator = torch.Generator().manual_seed(0)
        drawn = (3 * self._drawn(taken.counts, taken.axis, generator)).round()
        counts = drawn.clamp(neuron.low, neuron.high)
        given = {taken.counts: counts.to(taken.counts.meta["val"].dtype)}
        told, factor = counts, taken.threshold
        if isinstance(factor, fx.Node):
            _require_row_factor(factor, taken)
            shape = [hint(s) for s in factor.meta["val"].shape]
            given[factor] = (torch.rand(shape, generator=generator) + 0.5).to(factor.meta["val"].dtype)
            told = told * given[factor]
        elif factor is not None:
            told = told * factor
        root = through(neuron.x, shapes=False)
        if root is not taken.counts and [hint(s) for s in root.meta["val"].shape] == list(told.shape):
            given[root] = told.to(root.meta["val"].dtype)
        return counts.movedim(taken.axis, -1), given

    def _computed(
        self,
        neuron: Neuron,
        projection: Projection,
        result: fx.Node,
        weight: Weight,
        given: dict[fx.Node, Tensor],
    ) -> Tensor:
        """Returns what the op gives, channels last, for the counts and thresholds that the user's form has."""
        counts = evaluate(neuron.counts, given, self.constants)
        threshold = torch.ones(())
        if isinstance(neuron.threshold, fx.Node):
            threshold = evaluate(neuron.threshold, given, self.constants).float()
        elif neuron.threshold is not None:
            threshold = torch.tensor(neuron.threshold)
        threshold = threshold.broadcast_to(counts.shape).movedim(neuron.axis, -1)[..., :1]
        counts = counts.float().movedim(neuron.axis, -1)
        bias = projection.biases.get(result)
        values = self.constants.value(bias).flatten() if bias is not None else None
        if values is not None and values.numel() != weight.codes.shape[0]:
            raise NotSpiking(f"a bias of {values.numel()} values for {weight.codes.shape[0]} outputs")
        return spiking.spike_linear(counts, threshold, weight.codes, weight.scales, values, torch.float64)

    def _require_float_form(self, projection: Projection, result: fx.Node, axis: int, neuron: Neuron) -> None:
        """Raises NotSpiking unless gradients can be those of a product of what is multiplied, as the op's are."""
        if OUTSIDE in projection.product.meta or projection.activation not in projection.product.args:
            raise NotSpiking("its product is inside an autograd.Function, which has a gradient of its own")
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
        factor = None if neuron.settings else neuron.threshold  # what the op does not multiply with by itself
        shape = result.meta["val"].shape
        if isinstance(factor, fx.Node) and len(shape) != neuron.x.meta["val"].ndim and not _is_scalar(factor):
            raise NotSpiking("its result has other axes than its threshold")
        with graph.inserting_before(neuron.counts if neuron.settings else neuron.counts.next):
            counts, threshold = self._encode(emit, neuron)
        with graph.inserting_before(result):
            bias = projection.biases.get(result)
            if bias is not None:
                bias = bias if bias.meta["val"].ndim == 1 else emit.op(aten.flatten.using_ints, bias)
                bias = _float32(emit, bias)
            scale, outside = weight.scale, None
            if scale is not None and scale.op != "placeholder":
                whole_rows = weight.scales.shape[1] == 1 and not weight.source.meta["val"].is_floating_point()
                if whole_rows and not self.training:
                    scale, outside = None, scale  # a scale that is stored nowhere has no packed form
                else:
                    scale = emit.op(aten.reshape.default, scale, list(weight.scales.shape))
            if self.training:
                gradients = (projection.activation, projection.weight)
                if factor is not None:
                    threshold, factor = self._rows_of(emit, neuron, factor), None
            else:
                gradients = (None, None)
            inside = bias if factor is None and outside is None else None
            silent = _silent(projection.product)
            operands = (counts, threshold, weight.source, scale, inside, bits, *gradients, silent)
            made = emit.op(_LINEAR, *operands, **({"turned": True} if weight.turned else {}))
            if outside is not None:
                column = emit.op(aten.reshape.default, _float32(emit, outside), [weight.codes.shape[0]])
                made = emit.op(aten.mul.Tensor, made, column)
            if made.meta["val"].ndim != len(shape):
                made = emit.op(aten.reshape.default, made, [-1, *map(int, shape[1:])])
            elif axis != len(shape) - 1:
                made = emit.op(aten.movedim.int, made, -1, axis)
            if factor is not None:
                made = emit.op(aten.mul.Tensor, made, _moved(emit, factor, neuron.axis, axis, len(shape)))
            if bias is not None and inside is None:
                if axis != len(shape) - 1:
                    bias = emit.op(aten.reshape.default, bias, [-1, *[1] * (len(shape) - 1 - axis)])
                made = emit.op(aten.add.Tensor, made, bias)
        result.replace_all_uses_with(made)

    def _encode(self, emit: Emitter, neuron: Neuron) -> tuple[fx.Node, fx.Node]:
        """Emits counts and threshold of a neuron; counts that are computed as written are encoded with a threshold of 1."""
        root = through(neuron.x, shapes=False) if neuron.settings else neuron.counts
        settings = neuron.settings or (1.0, 1.0, 1.0)
        key = (root, neuron.axis, settings)
        if key not in self.encoded:
            x = root if root.meta["val"].dtype == torch.float32 or not neuron.settings else neuron.x
            x = _float32(emit, x)
            if neuron.axis != x.meta["val"].ndim - 1:
                x = emit.op(aten.movedim.int, x, neuron.axis, -1)
            if self.training:
                x = emit.op(aten.detach.default, x)
            both = emit.op(_ENCODE, x, *settings)
            parts = []
            for i in range(2):
                part = emit.graph.call_function(operator.getitem, (both, i))
                part.meta = {"val": both.meta["val"][i], "stack_trace": emit.trace}
                parts.append(part)
            self.encoded[key] = (parts[0], parts[1])
        return self.encoded[key]

    def _rows_of(self, emit: Emitter, neuron: Neuron, factor: Factor) -> fx.Node:
        """Emits what counts are multiplied with as a threshold for each row, without a gradient."""
        shape = list(neuron.x.meta["val"].shape)
        if not isinstance(factor, fx.Node):
            del shape[neuron.axis]
            return emit.op(aten.full.default, shape, factor, dtype=torch.float32)
        rows = emit.op(aten.select.int, emit.op(aten.expand.default, factor, shape), neuron.axis, 0)
        return emit.op(aten.detach.default, _float32(emit, rows))


class _OtherCounts(NotSpiking):
    """Raised where counts are not those of the op."""


def _require_row_factor(factor: fx.Node, neuron: Neuron) -> None:
    """Raises NotSpiking unless counts of a row are all multiplied with the same."""
    value, ndim = factor.meta["val"], neuron.counts.meta["val"].ndim
    place = neuron.axis - (ndim - value.ndim)
    if value.ndim > ndim or (place >= 0 and hint(value.shape[place]) != 1):
        raise NotSpiking("its counts are multiplied with a factor for each channel")
    if not value.dtype.is_floating_point:
        raise NotSpiking("its counts are multiplied with integers")


def _is_scalar(factor: fx.Node) -> bool:
    return all(hint(s) == 1 for s in factor.meta["val"].shape)


def _moved(emit: Emitter, factor: Factor, before: int, after: int, ndim: int) -> Factor:
    """Returns a factor with its axis of channels where the outputs are."""
    if not isinstance(factor, fx.Node):
        return factor
    if _is_scalar(factor):
        return emit.op(aten.reshape.default, factor, [])
    while factor.meta["val"].ndim < ndim:
        factor = emit.op(aten.unsqueeze.default, factor, 0)
    return factor if before == after else emit.op(aten.movedim.int, factor, before, after)


def _float32(emit: Emitter, node: fx.Node) -> fx.Node:
    if node.meta["val"].dtype == torch.float32:
        return node
    return emit.op(aten._to_copy.default, node, dtype=torch.float32)


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
    source, codes = weight.source.meta["val"], tuple(weight.codes.shape)
    if weight.turned:
        return not source.is_floating_point() and tuple(source.shape) == codes[::-1]
    return tuple(source.shape) == codes


def _agree(got: Tensor, wanted: Tensor, axis: int) -> bool:
    """Tells whether two results agree within the rounding of float32, row by row."""
    got, wanted = (t.double().movedim(axis, -1).reshape(-1, wanted.shape[axis]) for t in (got, wanted))
    size = wanted.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return bool(((got - wanted).abs() <= 2e-5 * size).all())
