"""Weights as integers: symmetric, rounded to nearest, with a scale for each output channel or group of inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain.models.spiking.errors import SpikingError

BITS = (8, 4)
SLAB = 1 << 24  # weights rounded at a time


def quantise_weight(
    weight: Tensor, group_size: int | None = None, bits: int = 8, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns codes int8 [N, C] and scales [N, G] of ``weight`` [N, C], where weight ~ codes * scale of the group.

    The largest weight of a group gets the code 2^(bits-1) - 1. ``group_size``: inputs that share a scale; None: all C.
    A given ``scale`` is taken as it is; codes that then lie outside the range of int8 make the result int16.

    Raises SpikingError for a group size that does not divide C, with those that do, and for weights that are not finite.
    """
    check_group_size(weight.shape[1], group_size)
    if bits not in BITS:
        raise SpikingError(
            f"weights of {bits} bits", why="codes are stored in bytes or halves", hint="8 or 4"
        )
    if scale is None:
        rounded = [
            _rounded(some, weight_scale(some, group_size, bits)) for some in _slabs(weight, _rows(weight))
        ]
    else:
        rounded = [
            _rounded(*both)
            for both in zip(_slabs(weight, _rows(weight)), _slabs(scale, _rows(weight)), strict=True)
        ]
    dtype = torch.int16 if any(codes.dtype == torch.int16 for codes, _ in rounded) else torch.int8
    return torch.cat([codes.to(dtype) for codes, _ in rounded]), torch.cat([scale for _, scale in rounded])


def _rows(weight: Tensor) -> int:
    """Returns how many rows are rounded at a time, so that what arithmetic takes stays small beside a large weight."""
    return max(1, SLAB // max(1, weight.shape[1]))


def _slabs(matrix: Tensor, rows: int) -> list[Tensor]:
    return [matrix[first : first + rows] for first in range(0, max(1, len(matrix)), rows)]


def _rounded(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the codes of some rows in the type that holds them, and their scales in float32."""
    if not weight.isfinite().all():
        raise SpikingError("a weight is NaN or infinite", why="no scale can hold it")
    codes = weight_codes(weight, scale)
    size = codes.abs().amax().item() if codes.numel() else 0
    if size > 2**15 - 1:
        raise SpikingError(
            f"a weight code of {size:.0f}", why="weights are up to 2^15 scales", hint="another scale"
        )
    return codes.to(torch.int8 if size <= 127 else torch.int16), scale.float()


def weight_scale(weight: Tensor, group_size: int | None = None, bits: int = 8) -> Tensor:
    """Returns scales float32 [N, G] that give the largest weight of each group of ``weight`` [N, C] the largest code.

    They are normal numbers, also where all weights of a group are 0 or nearly.
    """
    groups = weight.shape[1] // (group_size or weight.shape[1])
    largest = torch.unflatten(weight.float(), 1, (groups, -1)).abs().amax(-1)
    return torch.clamp(largest / (2 ** (bits - 1) - 1), min=torch.finfo(torch.float32).tiny)


def weight_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """Returns the codes [N, C] of ``weight`` [N, C] for scales [N, G], integers in float32, ties rounded to even."""
    grouped = torch.unflatten(weight.float(), 1, (scale.shape[1], -1))
    return torch.round(grouped / scale.float().unsqueeze(-1)).flatten(1)


def dequantise_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """Returns the weights [..., C] that codes [..., C] and scales [..., G] stand for."""
    grouped = torch.unflatten(codes, -1, (scale.shape[-1], -1)).to(scale.dtype)
    return (grouped * scale.unsqueeze(-1)).flatten(-2)


def check_group_size(inputs: int, group_size: int | None) -> int:
    """Returns the inputs that share a scale. Raises SpikingError unless that divides all inputs."""
    size = inputs if group_size is None else group_size
    if size < 1 or inputs % size:
        divisors = [n for n in range(8, inputs + 1) if inputs % n == 0]
        raise SpikingError(
            f"groups of {size} weights in rows of {inputs}",
            why="a group's size must divide the number of inputs",
            hint=f"one of {', '.join(map(str, divisors))}, or None for one scale per output",
        )
    return size
