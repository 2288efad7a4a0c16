"""Calibration: spreads the error of spikes over channels so that a layer's output has the least of it.

A count rounds x_c by up to V / 2, the same for every channel, whatever its size. If channel c is multiplied by r_c before it
fires, and its weights divided by it, nothing changes but these errors: with m_c the mean size of x_c, w_c the norm of its
weights, and C channels,

    V = sum_c r_c m_c / (k C),        error of the output ~ V^2 / 12 * sum_c (w_c / r_c)^2

whose least value has r_c^3 proportional to w_c^2 / m_c: large channels are made smaller, so that they no longer raise the
threshold of all others, and those with large weights finer. The number of spikes stays what k says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikingbrain.models.spiking.errors import SpikingError
from spikingbrain.models.spiking.threshold import threshold


@dataclass
class Observed:
    """What a layer has seen: the summed size of each channel, float64 [C], over so many tokens."""

    sizes: Tensor
    tokens: int

    @property
    def mean(self) -> Tensor:
        return self.sizes / max(self.tokens, 1)


def observe(model: nn.Module, layers: Mapping[str, nn.Linear], calls: Iterable[Any]) -> dict[str, Observed]:
    """Returns what the inputs of ``layers`` were, by name, when ``model`` was called with each of ``calls``.

    A call is a tuple of arguments, or the only one.
    """
    found = {
        name: Observed(layer.weight.new_zeros(layer.in_features, dtype=torch.float64), 0)
        for name, layer in layers.items()
    }

    def see(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2)
        found[name].sizes += x.abs().sum(0, dtype=torch.float64)
        found[name].tokens += x.shape[0]

    watch_inputs(model, layers, calls, see)
    for name, seen in found.items():
        check_seen(name, seen.tokens, seen.sizes)
    return found


def mean_thresholds(
    model: nn.Module, layers: Mapping[str, nn.Linear], calls: Iterable[Any], k: float
) -> dict[str, Tensor]:
    """Returns for each of ``layers``, by name, the mean over tokens of the adaptive threshold, float32 [1]."""
    sums = {name: torch.zeros(1, dtype=torch.float64, device=m.weight.device) for name, m in layers.items()}
    tokens = dict.fromkeys(layers, 0)

    def see(name: str, x: Tensor) -> None:
        v = threshold(x, k)
        sums[name] += v.sum(dtype=torch.float64)
        tokens[name] += v.numel()

    watch_inputs(model, layers, calls, see)
    for name, total in sums.items():
        check_seen(name, tokens[name], total)
    return {name: (total / tokens[name]).float() for name, total in sums.items()}


def watch_inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    calls: Iterable[Any],
    see: Callable[[str, Tensor], None],
) -> None:
    """Calls ``model`` with each of ``calls`` and shows ``see`` the input of each layer, with its name, before the layer runs."""

    def watch(name: str) -> Any:
        return lambda _, args: see(name, args[0])

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for call in calls:
                model(*call) if isinstance(call, tuple) else model(call)
    finally:
        for handle in handles:
            handle.remove()


def check_seen(name: str, tokens: int, sums: Tensor) -> None:
    """Raises SpikingError if a layer saw no tokens, or values that are not finite."""
    if not tokens or not sums.isfinite().all():
        raise SpikingError(
            "calibration saw nothing" if not tokens else "calibration saw NaN or infinity",
            where=name,
            hint="calls that reach every layer" if not tokens else "other calls",
        )


def channel_scale(observed: Observed, weight: Tensor) -> Tensor:
    """Returns r [C], float32, for a layer of ``weight`` [N, C]; its geometric mean is 1.

    Channels that were never seen, or have no weights, count as if they were a millionth of the largest.
    """
    sizes, norms = observed.mean.to(weight.device), torch.linalg.vector_norm(weight.double(), dim=0)
    sizes = sizes.clamp(min=max(float(sizes.max()) * 1e-6, 1e-30))
    norms = norms.clamp(min=max(float(norms.max()) * 1e-6, 1e-30))
    log: Tensor = (2 * norms.log() - sizes.log()) / 3
    return (log - log.mean()).exp().float()
