"""Short causal convolutions, one filter for each channel: fla's `ShortConvolution` and the functions of `causal_conv1d`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikingbrain.compat.packed import apart, lengths_of, longest_of, together
from spikingbrain.errors import UnsupportedOp


def _activated(x: Tensor, activation: str | None) -> Tensor:
    if activation not in (None, "silu", "swish"):
        raise UnsupportedOp(f"a causal convolution with activation {activation!r}", hint="silu, or None")
    return x if activation is None else F.silu(x)


def _filtered(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [B, D, W - 1 + T], weight [D, W]; returns [B, D, T]."""
    return F.conv1d(x, weight.unsqueeze(1), bias, groups=weight.shape[0])


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """`causal_conv1d.causal_conv1d_fn`: x [B, D, T], weight [D, W], states [B, D, W - 1].

    A tap in another text, by ``seq_idx`` [B, T], is left out.
    """
    width, dtype = weight.shape[1], x.dtype
    x = x.to(weight.dtype)
    before = F.pad(x, (width - 1, 0)) if initial_states is None else torch.cat((initial_states.to(x), x), -1)
    if seq_idx is None:
        y = _filtered(before, weight, bias)
    else:
        texts = F.pad(seq_idx, (width - 1, 0), value=-1)
        steps = x.shape[-1]
        y = torch.zeros_like(x) if bias is None else bias[:, None].expand_as(x)
        for tap in range(width):
            same = texts[:, tap : tap + steps] == seq_idx
            y = y + before[..., tap : tap + steps].where(same[:, None], 0.0) * weight[:, tap, None]
    y = _activated(y, activation).to(dtype)
    if not return_final_states:
        return y
    last = before[..., before.shape[-1] - (width - 1) :].to(dtype)
    return y, last if final_states_out is None else final_states_out.copy_(last)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d.causal_conv1d_update`: x [B, D] or [B, D, T]; moves conv_state [B, D, at least W - 1] on in place."""
    if cache_seqlens is not None or conv_state_indices is not None:
        raise UnsupportedOp("causal_conv1d_update with cache_seqlens or conv_state_indices")
    new = x.unsqueeze(-1) if x.ndim == 2 else x
    both = torch.cat((conv_state.to(new.dtype), new), -1)
    conv_state.copy_(both[..., new.shape[-1] :])
    seen = both[..., both.shape[-1] - (weight.shape[1] - 1 + new.shape[-1]) :].to(weight.dtype)
    y = _activated(_filtered(seen, weight, bias), activation).to(x.dtype)
    return y.squeeze(-1) if x.ndim == 2 else y


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    backend: str | None = None,
    cu_seqlens: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """fla's: x [B, T, D], weight [D, W], states [N, D, W] with the last W inputs of each text."""
    texts, width = x, weight.shape[-1]
    if cu_seqlens is not None:
        texts = apart(x.squeeze(0), cu_seqlens, longest_of(cu_seqlens))
    texts = texts.transpose(1, 2)
    if initial_state is None:
        seen = F.pad(texts, (width, 0))
    else:
        seen = torch.cat((initial_state.to(texts.dtype), texts), -1)
    y = _activated(_filtered(seen[..., 1:], weight.view(-1, width), bias), activation).transpose(1, 2)
    if cu_seqlens is not None:
        y = together(y, cu_seqlens, x.shape[1]).unsqueeze(0)
    y = y if residual is None else y + residual
    if not output_final_state:
        return y, None
    if cu_seqlens is None:
        return y, seen[..., texts.shape[-1] :]
    last = lengths_of(cu_seqlens)[:, None] + torch.arange(width, device=x.device)
    return y, seen.gather(2, last[:, None].expand(-1, seen.shape[1], -1))


class ShortConvolution(nn.Conv1d):
    """fla's layer: one filter of ``kernel_size`` taps for each channel, looking back, then silu.

    Returns the outputs [B, T, D] and the state [N, D, W], or None unless asked for. Without gradients, one token for each text
    moves ``cache`` on in place, as the kernel does.
    """

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        bias: bool = False,
        activation: str | None = "silu",
        backend: str | None = "triton",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **rest: Any,
    ):
        super().__init__(
            hidden_size,
            hidden_size,
            kernel_size,
            groups=hidden_size,
            bias=bias,
            padding=kernel_size - 1,
            device=device,
            dtype=dtype,
        )
        self.hidden_size, self.activation = hidden_size, activation

    @property
    def state_size(self) -> int:
        return self.hidden_size * self.kernel_size[0]

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        x = x if mask is None else x * mask.unsqueeze(-1)
        y, last = causal_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            residual,
            cache,
            output_final_state or cache is not None,
            self.activation,
            None,
            cu_seqlens,
        )
        texts = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if cache is not None and x.shape[0] * x.shape[1] == texts and not torch.is_grad_enabled():
            last = cache.copy_(last)  # type: ignore[arg-type]
        return y, last if output_final_state else None


def can_fuse_qkv_short_conv(*convolutions: nn.Module) -> bool:
    """False: three convolutions are three here."""
    return False


def fused_qkv_short_conv(
    q: Tensor, k: Tensor, v: Tensor, of_q: ShortConvolution, of_k: ShortConvolution, of_v: ShortConvolution
) -> tuple[Tensor, Tensor, Tensor]:
    return of_q(q)[0], of_k(k)[0], of_v(v)[0]
