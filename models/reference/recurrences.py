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


# ---- The papers' equations. Queries are scaled by K ** -0.5 where the papers do; heads and states are as many.


def _steps(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    """Returns the tensors of each step."""
    return zip(*(x.unbind(1) for x in tensors), strict=True)


def _stacked(outputs: list[Tensor], empty: Tensor) -> Tensor:
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(empty)


def _outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def _read(S: Tensor, q: Tensor) -> Tensor:
    return (S * q[..., None]).sum(-2)


def _zeros(k: Tensor, v: Tensor) -> Tensor:
    return k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3])


def linear_attention(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S_t = S_(t-1) + k_t v_t^T; o_t = S_t^T q_t. q, k [B, T, H, K]; v [B, T, H, V]; state [B, H, K, V]."""
    S, outputs = _zeros(k, v) if state is None else state, []
    for q_t, k_t, v_t in _steps(q * q.shape[-1] ** -0.5, k, v):
        S = S + _outer(k_t, v_t)
        outputs.append(_read(S, q_t))
    return _stacked(outputs, v), S


def normalised_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """o_t = S_t^T q_t / (z_t . q_t), S_t = S_(t-1) + k_t v_t^T, z_t = z_(t-1) + k_t. z [B, H, K]."""
    S, z = (_zeros(k, v), k.new_zeros(k.shape[0], *k.shape[2:])) if state is None else state
    outputs = []
    for q_t, k_t, v_t in _steps(q * q.shape[-1] ** -0.5, k, v):
        S, z = S + _outer(k_t, v_t), z + k_t
        outputs.append(_read(S, q_t) / ((z * q_t).sum(-1, keepdim=True) + 1e-10))
    return _stacked(outputs, v), (S, z)


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gated linear attention: S_t = Diag(exp g_t) S_(t-1) + k_t v_t^T; o_t = S_t^T q_t. g [B, T, H, K]."""
    S, outputs = _zeros(k, v) if state is None else state, []
    for q_t, k_t, v_t, g_t in _steps(q * q.shape[-1] ** -0.5, k, v, g):
        S = g_t.exp()[..., None] * S + _outer(k_t, v_t)
        outputs.append(_read(S, q_t))
    return _stacked(outputs, v), S


def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One gate for each head: S_t = exp(g_t) S_(t-1) + k_t v_t^T; o_t = S_t^T q_t. g [B, T, H]."""
    S, outputs = _zeros(k, v) if state is None else state, []
    for q_t, k_t, v_t, g_t in _steps(q * q.shape[-1] ** -0.5, k, v, g):
        S = g_t.exp()[..., None, None] * S + _outer(k_t, v_t)
        outputs.append(_read(S, q_t))
    return _stacked(outputs, v), S


def retention(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RetNet: S_t = gamma S_(t-1) + k_t v_t^T; o_t = S_t^T q_t, gamma = 1 - 2^(-5 - h) for head h."""
    gamma = 1 - 2.0 ** (-5 - torch.arange(k.shape[2], dtype=k.dtype, device=k.device))
    S, outputs = _zeros(k, v) if state is None else state, []
    for q_t, k_t, v_t in _steps(q * q.shape[-1] ** -0.5, k, v):
        S = gamma[:, None, None] * S + _outer(k_t, v_t)
        outputs.append(_read(S, q_t))
    return _stacked(outputs, v), S


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, layer: int, layers: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Lightning attention: S_t = lambda S_(t-1) + k_t v_t^T, lambda = exp(-8 h / H (1 - layer / layers)) for head h of H."""
    heads = k.shape[2]
    slope = 8 * torch.arange(heads, dtype=k.dtype, device=k.device) / heads * (1 - layer / layers)
    S, outputs = _zeros(k, v) if state is None else state, []
    for q_t, k_t, v_t in _steps(q * q.shape[-1] ** -0.5, k, v):
        S = (-slope).exp()[:, None, None] * S + _outer(k_t, v_t)
        outputs.append(_read(S, q_t))
    return _stacked(outputs, v), S


def ssd(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mamba-2: S_t = exp(dt_t a) S_(t-1) + dt_t b_t x_t^T; y_t = S_t^T c_t + d x_t.

    x [B, T, H, V]; dt [B, T, H]; a, d [H]; b, c [B, T, G, K], each shared by H / G neighbouring heads; state [B, H, K, V].
    """
    group = torch.arange(x.shape[2], device=x.device) // (x.shape[2] // b.shape[2])
    S = x.new_zeros(x.shape[0], x.shape[2], b.shape[3], x.shape[3]) if state is None else state
    outputs = []
    for x_t, dt_t, b_t, c_t in _steps(x, dt, b, c):
        S = (dt_t * a).exp()[..., None, None] * S + _outer(dt_t[..., None] * b_t[:, group], x_t)
        outputs.append(_read(S, c_t[:, group]) + d[:, None] * x_t)
    return _stacked(outputs, x), S


def rwkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RWKV-6: o_t = (S_(t-1) + Diag(u) k_t v_t^T)^T r_t; S_t = Diag(exp w_t) S_(t-1) + k_t v_t^T. u [H, K]."""
    S, outputs = _zeros(k, v) if state is None else state, []
    for r_t, k_t, v_t, w_t in _steps(r * r.shape[-1] ** -0.5, k, v, w):
        outputs.append(_read(S + _outer(u * k_t, v_t), r_t))
        S = w_t.exp()[..., None] * S + _outer(k_t, v_t)
    return _stacked(outputs, v), S


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """DeltaNet: S_t = S_(t-1) + beta_t k_t (v_t - S_(t-1)^T k_t)^T; o_t = S_t^T q_t. beta [B, T, H]."""
    S, outputs = _zeros(k, v) if state is None else state, []
    for q_t, k_t, v_t, beta_t in _steps(q * q.shape[-1] ** -0.5, k, v, beta):
        S = S + _outer(k_t, beta_t[..., None] * (v_t - _read(S, k_t)))
        outputs.append(_read(S, q_t))
    return _stacked(outputs, v), S


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet: the delta rule on the decayed state exp(g_t) S_(t-1). g, beta [B, T, H]."""
    return kda(q, k, v, g[..., None].expand(k.shape), beta, state)


def kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Kimi delta attention: the delta rule on the decayed state Diag(exp g_t) S_(t-1). g [B, T, H, K]; beta [B, T, H]."""
    S, outputs = _zeros(k, v) if state is None else state, []
    for q_t, k_t, v_t, g_t, beta_t in _steps(q * q.shape[-1] ** -0.5, k, v, g, beta):
        S = g_t.exp()[..., None] * S
        S = S + _outer(k_t, beta_t[..., None] * (v_t - _read(S, k_t)))
        outputs.append(_read(S, q_t))
    return _stacked(outputs, v), S


def gsa(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, state: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Gated slot attention: slots remember keys P [B, H, K, N] and values R [B, H, N, V]; s, g [B, T, H, N]."""
    P, R = (_zeros(k, s), _zeros(s, v)) if state is None else state
    outputs = []
    for q_t, k_t, v_t, s_t, g_t in _steps(q * q.shape[-1] ** -0.5, k, v, s, g):
        P = P * g_t.exp()[..., None, :] + _outer(k_t, s_t)
        R = R * g_t.exp()[..., None] + _outer(s_t, v_t)
        outputs.append(_read(R, _read(P, q_t).softmax(-1)))
    return _stacked(outputs, v), (P, R)


def abc(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """Attention with bounded memory: slots hold means of keys and values weighted by exp(s), s [B, T, H, N]."""
    weight = (s - s.amax(1, keepdim=True)).exp() if s.shape[1] else s
    P, R, z, outputs = _zeros(k, s), _zeros(s, v), s.new_zeros(s.shape[0], *s.shape[2:]), []
    for q_t, k_t, v_t, w_t in _steps(q * q.shape[-1] ** -0.5, k, v, weight):
        P, R, z = P + _outer(k_t, w_t), R + _outer(w_t, v_t), z + w_t
        outputs.append(_read(R / z[..., None], _read(P / z[..., None, :], q_t).softmax(-1)))
    return _stacked(outputs, v)


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Matrix LSTM with the stabiliser m; i [B, T, H] before its exponential, f [B, T, H] the log of the forget gate."""
    C, n, m = (
        (_zeros(k, v), k.new_zeros(k.shape[0], *k.shape[2:]), i.new_zeros(i.shape[0], i.shape[2]))
        if state is None
        else state
    )
    outputs = []
    for q_t, k_t, v_t, i_t, f_t in _steps(q * q.shape[-1] ** -0.5, k, v, i, f):
        old, m = m, torch.maximum(f_t + m, i_t)
        decay, write = (f_t + old - m).exp()[..., None], (i_t - m).exp()[..., None]
        C, n = decay[..., None] * C + _outer(write * k_t, v_t), decay * n + write * k_t
        divisor = torch.maximum((n * q_t).sum(-1).abs(), (-m).exp()) + 1e-6
        outputs.append(_read(C, q_t) / divisor[..., None])
    return _stacked(outputs, v), (C, n, m)


def hgrn(x: Tensor, g: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """HGRN: h_t = exp(g_t) h_(t-1) + x_t. x, g [B, T, D]; state [B, D]."""
    return linear_scan(g.exp(), x, state)


def rg_lru(
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    parameter: Tensor,
    reset: Tensor,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Griffin: h_t = a_t h_(t-1) + sqrt(1 - a_t^2) i_t x_t, a_t = exp(-8 softplus(parameter) r_t); at a reset h_t = i_t x_t.

    x and the gates [B, T, D]; parameter, state [B, D]; reset [B, T] of bools.
    """
    h, outputs = torch.zeros_like(x).sum(1) if state is None else state, []
    for x_t, i_t, r_t, reset_t in _steps(x, input_gate, recurrence_gate, reset):
        a = (-8 * torch.nn.functional.softplus(parameter) * r_t).exp()
        h = torch.where(reset_t[:, None], i_t * x_t, a * h + (1 - a * a).sqrt() * i_t * x_t)
        outputs.append(h)
    return _stacked(outputs, x), h


def mamba(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The selective scan and the skip: y_t = h_t c_t + d x_t. d [D]."""
    y, h = selective_scan(x, dt, a, b, c, state)
    return y + d * x, h


def lif(
    x: Tensor, decay: float, threshold: float, reset: str, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Leaky integrate-and-fire: v_t = decay v_(t-1) + x_t; s_t = [v_t >= threshold]; then the reset. x [B, T, D]."""
    v, outputs = torch.zeros_like(x).sum(1) if state is None else state, []
    for (x_t,) in _steps(x):
        v = decay * v + x_t
        s = (v >= threshold).to(x.dtype)
        v = {"none": v, "soft": v - threshold * s, "hard": v * (1 - s)}[reset]
        outputs.append(s)
    return _stacked(outputs, x), v
