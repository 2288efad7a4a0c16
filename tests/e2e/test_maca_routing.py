"""Routing to experts on the MetaX emulator: one launch behind the projection of scores, choices as in a stable sort."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spikingbrain
from spikingbrain.backend_maca.run import emulate

pytestmark = pytest.mark.skipif(shutil.which(emulate.compiler()) is None, reason="no C++ compiler")


def largest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Top-k where of equals the first comes first, and NaN before all, on the CPU."""
    values, places = x.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], places[..., :count]


class Softmax(nn.Module):
    """The best of all by softmax, their weights summing to 1."""

    def forward(self, scores: Tensor, stable: bool = False) -> tuple[Tensor, Tensor]:
        odds = F.softmax(scores, -1, dtype=torch.float32)
        best, chosen = largest(odds, 2) if stable else odds.topk(2, -1)
        return best / best.sum(-1, keepdim=True), chosen


class Groups(nn.Module):
    """The best of the best two of four groups by sigmoid, with a bias that only chooses; as in DeepSeek-V3."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randint(-1, 2, (experts,)) / 8)

    def forward(self, scores: Tensor, stable: bool = False) -> tuple[Tensor, Tensor]:
        best_of = largest if stable else (lambda x, k: x.topk(k, -1, sorted=True))
        odds = scores.float().sigmoid()
        biased = odds + self.bias
        in_groups = biased.unflatten(-1, (4, -1))
        of_group = best_of(in_groups, 2)[0].sum(-1)
        mask = torch.zeros_like(of_group).scatter(-1, best_of(of_group, 2)[1], 1.0)
        masked = in_groups.masked_fill(mask.unsqueeze(-1) == 0, 0.0).flatten(-2)
        _, chosen = best_of(masked, 3)
        weights = odds.gather(-1, chosen)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, chosen


@pytest.mark.parametrize(
    ("router", "experts"),
    [(Softmax(), 5), (Groups(12), 12), pytest.param(Groups(256), 256, marks=pytest.mark.slow)],
)
def test_routing_is_one_launch(router: nn.Module, experts: int, tmp_path: Path) -> None:
    length = torch.export.Dim("T", min=1, max=400)
    example = torch.randn(5, experts)
    entries = {
        "many": spikingbrain.Entry((example,), dynamic_shapes={"scores": {0: length}}),
        "one": spikingbrain.Entry((example[:1],)),
    }
    artifact = spikingbrain.export(router, entries, tmp_path / "router.sbrain", target="maca-emulator")
    plan = json.loads(bytes(artifact.code["plan.json"]))
    assert [len(plan["entries"][name]["launches"]) for name in entries] == [1, 1]
    program = spikingbrain.load(tmp_path / "router.sbrain")
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 3, 131):
        # few numbers: many ties; zeros of both signs
        scores = torch.randint(-3, 4, (rows, experts), generator=generator) / 2
        scores[:, ::3] *= -1
        if rows > 1:
            scores[1, 1] = torch.nan
        weights, chosen = router(scores, stable=True)
        for name in ["many"] + ["one"] * (rows == 1):
            found, places = getattr(program, name)(scores.numpy())
            np.testing.assert_array_equal(places, chosen)
            np.testing.assert_allclose(found, weights.detach(), rtol=1e-6)
