"""What is found in Dynamo's graph before autograd: recurrences, spiking projections, experts, attention, each raised to an op.

Differentiated first, a loop would save every state, a rounded activation would have no gradient, and the gradient of gathered
weights would be as large as they are.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import spikingbrain.frontend.ops  # noqa: F401  (registers the ops)
from spikingbrain.finite import WatchedLayer
from spikingbrain.frontend.attention import AttentionReport, Refuse, may_attend, raise_attention
from spikingbrain.frontend.checks import user_line
from spikingbrain.frontend.experts import ExpertReport, may_route, raise_experts
from spikingbrain.frontend.recurrences.associative import leave_as_written
from spikingbrain.frontend.recurrences.functional import NotFunctional, functionalise
from spikingbrain.frontend.recurrences.raising import promising, raise_recurrences
from spikingbrain.frontend.recurrences.report import RecurrenceReport
from spikingbrain.frontend.recurrences.symbolic import at_sizes, is_symbolic, sizes_of
from spikingbrain.frontend.recurrences.unify import NotUnified, unify
from spikingbrain.frontend.spikes.finite import Watch
from spikingbrain.frontend.spikes.raising import may_spike, raise_spikes
from spikingbrain.frontend.spikes.report import SpikeReport

log = logging.getLogger("spikingbrain.compile")


@dataclass
class Found:
    """What was found in a graph, raised or not. For each of ``watched`` the graph returns a tensor more, at the end."""

    recurrences: list[RecurrenceReport] = field(default_factory=list)
    spikes: list[SpikeReport] = field(default_factory=list)
    experts: list[ExpertReport] = field(default_factory=list)
    attention: list[AttentionReport] = field(default_factory=list)
    watched: list[WatchedLayer] = field(default_factory=list)

    @property
    def raised(self) -> bool:
        return (
            bool(self.watched)
            or any(r.status != "unrolled" for r in self.recurrences)
            or "raised" in [*(s.status for s in self.spikes), *(e.status for e in self.experts)]
            or any(a.status == "raised" for a in self.attention)
        )


def raise_in_dynamo_graph(
    module: fx.GraphModule,
    inputs: Sequence[Any] = (),
    check_finite: bool = False,
    attention: Refuse | None = None,
) -> tuple[fx.GraphModule, Found]:
    """Returns a module with what was found raised, or ``module`` itself where nothing was.

    ``inputs`` are the arguments that Dynamo gives, of which the model's own weights are read. With ``check_finite`` it also
    returns whether inputs of spiking layers are finite (`frontend.spikes.finite`). Where the target has kernels for attention,
    ``attention`` tells what they do not take.
    """
    made, found = _raised_if_possible(module, inputs, check_finite, attention)
    leave_as_written(made)
    return made, found


def _raised_if_possible(
    module: fx.GraphModule, inputs: Sequence[Any], check_finite: bool, attention: Refuse | None
) -> tuple[fx.GraphModule, Found]:
    attends = attention is not None and may_attend(module.graph)
    if not (attends or promising(module.graph) or may_spike(module.graph) or may_route(module.graph)):
        return module, Found()
    try:
        with _no_collection():
            raised, found = _raised(module, _weights(module.graph, inputs), check_finite, attention)
        if check_finite and found.spikes and not found.watched:
            left = found.spikes[0]
            log.warning(
                "check_finite sees no inputs of the spiking layers at %s: %s", left.where, left.reason
            )
        if raised is not module:
            _tell_origin(raised, module)
        return raised, found
    except Exception as error:  # a model never fails because a part of it was not recognised
        reason = f"the compiler failed: {type(error).__name__}: {error}"
        log.warning(
            "recurrences, spikes, experts and attention stay as they are written: %s",
            reason,
            exc_info=log.isEnabledFor(logging.DEBUG),
        )
        return module, _nothing(module, reason, "", attends)


def _raised(
    module: fx.GraphModule, weights: Mapping[str, Tensor], check_finite: bool, attention: Refuse | None
) -> tuple[fx.GraphModule, Found]:
    try:
        if is_symbolic(module.graph):
            return _raise_at_symbols(module, weights, check_finite, attention)
        functional = functionalise(module)
        found = _raise(functional, weights, check_finite, attention)
        return (functional if found.raised else module), found
    except NotFunctional as stop:
        attends = attention is not None and may_attend(module.graph)
        return module, _nothing(module, str(stop), str(user_line(stop.node) or ""), attends)


def _raise_at_symbols(
    module: fx.GraphModule, weights: Mapping[str, Tensor], check_finite: bool, attention: Refuse | None
) -> tuple[fx.GraphModule, Found]:
    """Raises in a graph with symbolic sizes, by way of several graphs whose sizes are known."""
    try:
        sizes = sizes_of(module.graph)
        points = sizes.points()
        graphs: list[fx.GraphModule] = []
        found = Found()
        for point in points:
            graphs.append(functionalise(at_sizes(module, point)))
            found = _raise(graphs[-1], weights, check_finite, attention, any_size=True)
            if not found.raised:
                return module, found
        return unify(graphs, sizes, points), found
    except NotUnified as stop:
        attends = attention is not None and may_attend(module.graph)
        return module, _nothing(module, f"sizes are symbols: {stop}", "", attends)


def _raise(
    functional: fx.GraphModule,
    weights: Mapping[str, Tensor],
    check_finite: bool,
    attention: Refuse | None,
    any_size: bool = False,
) -> Found:
    found = Found()
    placeholders = functional.graph.find_nodes(op="placeholder")
    if promising(functional.graph):
        found.recurrences = raise_recurrences(functional, keep_detach=torch.is_grad_enabled())
    if may_spike(functional.graph):
        of = {n: weights[n.target] for n in placeholders if n.target in weights}
        values = (n.meta.get("example_value") for n in placeholders)
        gradients = any(isinstance(v, Tensor) and v.requires_grad for v in values)
        watch = Watch() if check_finite else None
        training = torch.is_grad_enabled() and gradients
        found.spikes = raise_spikes(functional, of, training, watch=watch)
        found.watched = watch.layers if watch else []
    if may_route(functional.graph):
        found.experts = raise_experts(functional)
    if attention is not None and may_attend(functional.graph):
        found.attention = raise_attention(functional, attention, any_size)
    return found


def _tell_origin(raised: fx.GraphModule, module: fx.GraphModule) -> None:
    """Lets AOTAutograd take ``raised`` for Dynamo's graph, which its inputs are those of.

    It then knows which of them are weights (whose packed form is kept), and guards against arguments that are one tensor.
    (Private: torch._functorch._aot_autograd.frontend_utils._try_get_metadata_from_dynamo.)
    """
    raised.meta.update(module.meta)
    if hasattr(module, "_param_name_to_source"):
        raised._param_name_to_source = module._param_name_to_source
    pairs = zip(*(m.graph.find_nodes(op="placeholder") for m in (raised, module)), strict=True)
    for new, old in pairs:
        assert new.target == old.target
        new._dynamo_source = getattr(old, "_dynamo_source", None)
        if "tensor_dict" in old.meta:
            new.meta["tensor_dict"] = old.meta["tensor_dict"]


def _nothing(module: fx.GraphModule, reason: str, where: str, attends: bool) -> Found:
    found = Found()
    if promising(module.graph):
        found.recurrences.append(RecurrenceReport("unrolled", "", where, reason))
    if may_spike(module.graph):
        found.spikes.append(SpikeReport("float", "", where, reason))
    if may_route(module.graph):
        found.experts.append(ExpertReport("gathered", "", where, reason))
    if attends:
        found.attention.append(AttentionReport("torch's", "", where, reason))
    return found


def _weights(graph: fx.Graph, inputs: Sequence[Any]) -> dict[str, Tensor]:
    """Returns the tensors of parameters and buffers, by the name of their placeholder."""
    placeholders = graph.find_nodes(op="placeholder")
    return {
        str(n.target): value
        for n, value in zip(placeholders, inputs, strict=False)
        if isinstance(value, Tensor) and "_dynamo_static_input_type" in (n.meta.get("tensor_dict") or {})
    }


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Spares Python's search for garbage, which visits all of a large graph again and again; nothing here is garbage."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
