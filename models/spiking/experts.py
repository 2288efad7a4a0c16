"""Linear layers of experts with integer weights, on spikes: each row through the one that it is sent to.

R  rows    N  experts    C  inputs    O  outputs    G  groups of inputs that share a scale
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikingbrain.models.spiking.linear import exact_dtype, spike_linear
from spikingbrain.models.spiking.quantise import dequantise_weight, quantise_weight
from spikingbrain.models.spiking.silent import share
from spikingbrain.models.spiking.threshold import LOWER, UPPER, K, spike_counts
from spikingbrain.models.spikingbrain.experts import ExpertLinear, rows_by_expert


class SpikeExpertLinear(nn.Module):
    """``ExpertLinear`` whose input fires by an adaptive threshold and whose weights are integers, exact as `SpikeLinear` is.

    It serves inference: the weights are no parameters.

    Attributes:
        codes: int8 [N, O, C].
        scale: float32 [N, O, G].
        channel_scale: what each channel of all experts is multiplied by before it fires, [C], or None.
        k: the firing constant: a channel of the mean size fires k times.
        silent: the share of counts that are 0, as far as it is known, as that of `SpikeLinear`.
    """

    codes: Tensor
    scale: Tensor
    channel_scale: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        k: float = K,
        lower: float = LOWER,
        upper: float = UPPER,
        channel_scale: Tensor | None = None,
    ):
        super().__init__()
        self.silent: float | None = None
        self.k, self.lower, self.upper = k, lower, upper
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("channel_scale", channel_scale)

    @classmethod
    def of(
        cls,
        experts: ExpertLinear,
        k: float = K,
        group_size: int | None = None,
        bits: int = 8,
        channel_scale: Tensor | None = None,
        rounded: tuple[Tensor, Tensor] | None = None,
    ) -> SpikeExpertLinear:
        """Returns the spiking form of linear layers of experts.

        Their weights, divided by ``channel_scale``, are rounded to nearest; or ``rounded`` are the codes and scales to take.
        Raises SpikingError as `quantise_weight` does.
        """
        if rounded is None:
            weight = experts.weight.detach()
            stack = weight.shape[:2]
            weight = weight if channel_scale is None else weight / channel_scale
            codes, scale = quantise_weight(weight.flatten(0, 1), group_size, bits)
            rounded = torch.unflatten(codes, 0, stack), torch.unflatten(scale, 0, stack)
        return cls(*rounded, k, channel_scale=channel_scale)

    def weight(self) -> Tensor:
        """Returns the float weights [N, O, C] that the layer stands for."""
        weight = dequantise_weight(self.codes, self.scale)
        return weight if self.channel_scale is None else weight * self.channel_scale

    def counts(self, x_RC: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what x [R, C] fires: counts [R, C], integers in a floating dtype, and the threshold V [R, 1]."""
        scaled_RC = x_RC if self.channel_scale is None else x_RC * self.channel_scale
        return spike_counts(scaled_RC, self.k, self.lower, self.upper)

    def forward(self, x_RC: Tensor, expert_R: Tensor) -> Tensor:
        """x [R, C], expert [R] int64, 0 to N - 1 -> [R, O]. Raises IndexError for an expert that there is not."""
        scaled_RC = x_RC if self.channel_scale is None else x_RC * self.channel_scale
        y_RO = adaptive_spike_experts(
            scaled_RC,
            self.codes,
            self.scale,
            expert_R,
            self.k,
            self.lower,
            self.upper,
            silent=share(self.silent),
        )
        return y_RO.to(x_RC.dtype)

    def extra_repr(self) -> str:
        (experts, outputs, inputs), groups = self.codes.shape, self.scale.shape[2]
        return f"experts={experts}, {inputs}, {outputs}, group_size={inputs // groups}, k={self.k:g}"


def adaptive_spike_experts(
    x_RC: Tensor,
    codes_NOC: Tensor,
    scale_NOG: Tensor,
    expert_R: Tensor,
    k: float = K,
    lower: float = LOWER,
    upper: float = UPPER,
    silent: float = 0.0,
) -> Tensor:
    """Returns V (sum over groups of scale * (sum of counts * codes)) of each row's expert: [R, O], float32 or wider.

    ``silent`` is the share of counts that are 0, for compilers; no result depends on it.
    """
    if torch.compiler.is_compiling() or not len(x_RC):
        return gathering_spike_experts(x_RC, codes_NOC, scale_NOG, expert_R, k, lower, upper)
    counts_RC, v_R1 = spike_counts(x_RC, k, lower, upper)
    dtype = exact_dtype(codes_NOC.shape[2], k, codes_NOC.dtype)
    order, lengths = rows_by_expert(expert_R, len(codes_NOC))
    groups_of_rows = zip(*(torch.split(t[order], lengths) for t in (counts_RC, v_R1)), strict=True)
    y_RO = [
        spike_linear(counts, v, codes_NOC[e], scale_NOG[e], None, dtype)
        for e, (counts, v) in enumerate(groups_of_rows)
        if len(counts)
    ]
    return torch.cat(y_RO)[order.argsort()]


def gathering_spike_experts(
    x_RC: Tensor,
    codes_NOC: Tensor,
    scale_NOG: Tensor,
    expert_R: Tensor,
    k: float,
    lower: float,
    upper: float,
) -> Tensor:
    """Returns the same from weights gathered for each row, which needs no sizes that depend on the data."""
    counts_RC, v_R1 = spike_counts(x_RC, k, lower, upper)
    dtype = exact_dtype(codes_NOC.shape[2], k, codes_NOC.dtype)
    groups = scale_NOG.shape[2]
    c = torch.unflatten(counts_RC.to(dtype), 1, (groups, -1))
    w = torch.unflatten(codes_NOC[expert_R].to(dtype), 2, (groups, -1))
    sums_ROG = torch.einsum("rgc,rogc->rog", c, w).to(counts_RC.dtype)
    return (sums_ROG * scale_NOG[expert_R]).sum(-1) * v_R1
