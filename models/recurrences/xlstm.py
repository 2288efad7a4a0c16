"""The matrix LSTM of xLSTM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spikingbrain.models.recurrences.attend import attend
from spikingbrain.models.recurrences.dtypes import wide

# Takes the place of -inf in the stabiliser, so that differences of two such are numbers.
_LOWEST = -1e30

States = tuple[Tensor, Tensor, Tensor]


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    scale: float | None = None,
    initial_state: States | None = None,
    output_final_state: bool = False,
    epsilon: float = 1e-6,
) -> tuple[Tensor, States | None]:
    """Matrix LSTM with exponential input gate, kept in range by the running maximum m:

        m_t = max(f_t + m_(t-1), i_t)
        C_t = exp(f_t + m_(t-1) - m_t) C_(t-1) + exp(i_t - m_t) k_t v_t^T,   n_t likewise with 1 for v_t
        o_t = C_t^T q_t / (max(|n_t . q_t|, exp(-m_t)) + epsilon),           q_t scaled by K ** -0.5

    q, k [B, T, H, K]; v [B, T, H, V]; i, f [B, T, H], the input gate before its exponential and the *logarithm* of the
    forget gate (logsigmoid of its activation). State: C [B, H, K, V], n [B, H, K], m [B, H].
    """
    dtype = wide(i.dtype)
    i, f = i.to(dtype), f.to(dtype)
    before = i.new_zeros(i.shape[0], i.shape[2]) if initial_state is None else initial_state[2].to(dtype)
    m = _running_maximum(i, f, before)
    g = f + torch.cat((before.unsqueeze(1), m[:, :-1]), 1) - m if m.shape[1] else f
    write = (i - m).exp().unsqueeze(-1)
    state = (
        None if initial_state is None else torch.cat((initial_state[0], initial_state[1].unsqueeze(-1)), -1)
    )
    value = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    both, last = attend(
        q,
        write * k,
        value.to(dtype),
        g,
        "head",
        scale=scale,
        initial_state=state,
        output_final_state=output_final_state,
    )
    floor = (-m).exp().unsqueeze(-1)
    o = both[..., :-1] / (torch.maximum(both[..., -1:].abs(), floor) + epsilon)
    if last is None:
        return o.to(v.dtype), None
    return o.to(v.dtype), (last[..., :-1], last[..., -1], m[:, -1] if m.shape[1] else before)


def _running_maximum(i: Tensor, f: Tensor, before: Tensor) -> Tensor:
    """Returns m [B, T, H] of m_t = max(f_t + m_(t-1), i_t), in log2(T) operations: only sums, so -inf is a number."""
    total, m, step = f, i, 1
    while step < f.shape[1]:
        earlier = F.pad(m, (0, 0, step, 0), value=-torch.inf)[:, :-step]
        m = torch.maximum(m, total + earlier)
        total = total + F.pad(total, (0, 0, step, 0))[:, :-step]
        step *= 2
    return torch.maximum(m, total + before.unsqueeze(1)).clamp(min=_LOWEST)
