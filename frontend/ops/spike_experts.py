"""`spikingbrain::spike_grouped_linear`: rows of spike counts times the integer weights of the experts that they are sent to."""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain.errors import OptionError, ShapeError
from spikingbrain.frontend.ops.grouped_linear import by_expert
from spikingbrain.models import spiking


@torch.library.custom_op("spikingbrain::spike_grouped_linear", mutates_args=())
def spike_grouped_linear(
    counts: Tensor,
    threshold: Tensor,
    weight: Tensor,
    scale: Tensor,
    expert: Tensor,
    bits: int = 8,
    silent: float = 0.0,
) -> Tensor:
    """Returns y [R, O]: threshold * (sum over groups of scale * (exact sum of counts * codes)) of each row's expert.

    counts [R, C] and threshold [R] are those of `spike_encode`; weight [N, O, C] int8 holds codes of ``bits`` bits, scale is
    [N, O, G]; expert [R] int64 counts from the end where it is negative. There is no gradient. ``silent`` is that of
    `spike_linear`: no result depends on it.

    Raises:
        ShapeError: shapes or dtypes do not fit each other, or a code does not fit ``bits``.
        OptionError: an unknown number of bits.
        IndexError: an expert that does not exist.
    """
    _check(counts, threshold, weight, scale, expert, bits)
    low, high = (int(weight.amin()), int(weight.amax())) if weight.numel() else (0, 0)
    if low < -(2 ** (bits - 1)) or high >= 2 ** (bits - 1):
        raise ShapeError(f"spike_grouped_linear: weight codes {low} to {high}", why=f"codes have {bits} bits")
    order, groups = by_expert(expert, weight.shape[0])
    sorted_counts, sorted_threshold = counts[order], threshold[order].unsqueeze(-1)
    sorted_y = counts.new_empty(counts.shape[0], weight.shape[1])
    for e, first, end in groups:
        some, v = sorted_counts[first:end], sorted_threshold[first:end]
        # float32 rounds no sum of integers below 2^24
        exact = float(some.abs().sum(-1, dtype=torch.float64).amax()) * max(-low, high) < 2**24
        dtype = torch.float32 if exact else torch.float64
        sorted_y[first:end] = spiking.spike_linear(some, v, weight[e], scale[e], None, dtype)
    return torch.empty_like(sorted_y).index_copy_(0, order, sorted_y)


@spike_grouped_linear.register_fake
def _(
    counts: Tensor,
    threshold: Tensor,
    weight: Tensor,
    scale: Tensor,
    expert: Tensor,
    bits: int = 8,
    silent: float = 0.0,
) -> Tensor:
    _check(counts, threshold, weight, scale, expert, bits)
    return counts.new_empty(counts.shape[0], weight.shape[1])


def _check(
    counts: Tensor, threshold: Tensor, weight: Tensor, scale: Tensor, expert: Tensor, bits: int
) -> None:
    if bits not in (4, 8):
        raise OptionError(f"spike_grouped_linear: codes of {bits} bits", hint="4 or 8")
    tensors = (counts, threshold, weight, scale, expert)
    dtypes = (torch.float32, torch.float32, torch.int8, torch.float32, torch.int64)
    if tuple(t.dtype for t in tensors) != dtypes:
        raise ShapeError(
            f"spike_grouped_linear: dtypes {', '.join(str(t.dtype) for t in tensors)}",
            why="they must be float32, float32, int8, float32 and int64",
        )
    fits = tuple(t.ndim for t in tensors) == (2, 1, 3, 3, 1)
    fits = fits and counts.shape[0] == threshold.shape[0] == expert.shape[0]
    fits = fits and counts.shape[1] == weight.shape[2] and weight.shape[:2] == scale.shape[:2]
    if not fits or scale.shape[2] < 1 or counts.shape[1] % scale.shape[2]:
        raise ShapeError(
            f"spike_grouped_linear: shapes {', '.join(str(list(t.shape)) for t in tensors)}",
            why="they must be [R, C], [R], [N, O, C], [N, O, G] with G dividing C, and [R]",
        )
