"""The spiking projection on a GPU: launches of `spike_kernels`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from spikingbrain.backend_maca.triton.device import WARPS
from spikingbrain.backend_maca.triton.spike_kernels import spike_gemm

LIMIT = 2.0**22  # of the size of counts that three digits hold
CHANNELS = 1 << 16  # so that a sum of products of bytes stays below 2^31


def spike_linear(
    counts: Tensor, threshold: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Returns threshold * (sum over groups of scale * (sum of counts * codes)) + bias, float32 [..., N].

    counts float32 [..., C] hold integers, threshold [...], codes int8 [N, C] in any order of memory, scale float32 [N, G], bias
    [N]. Sums inside a group are exact, rounded once to float32, while counts are at most 4194304 in size; larger ones are
    summed as floats are.
    """
    (outputs, channels), groups = codes.shape, scale.shape[1]
    s = counts.reshape(-1, channels).contiguous()
    y = s.new_empty(s.shape[0], outputs)
    group_size = channels // groups
    # few rows: more of the weights at a time
    rows = 16 if s.shape[0] <= 16 else 32 if s.shape[0] <= 32 else 64
    tile = min(128 if rows == 16 else 64, max(32, triton.next_power_of_2(group_size)))
    spike_gemm[-(-s.shape[0] // rows), -(-outputs // 64)](
        s, threshold.reshape(-1).contiguous(), codes, scale.contiguous(), s if bias is None else bias.float(), y,
        s.shape[0], channels, outputs, group_size, groups, codes.stride(0), codes.stride(1),
        HAS_BIAS=bias is not None, LIMIT=LIMIT, BM=rows, BN=64, BC=tile, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    return y.view(*counts.shape[:-1], outputs)


def refusal(counts: Tensor, codes: Tensor, bits: int) -> str | None:
    """Returns why the kernel cannot take these arguments, or None."""
    if codes.dtype != torch.int8 or bits != 8:
        return f"codes of {bits} bits held as {str(codes.dtype).removeprefix('torch.')}; the Triton kernel takes int8"
    if isinstance(codes.shape[1], int) and codes.shape[1] > CHANNELS:
        return f"{codes.shape[1]} channels; int32 holds the sums of {CHANNELS}"
    return None
