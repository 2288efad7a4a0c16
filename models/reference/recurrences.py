"""Recurrences as plain loops over time: slow, obvious, any floating dtype. What every faster form is compared with.

`linear_recurrence` is the executable specification of the op of that name; the others are the papers' equations.

Letters in shapes
  B  batch    H  heads of queries    K  key size      D  features
  T  steps    S  states              V  value size    N  slots, or size of a channel's state
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    erase: Tensor | None = None,
    predict: Tensor | None = None,
    bonus: Tensor | None = None,
    state: Tensor | None = None,
    decay_axis: str = "none",
    log_decay: bool = False,
    exclusive: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """S_t = a_t * S_(t-1) + erase_t (predict_t^T S_(t-1)) + k_t v_t^T; o_t = S_t^T q_t, see docs/recurrence-ops.md.

    q [B, T, H, K]; k, erase, predict [B, T, S, K]; v [B, T, S, V]; decay [B, T, S], with K or V behind it for the axis
    "key" or "value"; bonus [S, K]; state [B, S, K, V]. Returns o [B, T, H, V] and the last state.
    """
    batch, steps, states, key_size = k.shape
    group = torch.arange(q.shape[2], device=q.device) // (
        q.shape[2] // states
    )  # the state that each head reads
    S = k.new_zeros(batch, states, key_size, v.shape[-1]) if state is None else state
    outputs: list[Tensor] = []
    for t in reversed(range(steps)) if reverse else range(steps):
        old = S
        if decay is not None:
            a = decay[:, t].exp() if log_decay else decay[:, t]
            axes = {
                "head": a[..., None, None] if decay_axis == "head" else a,
                "key": a[..., None],
                "value": a[..., None, :],
            }
            S = S * axes[decay_axis]
        if erase is not None and predict is not None:
            prediction = torch.einsum("bsk,bskv->bsv", predict[:, t], old)
            S = S + torch.einsum("bsk,bsv->bskv", erase[:, t], prediction)
        S = S + torch.einsum("bsk,bsv->bskv", k[:, t], v[:, t])
        o = torch.einsum("bhk,bhkv->bhv", q[:, t], (old if exclusive else S)[:, group])
        if bonus is not None:
            weight = (q[:, t] * (bonus * k[:, t])[:, group]).sum(-1, keepdim=True)
            o = o + weight * v[:, t][:, group]
        outputs.append(o)
    if reverse:
        outputs.reverse()
    empty = v.new_zeros(batch, 0, q.shape[2], v.shape[-1])
    return torch.stack(outputs, 1) if outputs else empty, S


def linear_scan(
    decay: Tensor, update: Tensor, state: Tensor | None = None, log_decay: bool = False, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """h_t = a_t * h_(t-1) + update_t. decay, update [B, T, D]; state [B, D]. Returns all h and the last state."""
    h = torch.zeros_like(update).sum(1) if state is None else state
    outputs: list[Tensor] = []
    for t in reversed(range(update.shape[1])) if reverse else range(update.shape[1]):
        h = (decay[:, t].exp() if log_decay else decay[:, t]) * h + update[:, t]
        outputs.append(h)
    if reverse:
        outputs.reverse()
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(update), h


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Mamba: h_t = exp(dt_t a) h_(t-1) + (dt_t x_t) b_t^T; y_t = h_t c_t.

    x, dt [B, T, D]; a [D, N]; b, c [B, T, N]; state [B, D, N]. Returns y [B, T, D] and the last state.
    """
    h = x.new_zeros(x.shape[0], *a.shape) if state is None else state
    outputs: list[Tensor] = []
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        h = (dt[:, t, :, None] * a).exp() * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None, :]
        outputs.append(torch.einsum("bdn,bn->bd", h, c[:, t]))
    if reverse:
        outputs.reverse()
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(x), h
