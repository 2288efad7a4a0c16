"""Layers of `fla.modules` in plain PyTorch: norms, gated norms, rotary embedding, MLP, losses.

Parameters have fla's names and shapes, so that its checkpoints load. Norms compute in float32, like the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikingbrain.compat.fla_activations import swiglu
from spikingbrain.compat.packed import positions_of
from spikingbrain.compat.rotary import rotated
from spikingbrain.errors import UnsupportedOp
from spikingbrain.models.recurrences.dtypes import wide


def normalised(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    rms: bool,
    groups: int = 1,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    gate: Tensor | None = None,
    activation: str = "swish",
) -> Any:
    """Returns the norm of ``x + residual`` over the last dimension, or over each of its groups, times the activated gate.

    With ``prenorm`` it returns the sum, too.
    """
    dtype, total = x.dtype, x.to(wide(x.dtype))
    if residual is not None:
        total = total + residual.to(total.dtype)
    y = total.reshape(*total.shape[:-1], groups, -1)
    if not rms:
        y = y - y.mean(-1, keepdim=True)
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    if gate is not None:
        opened = gate.to(y.dtype)
        y = y * (opened.sigmoid() if activation == "sigmoid" else F.silu(opened))
    y = y.to(dtype)
    return (y, total if residual_in_fp32 else total.to(dtype)) if prenorm else y


class _Norm(nn.Module):
    rms = True

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.hidden_size, self.elementwise_affine, self.eps = hidden_size, elementwise_affine, eps
        like = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(hidden_size, **like)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(hidden_size, **like)) if elementwise_affine and bias else None

    def reset_parameters(self) -> None:
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        return normalised(
            x,
            self.weight,
            self.bias,
            self.eps,
            rms=self.rms,
            residual=residual,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


class RMSNorm(_Norm):
    """x / rms(x) * weight over the last dimension."""


class LayerNorm(_Norm):
    """(x - mean) / std * weight + bias over the last dimension."""

    rms = False


class GroupNorm(_Norm):
    """A norm of each of ``num_groups`` groups of the last dimension."""

    def __init__(
        self,
        num_groups: int,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        is_rms_norm: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, elementwise_affine, bias, eps, device, dtype)
        self.num_groups, self.rms = num_groups, is_rms_norm

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        return normalised(
            x,
            self.weight,
            self.bias,
            self.eps,
            rms=self.rms,
            groups=self.num_groups,
            residual=residual,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


class _GatedNorm(_Norm):
    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        activation: str = "swish",
        device: Any = None,
        dtype: torch.dtype | None = None,
        bias: bool = False,
    ):
        super().__init__(hidden_size, elementwise_affine, bias, eps, device, dtype)
        if activation not in ("swish", "silu", "sigmoid"):
            raise UnsupportedOp(f"a gated norm with activation {activation!r}", hint="swish, silu or sigmoid")
        self.activation = activation

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        g: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        return normalised(
            x,
            self.weight,
            self.bias,
            self.eps,
            rms=self.rms,
            residual=residual,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            gate=g,
            activation=self.activation,
        )


class FusedRMSNormGated(_GatedNorm):
    """RMSNorm(x) times the activation of g, swish by default."""


class FusedLayerNormGated(_GatedNorm):
    """LayerNorm(x) times the activation of g, swish by default."""

    rms = False

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        activation: str = "swish",
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, elementwise_affine, eps, activation, device, dtype, bias)


class FusedRMSNormSwishGate(_GatedNorm):
    """The older name of FusedRMSNormGated with swish."""

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, elementwise_affine, eps, "swish", device, dtype)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:
    return normalised(
        x,
        weight,
        bias,
        eps,
        rms=True,
        residual=residual,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
    )


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:
    return normalised(
        x,
        weight,
        bias,
        eps,
        rms=False,
        residual=residual,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
    )


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension."""
    high = x.to(wide(x.dtype))
    return (high * torch.rsqrt(high.square().sum(-1, keepdim=True) + eps)).to(output_dtype or x.dtype)


class L2Norm(nn.Module):
    def __init__(self, eps: float = 1e-6, output_dtype: torch.dtype | None = None):
        super().__init__()
        self.eps, self.output_dtype = eps, output_dtype

    def forward(self, x: Tensor) -> Tensor:
        return l2norm(x, self.eps, self.output_dtype)


class RotaryEmbedding(nn.Module):
    """Rotates the first ``dim`` channels of queries and keys [B, T, H, D] by angles position * base^(-2i / dim)."""

    inv_freq: Tensor

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        scale_base: float | None = None,
        interleaved: bool = False,
        pos_idx_in_fp32: bool = True,
        device: Any = None,
    ):
        super().__init__()
        if scale_base is not None:
            raise UnsupportedOp("fla's RotaryEmbedding with scale_base", hint="scale_base=None")
        self.dim, self.base, self.interleaved = dim, float(base), interleaved
        exponents = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
        self.register_buffer("inv_freq", self.base**-exponents, persistent=False)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        seqlen_offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Position t of row b is t + seqlen_offset[b]; packed texts each begin at 0. ``max_seqlen`` is not needed."""
        if cu_seqlens is None:
            position = torch.arange(q.shape[1], device=q.device)[None]
            shift = seqlen_offset[:, None] if isinstance(seqlen_offset, Tensor) else seqlen_offset
        else:
            text, place = positions_of(cu_seqlens, q.shape[1])
            position = place[None]
            shift = seqlen_offset[text] if isinstance(seqlen_offset, Tensor) else seqlen_offset
        angles = (position + shift)[:, :, None, None].float() * self.inv_freq.float()
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
        return rotated(q, cos, sin, self.interleaved), rotated(k, cos, sin, self.interleaved)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Its width is 2/3 hidden_ratio hidden_size, up to the next multiple of 256."""

    def __init__(
        self,
        hidden_size: int,
        hidden_ratio: int | None = None,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        fuse_swiglu: bool = True,
    ):
        super().__init__()
        if hidden_act not in ("swish", "silu"):
            raise UnsupportedOp(f"fla's GatedMLP with hidden_act {hidden_act!r}", hint="swish")
        if intermediate_size is None:
            size = int(hidden_size * (hidden_ratio or 4) * 2 / 3)
            intermediate_size = -(-size // 256) * 256
        self.hidden_size, self.intermediate_size, self.hidden_act = hidden_size, intermediate_size, hidden_act
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor, **rest: Any) -> Tensor:
        y: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return y


class TokenShift(nn.Module):
    """x_(t-1) - x_t, zeros before the first token."""

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return token_shift(x, cu_seqlens)


def token_shift(x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Returns x_(t-1) - x_t of x [B, T, D], zeros before the first token of each text."""
    before = F.pad(x[:, :-1], (0, 0, 1, 0))
    if cu_seqlens is not None:
        before = before.masked_fill((positions_of(cu_seqlens, x.shape[1])[1] == 0)[None, :, None], 0)
    return before - x


class FusedCrossEntropyLoss(nn.Module):
    """Cross entropy of logits [..., C] and targets [...], in float32."""

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ):
        super().__init__()
        if lse_square_scale or process_group is not None or return_z_loss:
            raise UnsupportedOp(
                "fla's FusedCrossEntropyLoss with lse_square_scale, process_group or return_z_loss"
            )
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.logit_scale = label_smoothing, logit_scale

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        logits = input.reshape(-1, input.shape[-1]).to(wide(input.dtype)) * self.logit_scale
        return F.cross_entropy(
            logits,
            target.reshape(-1),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class FusedLinearCrossEntropyLoss(FusedCrossEntropyLoss):
    """The same of ``x weight^T + bias``; the logits are made whole."""

    def __init__(
        self,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        num_chunks: int = 8,
        reduction: str = "mean",
        **rest: Any,
    ):
        if any(rest.values()):
            raise UnsupportedOp(f"fla's FusedLinearCrossEntropyLoss with {', '.join(rest)}")
        super().__init__(ignore_index, reduction, label_smoothing, logit_scale)

    def forward(  # type: ignore[override]
        self, x: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return super().forward(F.linear(x, weight, bias), target)
