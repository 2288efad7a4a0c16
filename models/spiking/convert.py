"""Makes a model spike: linear layers are replaced by spiking ones, and a report says which and why not the others."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spikingbrain.models.embedding import TiedEmbedding
from spikingbrain.models.spiking.calibrate import channel_scales, mean_thresholds, observe
from spikingbrain.models.spiking.codings import Budget
from spikingbrain.models.spiking.compensate import Compensation
from spikingbrain.models.spiking.embedding import SpikeEmbedding
from spikingbrain.models.spiking.errors import SpikingError
from spikingbrain.models.spiking.experts import SpikeExpertLinear
from spikingbrain.models.spiking.linear import SpikeLinear, SpikeLinearTraining
from spikingbrain.models.spiking.quantise import BITS, SLAB, check_group_size, dequantise_weight
from spikingbrain.models.spiking.threshold import K, spiking
from spikingbrain.models.spikingbrain.experts import ExpertLinear

AUTO_GROUP = 128
GroupSize = int | None | str | Mapping[int, int | None]
_Layer = nn.Linear | nn.Embedding | ExpertLinear


@dataclass(frozen=True)
class Replaced:
    """One layer that spikes now."""

    name: str
    inputs: int
    outputs: int
    group_size: int
    error: float  # of the rounded weights, relative to their norm


@dataclass
class SpikeReport:
    """What `spike` did.

    Attributes:
        k: the firing constant.
        bits: bits of a weight.
        calibrated: whether weights were changed by what calibration saw.
        threshold: "adaptive" or "static".
        budget: the virtual steps that there are, if they were limited.
        replaced: the layers that spike.
        tables: embeddings, other than those that are heads, whose vectors are integers.
        kept: the linear layers that do not, each with the reason.
        unfitted: layers of experts, and which of these saw too few rows in calibration to change their weights.
    """

    k: float
    bits: int
    calibrated: bool
    threshold: str = "adaptive"
    budget: Budget | None = None
    replaced: list[Replaced] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    unfitted: dict[str, list[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        weights = sum(r.inputs * r.outputs for r in self.replaced)
        sizes = sorted({(r.inputs, r.group_size) for r in self.replaced})
        lines = [
            f"{len(self.replaced)} linear layers spike (k = {self.k:g}), {weights / 1e6:.1f} million weights in int{self.bits}"
            + (", calibrated" if self.calibrated else "")
            + (", thresholds fixed by calibration" if self.threshold == "static" else "")
        ]
        if self.budget is not None:
            what = "dropped" if self.budget.remainder == "drop" else "added exactly"
            lines.append(f"  {self.budget.steps} steps of {self.budget.coding}, what remains is {what}")
        lines += [f"  {inputs} inputs: groups of {size}" for inputs, size in sizes]
        if self.replaced:
            worst = max(self.replaced, key=lambda r: r.error)
            lines.append(f"  largest error of rounded weights: {worst.error:.2%} in {worst.name}")
        lines += [f"  vectors in integers: {name}" for name in self.tables]
        lines += [
            f"  too few rows seen to change weights: {name}, experts {', '.join(map(str, experts))}"
            for name, experts in self.unfitted.items()
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  left as it is: {', '.join(names[:3])}{more}: {reason}")
        return "\n".join(lines)


def spike(
    model: nn.Module,
    k: float = K,
    group_size: GroupSize = "auto",
    bits: int = 8,
    calibration: Iterable[Any] | None = None,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    types: tuple[type[nn.Linear | ExpertLinear], ...] = (nn.Linear, ExpertLinear),
    head: bool | int = False,
    embedding: bool | int = False,
    training: bool = False,
    threshold: str = "adaptive",
    budget: Budget | None = None,
) -> SpikeReport:
    """Replaces the linear layers of ``model``, in place, by ones that spike; returns what was done.

    Args:
        k: the firing constant: more spikes, less error.
        group_size: inputs that share a weight scale: a number, None for all of a row, a mapping from a layer's inputs to one of
            these, or "auto": the largest divisor of the inputs up to 128 that is a multiple of 8.
        bits: 8 or 4.
        calibration: arguments for calls of the model, a tuple for each. Channels are scaled before they fire by what layers
            see in them (`calibrate`); weights of 4 bits are also changed so that they expect the rounding of their inputs, and
            are rounded together (`compensate`). Some thousand tokens are needed. It costs nothing at run time.
        only: names, with * and ?, of the layers to replace; all by default.
        skip: names of layers to leave as they are.
        types: classes whose instances are replaced.
        head: replace output heads, too: layers that share an embedding's weight, or have an output for each of its rows. Where
            they share it, the embedding becomes integers as well: the same codes serve both. A number: with so many bits.
        embedding: store the vectors of other embeddings as codes, too. A number: with so many bits.
        training: keep float weights, rounded at each call, so that the model can be trained.
        threshold: "adaptive": each token has its own; "static": a layer has one, the mean of the adaptive thresholds over the
            tokens of ``calibration``, which then serves this alone.
        budget: virtual steps that there are for a count; see `Budget`.

    Raises SpikingError, with the model unchanged, for a group size that does not divide a layer's inputs, a name in ``only``
    or ``skip`` that no layer has, and weights that are not finite.
    """
    if not (0 < k < float("inf")):
        raise SpikingError(f"k = {k}", why="a channel of the mean size fires k times", hint="3")
    head_bits, table_bits = (bits if wanted is True else int(wanted) for wanted in (head, embedding))
    for number in (bits, *filter(None, (head_bits, table_bits))):
        if number not in BITS:
            raise SpikingError(
                f"weights of {number} bits", why="codes are stored in bytes or halves", hint="8 or 4"
            )
    if threshold not in ("adaptive", "static"):
        raise SpikingError(f"threshold {threshold!r}", hint="adaptive or static")
    static = threshold == "static"
    if static and calibration is None:
        raise SpikingError(
            "static thresholds without calibration",
            why="they are means over what layers see",
            hint="calibration",
        )
    if training and (static or budget is not None):
        raise SpikingError("static thresholds or a budget in training", why="they serve inference")
    if training and embedding:
        raise SpikingError("an embedding of integers in training", why="its vectors could not be trained")
    replaceable: tuple[type[_Layer], ...] = (*types, TiedEmbedding)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, replaceable)}
    for pattern in (*only, *skip):
        if not fnmatch.filter(linears, pattern):
            names = ", ".join(list(linears)[:8])
            raise SpikingError(f"no linear layer is called {pattern!r}", hint=f"names such as {names}")
    report = SpikeReport(k, bits, calibration is not None and not static, threshold, budget)
    chosen: dict[str, _Layer] = {}
    heads = {name: reason for name, linear in linears.items() if (reason := _head(model, linear))}
    for name, linear in linears.items():
        if only and not any(fnmatch.fnmatchcase(name, p) for p in only):
            report.kept[name] = "not among those asked for"
        elif any(fnmatch.fnmatchcase(name, p) for p in skip):
            report.kept[name] = "to be skipped"
        elif not head and not only and name in heads:
            report.kept[name] = heads[name]
        elif isinstance(linear, nn.Embedding) and (training or static):
            report.kept[name] = "the head, which is the embedding: adaptive thresholds and inference only"
        elif isinstance(linear, ExpertLinear) and (training or static or budget is not None):
            report.kept[name] = "experts: adaptive thresholds, no budget and inference only"
        else:
            chosen[name] = linear
    sizes = {name: _group_size(name, linear, group_size) for name, linear in chosen.items()}
    compensation: Compensation | None = None
    channels: dict[str, Tensor] = {}
    thresholds: dict[str, Tensor] = {}
    if calibration is not None:
        if training:
            raise SpikingError("calibration of a model to be trained", why="training fits the weights itself")
        if static:
            thresholds = mean_thresholds(model, _linears(chosen), calibration, k)
        else:
            # codes that serve as vectors, too, must stay near them
            alone = {
                n: m
                for n, m in chosen.items()
                if isinstance(m, nn.Linear | ExpertLinear) and not _embeddings_of(model, m)
            }
            calls = list(calibration)
            channels = channel_scales(observe(model, alone, calls), alone)
            if bits == 4:
                compensation = Compensation(
                    model, alone, calls, lambda name, x: spiking(x * channels[name], k) / channels[name]
                )
    made: dict[int, nn.Module] = {}  # one layer may have several names
    for name, linear in chosen.items():
        if id(linear) not in made:
            width = (head_bits or bits) if name in heads else bits
            new: nn.Module
            rounded = None
            if compensation is not None and name in compensation.layers and width == 4:
                rounded = compensation.rounded(name, sizes[name], width, channels[name])
                if kept := compensation.unfitted(name):
                    report.unfitted[name] = kept
            if isinstance(linear, ExpertLinear):
                new = _frozen_experts(name, linear, k, sizes[name], width, channels.get(name), rounded)
            elif training and isinstance(linear, nn.Linear):
                new = SpikeLinearTraining.of(linear, k, sizes[name], width)
            else:
                new = frozen = _frozen(
                    name,
                    linear,
                    k,
                    sizes[name],
                    width,
                    channels.get(name),
                    thresholds.get(name),
                    budget,
                    rounded,
                )
                for table in _embeddings_of(model, linear):
                    made[id(table)] = SpikeEmbedding(frozen, linear.weight.dtype).train(linear.training)
            made.setdefault(
                id(linear), new.train(linear.training)
            )  # an embedding that is the head is one already
        new = made[id(linear)]
        inputs = linear.weight.shape[-1]
        outputs = linear.weight[..., 0].numel()
        report.replaced.append(
            Replaced(name, inputs, outputs, sizes[name], _error(linear, getattr(new, "table", new)))
        )
    if embedding:
        for name, table in list(model.named_modules()):
            tied = isinstance(table, TiedEmbedding)
            if isinstance(table, nn.Embedding) and not tied and id(table) not in made:
                size = _group_size(name, table, group_size)
                made[id(table)] = SpikeEmbedding(
                    _frozen(name, table, k, size, table_bits), table.weight.dtype
                ).train(table.training)
                report.tables.append(name)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in made:
            _replace(model, name, made)
    return report


def _linears(modules: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    return {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}


def _embeddings_of(model: nn.Module, linear: nn.Module) -> list[nn.Embedding]:
    """Returns the embeddings whose weight is that of ``linear``."""
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding))
    return [table for table in tables if table.weight is linear.weight]


def _frozen(
    name: str,
    linear: nn.Linear | nn.Embedding,
    k: float,
    group_size: int,
    bits: int,
    channels: Tensor | None = None,
    threshold: Tensor | None = None,
    budget: Budget | None = None,
    rounded: tuple[Tensor, Tensor] | None = None,
) -> SpikeLinear:
    """Returns the spiking form of a layer; ``rounded`` are codes and scales to take instead of those of its weights."""
    try:
        return SpikeLinear.of(
            linear,
            k,
            group_size,
            bits,
            channel_scale=channels,
            static_threshold=threshold,
            budget=budget,
            rounded=rounded,
        )
    except SpikingError as error:
        raise SpikingError(str(error), where=name) from None


def _frozen_experts(
    name: str,
    experts: ExpertLinear,
    k: float,
    group_size: int,
    bits: int,
    channels: Tensor | None,
    rounded: tuple[Tensor, Tensor] | None,
) -> SpikeExpertLinear:
    try:
        return SpikeExpertLinear.of(experts, k, group_size, bits, channels, rounded)
    except SpikingError as error:
        raise SpikingError(str(error), where=name) from None


def _error(linear: _Layer, made: nn.Module) -> float:
    """Returns the relative error of rounded weights."""
    if not isinstance(made, SpikeLinear | SpikeExpertLinear):
        return 0.0
    weight, codes, scales = (
        t.reshape(-1, t.shape[-1]) for t in (linear.weight.detach(), made.codes, made.scale)
    )
    rows = max(1, SLAB // max(1, weight.shape[1]))
    squares = torch.zeros(2, dtype=torch.float64)  # a piece at a time, beside a large weight
    for some, code, scale in zip(*(torch.split(t, rows) for t in (weight, codes, scales)), strict=True):
        told = dequantise_weight(code, scale)
        told = told if made.channel_scale is None else told * made.channel_scale
        squares += torch.stack([(told - some.float()).norm() ** 2, some.float().norm() ** 2])
    return float((squares[0] / squares[1].clamp(min=1e-60)).sqrt())


def _replace(model: nn.Module, name: str, made: Mapping[int, nn.Module]) -> None:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, made[id(getattr(owner, child))])


def _group_size(name: str, linear: _Layer, wanted: GroupSize) -> int:
    """Returns the group size of a layer. Raises SpikingError if it does not divide the inputs."""
    inputs = linear.weight.shape[-1]
    size = wanted.get(inputs, "auto") if isinstance(wanted, Mapping) else wanted
    if size == "auto":
        size = next(
            (n for n in range(min(AUTO_GROUP, inputs), 7, -1) if inputs % n == 0 and n % 8 == 0), inputs
        )
    if not (size is None or isinstance(size, int)):
        raise SpikingError(f"group_size {size!r}", hint='a number, None, a mapping from inputs, or "auto"')
    try:
        return check_group_size(inputs, size)
    except SpikingError as error:
        raise SpikingError(str(error), where=name) from None


def _head(model: nn.Module, linear: _Layer) -> str:
    """Returns why a layer is taken for the model's head, or nothing."""
    if isinstance(linear, nn.Embedding):
        return "the head: it is the embedding"
    if isinstance(linear, ExpertLinear):
        return ""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            if module.weight is linear.weight:
                return "the head: it shares the embedding's weight"
            if module.num_embeddings == linear.out_features:
                return "the head: it has an output for each row of the embedding"
    return ""
