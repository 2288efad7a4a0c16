"""A linear layer of integer weights on spikes: y = V sum_c W_c s_c + bias, only additions of weights in hardware."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikingbrain.models.spiking.codings import Budget, held_range
from spikingbrain.models.spiking.quantise import (
    check_group_size,
    dequantise_weight,
    quantise_weight,
    weight_codes,
    weight_scale,
)
from spikingbrain.models.spiking.silent import telling
from spikingbrain.models.spiking.threshold import LOWER, UPPER, K, counts_at, spike_counts, spiking


class SpikeLinear(nn.Module):
    """``nn.Linear`` whose input fires by an adaptive threshold and whose weights are integers.

    Products of counts and weight codes are summed exactly, for each group of inputs that share a scale; floats come in only
    when a sum is multiplied by its scale and the token's threshold. (A token whose threshold was clamped to ``upper`` has
    counts of any size; its sums are rounded as floats are.) It serves inference: the weights are no parameters. To train,
    use `SpikeLinearTraining`, which holds float weights.

    Attributes:
        codes: int8 (int16 where a scale was given that needs it) [N, C].
        scale: float32 [N, G], G groups of C / G inputs.
        bias: [N] or None.
        channel_scale: what each channel is multiplied by before it fires, [C], or None; the weights are divided by it.
        k: the firing constant: a channel of the mean size fires k times.
        static_threshold: the threshold of every token, [1], or None: each token has its own.
        budget: the virtual steps that there are; only one that drops the remainder changes the result.
        silent: the share of counts that are 0, 0 to 1, as far as it is known (`measure_silence`). Compilers may then read
            the weights of those channels alone that fire; the result is the same.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    channel_scale: Tensor | None
    static_threshold: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        k: float = K,
        lower: float = LOWER,
        upper: float = UPPER,
        channel_scale: Tensor | None = None,
        static_threshold: Tensor | None = None,
        budget: Budget | None = None,
    ):
        super().__init__()
        self.budget = budget
        self.silent: float | None = None
        self.k, self.lower, self.upper = k, lower, upper
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.register_buffer("channel_scale", channel_scale)
        self.register_buffer("static_threshold", static_threshold)

    @classmethod
    def of(
        cls,
        linear: nn.Linear | nn.Embedding,
        k: float = K,
        group_size: int | None = None,
        bits: int = 8,
        scale: Tensor | None = None,
        channel_scale: Tensor | None = None,
        static_threshold: Tensor | None = None,
        budget: Budget | None = None,
        rounded: tuple[Tensor, Tensor] | None = None,
    ) -> SpikeLinear:
        """Returns the spiking form of a linear layer, or of a table of vectors as one.

        Its weights, divided by ``channel_scale``, are rounded to nearest; or ``rounded`` are the codes and scales to take.
        """
        weight = linear.weight.detach()
        if channel_scale is not None:
            weight = weight / channel_scale
        codes, scale = rounded or quantise_weight(weight, group_size, bits, scale)
        bias = linear.bias if isinstance(linear, nn.Linear) else None
        return cls(
            codes,
            scale,
            None if bias is None else bias.detach().clone(),
            k,
            channel_scale=channel_scale,
            static_threshold=static_threshold,
            budget=budget,
        )

    def weight(self) -> Tensor:
        """Returns the float weights [N, C] that the layer stands for."""
        weight = dequantise_weight(self.codes, self.scale)
        return weight if self.channel_scale is None else weight * self.channel_scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., N], in the dtype of x."""
        with telling(self.silent):
            return self._project(x)

    def _project(self, x: Tensor) -> Tensor:
        if self.static_threshold is None and not self._drops:
            scaled = x if self.channel_scale is None else x * self.channel_scale
            y = adaptive_spike_linear(
                scaled, self.codes, self.scale, self.bias, self.k, self.lower, self.upper
            )
            return y.to(x.dtype)
        counts, v = self.counts(x)
        if self.static_threshold is None:
            dtype = exact_dtype(self.codes.shape[1], self.k, self.codes.dtype)
        else:
            dtype = torch.float64  # nothing bounds the counts
        return spike_linear(counts, v, self.codes, self.scale, self.bias, dtype).to(x.dtype)

    @property
    def _drops(self) -> bool:
        return self.budget is not None and self.budget.remainder == "drop"

    def counts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what x [..., C] fires: counts [..., C], integers in a floating dtype, and the threshold V [..., 1] or [1]."""
        counts, v = self.unlimited_counts(x)
        if self.budget is not None and self._drops:
            counts = counts.clamp(*held_range(self.budget.coding, self.budget.steps))
        return counts, v

    def unlimited_counts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the same as if there were as many steps as are needed."""
        scaled = x if self.channel_scale is None else x * self.channel_scale
        if self.static_threshold is None:
            return spike_counts(scaled, self.k, self.lower, self.upper)
        return counts_at(scaled, self.static_threshold)

    def extra_repr(self) -> str:
        (outputs, inputs), groups = self.codes.shape, self.scale.shape[1]
        return (
            f"{inputs}, {outputs}, group_size={inputs // groups}, k={self.k:g}, bias={self.bias is not None}"
        )


class SpikeLinearTraining(nn.Linear):
    """The same with float weights, rounded anew at each call; gradients pass both roundings as if they were not there."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        k: float = K,
        group_size: int | None = None,
        bits: int = 8,
    ):
        super().__init__(in_features, out_features, bias)
        check_group_size(in_features, group_size)
        self.k, self.group_size, self.bits = k, group_size, bits

    @classmethod
    def of(
        cls, linear: nn.Linear, k: float = K, group_size: int | None = None, bits: int = 8
    ) -> SpikeLinearTraining:
        """Returns the trainable spiking form of a linear layer; it holds the layer's own parameters."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, False, k, group_size, bits)
        made.weight, made.bias = linear.weight, linear.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., N], in the dtype of x."""
        scale = weight_scale(self.weight.detach(), self.group_size, self.bits)
        rounded = dequantise_weight(weight_codes(self.weight.detach(), scale), scale).to(self.weight.dtype)
        weight = self.weight + (rounded - self.weight).detach()
        return nn.functional.linear(spiking(x, self.k), weight, self.bias)

    def frozen(self) -> SpikeLinear:
        """Returns the layer for inference, with integer weights."""
        return SpikeLinear.of(self, self.k, self.group_size, self.bits)


def adaptive_spike_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, k: float, lower: float, upper: float
) -> Tensor:
    """Returns what a layer with codes [N, C], scales [N, G] and bias [N] makes of x [..., C]: [..., N] of x's dtype, or wider.

    An exporter may put an op of its own in the place of this function.
    """
    counts, v = spike_counts(x, k, lower, upper)
    return spike_linear(counts, v, codes, scale, bias, exact_dtype(codes.shape[1], k, codes.dtype))


def spike_linear(
    counts: Tensor, threshold: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Returns V (sum over groups of scale * (sum of counts * codes)) + bias: [..., N] of the counts' dtype.

    counts [..., C], threshold [..., 1], codes [N, C], scale [N, G], bias [N]. The inner sums are computed in ``dtype``.
    """
    groups = scale.shape[1]
    c, w = counts.to(dtype), codes.to(dtype)
    if groups == 1:
        y = (c @ w.mT).to(counts.dtype) * scale[:, 0]
    else:
        grouped = torch.unflatten(c, -1, (groups, -1)), torch.unflatten(w, -1, (groups, -1))
        sums = torch.einsum("...gc,ngc->...ng", *grouped)
        y = (sums.to(counts.dtype) * scale).sum(-1)
    y = y * threshold
    return y if bias is None else y + bias


def exact_dtype(channels: int, k: float, codes: torch.dtype) -> torch.dtype:
    """Returns the dtype in which counts * codes are summed over so many channels without rounding.

    The sizes of a token's counts add up to no more than (k + 1/2) C, so float32 does while that times the largest code is
    less than 2^24, in any order of the sum. float64 holds 2^53.
    """
    largest = 128 if codes == torch.int8 else 2**15
    return torch.float32 if (k + 0.5) * channels * largest < 2**24 else torch.float64
