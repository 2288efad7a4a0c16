"""Neurons over time, as references: what a count stands for when it is fired one spike at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain.models.recurrences.spiking import lif

__all__ = ["integrate_and_fire", "lif"]


def integrate_and_fire(
    x: Tensor, threshold: Tensor | float, signed: bool = False, potential: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Integrate-and-fire with soft reset: spikes s [T, ...] of currents x [T, ...], and the last potential [...].

        v_t = v_(t-1) + x_t,    s_t = 1 if v_t >= V,  -1 if signed and v_t <= -V,  else 0,    v_t <- v_t - V s_t

    Fed with x and then with nothing, it fires |x| / V spikes, rounded towards 0, and keeps the rest; begun at a potential of
    V / 2 (with the sign of x) it fires the nearest integer (ties away from 0): the count of `spike_counts`.
    """
    v = torch.zeros_like(x[0]) if potential is None else potential
    spikes = []
    for x_t in x.unbind(0):
        v = v + x_t
        fired = (v >= threshold).to(x.dtype)
        if signed:
            fired = fired - (v <= -threshold).to(x.dtype)
        v = v - threshold * fired
        spikes.append(fired)
    return torch.stack(spikes) if spikes else torch.zeros_like(x), v
