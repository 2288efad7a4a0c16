"""Writes ``spikingbrain::spike_encode`` and ``spike_linear`` in the place of what a trial matched with them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from spikingbrain.frontend.recurrences.emit import Emitter
from spikingbrain.frontend.spikes.neuron import OUTSIDE, Factor, Neuron, NotSpiking, through
from spikingbrain.frontend.spikes.projection import Projection, hint
from spikingbrain.frontend.spikes.trial import Match
from spikingbrain.models import spiking

aten = torch.ops.aten
ENCODE = torch.ops.spikingbrain.spike_encode.default
LINEAR = torch.ops.spikingbrain.spike_linear.default


class Writer:
    """Writes into one graph; neurons of the same input are encoded once. With ``training``, gradients may be asked for."""

    def __init__(self, graph: fx.Graph, training: bool) -> None:
        self.graph, self.training = graph, training
        self.encoded: dict[Any, tuple[fx.Node, fx.Node]] = {}
        values = (n.meta.get("val") for n in graph.nodes)
        self.mode = next((m for v in values if (m := getattr(v, "fake_mode", None))), None)

    def emitter(self) -> Emitter:
        return Emitter(self.graph, self.mode)

    def write(self, match: Match, projection: Projection) -> None:
        """Puts the op in the place of a result that it matches; raises NotSpiking where it cannot stand there."""
        neuron, result, weight, axis = match.neuron, match.result, match.weight, match.axis
        if self.training:
            self._require_float_form(match, projection)
        graph, emit = self.graph, self.emitter()
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
            silent = silent_share(projection.product)
            operands = (counts, threshold, weight.source, scale, inside, match.bits, *gradients, silent)
            made = emit.op(LINEAR, *operands, **({"turned": True} if weight.turned else {}))
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

    def _require_float_form(self, match: Match, projection: Projection) -> None:
        """Raises NotSpiking unless gradients can be those of a product of what is multiplied, as the op's are."""
        if OUTSIDE in projection.product.meta or projection.activation not in projection.product.args:
            raise NotSpiking("its product is inside an autograd.Function, which has a gradient of its own")
        plain = projection.product.target is aten.linear.default and match.result is projection.product
        x, result = match.neuron.x.meta["val"], match.result.meta["val"]
        last = match.axis == result.ndim - 1 and match.neuron.axis == x.ndim - 1
        if not (plain and last):
            raise NotSpiking(
                "gradients may be asked for, and it is no linear of floats; under torch.no_grad() it is raised"
            )

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
            both = emit.op(ENCODE, x, *settings)
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


def silent_share(product: fx.Node) -> float:
    """Returns the share of silent channels that the model tells of a product; 0 where it tells nothing."""
    return float((product.meta.get("custom") or {}).get(spiking.SILENT_NOTE, 0.0))


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
