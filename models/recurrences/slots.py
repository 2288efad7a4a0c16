"""Attention over a fixed number of slots: two linear recurrences with a softmax between them."""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain.models.recurrences.attend import attend
from spikingbrain.models.recurrences.dtypes import wide

States = tuple[Tensor, Tensor]


def gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: States | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, States | None]:
    """Gated slot attention. Slots hold keys and values, and forget by the gates g:

        P_t = P_(t-1) Diag(exp g_t) + k_t s_t^T,    a_t = softmax(scale P_t^T q_t)
        R_t = Diag(exp g_t) R_(t-1) + s_t v_t^T,    o_t = R_t^T a_t

    q [B, T, H, K]; k [B, T, S, K]; v [B, T, S, V]; s, g [B, T, S, M]. Returns o [B, T, H, V] and, if wanted, P [B, S, K, M] and
    R [B, S, M, V]. ``scale`` defaults to K ** -0.5.
    """
    keys, values = (None, None) if initial_state is None else initial_state
    score, keys = attend(
        q, k, s, g, "value", scale=scale, initial_state=keys, output_final_state=output_final_state
    )
    weight = score.softmax(-1, dtype=wide(score.dtype)).to(score.dtype)
    o, values = attend(
        weight, s, v, g, "key", scale=1.0, initial_state=values, output_final_state=output_final_state
    )
    return o, None if keys is None or values is None else (keys, values)


def abc(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Attention with bounded memory: slot m holds the mean of all keys (values) so far, weighted by exp(s_t[m]).

    That is `gsa` with the gates that turn a weighted sum into the mean: with z_t = log sum_(i <= t) exp s_i, the gate is
    z_(t-1) - z_t and the weight exp(s_t - z_t). Shapes as there; returns o [B, T, H, V].
    """
    s = s.to(wide(s.dtype))
    z = s.logcumsumexp(1)
    g = torch.cat((z[:, :1], z[:, :-1]), 1) - z
    return gsa(q, k, v, (s - z).exp(), g, scale)[0]
