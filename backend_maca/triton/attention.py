"""Softmax attention over a window on a GPU, forward and backward: launches of `attention_kernels`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spikingbrain.backend_maca.triton import attention_kernels as kernels
from spikingbrain.backend_maca.triton import settings
from spikingbrain.backend_maca.triton.dots import DOTS, tile

LARGEST_HEAD = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}


def refusal(q: Tensor, v: Tensor) -> str | None:
    """Returns why the kernels cannot take heads like those of q [B, T, H, D] and v [B, N, S, E], or None."""
    if q.dtype not in DOTS:
        return f"{str(q.dtype).removeprefix('torch.')}; the Triton kernel computes on float32, bfloat16 and float16"
    largest = max(q.shape[3], v.shape[3])
    if isinstance(largest, int) and largest > LARGEST_HEAD[q.dtype]:
        return f"heads of {largest}; the Triton kernel holds {LARGEST_HEAD[q.dtype]} of {str(q.dtype).removeprefix('torch.')}"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    sinks: int,
    scale: float | None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns what the op `window_attention` does: o [B, T, H, E] and log2 of the sums of exponentials [B, H, T].

    Operands of dots have the dtype of q, sums are float32. A query that sees nothing yields 0.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch, steps, heads, _ = q.shape
    o = q.new_empty(batch, steps, heads, v.shape[3])
    sums = q.new_empty(batch, heads, steps, dtype=torch.float32)
    if o.numel():
        places, given = _positions(q, query_positions, key_positions)
        sizes, blocks = _launch(q, v, window, sinks, _scale(q, scale), _numbers(q, given))
        kernels.attend[(-(-steps // blocks["BM"]) * batch * heads,)](
            q, k, v, *places, o, sums, *sizes, POSITIONS=given, **blocks
        )
    return o, sums


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    sums: Tensor,
    window: int,
    sinks: int,
    scale: float | None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v, from that of o and the results of `forward`."""
    do, q, k, v, sums = (x.contiguous() for x in (do, q, k, v, sums))
    batch, steps, heads, _ = q.shape
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if o.numel():
        products = (o.float() * do.float()).sum(-1).transpose(1, 2).contiguous()
        factor = _scale(q, scale)
        places, given = _positions(q, query_positions, key_positions)
        sizes, blocks = _launch(q, v, window, sinks, factor, _numbers(q, given, backward=True))
        arguments = (q, k, v, *places, do, sums, products)
        kernels.attend_query_gradients[(-(-steps // blocks["BM"]) * batch * heads,)](
            *arguments, dq, *sizes, factor, POSITIONS=given, **blocks
        )
        kernels.attend_key_gradients[(-(-k.shape[1] // blocks["BN"]) * batch * k.shape[2],)](
            *arguments, dk, dv, *sizes, factor, POSITIONS=given, **blocks
        )
    return dq, dk, dv


def _positions(q: Tensor, queries: Tensor | None, keys: Tensor | None) -> tuple[tuple[Tensor, Tensor], bool]:
    """Returns positions as kernels take them, and whether there are any; if not, tensors that are not read."""
    if queries is None or keys is None:
        return (q, q), False
    return (queries.contiguous(), keys.contiguous()), True


def _numbers(q: Tensor, positions: bool, backward: bool = False) -> int:
    """Returns how many numbers a block of queries has: half, if positions take their share of the registers."""
    tuning = settings.current()
    halves = tuning.attention_gradient_numbers if backward else tuning.attention_numbers
    return (tuning.attention_float_numbers if q.dtype == torch.float32 else halves) // (2 if positions else 1)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[3] ** -0.5 if scale is None else scale


def _launch(
    q: Tensor, v: Tensor, window: int, sinks: int, scale: float, numbers: int
) -> tuple[list[Any], dict[str, Any]]:
    """Returns what a kernel is given: sizes, and blocks of about so many ``numbers``."""
    _, steps, heads, size = q.shape
    _, keys, sources, values = v.shape
    width, height = (tile(d, LARGEST_HEAD[q.dtype]) for d in (size, values))
    tuning = settings.current()
    rows = min(tuning.attention_rows, max(16, numbers // max(width, height)))
    columns = min(rows, tuning.attention_keys)
    blocks = dict(DOT=DOTS[q.dtype], BM=rows, BN=columns, BD=width, BE=height, **tuning.options("attention"))
    return [steps, keys, sources, heads // sources, size, values, window, sinks, scale / math.log(2)], blocks
