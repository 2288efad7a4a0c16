"""The adaptive-threshold neuron: activations as integer spike counts (SpikingBrain report, arXiv 2509.05276, section 2.3).

A token's threshold is a fraction of the mean size of its own channels, so that counts are small whatever the scale:

    V = clamp(mean_c |x_c| / k, lower, upper),    s_c = round(x_c / V),    x_c ~ V s_c

A count is what an integrate-and-fire neuron with soft reset would fire, negative for spikes of the other sign (`neurons`).
"""

from __future__ import annotations

import torch
from torch import Tensor

K = 3.0
LOWER, UPPER = 1e-5, 1e4


def threshold(x: Tensor, k: float = K, lower: float = LOWER, upper: float = UPPER) -> Tensor:
    """Returns V [..., 1] of x [..., C].

    The mean is taken in float64 and rounded to the dtype of x (float32 for narrower ones), so that it does not depend
    on the order of the sum; division by k and clamps are in that dtype. NaN in a token makes its V NaN.
    """
    mean = x.abs().to(torch.float64).mean(-1, keepdim=True)
    return (mean.to(_wide(x)) / k).clamp(lower, upper)


def spike_counts(
    x: Tensor, k: float = K, lower: float = LOWER, upper: float = UPPER
) -> tuple[Tensor, Tensor]:
    """Returns the counts [..., C] of x [..., C], integers in a floating dtype (float32 or wider), and V [..., 1].

    Ties are rounded to even. |s| is at most k C, and the sum of |s| at most (k + 1/2) C, unless V was clamped to ``upper``.
    """
    v = threshold(x, k, lower, upper)
    return torch.round(x.to(v.dtype) / v), v


def counts_at(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the same for a given threshold ``v``, the same for all tokens ([1]) or one for each; nothing bounds the counts."""
    v = v.to(_wide(x))
    return torch.round(x.to(v.dtype) / v), v


def spiking(x: Tensor, k: float = K, lower: float = LOWER, upper: float = UPPER) -> Tensor:
    """Returns V s, x [..., C] as its spikes tell it, with the gradient of the identity (straight-through)."""
    counts, v = spike_counts(x.detach(), k, lower, upper)
    told = (counts * v).to(x.dtype)
    return x + (told - x).detach() if x.requires_grad else told


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
