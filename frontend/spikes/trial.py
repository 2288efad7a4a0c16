"""Decides by numbers whether counts times weights are ``spike_linear``: both forms are run on inputs of all sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from spikingbrain.frontend.spikes.neuron import Neuron, NotSpiking, through
from spikingbrain.frontend.spikes.projection import (
    Constants,
    Projection,
    Weight,
    evaluate,
    find_weights,
    hint,
)
from spikingbrain.models import spiking

# Of the rows that are tried: usual ones, and those whose threshold is clamped.
_SIZES = (1.0, 1e-7, 300.0, 1e6, 0.0)


@dataclass(frozen=True)
class Match:
    """A result that the op gives as well.

    Attributes:
        neuron: as it is taken: by its settings, or as counts that are multiplied with a factor.
        result: the node that the op replaces.
        weight: the codes and scales that the op multiplies with.
        axis: the result's axis of outputs.
        bits: of the weight's codes.
    """

    neuron: Neuron
    result: fx.Node
    weight: Weight
    axis: int
    bits: int


class Trials:
    """Trials in one graph. With ``fixed`` weights, codes that fit 4 bits take 4."""

    def __init__(self, constants: Constants, fixed: bool) -> None:
        self.constants, self.fixed = constants, fixed

    def match(self, neuron: Neuron, projection: Projection) -> Match:
        """Returns what the op can be written for; raises NotSpiking, which says why there is nothing."""
        if neuron.settings:
            try:
                return self._matched(neuron, projection, *self._trial(neuron))
            except _OtherCounts as why:
                neuron = replace(neuron, settings=None, axis=-1, threshold=None, why=str(why))
        base, reason = projection.base, "its shape tells no axis of channels"
        if base.meta["val"].dtype == torch.float64:
            raise NotSpiking("its counts are float64")
        for axis in reversed(range(base.meta["val"].ndim)):
            taken = replace(neuron, x=base, axis=axis, counts=base, threshold=projection.factor)
            try:
                return self._matched(taken, projection, *self._trial_of_counts(neuron, taken))
            except NotSpiking as why:
                reason = str(why) if axis == base.meta["val"].ndim - 1 else reason
        raise NotSpiking(reason)

    def _matched(
        self, neuron: Neuron, projection: Projection, x: Tensor, given: dict[fx.Node, Tensor]
    ) -> Match:
        """Returns the result that is the op's for the given inputs."""
        channels = x.shape[-1]
        dtype = projection.product.meta["val"].dtype
        if dtype in (torch.bfloat16, torch.float16):
            raise NotSpiking(f"its product is in {str(dtype).removeprefix('torch.')}, the op's in float32")
        if not projection.results:
            raise NotSpiking("its result is not multiplied by the threshold")
        rows = x.numel() // channels
        why = "no weights that are integers times scales give its result"
        for result in projection.results:
            outputs, rest = divmod(_numel(result), rows)
            axis = _output_axis(neuron, result, outputs)
            if rest or axis is None:
                continue
            wanted = evaluate(result, given, self.constants)
            for weight in find_weights(projection, result, self.constants, outputs, channels):
                try:
                    bits = bits_of(weight.codes, self.fixed)
                    got = self._computed(neuron, projection, result, weight, given)
                except NotSpiking as reason:
                    why = str(reason)
                    continue
                got = got.movedim(-1, axis) if got.ndim == wanted.ndim else got.reshape(wanted.shape)
                if got.shape == wanted.shape and _agree(got, wanted, axis):
                    if not _is_stored_order(weight):
                        shape = list(weight.source.meta["val"].shape)
                        why = f"its weights are stored as {shape}; the op takes [outputs, inputs]"
                        continue
                    return Match(neuron, result, weight, axis, bits)
        raise NotSpiking(why)

    def _drawn(self, node: fx.Node, axis: int, generator: torch.Generator) -> Tensor:
        """Returns values for a node, in rows of several sizes."""
        shape = [hint(s) for s in node.meta["val"].shape]
        if not all(shape):
            raise NotSpiking("its input is empty")
        rows = torch.randn(shape, generator=generator).movedim(axis, -1)
        sizes = torch.tensor(_SIZES)[torch.arange(rows[..., 0].numel()) % len(_SIZES)]
        return (rows * sizes.reshape(rows.shape[:-1]).unsqueeze(-1)).movedim(-1, axis).contiguous()

    def _trial(self, neuron: Neuron) -> tuple[Tensor, dict[fx.Node, Tensor]]:
        """Returns inputs of several sizes, channels last, and with them the values of what the region reads."""
        x = self._drawn(neuron.x, neuron.axis, torch.Generator().manual_seed(0))
        root = through(neuron.x, shapes=False)
        x = x.clamp(min=-(largest := torch.finfo(root.meta["val"].dtype).max), max=largest)
        given = {root: x.to(root.meta["val"].dtype), neuron.x: x}
        if root.meta["val"].dtype != torch.float32:
            given[neuron.x] = given[root].float()
        counts = evaluate(neuron.counts, given, self.constants).movedim(neuron.axis, -1)
        x = given[neuron.x].movedim(neuron.axis, -1)
        assert neuron.settings is not None
        expected, _ = spiking.spike_counts(x, *neuron.settings)
        # a mean in another order moves a threshold by its last bit, and a count in ten million by one
        if ((counts - expected).abs() > 1).any() and not torch.allclose(
            counts, expected, rtol=1e-5, atol=1.0
        ):
            raise _OtherCounts("not those of round(x / clamp(mean |x| / k))")
        if (counts != expected).sum() > 1e-3 * counts.numel():
            raise _OtherCounts("too many differ from round(x / clamp(mean |x| / k))")
        return x, given

    def _trial_of_counts(self, neuron: Neuron, taken: Neuron) -> tuple[Tensor, dict[fx.Node, Tensor]]:
        """Returns counts of several sizes, channels last, and with them the values of what is multiplied with them.

        An input that is added and subtracted again, as for a straight-through gradient, is taken for what counts stand for.
        """
        generator = torch.Generator().manual_seed(0)
        drawn = (3 * self._drawn(taken.counts, taken.axis, generator)).round()
        counts = drawn.clamp(neuron.low, neuron.high)
        given = {taken.counts: counts.to(taken.counts.meta["val"].dtype)}
        told, factor = counts, taken.threshold
        if isinstance(factor, fx.Node):
            _require_row_factor(factor, taken)
            shape = [hint(s) for s in factor.meta["val"].shape]
            given[factor] = (torch.rand(shape, generator=generator) + 0.5).to(factor.meta["val"].dtype)
            told = told * given[factor]
        elif factor is not None:
            told = told * factor
        root = through(neuron.x, shapes=False)
        if root is not taken.counts and [hint(s) for s in root.meta["val"].shape] == list(told.shape):
            given[root] = told.to(root.meta["val"].dtype)
        return counts.movedim(taken.axis, -1), given

    def _computed(
        self,
        neuron: Neuron,
        projection: Projection,
        result: fx.Node,
        weight: Weight,
        given: dict[fx.Node, Tensor],
    ) -> Tensor:
        """Returns what the op gives, channels last, for the counts and thresholds that the user's form has."""
        counts = evaluate(neuron.counts, given, self.constants)
        threshold = torch.ones(())
        if isinstance(neuron.threshold, fx.Node):
            threshold = evaluate(neuron.threshold, given, self.constants).float()
        elif neuron.threshold is not None:
            threshold = torch.tensor(neuron.threshold)
        threshold = threshold.broadcast_to(counts.shape).movedim(neuron.axis, -1)[..., :1]
        counts = counts.float().movedim(neuron.axis, -1)
        bias = projection.biases.get(result)
        values = self.constants.value(bias).flatten() if bias is not None else None
        if values is not None and values.numel() != weight.codes.shape[0]:
            raise NotSpiking(f"a bias of {values.numel()} values for {weight.codes.shape[0]} outputs")
        return spiking.spike_linear(counts, threshold, weight.codes, weight.scales, values, torch.float64)


class _OtherCounts(NotSpiking):
    """Raised where counts are not those of the op."""


def _require_row_factor(factor: fx.Node, neuron: Neuron) -> None:
    """Raises NotSpiking unless counts of a row are all multiplied with the same."""
    value, ndim = factor.meta["val"], neuron.counts.meta["val"].ndim
    place = neuron.axis - (ndim - value.ndim)
    if value.ndim > ndim or (place >= 0 and hint(value.shape[place]) != 1):
        raise NotSpiking("its counts are multiplied with a factor for each channel")
    if not value.dtype.is_floating_point:
        raise NotSpiking("its counts are multiplied with integers")


def _numel(node: fx.Node) -> int:
    return math.prod(hint(s) for s in node.meta["val"].shape)


def _output_axis(neuron: Neuron, result: fx.Node, outputs: int) -> int | None:
    """Returns which axis of a result holds the outputs; None where its shape is not the input's otherwise."""
    before = [hint(s) for s in neuron.x.meta["val"].shape]
    after = [hint(s) for s in result.meta["val"].shape]
    rows = before[: neuron.axis] + before[neuron.axis + 1 :]
    if len(after) != len(before):
        joined = len(after) == 2 and after[1] == outputs and neuron.axis == len(before) - 1
        return 1 if joined else None
    for axis in dict.fromkeys((neuron.axis, len(after) - 1)):
        if after[axis] == outputs and after[:axis] + after[axis + 1 :] == rows:
            return axis
    return None


def bits_of(codes: Tensor, fixed: bool) -> int:
    """Returns how many bits the codes take: 8 or 16, and 4 if they are ``fixed``."""
    low, high = (float(codes.min()), float(codes.max())) if codes.numel() else (0.0, 0.0)
    if codes.is_floating_point() and not bool((codes == codes.round()).all()):
        raise NotSpiking("its weights are no integers times scales")
    bits = next(
        (b for b in ((4, 8, 16) if fixed else (8, 16)) if low >= -(2 ** (b - 1)) and high < 2 ** (b - 1)),
        None,
    )
    if bits is None or (codes.dtype == torch.int8 and bits > 8):
        raise NotSpiking(f"a weight code of {max(-low, high):.0f}; up to 16 bits are")
    return 16 if codes.dtype == torch.int16 else bits


def _is_stored_order(weight: Weight) -> bool:
    source, codes = weight.source.meta["val"], tuple(weight.codes.shape)
    if weight.turned:
        return not source.is_floating_point() and tuple(source.shape) == codes[::-1]
    return tuple(source.shape) == codes


def _agree(got: Tensor, wanted: Tensor, axis: int) -> bool:
    """Tells whether two results agree within the rounding of float32, row by row."""
    got, wanted = (t.double().movedim(axis, -1).reshape(-1, wanted.shape[axis]) for t in (got, wanted))
    size = wanted.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return bool(((got - wanted).abs() <= 2e-5 * size).all())
