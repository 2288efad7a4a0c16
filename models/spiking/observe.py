"""What fires when a spiking model reads a text: the counts at the input of every `SpikeLinear`."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikingbrain.models.spiking.calibrate import watch_inputs
from spikingbrain.models.spiking.codings import Budget, held_range
from spikingbrain.models.spiking.errors import SpikingError
from spikingbrain.models.spiking.experts import SpikeExpertLinear
from spikingbrain.models.spiking.linear import SpikeLinear


@dataclass(frozen=True)
class LayerCounts:
    """The counts at one input.

    Attributes:
        layers: the layers that read it, in the order of their calls; the first one names it.
        outputs: outputs of all these layers together, the fan-out of a spike.
        counts: what the layers multiply by their weights, integers [tokens, C].
        thresholds: V of each token, float32 [tokens].
        budget: the virtual steps that there are, if they are limited.
        beyond: values whose count needs more steps than that.
        beyond_size: the sum of the sizes of what remains of these.
    """

    layers: tuple[str, ...]
    outputs: int
    counts: Tensor
    thresholds: Tensor
    budget: Budget | None = None
    beyond: int = 0
    beyond_size: int = 0

    @property
    def name(self) -> str:
        return self.layers[0]

    def held(self) -> Tensor:
        """Returns the part of the counts that the budget's train holds, integers [tokens, C]."""
        if self.budget is None:
            return self.counts
        return self.counts.clamp(*held_range(self.budget.coding, self.budget.steps))


@dataclass
class _Seen:
    layers: list[str]
    outputs: int
    counts: list[Tensor]
    thresholds: list[Tensor]
    beyond: int = 0
    beyond_size: int = 0


def observe_counts(model: nn.Module, calls: Iterable[Any]) -> list[LayerCounts]:
    """Returns the counts at all inputs of spiking layers in ``calls`` of the model, in the order of the first call.

    A call is a tuple of arguments, or the only one. Layers that are given the same tensor and count alike share an input. All
    counts are kept: two bytes for each value that is multiplied by weights (four where a count needs them).

    Raises SpikingError if the model has no spiking layers, or none is reached.
    """
    spiking = {name: m for name, m in model.named_modules() if isinstance(m, SpikeLinear)}
    if not spiking:
        raise SpikingError("no layer of the model spikes", hint="models.spiking.spike(model)")
    seen: dict[str, _Seen] = {}
    sharers: dict[str, str] = {}  # layer -> the one that names its input
    inputs: dict[
        str, tuple[weakref.ref[Tensor], int]
    ] = {}  # of layers that name one: the last, and its version

    def see(name: str, x: Tensor) -> None:
        layer = spiking[name]
        if name not in sharers:
            sharers[name] = next(
                (n for n in inputs if _same(inputs[n], x) and _alike(spiking[n], layer)), name
            )
            if sharers[name] != name:
                seen[sharers[name]].layers.append(name)
                seen[sharers[name]].outputs += layer.codes.shape[0]
        if sharers[name] != name:
            return
        inputs[name] = (weakref.ref(x), x._version)
        record = seen.setdefault(name, _Seen([name], layer.codes.shape[0], [], []))
        counts, v = layer.unlimited_counts(x)
        if not counts.isfinite().all():
            raise SpikingError("a count is NaN or infinite", where=name, hint="another text, or another k")
        if layer.budget is not None:
            rest = (counts - counts.clamp(*held_range(layer.budget.coding, layer.budget.steps))).abs()
            record.beyond += int((rest > 0).sum())
            record.beyond_size += int(rest.sum(dtype=torch.float64))
            counts, _ = layer.counts(x)
        record.counts.append(_small(counts.flatten(0, -2)))
        record.thresholds.append(v.float().expand(*counts.shape[:-1], 1).flatten())

    watch_inputs(model, spiking, calls, see)
    if not seen:
        raise SpikingError("no spiking layer was reached", hint="calls that reach one")
    return [
        LayerCounts(
            tuple(s.layers),
            s.outputs,
            torch.cat(s.counts),
            torch.cat(s.thresholds),
            spiking[n].budget,
            s.beyond,
            s.beyond_size,
        )
        for n, s in seen.items()
    ]


def _same(known: tuple[weakref.ref[Tensor], int], x: Tensor) -> bool:
    return known[0]() is x and known[1] == x._version


def _alike(a: SpikeLinear, b: SpikeLinear) -> bool:
    """Tells whether two layers count alike."""
    for one, other in ((a.channel_scale, b.channel_scale), (a.static_threshold, b.static_threshold)):
        if (one is None) != (other is None) or (
            one is not None and other is not None and not torch.equal(one, other)
        ):
            return False
    return (a.k, a.lower, a.upper, a.budget) == (b.k, b.lower, b.upper, b.budget)


def _small(counts: Tensor) -> Tensor:
    largest = int(counts.abs().amax()) if counts.numel() else 0
    return counts.to(
        torch.int16 if largest < 2**15 else torch.int32 if largest < 2**31 else torch.int64
    ).cpu()


def measure_silence(model: nn.Module, calls: Iterable[Any]) -> dict[str, float]:
    """Measures the share of counts that are 0 at each spiking layer; returns it by name, and keeps it there as ``silent``.

    A call is a tuple of arguments, or the only one. Layers that no call reaches keep what they have. Only the channels of a token
    that fires at all are counted: rows of zeros, such as padding, say nothing.

    Raises SpikingError if no layer of the model spikes, or none is reached.
    """
    kinds = SpikeLinear, SpikeExpertLinear
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    if not layers:
        raise SpikingError("no layer of the model spikes", hint="models.spiking.spike(model)")
    seen = {name: [0, 0] for name in layers}

    def see(name: str, x: Tensor, *_: Tensor) -> None:
        counts = layers[name].counts(x)[0].flatten(0, -2)
        fires = (counts != 0).sum(-1)
        seen[name][0] += int(fires.sum())
        seen[name][1] += int((fires > 0).sum()) * counts.shape[-1]

    watch_inputs(model, layers, calls, see)
    found = {name: 1 - fires / values for name, (fires, values) in seen.items() if values}
    if not found:
        raise SpikingError("no spiking layer was reached", hint="calls that reach one")
    for name, share in found.items():
        layers[name].silent = share
    return found
