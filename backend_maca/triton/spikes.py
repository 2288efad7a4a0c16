"""The spiking projection on a GPU: launches of `spike_kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain.backend_maca.triton import settings
from spikingbrain.backend_maca.triton import spike_kernels as kernels
from spikingbrain.backend_maca.triton.dots import tile

EXACT = 2**22  # counts below it are held in three digits
LEAST = 32  # channels in a dot of bytes
CHANNELS = 1 << 16  # so that a sum of products of bytes stays below 2^31


def spike_linear(
    counts: Tensor, threshold: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Returns threshold * (sum over groups of scale * (sum of counts * codes)) + bias, float32 [..., N].

    counts float32 [..., C] hold integers, threshold [...], codes int8 [N, C] in any order of memory, scale float32 [N, G], bias
    [N]. Sums inside a group are exact, rounded once to float32, in rows whose counts are below `EXACT` in size; in other rows
    counts are rounded to that share of the largest. A row with NaN or infinity is NaN.
    """
    (outputs, channels), groups = codes.shape, scale.shape[1]
    s = counts.reshape(-1, channels).contiguous()
    y = s.new_empty(s.shape[0], outputs)
    if not y.numel():
        return y.view(*counts.shape[:-1], outputs)
    tuning = settings.current()
    options = tuning.options("spike")
    factors, thresholds = s.new_empty(2, s.shape[0])
    kernels.scale_rows[(s.shape[0],)](
        s,
        threshold.contiguous(),
        factors,
        thresholds,
        channels,
        BC=tile(channels, 1024),
        **options,
    )
    group_size = channels // groups
    rows, columns = tile(s.shape[0], tuning.spike_rows), tuning.spike_outputs
    most = tuning.spike_few_rows_channels if rows == 16 else tuning.spike_channels
    kernels.spike_gemm[-(-s.shape[0] // rows), -(-outputs // columns)](
        s, factors, thresholds, codes, scale.contiguous(), s if bias is None else bias.float().contiguous(), y,
        s.shape[0], channels, outputs, group_size, groups, codes.stride(0), codes.stride(1),
        HAS_BIAS=bias is not None, BM=rows, BN=columns, BC=max(LEAST, tile(group_size, most)), **options,
    )  # fmt: skip
    return y.view(*counts.shape[:-1], outputs)


def refusal(counts: Tensor, codes: Tensor, bits: int) -> str | None:
    """Returns why the kernel cannot take these arguments, or None."""
    if codes.dtype != torch.int8 or bits != 8:
        return f"codes of {bits} bits held as {str(codes.dtype).removeprefix('torch.')}; the Triton kernel takes int8"
    if isinstance(codes.shape[1], int) and codes.shape[1] > CHANNELS:
        return f"{codes.shape[1]} channels; int32 holds the sums of {CHANNELS}"
    return None
