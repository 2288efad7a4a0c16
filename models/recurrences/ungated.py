"""Linear attention without a gate."""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain.models.recurrences.attend import attend

# Added to the normaliser, as published code does.
_EPSILON = 1e-10


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """S_t = S_(t-1) + k_t v_t^T, o_t = scale S_t^T q_t.

    q [B, T, H, K]; k [B, T, S, K]; v [B, T, S, V]; head h reads state h // (H / S). Returns o [B, T, H, V] and, if wanted,
    the state [B, S, K, V]. ``scale`` defaults to K ** -0.5.
    """
    return attend(
        q,
        k,
        v,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
    )


def normalised_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The same, divided by what a value of all ones would give: o_t = S_t^T q_t / (z_t . q_t), z_t = z_(t-1) + k_t.

    The state is the pair S [B, S, K, V], z [B, S, K]. Both are one recurrence: z is the column of S for that value.
    """
    ones = torch.ones_like(v[..., :1])
    state = (
        None if initial_state is None else torch.cat((initial_state[0], initial_state[1].unsqueeze(-1)), -1)
    )
    both, last = attend(
        q,
        k,
        torch.cat((v, ones), -1),
        scale=scale,
        initial_state=state,
        output_final_state=output_final_state,
        reverse=reverse,
    )
    o = both[..., :-1] / (both[..., -1:] + _EPSILON)
    return o, None if last is None else (last[..., :-1], last[..., -1])
