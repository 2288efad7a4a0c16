"""Functions of `mamba_ssm`: the selective scan of Mamba, the chunked one of Mamba-2, their step, and the gated norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikingbrain.compat.fla_modules import normalised
from spikingbrain.errors import UnsupportedOp
from spikingbrain.models import recurrences
from spikingbrain.models.recurrences.dtypes import wide


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """u, delta, z [batch, D, T]; A [D, N]; B, C [batch, N, T] or [batch, G, N, T].

    Returns [batch, D, T] and, if wanted, the state [batch, D, N].
    """
    if A.is_complex() or B.ndim < 3 or C.ndim < 3:
        raise UnsupportedOp("mamba_ssm's selective_scan_fn with complex A, or with B or C without time")
    dt = delta.to(wide(delta.dtype))
    dt = dt if delta_bias is None else dt + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    of_b, of_c = (x.unsqueeze(1) if x.ndim == 3 else x for x in (B, C))
    groups = max(of_b.shape[1], of_c.shape[1])
    parts = []
    for g in range(groups):  # channels of a group share B and C
        rows = slice(g * A.shape[0] // groups, (g + 1) * A.shape[0] // groups)
        b, c = (x[:, min(g, x.shape[1] - 1)].transpose(1, 2) for x in (of_b, of_c))
        parts.append(
            recurrences.mamba(
                u[:, rows].transpose(1, 2),
                dt[:, rows].transpose(1, 2),
                A[rows],
                b,
                c,
                None if D is None else D[rows],
                None,
                True,
            )
        )
    y = torch.cat([part[0] for part in parts], -1).transpose(1, 2)
    y = y if z is None else y * F.silu(z)
    y = y.to(u.dtype)
    return (y, torch.cat([part[1] for part in parts], 1)) if return_last_state else y  # type: ignore[misc]


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    """x, z [batch, T, H, P]; dt [batch, T, H]; A [H]; B, C [batch, T, G, N]; states [batch, H, P, N]."""
    if seq_idx is not None or cu_seqlens is not None or return_varlen_states:
        raise UnsupportedOp("mamba_ssm's mamba_chunk_scan_combined with seq_idx or cu_seqlens")
    dt = dt.to(wide(dt.dtype))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    dt = dt if dt_limit == (0.0, float("inf")) else dt.clamp(*dt_limit)
    state = None if initial_states is None else initial_states.mT
    y, last = recurrences.ssd(
        x, dt, A, B, C, D if D is None or D.ndim == 1 else None, state, return_final_states
    )
    y = y if D is None or D.ndim == 1 else y + D * x
    y = (y if z is None else y * F.silu(z)).to(x.dtype)
    return (y, None if last is None else last.mT) if return_final_states else y


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One step, which moves the state on in place.

    Mamba: state [batch, D, N]; x, dt, z [batch, D]; A [D, N]; B, C [batch, N]; D, dt_bias [D]. Mamba-2: state [batch, H, P, N];
    x, dt, z [batch, H, P]; A [H, P, N]; B, C [batch, G, N]; D, dt_bias [H, P].
    """
    dtype = wide(state.dtype)
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    if state.ndim == 4:
        B, C = (m.repeat_interleave(state.shape[1] // m.shape[1], 1).unsqueeze(2) for m in (B, C))
    else:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    new = state.to(dtype) * (dt.unsqueeze(-1) * A).exp() + (dt * x).unsqueeze(-1) * B
    state.copy_(new)
    y = (new * C).sum(-1)
    y = y if D is None else y + D * x
    return (y if z is None else y * F.silu(z)).to(x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """A norm of each group of the last dimension, gated by silu(z) behind it or in front of it."""
    groups = 1 if group_size is None else x.shape[-1] // group_size
    if z is not None and not norm_before_gate:
        x, z = (x.to(wide(x.dtype)) * F.silu(z.to(wide(z.dtype)))).to(x.dtype), None
    y: Tensor = normalised(x, weight, bias, eps, rms=True, groups=groups, gate=z)
    return y


class RMSNorm(nn.Module):
    """`mamba_ssm.ops.triton.layernorm_gated.RMSNorm`."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)
