"""The gradients of ``spikingbrain::linear_recurrence``.

The gradients of the recurrence without the rank-one part are recurrences of the same kind. With D_t the gradient of S_t,

    D_t = q_t do_t^T + a_(t+1) * D_(t+1),    dq_t = S_t do_t,    dk_t = D_t v_t,    dv_t = D_t^T k_t,

so the backward calls the op three times, with keys and values exchanged or time reversed, and whoever compiles the forward
compiles the backward. Of a decay in log form the gradient is e_t = a_t * rowsum(S_(t-1) * D_t), for which

    e_t = e_(t+1) + q_t * dq_t - k_t * dk_t,    e_(T+1) = rowsum(S_T * dS_T)

(for values: o_t * do_t - v_t * dv_t), a cumulative sum. The rest of the family has a backward op of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from spikingbrain.frontend.ops.checks import state_dtype
from spikingbrain.frontend.ops.linear_recurrence import compute, linear_recurrence

_SWAPPED = {"none": "none", "head": "head", "key": "value", "value": "key"}


@torch.library.custom_op("spikingbrain::linear_recurrence_backward", mutates_args=())
def linear_recurrence_backward(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    erase: Tensor | None,
    predict: Tensor | None,
    bonus: Tensor | None,
    state: Tensor | None,
    decay_axis: str,
    log_decay: bool,
    exclusive: bool,
    reverse: bool,
) -> list[Tensor]:
    """Returns the gradients of those of q, k, v, decay, erase, predict, bonus and state that are given, in that order.

    Nothing but the inputs is kept from the forward: blocks are computed anew and differentiated.
    """
    tensors = [q, k, v, decay, erase, predict, bonus, state]
    there = [i for i, t in enumerate(tensors) if t is not None]

    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        full: list[Any] = [None] * len(tensors)
        for i, t in zip(there, given, strict=True):
            full[i] = t
        return compute(*full, decay_axis, log_decay, exclusive, reverse)

    with _disable_current_modes():  # autograd is off inside a custom op; a transform of its own is not
        _, pull = torch.func.vjp(run, *[t for t in tensors if t is not None])
        return [g.contiguous().clone() for g in pull((grad_o, grad_state))]


@linear_recurrence_backward.register_fake
def _(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    erase: Tensor | None,
    predict: Tensor | None,
    bonus: Tensor | None,
    state: Tensor | None,
    decay_axis: str,
    log_decay: bool,
    exclusive: bool,
    reverse: bool,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (q, k, v, decay, erase, predict, bonus, state) if t is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, decay_axis, log_decay, exclusive, reverse = inputs
    ctx.flags = (decay_axis, log_decay, exclusive, reverse)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_o: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
    *tensors, o, last = ctx.saved_tensors
    log_decay = ctx.flags[1]
    decay, erase = tensors[3], tensors[4]
    if erase is None and (decay is None or log_decay):
        gradients = _by_recurrences(grad_o, grad_state, *tensors, o, last, *ctx.flags)
    else:
        given = torch.ops.spikingbrain.linear_recurrence_backward(grad_o, grad_state, *tensors, *ctx.flags)
        gradients, rest = [], iter(given)
        for t in tensors:
            gradients.append(None if t is None else next(rest))
    needed = zip(gradients, ctx.needs_input_grad, strict=False)
    return (*[g if needs else None for g, needs in needed], None, None, None, None)


def _by_recurrences(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    erase: None,
    predict: None,
    bonus: Tensor | None,
    state: Tensor | None,
    o: Tensor,
    last: Tensor,
    decay_axis: str,
    log_decay: bool,
    exclusive: bool,
    reverse: bool,
) -> list[Tensor | None]:
    """Returns the gradients of q, k, v, decay, erase, predict, bonus and state by three calls of the op."""
    dtype = state_dtype(q)
    kinds = [t if t is None else t.dtype for t in (q, k, v, decay, bonus, state)]
    q, k, v, grad_o, o = (t.to(dtype) for t in (q, k, v, grad_o, o))
    log = None if decay is None else decay.to(dtype)
    groups = q.shape[2] // k.shape[2]
    op = torch.ops.spikingbrain.linear_recurrence

    turned = None if state is None else state.to(dtype).mT.contiguous()
    swapped = _SWAPPED[decay_axis]
    dq, _ = op(grad_o, v, k, log, None, None, None, turned, swapped, True, exclusive, reverse)

    # The gradient of the state is a sum over the queries that read it: each query gets a state of its own.
    def spread(x: Tensor) -> Tensor:
        return x if groups == 1 else x.repeat_interleave(groups, 2)

    start = grad_state.to(dtype)
    if groups > 1:  # the last state's own gradient is counted once
        zeros = torch.zeros_like(start).unsqueeze(2).expand(-1, -1, groups - 1, -1, -1)
        start = torch.cat([start.unsqueeze(2), zeros], 2).flatten(1, 2)
    back = log if exclusive or log is None else _shifted(log, reverse)
    back = None if back is None else spread(back)
    dv, first = op(
        spread(k), q, grad_o, back, None, None, None, start, decay_axis, True, exclusive, not reverse
    )
    start = start.mT.contiguous()
    dk, _ = op(spread(v), grad_o, q, back, None, None, None, start, swapped, True, exclusive, not reverse)
    if groups > 1:
        dk, dv = (x.unflatten(2, (-1, groups)).sum(3) for x in (dk, dv))
        first = first.unflatten(1, (-1, groups)).sum(2)

    grad_log = None
    if log is not None:
        grad_log = _log_decay(
            q,
            dq,
            k,
            dk,
            v,
            dv,
            o,
            grad_o,
            last,
            grad_state.to(dtype),
            groups,
            decay_axis,
            exclusive,
            reverse,
            bonus,
        )
        grad_log = grad_log.masked_fill(log == -torch.inf, 0.0)
    grad_initial = first
    if log is not None and not exclusive:
        at = log[:, -1 if reverse else 0].exp() if log.shape[1] else torch.ones_like(log.sum(1))
        grad_initial = first * _on_state(at, decay_axis)

    grad_bonus = None
    if bonus is not None:
        b = bonus.to(dtype)
        along = (grad_o * spread(v)).sum(-1, keepdim=True)  # [B, T, H, 1]
        weight = (q * spread(b * k)).sum(-1, keepdim=True)
        dq = dq + along * spread(b * k)
        per_head = along * q
        per_state = per_head if groups == 1 else per_head.unflatten(2, (-1, groups)).sum(3)
        dk = dk + per_state * b
        grad_bonus = (per_state * k).sum((0, 1))
        onto = weight * grad_o
        dv = dv + (onto if groups == 1 else onto.unflatten(2, (-1, groups)).sum(3))
    found = [dq, dk, dv, grad_log, grad_bonus, grad_initial if state is not None else None]
    cast = [None if g is None else g.to(kind) for g, kind in zip(found, kinds, strict=True)]
    return [*cast[:4], None, None, *cast[4:]]


def _log_decay(
    q: Tensor,
    dq: Tensor,
    k: Tensor,
    dk: Tensor,
    v: Tensor,
    dv: Tensor,
    o: Tensor,
    grad_o: Tensor,
    last: Tensor,
    grad_last: Tensor,
    groups: int,
    decay_axis: str,
    exclusive: bool,
    reverse: bool,
    bonus: Tensor | None,
) -> Tensor:
    """Returns the gradient of the decays' logarithms by the cumulative sum; dk and dv are without the bonus' part."""

    def gathered(x: Tensor) -> Tensor:
        return x if groups == 1 else x.unflatten(2, (-1, groups)).sum(3)

    if decay_axis == "value":
        if bonus is not None:
            weight = (q * (bonus * k).repeat_interleave(groups, 2)).sum(-1, keepdim=True)
            o = o - weight * v.repeat_interleave(groups, 2)
        reads, writes, ends = gathered(o * grad_o), v * dv, (last * grad_last).sum(-2)
    else:
        reads, writes, ends = gathered(q * dq), k * dk, (last * grad_last).sum(-1)
    if exclusive:  # a read is of the state before its step, so its own decay has no part in it
        reads = _later(reads, reverse)
    total = reads - writes
    total = total.cumsum(1) if reverse else total.flip(1).cumsum(1).flip(1)
    total = total + ends.unsqueeze(1)
    return total.sum(-1) if decay_axis == "head" else total


def _later(x: Tensor, reverse: bool) -> Tensor:
    """Returns at each step what x is at the next one, zero at the last."""
    zero = torch.zeros_like(x[:, :1])
    return torch.cat([zero, x[:, :-1]], 1) if reverse else torch.cat([x[:, 1:], zero], 1)


def _shifted(log: Tensor, reverse: bool) -> Tensor:
    """Returns at each step the decay of the next one; the last step's is that of the final state, which has none."""
    return _later(log, reverse)


def _on_state(decay: Tensor, axis: str) -> Tensor:
    """Returns a decay [B, S, ...] so that it multiplies a state [B, S, K, V]."""
    if axis == "head":
        return decay[..., None, None]
    return decay.unsqueeze(-1 if axis == "key" else -2)


linear_recurrence.register_autograd(_backward, setup_context=_setup)
