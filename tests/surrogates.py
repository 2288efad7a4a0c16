"""Surrogate gradients that several tests train neurons with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FastSigmoid(torch.autograd.Function):
    """1 where the potential is over zero; the gradient is that of a fast sigmoid, as in snnTorch."""

    @staticmethod
    def forward(ctx: Any, over: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(over)
        ctx.slope = slope
        return (over > 0).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (over,) = ctx.saved_tensors
        return gradient.clone() / (ctx.slope * torch.abs(over) + 1.0) ** 2, None
