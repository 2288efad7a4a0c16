"""Small spiking models and counts that tests of spikes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spikingbrain.models.spiking import Budget, SpikeLinear
from spikingbrain.models.spiking.observe import LayerCounts


class Shared(nn.Module):
    """Two layers that read one input, and a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 6, bias=False)
        self.c = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.b(x) + self.a(x).sum(-1, keepdim=True))
        return y


def seen(counts: list[list[int]], outputs: int = 1, **options: Any) -> LayerCounts:
    values = torch.tensor(counts)
    return LayerCounts(("layer",), outputs, values, torch.ones(len(values)), **options)


def static(inputs: int, outputs: int, threshold: float, levels: int, bias: bool = True) -> SpikeLinear:
    """A layer with numbers that floats hold exactly, so that no sum depends on its order; its outputs are no ties."""
    codes = torch.randint(-9, 10, (outputs, inputs), dtype=torch.int8)
    return SpikeLinear(
        codes,
        torch.full((outputs, 1), 0.125),
        torch.randint(-4, 5, (outputs,)) / 4 + 1 / 256 if bias else None,
        channel_scale=torch.tensor([1.0, 2.0]).repeat(inputs // 2 + 1)[:inputs],
        static_threshold=torch.tensor([threshold]),
        budget=Budget(levels, "ternary", "drop"),
    )
