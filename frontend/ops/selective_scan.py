"""``torch.ops.spikingbrain.selective_scan``: Mamba's recurrence, read at once, so that [T, C, N] never exists.

h_t = exp(dt_t a) * h_(t-1) + (dt_t * x_t) b_t^T,    y_t = h_t c_t        (h [C, N])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikingbrain.frontend.ops.checks import require_dtype, require_rank, require_shape, state_dtype, up

_NAME = "selective_scan"
_BLOCK = 64  # steps whose states the backward holds at once


@torch.library.custom_op("spikingbrain::selective_scan", mutates_args=())
def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns y [B, T, C] in the dtype of x, and the last h [B, C, N] in float32 (float64 for float64).

    x, dt [B, T, C]; a [C, N]; b, c [B, T, N]; state [B, C, N], zeros if None. ``reverse``: time runs from T - 1 to 0.

    Raises ShapeError for shapes or dtypes that do not fit.
    """
    check(x, dt, a, b, c, state)
    h = up(x).new_zeros(x.shape[0], *a.shape) if state is None else state.clone()
    wx, wdt, wa, wb, wc = map(up, (x, dt, a, b, c))
    y = torch.empty_like(wx)
    for t in _order(x.shape[1], reverse):
        h = _step(h, wx[:, t], wdt[:, t], wa, wb[:, t])
        y[:, t] = (h @ wc[:, t].unsqueeze(-1)).squeeze(-1)
    return y.to(x.dtype), h


@selective_scan.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    check(x, dt, a, b, c, state)
    return x.new_empty(x.shape), x.new_empty(x.shape[0], *a.shape, dtype=state_dtype(x))


def check(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None) -> None:
    """Raises ShapeError unless the arguments fit together."""
    require_rank(_NAME, "x", x, "B, T, C")
    require_rank(_NAME, "a", a, "C, N")
    batch, steps, channels = x.shape
    require_shape(_NAME, "dt", dt, "B, T, C", x.shape)
    require_shape(_NAME, "a", a, "C, N", (channels, a.shape[1]))
    for name, tensor in (("b", b), ("c", c)):
        require_shape(_NAME, name, tensor, "B, T, N", (batch, steps, a.shape[1]))
    if state is not None:
        require_shape(_NAME, "state", state, "B, C, N", (batch, channels, a.shape[1]))
    require_dtype(_NAME, x, state, dt=dt, a=a, b=b, c=c)


def _order(steps: int, reverse: bool) -> list[int]:
    return list(range(steps))[::-1] if reverse else list(range(steps))


def _step(h: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[B, C, N] from x, dt [B, C], a [C, N], b [B, N]"""
    return (dt.unsqueeze(-1) * a).exp_().mul_(h).addcmul_((dt * x).unsqueeze(-1), b.unsqueeze(1))


@torch.library.custom_op("spikingbrain::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, dt, a, b, c and state; states are computed anew, a block at a time.

    With D_t the gradient of h_t: D_t = dy_t c_t^T + exp(dt_(t+1) a) * D_(t+1); E_t = D_t * exp(dt_t a) * h_(t-1) is that of the
    exponent.
    """
    order = _order(x.shape[1], reverse)
    blocks = [order[i : i + _BLOCK] for i in range(0, len(order), _BLOCK)]
    wx, wdt, wa, wb, wc, dy = map(up, (x, dt, a, b, c, grad_y))
    h = wx.new_zeros(x.shape[0], *a.shape) if state is None else state.clone()
    starts = []
    for block in blocks:
        starts.append(h)
        for t in block:
            h = _step(h, wx[:, t], wdt[:, t], wa, wb[:, t])
    back = up(grad_last).clone()
    gx, gdt, gb, gc = (torch.empty_like(v) for v in (wx, wdt, wb, wc))
    ga = torch.zeros_like(wa)
    for block, start in zip(reversed(blocks), reversed(starts), strict=True):
        states = [start]
        for t in block:
            states.append(_step(states[-1], wx[:, t], wdt[:, t], wa, wb[:, t]))
        for i in range(len(block) - 1, -1, -1):
            t = block[i]
            back = back + dy[:, t].unsqueeze(-1) * wc[:, t].unsqueeze(1)
            gc[:, t] = (states[i + 1] * dy[:, t].unsqueeze(-1)).sum(1)
            scaled = (back @ wb[:, t].unsqueeze(-1)).squeeze(-1)  # of dt * x
            gb[:, t] = (back * (wdt[:, t] * wx[:, t]).unsqueeze(-1)).sum(1)
            back = back * (wdt[:, t].unsqueeze(-1) * wa).exp()
            exponent = back * states[i]
            ga += (exponent * wdt[:, t].unsqueeze(-1)).sum(0)
            gdt[:, t] = (exponent * wa).sum(-1) + scaled * wx[:, t]
            gx[:, t] = scaled * wdt[:, t]
    return gx.to(x.dtype), gdt.to(x.dtype), ga.to(x.dtype), gb.to(x.dtype), gc.to(x.dtype), back


@selective_scan_backward.register_fake
def _(
    grad_y: Tensor,
    grad_last: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    first = x.new_empty(x.shape[0], *a.shape, dtype=state_dtype(x))
    return (*(t.new_empty(t.shape) for t in (x, dt, a, b, c)), first)  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    found = torch.ops.spikingbrain.selective_scan_backward(grad_y, grad_last, *tensors, ctx.reverse)
    return (*found[:5], found[5] if tensors[5] is not None else None, None)


selective_scan.register_autograd(_backward, setup_context=_setup)
