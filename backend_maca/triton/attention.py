"""Softmax attention over a window on a GPU, forward and backward: launches of `attention_kernels`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spikingbrain.backend_maca.triton import attention_kernels as kernels
from spikingbrain.backend_maca.triton.device import WARPS
from spikingbrain.backend_maca.triton.dots import DOTS, tile
from spikingbrain.errors import ShapeError

LARGEST_HEAD = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
# Numbers in a block of queries: of those in float32 registers hold fewer, and the backward holds more such blocks at a time.
FORWARD = {torch.float32: 2048, torch.bfloat16: 8192, torch.float16: 8192}
BACKWARD = {torch.float32: 2048, torch.bfloat16: 4096, torch.float16: 4096}


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int = 0, sinks: int = 0, scale: float | None = None
) -> Tensor:
    """Returns o [B, T, H, E] of q [B, T, H, D], k [B, N, S, D], v [B, N, S, E]; can be differentiated.

    The queries are the last T of N positions. Each sees itself and the ``window - 1`` positions before it (all of them if
    ``window`` is 0), and the first ``sinks`` positions, if they are not later than itself. Head h reads keys h // (H / S).
    ``scale``: D ** -0.5 if None. A query that sees nothing yields 0. Operands of dots have the dtype of q, sums are float32.

    Raises:
        ShapeError: shapes or dtypes do not fit each other, or heads are larger than 256 (128 in float32).
    """
    _check(q, k, v, window, sinks)
    o: Tensor = _WindowAttention.apply(  # type: ignore[no-untyped-call]
        q, k, v, window, sinks, q.shape[-1] ** -0.5 if scale is None else scale
    )
    return o


def _check(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> None:
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3]
    fits = fits and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and q.shape[1] <= k.shape[1]
    if not fits or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ShapeError(
            f"window_attention: shapes {', '.join(str(list(t.shape)) for t in (q, k, v))}",
            why="they must be [B, T, H, D], [B, N, S, D] and [B, N, S, E] with T <= N and S a divisor of H",
        )
    if q.dtype not in DOTS or not q.dtype == k.dtype == v.dtype:
        raise ShapeError(
            f"window_attention: dtypes {q.dtype}, {k.dtype}, {v.dtype}",
            why="they must be one of float32, bfloat16 and float16",
        )
    if max(q.shape[3], v.shape[3]) > LARGEST_HEAD[q.dtype] or min(window, sinks) < 0:
        raise ShapeError(
            f"window_attention: heads of {q.shape[3]} and {v.shape[3]}, window {window}, {sinks} sinks",
            why=f"heads must be of at most {LARGEST_HEAD[q.dtype]}, window and sinks not negative",
        )


def _launch(
    q: Tensor, v: Tensor, window: int, sinks: int, scale: float, numbers: int
) -> tuple[list[Any], dict[str, Any]]:
    """Returns what a kernel is given: sizes, and blocks of about so many ``numbers``."""
    _, steps, heads, size = q.shape
    _, keys, sources, values = v.shape
    width, height = (tile(d, LARGEST_HEAD[q.dtype]) for d in (size, values))
    rows = min(64, max(16, numbers // max(width, height)))
    blocks = dict(
        DOT=DOTS[q.dtype], BM=rows, BN=min(rows, 32), BD=width, BE=height, num_warps=WARPS, num_stages=1
    )
    return [steps, keys, sources, heads // sources, size, values, window, sinks, scale / math.log(2)], blocks


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        batch, steps, heads, _ = q.shape
        o = q.new_empty(batch, steps, heads, v.shape[3])
        sums = q.new_empty(batch, heads, steps, dtype=torch.float32)
        if o.numel():
            sizes, blocks = _launch(q, v, window, sinks, scale, FORWARD[q.dtype])
            kernels.attend[(-(-steps // blocks["BM"]) * batch * heads,)](q, k, v, o, sums, *sizes, **blocks)
        ctx.save_for_backward(q, k, v, o, sums)
        ctx.options = (window, sinks, scale)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, sums = ctx.saved_tensors
        do = do.contiguous()
        batch, steps, heads, _ = q.shape
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        if o.numel():
            products = (o.float() * do.float()).sum(-1).transpose(1, 2).contiguous()
            window, sinks, scale = ctx.options
            sizes, blocks = _launch(q, v, window, sinks, scale, BACKWARD[q.dtype])
            given = (q, k, v, do, sums, products)
            kernels.attend_query_gradients[(-(-steps // blocks["BM"]) * batch * heads,)](
                *given, dq, *sizes, scale, **blocks
            )
            kernels.attend_key_gradients[(-(-k.shape[1] // blocks["BN"]) * batch * k.shape[2],)](
                *given, dk, dv, *sizes, scale, **blocks
            )
        return dq, dk, dv, None, None, None
