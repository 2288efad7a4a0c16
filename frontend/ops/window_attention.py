"""`spikingbrain::window_attention`, softmax attention over a window: shape function, plain body and backward.

`frontend.attention` raises attention to it where the target has kernels for it inside torch; elsewhere torch's attention stays.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spikingbrain.errors import OptionError, ShapeError
from spikingbrain.frontend.ops.checks import (
    once_only,
    require_dtype,
    require_rank,
    require_shape,
    state_dtype,
    up,
)

_NAME = "window_attention"


@torch.library.custom_op("spikingbrain::window_attention", mutates_args=())
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int = 0,
    sinks: int = 0,
    scale: float | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns o [B, T, H, E] of q [B, T, H, D], k [B, N, S, D], v [B, N, S, E], and log2 of the sums of exponentials [B, H, T].

    The queries are the last T of N positions, or both have positions of their own, ``query_positions`` [B, T] and
    ``key_positions`` [B, N], integers in any order; a key below 0 is not there, and a query that sees none yields 0. Each query
    sees its own position and the ``window - 1`` before it (all of them if ``window`` is 0), and the first ``sinks`` positions, if
    they are not later than its own. Head h reads keys h // (H / S). ``scale`` multiplies the products; D ** -0.5 if None. o has
    the dtype of q; the sums, float32 (float64 for float64), are for the backward.

    Raises:
        ShapeError: a shape or dtype does not fit the others.
        OptionError: a negative window or number of sinks, or positions of only one side.
    """
    check(q, k, v, window, sinks, query_positions, key_positions)
    if not q.numel() or not v.numel():
        return q.new_zeros(*q.shape[:3], v.shape[3]), _sums_like(q).zero_()
    scores = _scores(q, k, window, sinks, scale, query_positions, key_positions)
    sums = scores.logsumexp(-1)
    sums = sums.masked_fill(sums == -torch.inf, 0.0)
    o = torch.einsum("bsgtn,bnse->btsge", (scores - sums.unsqueeze(-1)).exp(), up(v)).flatten(2, 3)
    sums = sums.flatten(1, 2) / math.log(2)
    return o.to(q.dtype).contiguous(), sums.contiguous()


def _scores(
    q: Tensor,
    k: Tensor,
    window: int,
    sinks: int,
    scale: float | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
) -> Tensor:
    """Returns scale * q . k [B, S, G, T, N], -inf where a query does not see a key."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    products = torch.einsum("btsgd,bnsd->bsgtn", torch.unflatten(up(q), 2, (k.shape[2], -1)), up(k)) * scale
    key = torch.arange(k.shape[1], device=q.device)
    position = key[k.shape[1] - q.shape[1] :, None]
    if query_positions is not None and key_positions is not None:
        key, position = key_positions[:, None, None, None], query_positions[:, None, None, :, None]
    seen = (key >= 0) & (key <= position)
    if window:
        seen = seen & ((key > position - window) | (key < sinks))
    return products.masked_fill(~seen, -torch.inf)


def _sums_like(q: Tensor) -> Tensor:
    batch, steps, heads, _ = q.shape
    return q.new_empty(batch, heads, steps, dtype=state_dtype(q))


@window_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int = 0,
    sinks: int = 0,
    scale: float | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check(q, k, v, window, sinks, query_positions, key_positions)
    return q.new_empty(*q.shape[:3], v.shape[3]), _sums_like(q)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    sinks: int,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> None:
    """Raises ShapeError or OptionError unless the arguments fit together."""
    require_rank(_NAME, "k", k, "B, N, S, D")
    require_rank(_NAME, "v", v, "B, N, S, E")
    require_rank(_NAME, "q", q, "B, T, H, D")
    batch, keys, states, size = k.shape
    require_shape(_NAME, "v", v, "B, N, S, E", (batch, keys, states, v.shape[3]))
    require_shape(_NAME, "q", q, "B, T, H, D", (batch, q.shape[1], q.shape[2], size))
    if states < 1 or q.shape[2] % states:
        raise ShapeError(
            f"{_NAME}: {q.shape[2]} heads read keys of {states}",
            why="each head of keys serves the same number of heads",
        )
    if q.shape[1] > keys:
        raise ShapeError(
            f"{_NAME}: {q.shape[1]} queries and {keys} keys", why="the queries are the last of the positions"
        )
    require_dtype(_NAME, q, None, k=k, v=v)
    if (query_positions is None) != (key_positions is None):
        raise OptionError(f"{_NAME}: only one of query_positions and key_positions", hint="both, or neither")
    for name, tensor, length in (("query", query_positions, q.shape[1]), ("key", key_positions, keys)):
        if tensor is not None:
            require_shape(_NAME, f"{name}_positions", tensor, f"B, {'TN'[name == 'key']}", (batch, length))
            if tensor.dtype not in (torch.int32, torch.int64):
                raise ShapeError(f"{_NAME}: {name}_positions are {tensor.dtype}", why="they must be integers")
    if window < 0 or sinks < 0:
        raise OptionError(
            f"{_NAME}: window {window}, {sinks} sinks", why="neither is negative; a window of 0 is unlimited"
        )


@torch.library.custom_op("spikingbrain::window_attention_backward", mutates_args=())
def window_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    sums: Tensor,
    window: int = 0,
    sinks: int = 0,
    scale: float | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v from that of o, of the arguments and results of `window_attention`."""
    if not q.numel() or not v.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    states = (k.shape[2], -1)
    scores = _scores(q, k, window, sinks, scale, query_positions, key_positions)
    p = torch.exp2(scores / math.log(2) - torch.unflatten(sums, 1, states).unsqueeze(-1))
    of_o = torch.unflatten(up(do), 2, states)
    of_p = torch.einsum("btsge,bnse->bsgtn", of_o, up(v))
    product = (up(o) * up(do)).sum(-1).transpose(1, 2)
    of_scores = p * (of_p - torch.unflatten(product, 1, states).unsqueeze(-1)) * factor
    dq = torch.einsum("bsgtn,bnsd->btsgd", of_scores, up(k)).flatten(2, 3)
    dk = torch.einsum("bsgtn,btsgd->bnsd", of_scores, torch.unflatten(up(q), 2, states))
    dv = torch.einsum("bsgtn,btsge->bnse", p, of_o)
    return tuple(g.to(q.dtype).contiguous() for g in (dq, dk, dv))  # type: ignore[return-value]


@window_attention_backward.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    sums: Tensor,
    window: int = 0,
    sinks: int = 0,
    scale: float | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.window, ctx.sinks, ctx.scale, *positions = inputs
    ctx.save_for_backward(q, k, v, *output, *positions)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *given, query_positions, key_positions = ctx.saved_tensors
    gradients = torch.ops.spikingbrain.window_attention_backward(
        do, *given, ctx.window, ctx.sinks, ctx.scale, query_positions, key_positions
    )
    return *gradients, None, None, None, None, None


window_attention.register_autograd(_backward, setup_context=_save)
window_attention_backward.register_autograd(once_only(_NAME))
