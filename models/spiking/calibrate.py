"""Calibration: spreads the error of spikes over channels so that a layer's output has the least of it.

A count rounds x_c by up to V / 2, the same for every channel, whatever its size. If channel c is multiplied by r_c before it
fires, and its weights divided by it, nothing changes but these errors: with m_c the mean size of x_c, w_c the norm of its
weights, and C channels,

    V = sum_c r_c m_c / (k C),        error of the output ~ V^2 / 12 * sum_c (w_c / r_c)^2

whose least value has r_c^3 proportional to w_c^2 / m_c: large channels are made smaller, so that they no longer raise the
threshold of all others, and those with large weights finer. The number of spikes stays what k says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikingbrain.models.spiking.errors import SpikingError
from spikingbrain.models.spiking.threshold import threshold
from spikingbrain.models.spikingbrain.experts import ExpertLinear


@dataclass
class Observed:
    """What layers of one input have seen: the summed size of each channel, float64 [C], over so many tokens."""

    sizes: Tensor
    tokens: int

    @property
    def mean(self) -> Tensor:
        return self.sizes / max(self.tokens, 1)


def observe(
    model: nn.Module, layers: Mapping[str, nn.Linear | ExpertLinear], calls: Iterable[Any]
) -> dict[str, Observed]:
    """Returns what the inputs of ``layers`` were, by name, when ``model`` was called with each of ``calls``.

    A call is a tuple of arguments, or the only one. Layers that are given the same tensor share what is returned.
    """
    found: dict[str, Observed] = {}
    leads: dict[str, Observed] = {}  # of the layers that count their input
    last: tuple[Tensor | None, Observed | None] = None, None

    def see(name: str, x: Tensor, *_: Tensor) -> None:
        nonlocal last
        if name not in found:
            if x is last[0] and last[1] is not None:
                found[name] = last[1]
            else:
                found[name] = leads[name] = Observed(x.new_zeros(x.shape[-1], dtype=torch.float64), 0)
        if name in leads:
            rows = x.flatten(0, -2)
            leads[name].sizes += rows.abs().sum(0, dtype=torch.float64)
            leads[name].tokens += len(rows)
            last = x, leads[name]

    watch_inputs(model, layers, calls, see)
    for name in layers:
        seen = found.get(name)
        check_seen(name, seen.tokens if seen else 0, seen.sizes if seen else torch.zeros(1))
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
    see: Callable[..., None],
) -> None:
    """Calls ``model`` with each of ``calls`` and shows ``see`` the input of each layer, with its name, before the layer runs.

    ``see`` is given the name, the input, and of a layer of experts also the number of each row's expert.
    """

    def watch(name: str) -> Any:
        return lambda _, args: see(name, *args)

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


def channel_scales(
    observed: Mapping[str, Observed], layers: Mapping[str, nn.Linear | ExpertLinear]
) -> dict[str, Tensor]:
    """Returns r [C] of each layer, by name; layers of one input have one, so that it fires once for all of them."""
    sharers: dict[int, list[str]] = {}
    for name, seen in observed.items():
        sharers.setdefault(id(seen), []).append(name)
    scales: dict[str, Tensor] = {}
    for names in sharers.values():
        weights = [layers[name].weight.detach().flatten(0, -2) for name in names]
        scales |= dict.fromkeys(names, channel_scale(observed[names[0]], weights))
    return scales


def channel_scale(observed: Observed, weights: Sequence[Tensor]) -> Tensor:
    """Returns r [C], float32, for layers of ``weights`` [N, C] that share their input; its geometric mean is 1.

    Channels that were never seen, or have no weights, count as if they were a millionth of the largest.
    """
    norms = torch.stack([torch.linalg.vector_norm(weight.double(), dim=0) for weight in weights]).norm(dim=0)
    sizes = observed.mean.to(norms.device)
    sizes = sizes.clamp(min=max(float(sizes.max()) * 1e-6, 1e-30))
    norms = norms.clamp(min=max(float(norms.max()) * 1e-6, 1e-30))
    log: Tensor = (2 * norms.log() - sizes.log()) / 3
    return (log - log.mean()).exp().float()
