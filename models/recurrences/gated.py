"""Linear attention whose state fades: by a gate for each key channel, for each head, or by a constant.

Each function takes queries [B, T, H, K], keys [B, T, S, K] and values [B, T, S, V], where H is a multiple of S and head h
reads state h // (H / S), and returns the outputs [B, T, H, V] and, if ``output_final_state``, the state [B, S, K, V] after
the last step, in float32. Gates are logarithms, down to -inf, which forgets all. ``scale`` defaults to K ** -0.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain.models.recurrences.attend import attend
from spikingbrain.models.recurrences.dtypes import wide


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention: S_t = Diag(exp g_t) S_(t-1) + k_t v_t^T, o_t = scale S_t^T q_t; g [B, T, S, K]."""
    return attend(
        q,
        k,
        v,
        g,
        "key",
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
    )


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One gate for each head: S_t = exp(g_t) S_(t-1) + k_t v_t^T, o_t = scale S_t^T q_t; g [B, T, S]."""
    return attend(
        q,
        k,
        v,
        g,
        "head",
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
    )


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """RetNet: `simple_gla` with the constant factor 1 - 2^(-5 - s) for state s."""
    states = torch.arange(k.shape[2], device=k.device, dtype=wide(k.dtype))
    return _constant(
        q, k, v, torch.log1p(-torch.exp2(-5 - states)), scale, initial_state, output_final_state, reverse
    )


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Lightning attention: `simple_gla` with the constant gate -(8 / S) (1 - layer / layers) s for state s."""
    states = torch.arange(k.shape[2], device=k.device, dtype=wide(k.dtype))
    g = states * (-8 / max(k.shape[2], 1) * (1 - layer / layers))
    return _constant(q, k, v, g, scale, initial_state, output_final_state, reverse)


def _constant(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor | None]:
    g = g.to(k.dtype) if k.dtype == torch.float64 else g
    return simple_gla(q, k, v, g.expand(k.shape[:3]), scale, initial_state, output_final_state, reverse)


def ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2: S_t = exp(dt_t a) S_(t-1) + b_t (dt_t x_t)^T, y_t = S_t^T c_t + d x_t.

    x [B, T, H, V]; dt [B, T, H]; a, d [H], a negative; b, c [B, T, G, K], shared by H / G heads each. Returns y [B, T, H, V]
    and, if wanted, the state [B, H, K, V].
    """
    shared = x.shape[2] // b.shape[2]
    b, c = (t.repeat_interleave(shared, 2) if shared > 1 else t for t in (b, c))
    y, last = attend(
        c,
        b,
        x * dt.unsqueeze(-1),
        dt * a,
        "head",
        scale=1.0,
        initial_state=initial_state,
        output_final_state=output_final_state,
    )
    y = y if d is None else y + x * d.unsqueeze(-1)
    return y.to(x.dtype), last


def rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """RWKV-6, which reads before it writes: o_t = scale (S_(t-1) + Diag(u) k_t v_t^T)^T r_t, S_t as in `gla` with gate w.

    r, k, w [B, T, H, K]; v [B, T, H, V]; u [H, K].
    """
    return attend(
        r,
        k,
        v,
        w,
        "key",
        bonus=u,
        exclusive=True,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
    )
