"""Writes the projections of spike counts in a graph as ``spikingbrain::spike_linear``: the one road of both doors.

Structure proposes and numbers decide: what multiplies the counts of a neuron (`neuron`) by something made of weights
(`projection`) is run on inputs of all sizes with the model's own weights, in the user's form and as the op, and raised if both
agree. The values then come from integers; gradients, where there are any, go through the user's own graph.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from spikingbrain.frontend.checks import user_line
from spikingbrain.frontend.spikes.finite import Watch, module_path
from spikingbrain.frontend.spikes.functions import body_of, forget, is_function, write_forwards
from spikingbrain.frontend.spikes.neuron import CASTS, Neuron, NotSpiking, find_neuron, through, whole
from spikingbrain.frontend.spikes.projection import Constants, Projection, find_projections
from spikingbrain.frontend.spikes.report import SpikeReport
from spikingbrain.frontend.spikes.trial import Trials, bits_of
from spikingbrain.frontend.spikes.writing import ENCODE, LINEAR, Writer, silent_share
from spikingbrain.passes.spike_forms import form

_ROUNDINGS = {"round", "floor", "trunc", "ceil", "fix", "spike_encode"}


def may_spike(graph: fx.Graph) -> bool:
    """Tells whether a graph, functional or not, may count spikes."""
    return any(
        (
            n.op in ("call_function", "call_method")
            and str(getattr(n.target, "__name__", n.target)).partition(".")[0].removesuffix("_") in _ROUNDINGS
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
    writer = Writer(module.graph, training)
    functions = write_forwards(module, writer.mode)
    constants = Constants(module.graph, tensors)
    trials = Trials(constants, fixed)
    reports = _calls(module.graph, tensors) if fixed else []
    if watch is not None:
        for encode in module.graph.find_nodes(op="call_function", target=ENCODE):
            x = encode.args[0]
            watch.add(writer.emitter(), x, x.meta["val"].ndim - 1, encode)
    for neuron in [find_neuron(n) for n in module.graph.nodes]:
        if neuron is None or neuron.counts in constants or neuron.x in constants:
            continue
        try:
            found = list(find_projections(neuron, constants))
        except NotSpiking as why:
            reports.append(_left(neuron.counts, str(why)))
            continue
        if watch is not None and (found or neuron.settings or neuron.why):
            watch.add(writer.emitter(), through(neuron.x, shapes=False), neuron.axis, neuron.counts)
        if not found and (neuron.settings or neuron.why) and not _goes_on(neuron.counts):
            reports.append(_left(neuron.counts, "its counts are not multiplied by weights"))
        for projection in found:
            reports.append(_carry_out(neuron, projection, trials, writer))
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
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        counts, _, weight, scale, bias, bits, *_ = _arguments(node)
        encode = counts.args[0] if counts.target is operator.getitem else counts
        if bits == 8 and weight in tensors:
            if weight not in widths:
                widths[weight] = bits_of(tensors[weight], fixed=True)
            bits = widths[weight]
            node.args, node.kwargs = (*node.args[:4], bias, bits, *node.args[6:]), {}
        silent = silent_share(node)
        if silent:
            node.kwargs = {**node.kwargs, "silent": silent}
        (outputs, inputs), groups = weight.meta["val"].shape, scale.meta["val"].shape[1]
        k = _arguments(encode)[1] if encode.target is ENCODE else 0.0
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


def _carry_out(neuron: Neuron, projection: Projection, trials: Trials, writer: Writer) -> SpikeReport:
    where = str(user_line(projection.product) or "")
    try:
        match = trials.match(neuron, projection)
        neuron = match.neuron
        writer.write(match, projection)
    except NotSpiking as why:
        return SpikeReport("float", "", where, str(why), k=neuron.k)
    weight = match.weight
    (outputs, channels), groups = weight.codes.shape, weight.scales.shape[1]
    form = "integers" if not weight.source.meta["val"].is_floating_point() else "floats that are rounded"
    kind = "of an adaptive threshold" if neuron.settings else "computed as they are written"
    reason = f"counts {kind}{f' ({neuron.why})' if neuron.why else ''} times {form}"
    silent, layer = silent_share(projection.product), module_path(projection.product)
    sizes = channels, outputs, groups, match.bits
    return SpikeReport(
        "raised", "spike_linear", where, reason + _way(silent), *sizes, neuron.k, layer, silent
    )
