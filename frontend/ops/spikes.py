"""`spikingbrain::spike_encode` and `spikingbrain::spike_linear`: what a spiking projection is before autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikingbrain.errors import OptionError, ShapeError
from spikingbrain.models import spiking

_BITS = {4: torch.int8, 8: torch.int8, 16: torch.int16}


@torch.library.custom_op("spikingbrain::spike_encode", mutates_args=())
def spike_encode(x: Tensor, k: float = 3.0, lower: float = 1e-5, upper: float = 1e4) -> tuple[Tensor, Tensor]:
    """Returns counts [..., C] of x [..., C], integers as float32, and thresholds [...].

    See `models.spiking.spike_counts`. There is no gradient: it goes through ``activation`` of `spike_linear`.

    Raises:
        ShapeError: x has no axis of channels, or is not float32.
    """
    _check_input(x)
    counts, threshold = spiking.spike_counts(x, k, lower, upper)
    return counts, threshold.squeeze(-1)


@spike_encode.register_fake
def _(x: Tensor, k: float = 3.0, lower: float = 1e-5, upper: float = 1e4) -> tuple[Tensor, Tensor]:
    _check_input(x)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1])


def _check_input(x: Tensor) -> None:
    if not x.ndim or x.dtype != torch.float32:
        raise ShapeError(f"spike_encode: x is {x.dtype} {list(x.shape)}", why="it must be float32 [..., C]")


@torch.library.custom_op("spikingbrain::spike_linear", mutates_args=())
def spike_linear(
    counts: Tensor,
    threshold: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None = None,
    bits: int = 8,
    activation: Tensor | None = None,
    float_weight: Tensor | None = None,
    silent: float = 0.0,
    turned: bool = False,
) -> Tensor:
    """Returns y [..., N]: threshold * (sum over groups of scale * (exact sum of counts * codes)) + bias.

    counts [..., C] and threshold [...] are those of `spike_encode`; bias [N]. scale: [N, G] or [N, G, 1], N numbers in any shape
    for G = 1, or None for 1. ``weight`` [N, C] holds the codes, of ``bits`` bits (4 and 8: int8, 16: int16), or float weights,
    whose codes are round(weight / scale), the quotient in float32. Weights and scales may be half floats. ``turned``: codes
    are [C, N], and scales, unless they are N, [G, N].

    The gradient is that of activation @ float_weight^T + bias: whoever trains gives what counts and codes stand for, computed as
    gradients should pass; their values are not read forwards. ``silent`` is the share of counts that are 0, as far as it is
    known; no result depends on it.

    Raises:
        ShapeError: shapes or dtypes do not fit each other, or a code does not fit ``bits``.
        OptionError: an unknown number of bits.
    """
    scale, weight = check(counts, threshold, weight, scale, bias, bits, turned)
    codes = weight if not weight.is_floating_point() else spiking.weight_codes(weight, scale)
    low, high = (float(codes.amin()), float(codes.amax())) if codes.numel() else (0.0, 0.0)
    if low < -(2 ** (bits - 1)) or high >= 2 ** (bits - 1):
        raise ShapeError(f"spike_linear: weight codes {low:.0f} to {high:.0f}", why=f"codes have {bits} bits")
    sizes = counts.abs().sum(-1, dtype=torch.float64)
    fits = (
        float(sizes.amax() if sizes.numel() else 0.0) * max(-low, high) < 2**24
    )  # else float32 would round the sums
    dtype = torch.float32 if fits else torch.float64
    return spiking.spike_linear(counts, threshold.unsqueeze(-1), codes, scale, bias, dtype)


@spike_linear.register_fake
def _(
    counts: Tensor,
    threshold: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None = None,
    bits: int = 8,
    activation: Tensor | None = None,
    float_weight: Tensor | None = None,
    silent: float = 0.0,
    turned: bool = False,
) -> Tensor:
    _, weight = check(counts, threshold, weight, scale, bias, bits, turned)
    return counts.new_empty([*counts.shape[:-1], weight.shape[0]])


def check(
    counts: Tensor,
    threshold: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    turned: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the scale as float32 [N, G], and the weight as [N, C]."""
    if bits not in _BITS:
        raise OptionError(f"spike_linear: codes of {bits} bits", hint="4, 8 or 16")
    if counts.dtype != torch.float32 or (
        weight.dtype != _BITS[bits] and (turned or not weight.is_floating_point())
    ):
        raise ShapeError(
            f"spike_linear: counts are {counts.dtype}, weights {weight.dtype}",
            why=f"counts must be float32, and codes of {bits} bits {_BITS[bits]}",
        )
    given = [counts, threshold, weight, *(t for t in (scale, bias) if t is not None)]
    weight = weight.mT if turned and weight.ndim == 2 else weight
    outputs, channels = weight.shape if weight.ndim == 2 else (-1, -1)
    if scale is None:
        scale = counts.new_ones([outputs, 1])
    elif scale.numel() == outputs:
        scale = scale.reshape(outputs, 1)
    else:
        if scale.ndim == 3 and scale.shape[1 if turned else 2] == 1:
            scale = scale.squeeze(1 if turned else 2)
        scale = scale.mT if turned and scale.ndim == 2 else scale
    scale = scale.float()
    fits = counts.ndim >= 1 and counts.shape[-1] == channels and threshold.ndim == counts.ndim - 1
    fits = fits and scale.ndim == 2 and scale.shape[0] == outputs
    fits = fits and scale.shape[1] > 0 and channels % scale.shape[1] == 0
    if not fits or (bias is not None and (bias.ndim != 1 or bias.shape[0] != outputs)):
        raise ShapeError(
            f"spike_linear: shapes {', '.join(str(list(t.shape)) for t in given)}",
            why="they must be [..., C], [...], [N, C], [N, G] with G dividing C, and [N]",
        )
    return scale, weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, _, bias, _, activation, float_weight, _, _ = inputs
    ctx.save_for_backward(activation, float_weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    activation, float_weight = ctx.saved_tensors
    wants = ctx.needs_input_grad
    of_activation = gradient @ float_weight if wants[6] and float_weight is not None else None
    rows = gradient.flatten(0, -2) if gradient.ndim > 1 else gradient.unsqueeze(0)
    of_weight = None
    if wants[7] and activation is not None:
        of_weight = rows.mT @ (activation.flatten(0, -2) if activation.ndim > 1 else activation.unsqueeze(0))
    of_bias = rows.sum(0) if ctx.has_bias and wants[4] else None
    return None, None, None, None, of_bias, None, of_activation, of_weight, None, None


spike_linear.register_autograd(_backward, setup_context=_save)
