"""How much a model fires, layer by layer and in total: spikes, sparsity, synaptic operations, energy.

Everything follows from the histogram of counts s. For codings without a sign (binary, bitwise) the sizes |s| are taken, as by
hardware that keeps the sign beside the train.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from spikingbrain.models.spiking.codings import CODINGS, DEFAULT, SIGNED, spikes_each, steps_needed
from spikingbrain.models.spiking.errors import SpikingError
from spikingbrain.models.spiking.observe import LayerCounts

WINDOW = 3  # steps of the window in which the SpikingBrain report (arXiv 2509.05276) gives its sparsity

# Energy of one operation at 45 nm in pJ, as in the report.
FP16_MAC, INT8_MAC, INT8_ADD = 1.5, 0.23, 0.03

DEFINITIONS = {
    "silent": "values with s = 0 / values",
    "needed_steps": "1 - spikes / (values x T), T steps: as many as the largest |s| of the layer has bits (bitwise_ternary)",
    "window": f"1 - spikes / (values x {WINDOW}), where |s| is held to {2**WINDOW - 1}, as {WINDOW} steps do (bitwise_ternary)",
    "operations": "spikes (bitwise_ternary) x outputs of the layers that read them: additions of one weight",
    "energy": (
        f"operations x {INT8_ADD} pJ (INT8 add), against multiplications x {INT8_MAC} pJ (INT8 MAC) or x {FP16_MAC} pJ"
        " (FP16 MAC), multiplications = values x outputs; arithmetic alone, 45 nm"
    ),
}


@dataclass(frozen=True)
class Statistics:
    """Sums over the values of an input, or of several; shares of them as properties.

    Attributes:
        layers: the layers that read it.
        tokens: tokens seen.
        values: tokens x channels.
        histogram: values by signed count.
        spikes: by coding.
        steps: virtual steps that the coding needs, by coding; the most of any input.
        pairs: (value, step) pairs of all trains, by coding.
        window_spikes: spikes in a window of `WINDOW` steps of bitwise_ternary, larger counts held.
        operations: synaptic operations.
        multiplications: those of the same layers on dense activations.
        threshold: the mean of V over tokens and inputs.
        beyond: values beyond the budget of steps.
        beyond_size: the sum of what remains of their sizes.
    """

    layers: tuple[str, ...]
    tokens: int
    values: int
    histogram: dict[int, int]
    spikes: dict[str, int]
    steps: dict[str, int]
    pairs: dict[str, int]
    window_spikes: int
    operations: int
    multiplications: int
    threshold: float
    beyond: int = 0
    beyond_size: int = 0
    channels: int = field(default=0)

    def spikes_per_value(self, coding: str = DEFAULT) -> float:
        return self.spikes[coding] / self.values

    def share(self, least: int, most: int | None = None) -> float:
        """Returns the share of values with least <= |s| <= most."""
        fits = (n for s, n in self.histogram.items() if least <= abs(s) and (most is None or abs(s) <= most))
        return sum(fits) / self.values

    @property
    def largest(self) -> int:
        return max(map(abs, self.histogram), default=0)

    @property
    def sparsity(self) -> dict[str, float]:
        """The three definitions of `DEFINITIONS`."""
        return {
            "silent": self.share(0, 0),
            "needed_steps": 1 - self.spikes[DEFAULT] / max(self.pairs[DEFAULT], 1),
            "window": 1 - self.window_spikes / (self.values * WINDOW),
        }

    @property
    def energy(self) -> dict[str, float]:
        """pJ per token by the formula of `DEFINITIONS`."""
        return {
            "spikes": self.operations * INT8_ADD / self.tokens,
            "int8": self.multiplications * INT8_MAC / self.tokens,
            "fp16": self.multiplications * FP16_MAC / self.tokens,
        }

    def to_json(self) -> dict[str, Any]:
        """Returns everything as what JSON holds."""
        sizes: Counter[int] = Counter()
        for s, n in self.histogram.items():
            sizes[abs(s)] += n
        return {
            "layers": list(self.layers),
            "tokens": self.tokens,
            "channels": self.channels,
            "values": self.values,
            "threshold_mean": self.threshold,
            "spikes_per_value": {c: self.spikes_per_value(c) for c in CODINGS},
            "steps": self.steps,
            "silent": self.share(0, 0),
            "up_to_7": self.share(0, 7),
            "above_16": self.share(17),
            "above_127": self.share(128),
            "largest": self.largest,
            "sparsity": self.sparsity,
            "operations_per_token": self.operations / self.tokens,
            "multiplications_per_token": self.multiplications / self.tokens,
            "energy_pJ_per_token": self.energy,
            "beyond_budget": self.beyond / self.values,
            "beyond_budget_size": self.beyond_size,
            "sizes": {str(s): sizes[s] for s in sorted(sizes)},
        }


def statistics(seen: LayerCounts) -> Statistics:
    """Returns the statistics of one input."""
    counts = seen.counts
    signed, number = torch.unique(counts.to(torch.int64), return_counts=True)
    if not number.numel():
        raise SpikingError("statistics of no tokens", where=seen.name, hint="a text")
    spikes, steps = {}, {}
    for coding in CODINGS:
        told = signed if coding in SIGNED else signed.abs()
        steps[coding] = steps_needed(told, coding)
        spikes[coding] = int((spikes_each(told, coding, steps[coding]) * number).sum())
    held = signed.abs().clamp(max=2**WINDOW - 1)
    values, tokens = counts.numel(), counts.shape[0]
    return Statistics(
        layers=seen.layers,
        tokens=tokens,
        values=values,
        histogram=dict(zip(signed.tolist(), number.tolist(), strict=True)),
        spikes=spikes,
        steps=steps,
        pairs={coding: values * steps[coding] for coding in CODINGS},
        window_spikes=int((spikes_each(held, "bitwise", WINDOW) * number).sum()),
        operations=spikes[DEFAULT] * seen.outputs,
        multiplications=values * seen.outputs,
        threshold=float(seen.thresholds.double().mean()),
        beyond=seen.beyond,
        beyond_size=seen.beyond_size,
        channels=values // tokens,
    )


def total(parts: Sequence[Statistics]) -> Statistics:
    """Returns the statistics of all inputs together; each has as many steps as it needs itself."""
    histogram: Counter[int] = Counter()
    for part in parts:
        histogram.update(part.histogram)
    return Statistics(
        layers=tuple(name for p in parts for name in p.layers),
        tokens=max(p.tokens for p in parts),
        values=sum(p.values for p in parts),
        histogram=dict(sorted(histogram.items())),
        spikes={c: sum(p.spikes[c] for p in parts) for c in CODINGS},
        steps={c: max(p.steps[c] for p in parts) for c in CODINGS},
        pairs={c: sum(p.pairs[c] for p in parts) for c in CODINGS},
        window_spikes=sum(p.window_spikes for p in parts),
        operations=sum(p.operations for p in parts),
        multiplications=sum(p.multiplications for p in parts),
        threshold=sum(p.threshold for p in parts) / len(parts),
        beyond=sum(p.beyond for p in parts),
        beyond_size=sum(p.beyond_size for p in parts),
        channels=sum(p.channels for p in parts),
    )
