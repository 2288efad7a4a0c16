"""The delta rule: before a value is written, what its key recalls is erased.

Shapes, states and scale as in `gated`; beta [B, T, S] says how much is erased and written.
"""

from __future__ import annotations

from torch import Tensor

from spikingbrain.models.recurrences.attend import attend


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """DeltaNet: S_t = S_(t-1) + beta_t k_t (v_t - S_(t-1)^T k_t)^T, o_t = scale S_t^T q_t."""
    write = beta.unsqueeze(-1) * k
    return attend(
        q,
        write,
        v,
        erase=-write,
        predict=k,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
    )


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet: S' = exp(g_t) S_(t-1), S_t = S' + beta_t k_t (v_t - S'^T k_t)^T; g [B, T, S]."""
    write = beta.unsqueeze(-1) * k
    return attend(
        q,
        write,
        v,
        g,
        "head",
        erase=-write,
        predict=g.exp().unsqueeze(-1) * k,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
    )


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Kimi delta attention: S' = Diag(exp g_t) S_(t-1), S_t = S' + beta_t k_t (v_t - S'^T k_t)^T; g [B, T, S, K]."""
    write = beta.unsqueeze(-1) * k
    return attend(
        q,
        write,
        v,
        g,
        "key",
        erase=-write,
        predict=g.exp() * k,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
    )
