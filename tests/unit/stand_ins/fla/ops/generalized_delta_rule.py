from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla.ops.naive import check


def fused_recurrent_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """S_t = exp(gk_t) S_(t-1) + b_t (a_t^T S_(t-1)) + k_t v_t^T."""
    check(q, k, v, initial_state)
    assert a.shape == b.shape == gk.shape == k.shape and gk.is_contiguous()
    s = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]).float()
    s = s if initial_state is None else initial_state
    o = []
    for t in range(q.shape[1]):
        predicted = (s * a[:, t].float().unsqueeze(-1)).sum(-2, keepdim=True)
        s = s * gk[:, t].float().exp().unsqueeze(-1) + b[:, t].float().unsqueeze(-1) * predicted
        s = s + k[:, t].float().unsqueeze(-1) * v[:, t].float().unsqueeze(-2)
        o.append((s * q[:, t].float().unsqueeze(-1)).sum(-2) * scale)
    return torch.stack(o, 1).to(q.dtype), s if output_final_state else None
