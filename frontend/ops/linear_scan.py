"""``torch.ops.spikingbrain.linear_scan``: elementwise recurrences.

    h_t = a_t * h_(t-1) + b_t

Its gradient is one scan more, in reversed time: with D_t the gradient of h_t, D_t = dh_t + a_(t+1) * D_(t+1), the gradient of
b_t is D_t and that of a_t is h_(t-1) * D_t (times a_t if the decay is given as a logarithm).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikingbrain.frontend.ops.checks import require_dtype, require_rank, require_shape, state_dtype, up

_NAME = "linear_scan"
_BLOCK = 32


@torch.library.custom_op("spikingbrain::linear_scan", mutates_args=())
def linear_scan(
    decay: Tensor, update: Tensor, state: Tensor | None = None, log_decay: bool = False, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns h [B, T, C] in the dtype of ``update``, and the last h [B, C] in float32 (float64 for float64).

    decay, update [B, T, C]; state [B, C], zeros if None. The factor is ``decay``, or exp(decay) if ``log_decay``; it may be
    zero, negative or larger than 1. ``reverse``: time runs from T - 1 to 0.

    Raises ShapeError for shapes or dtypes that do not fit.
    """
    check(decay, update, state)
    factor = up(decay).exp() if log_decay else up(decay)
    value = up(update)
    if reverse:
        factor, value = factor.flip(1), value.flip(1)
    h, last = _blocks(factor, value, state)
    return (h.flip(1) if reverse else h).to(update.dtype).contiguous(), last


@linear_scan.register_fake
def _(
    decay: Tensor, update: Tensor, state: Tensor | None = None, log_decay: bool = False, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    check(decay, update, state)
    batch, _, channels = update.shape
    last = update.new_empty(batch, channels, dtype=state_dtype(update))
    return update.new_empty(update.shape), last


def check(decay: Tensor, update: Tensor, state: Tensor | None) -> None:
    """Raises ShapeError unless the arguments fit together."""
    require_rank(_NAME, "update", update, "B, T, C")
    require_shape(_NAME, "decay", decay, "B, T, C", update.shape)
    if state is not None:
        require_shape(_NAME, "state", state, "B, C", (update.shape[0], update.shape[2]))
    require_dtype(_NAME, update, state, decay=decay)


def _blocks(factor: Tensor, value: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Runs blocks side by side, step by step, then hands the state on from block to block: about T/32 + 32 small steps."""
    batch, steps, channels = value.shape
    h = value.new_zeros(batch, channels) if state is None else state.clone()
    if steps == 0:
        return value.clone(), h
    padding = -steps % _BLOCK
    pad = torch.nn.functional.pad
    a = pad(factor, (0, 0, 0, padding), value=1.0).unflatten(1, (-1, _BLOCK))
    b = pad(value, (0, 0, 0, padding)).unflatten(1, (-1, _BLOCK))
    inside, through = [b[:, :, 0]], [a[:, :, 0]]  # from zero, and what becomes of the state before the block
    for i in range(1, _BLOCK):
        inside.append(a[:, :, i] * inside[-1] + b[:, :, i])
        through.append(a[:, :, i] * through[-1])
    starts = []
    for n in range(a.shape[1]):
        starts.append(h)
        h = through[-1][:, n] * h + inside[-1][:, n]
    before = torch.stack(starts, 1).unsqueeze(2)
    whole = torch.stack(inside, 2) + torch.stack(through, 2) * before
    return whole.flatten(1, 2)[:, :steps], h


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    decay, _, state, ctx.log_decay, ctx.reverse = inputs
    ctx.save_for_backward(decay, state, output[0])


def _backward(ctx: Any, grad_h: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
    decay, state, h = ctx.saved_tensors
    reverse, log = ctx.reverse, ctx.log_decay
    a, grad_h, h = up(decay), up(grad_h), up(h)
    one = torch.zeros_like(a[:, :1]) if log else torch.ones_like(a[:, :1])
    later = torch.cat([one, a[:, :-1]], 1) if reverse else torch.cat([a[:, 1:], one], 1)
    back, first = torch.ops.spikingbrain.linear_scan(later, grad_h, grad_last.to(a.dtype), log, not reverse)
    start = (
        (torch.zeros_like(h[:, 0]) if state is None else state.to(h.dtype)).unsqueeze(1)
        if h.shape[1]
        else h[:, :0]
    )
    before = torch.cat([h[:, 1:], start], 1) if reverse else torch.cat([start, h[:, :-1]], 1)
    factor = a.exp() if log else a
    grad_decay = before * back * factor if log else before * back
    grad_state = None
    if state is not None:
        at = factor[:, -1 if reverse else 0] if a.shape[1] else torch.ones_like(first)
        grad_state = (first * at).to(state.dtype)
    return grad_decay.to(decay.dtype), back.to(decay.dtype), grad_state, None, None


linear_scan.register_autograd(_backward, setup_context=_setup)
