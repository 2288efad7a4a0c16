"""A stand-in for `flash_attn`: its public function, strict about its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor) -> Any:
        ctx.save_for_backward(q, k, v, seen)
        ctx.scale = scale
        with torch.no_grad():
            o, log = _attend(q, k, v, scale, seen)
        ctx.mark_non_differentiable(log)
        return o, log

    @staticmethod
    def backward(ctx: Any, do: Tensor, _: Tensor) -> Any:
        *given, seen = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in given]
            found = torch.autograd.grad(_attend(*leaves, ctx.scale, seen)[0], leaves, do)
        return *found, None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) * scale
    scores = scores.masked_fill(~seen, -torch.inf)
    o = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v.float()).to(q.dtype)
    return o, scores.logsumexp(-1)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if q.shape[3] > 256 or not q.shape[3] == k.shape[3] == v.shape[3] or k.shape != v.shape:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    if q.shape[2] % k.shape[2] or any(x.stride(-1) != 1 for x in (q, k, v)):
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    left, right = window_size[0], 0 if causal else window_size[1]
    row = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    column = torch.arange(k.shape[1], device=q.device)
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if right >= 0:
        seen = seen & (column <= row + right)
    if left >= 0:
        seen = seen & (column >= row - left)
    o, log = _Attend.apply(q, k, v, q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale, seen)  # type: ignore[no-untyped-call]
    return (o, log, None) if return_attn_probs else o
