"""Makes a model spike: linear layers are replaced by spiking ones, and a report says which and why not the others."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from spikingbrain.models.spiking.calibrate import channel_scale, mean_thresholds, observe
from spikingbrain.models.spiking.codings import Budget
from spikingbrain.models.spiking.errors import SpikingError
from spikingbrain.models.spiking.linear import SpikeLinear, SpikeLinearTraining
from spikingbrain.models.spiking.quantise import BITS, check_group_size
from spikingbrain.models.spiking.threshold import K

AUTO_GROUP = 128
GroupSize = int | None | str | Mapping[int, int | None]


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
        calibrated: whether channels were scaled by what calibration saw.
        threshold: "adaptive" or "static".
        budget: the virtual steps that there are, if they were limited.
        replaced: the layers that spike.
        kept: the linear layers that do not, each with the reason.
    """

    k: float
    bits: int
    calibrated: bool
    threshold: str = "adaptive"
    budget: Budget | None = None
    replaced: list[Replaced] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

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
    types: tuple[type[nn.Linear], ...] = (nn.Linear,),
    head: bool = False,
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
        calibration: arguments for calls of the model, a tuple for each; what the layers see in them decides how errors are
            spread over channels (`calibrate`). Better than none, at the price of a multiplication per input.
        only: names, with * and ?, of the layers to replace; all by default.
        skip: names of layers to leave as they are.
        types: classes whose instances are replaced.
        head: replace output heads, too: layers that share an embedding's weight, or have an output for each of its rows.
        training: keep float weights, rounded at each call, so that the model can be trained.
        threshold: "adaptive": each token has its own; "static": a layer has one, the mean of the adaptive thresholds over the
            tokens of ``calibration``, which then serves this alone.
        budget: virtual steps that there are for a count; see `Budget`.

    Raises SpikingError, with the model unchanged, for a group size that does not divide a layer's inputs, a name in ``only``
    or ``skip`` that no layer has, and weights that are not finite.
    """
    if not (0 < k < float("inf")):
        raise SpikingError(f"k = {k}", why="a channel of the mean size fires k times", hint="3")
    if bits not in BITS:
        raise SpikingError(
            f"weights of {bits} bits", why="codes are stored in bytes or halves", hint="8 or 4"
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
    linears = {name: m for name, m in model.named_modules() if isinstance(m, types)}
    for pattern in (*only, *skip):
        if not fnmatch.filter(linears, pattern):
            names = ", ".join(list(linears)[:8])
            raise SpikingError(f"no linear layer is called {pattern!r}", hint=f"names such as {names}")
    report = SpikeReport(k, bits, calibration is not None and not static, threshold, budget)
    chosen: dict[str, nn.Linear] = {}
    for name, linear in linears.items():
        if only and not any(fnmatch.fnmatchcase(name, p) for p in only):
            report.kept[name] = "not among those asked for"
        elif any(fnmatch.fnmatchcase(name, p) for p in skip):
            report.kept[name] = "to be skipped"
        elif not head and not only and (reason := _head(model, linear)):
            report.kept[name] = reason
        else:
            chosen[name] = linear
    sizes = {name: _group_size(name, linear, group_size) for name, linear in chosen.items()}
    channels: dict[str, Tensor] = {}
    thresholds: dict[str, Tensor] = {}
    if calibration is not None:
        if training:
            raise SpikingError("calibration of a model to be trained", why="training fits the weights itself")
        if static:
            thresholds = mean_thresholds(model, chosen, calibration, k)
        else:
            observed = observe(model, chosen, calibration)
            channels = {n: channel_scale(seen, chosen[n].weight.detach()) for n, seen in observed.items()}
    made: dict[int, nn.Module] = {}  # one layer may have several names
    for name, linear in chosen.items():
        if id(linear) not in made:
            made[id(linear)] = (
                SpikeLinearTraining.of(linear, k, sizes[name], bits)
                if training
                else _frozen(
                    name, linear, k, sizes[name], bits, channels.get(name), thresholds.get(name), budget
                )
            ).train(linear.training)
        new = made[id(linear)]
        report.replaced.append(
            Replaced(name, linear.in_features, linear.out_features, sizes[name], _error(linear, new))
        )
    for name in chosen:
        _replace(model, name, made)
    return report


def _frozen(
    name: str,
    linear: nn.Linear,
    k: float,
    group_size: int,
    bits: int,
    channels: Tensor | None,
    threshold: Tensor | None,
    budget: Budget | None,
) -> SpikeLinear:
    try:
        return SpikeLinear.of(
            linear,
            k,
            group_size,
            bits,
            channel_scale=channels,
            static_threshold=threshold,
            budget=budget,
        )
    except SpikingError as error:
        raise SpikingError(str(error), where=name) from None


def _error(linear: nn.Linear, made: nn.Module) -> float:
    """Returns the relative error of rounded weights."""
    if not isinstance(made, SpikeLinear):
        return 0.0
    weight = linear.weight.detach().float()
    return float((made.weight() - weight).norm() / weight.norm().clamp(min=1e-30))


def _replace(model: nn.Module, name: str, made: Mapping[int, nn.Module]) -> None:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, made[id(getattr(owner, child))])


def _group_size(name: str, linear: nn.Linear, wanted: GroupSize) -> int:
    """Returns the group size of a layer. Raises SpikingError if it does not divide the inputs."""
    inputs = linear.in_features
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


def _head(model: nn.Module, linear: nn.Linear) -> str:
    """Returns why a layer is taken for the model's head, or nothing."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            if module.weight is linear.weight:
                return "the head: it shares the embedding's weight"
            if module.num_embeddings == linear.out_features:
                return "the head: it has an output for each row of the embedding"
    return ""
