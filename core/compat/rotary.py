"""Rotary position embedding, as fla and flash-attn spell it."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first 2R channels of x [..., D]; cos and sin [..., R], broadcast against x.

    Pairs are (i, i + R), or (2i, 2i + 1) if ``interleaved``.
    """
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
        y = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        y = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
    return torch.cat((y, rest), -1) if rest.shape[-1] else y
