"""Leaky integrate-and-fire neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain.models.recurrences import scan

RESETS = ("none", "soft", "hard")


def lif(
    x: Tensor,
    decay: float,
    threshold: float = 1.0,
    reset: str = "soft",
    slope: float = 4.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Leaky integrate-and-fire: spikes s [B, T, D], 0 or 1, and, if wanted, the potential [B, D] after the last step.

        v_t = decay v'_(t-1) + x_t,    s_t = 1 if v_t >= threshold else 0
        v'_t = v_t (reset "none"),  v_t - s_t threshold ("soft"),  (1 - s_t) v_t ("hard")

    Without a reset the potential is a `linear_scan`. With one it depends on the spikes before, so time is walked through.
    Backwards, a spike has the derivative of sigmoid(slope (v - threshold)).
    """
    if reset not in RESETS:
        raise ValueError(f"unknown reset {reset!r}: one of {', '.join(RESETS)}")
    if reset == "none":
        v, last = scan.linear_scan(torch.full_like(x, decay), x, initial_state)
        return _spike(v - threshold, slope), last if output_final_state else None
    potential = torch.zeros_like(x[:, :0].sum(1)) if initial_state is None else initial_state
    spikes = []
    for x_t in x.unbind(1):
        v_t = decay * potential + x_t
        s_t = _spike(v_t - threshold, slope)
        potential = v_t - s_t * threshold if reset == "soft" else (1 - s_t) * v_t
        spikes.append(s_t)
    s = torch.stack(spikes, 1) if spikes else torch.zeros_like(x)
    return s, potential if output_final_state else None


def _spike(x: Tensor, slope: float) -> Tensor:
    """Returns 1 where x >= 0, else 0, with the derivative of a sigmoid."""
    soft = (slope * x).sigmoid()
    return (x >= 0).to(x.dtype) + (soft - soft.detach())
