"""`spikingbrain::selective_scan`, the recurrence of Mamba, and its backward: shape functions, eager bodies, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikingbrain.frontend.ops.checks import (
    needed,
    once_only,
    require_dtype,
    require_rank,
    require_shape,
    state_dtype,
    up,
)
from spikingbrain.models.recurrences.scan import chunk_states
from spikingbrain.models.recurrences.scan import selective_scan as blockwise

_NAME = "selective_scan"
# Steps whose states [B, steps, C, N] the backward holds at a time.
_CHUNK = 64


@torch.library.custom_op("spikingbrain::selective_scan", mutates_args=())
def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns y [B, T, C] and the last state [B, C, N] of, for each channel c and slot n,

        h_t = exp(dt_t[c] a[c, n]) h_(t-1) + dt_t[c] x_t[c] b_t[n],    y_t[c] = sum_n h_t[c, n] c_t[n]

    x, dt [B, T, C]; a [C, N]; b, c [B, T, N]; state [B, C, N], zeros if None. ``reverse``: time runs from T - 1 to 0. States
    and arithmetic are float32 (float64 for float64); y has the dtype of x.

    Raises:
        ShapeError: a shape or dtype does not fit the others.
    """
    _check(x, dt, a, b, c, state)
    y, last = blockwise(x, dt, a, b, c, state, reverse)
    return y.contiguous(), last.contiguous()


@selective_scan.register_fake
def _(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    _check(x, dt, a, b, c, state)
    return x.new_empty(x.shape), x.new_empty(x.shape[0], *a.shape, dtype=state_dtype(x))


def _check(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None) -> None:
    require_rank(_NAME, "x", x, "B, T, C")
    require_rank(_NAME, "a", a, "C, N")
    batch, steps, width = x.shape
    slots = a.shape[1]
    require_shape(_NAME, "dt", dt, "B, T, C", x.shape)
    require_shape(_NAME, "a", a, "C, N", (width, slots))
    require_shape(_NAME, "b", b, "B, T, N", (batch, steps, slots))
    require_shape(_NAME, "c", c, "B, T, N", (batch, steps, slots))
    if state is not None:
        require_shape(_NAME, "state", state, "B, C, N", (batch, width, slots))
    require_dtype(_NAME, x, state, dt=dt, a=a, b=b, c=c)


@torch.library.custom_op("spikingbrain::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    dy: Tensor,
    dlast: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, dt, a, b, c and state, for those of y [B, T, C] and of the last state [B, C, N].

    States are kept at the start of each chunk only and recomputed inside. With h the states and D_t the gradient of h_t,
    D_t = dy_t c_t^T + exp(dt_(t+1) a) D_(t+1); that of the exponent dt_t a is E_t = exp(dt_t a) h_(t-1) D_t.
    """
    h = x.new_zeros(x.shape[0], *a.shape, dtype=state_dtype(x)) if state is None else state
    operands = [up(tensor.flip(1) if reverse else tensor) for tensor in (dy, x, dt, b, c)]
    A = up(a)
    chunks = [tuple(tensor[:, i : i + _CHUNK] for tensor in operands) for i in range(0, x.shape[1], _CHUNK)]
    starts = []
    for _, x_, dt_, b_, _ in chunks:
        starts.append(h)
        h = chunk_states(x_, dt_, A, b_, h)[1]

    D, of_a = up(dlast).clone(), torch.zeros_like(A)
    parts: list[tuple[Tensor, ...]] = []
    for (dy_, x_, dt_, b_, c_), start in zip(reversed(chunks), reversed(starts), strict=True):
        states = chunk_states(x_, dt_, A, b_, start)[0]
        factor = (dt_.unsqueeze(-1) * A).exp()
        of_states = dy_.unsqueeze(-1) * c_.unsqueeze(2)
        for t in reversed(range(x_.shape[1])):
            of_states[:, t] += D
            D = factor[:, t] * of_states[:, t]
        of_exponent = factor * torch.cat((start.unsqueeze(1), states[:, :-1]), 1) * of_states
        of_product = (of_states @ b_.unsqueeze(-1)).squeeze(-1)  # of dt x
        of_a += torch.einsum("btcn,btc->cn", of_exponent, dt_)
        parts.append(
            (
                of_product * dt_,
                of_product * x_ + (of_exponent * A).sum(-1),
                torch.einsum("btcn,btc->btn", of_states, dt_ * x_),
                torch.einsum("btcn,btc->btn", states, dy_),
            )
        )
    whole = [torch.cat(part, 1) for part in zip(*reversed(parts), strict=True)] or [
        torch.zeros_like(tensor) for tensor in (x, dt, b, c)
    ]
    of_x, of_dt, of_b, of_c = ((g.flip(1) if reverse else g).to(x.dtype).contiguous() for g in whole)
    return of_x, of_dt, of_a.to(x.dtype), of_b, of_c, D


@selective_scan_backward.register_fake
def _(
    dy: Tensor,
    dlast: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_x, of_dt, of_a, of_b, of_c = (tensor.new_empty(tensor.shape) for tensor in (x, dt, a, b, c))
    return of_x, of_dt, of_a, of_b, of_c, dlast.new_empty(dlast.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.spikingbrain.selective_scan_backward(dy, dlast, *ctx.saved_tensors, ctx.reverse)
    return *(g if wanted else None for g, wanted in zip(gradients, needed(ctx, 6), strict=True)), None


selective_scan.register_autograd(_backward, setup_context=_save)
selective_scan_backward.register_autograd(once_only(_NAME))
