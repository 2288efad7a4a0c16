"""A feed-forward of squared ReLU, nine tenths of whose hidden channels are silent: which form is taken, and what it gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spikingbrain
from spikingbrain.artifact import REPORT
from spikingbrain.models import spiking

C, H = 64, 320


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(C, H), nn.Linear(H, C)
        nn.init.constant_(self.up.bias, -0.7)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class ByHand(nn.Module):
    """A spiking layer that someone wrote, and what he knows of its silence."""

    def __init__(self, silent: float | None) -> None:
        super().__init__()
        self.silent = silent
        self.register_buffer("codes", torch.randint(-127, 128, (C, H), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(C, 1) / 100)

    def forward(self, x: Tensor) -> Tensor:
        v = (x.abs().mean(-1, keepdim=True) / 3).clamp(1e-5, 1e4)
        with spiking.telling(self.silent):
            return F.linear(torch.round(x / v) * v, self.codes.float() * self.scales)


@pytest.fixture(scope="module")
def model() -> MLP:
    torch.manual_seed(0)
    model = MLP().eval()
    spiking.spike(model, group_size=64)
    shares = spiking.measure_silence(model, [torch.randn(100, C)])
    assert shares["down"] > 0.85 > 0.2 > shares["up"]
    return model


@torch.no_grad()
def test_compiled(model: MLP) -> None:
    x = torch.randn(1, C)
    torch._dynamo.reset()
    found = spikingbrain.explain(model, x)
    assert [(s.layer, s.form) for s in found.spikes] == [("up", "dense"), ("down", "events")]
    assert found.spikes[1].silent == model.down.silent
    assert found.to_dict()["spikes"][1]["form"] == "events"
    assert "added for the channels that fire" in " ".join(str(found).split())
    fast = torch.compile(model, backend="spikingbrain")
    for rows in (x, torch.randn(1, C), torch.zeros(1, C)):
        torch.testing.assert_close(fast(rows), model(rows), rtol=2e-5, atol=2e-6)


@torch.no_grad()
def test_exported_for_a_step_and_any_length(model: MLP, tmp_path: Path) -> None:
    """Both entries read one stored weight."""
    entries = {
        "step": spikingbrain.Entry((torch.randn(1, C),)),
        "any": spikingbrain.Entry(
            (torch.randn(5, C),), {}, {"x": {0: torch.export.Dim("T", min=1, max=512)}}
        ),
    }
    artifact = spikingbrain.export(model, entries, tmp_path / "m.sbrain")
    for entry in entries:
        spikes = artifact.manifest["entries"][entry]["spikes"]
        assert [(s["layer"], s["form"]) for s in spikes] == [("up", "dense"), ("down", "events")]
    stored = json.loads(bytes(artifact.member(REPORT)))["weights"]
    assert [any("pack_channels" in step for step in w["recipe"]) for w in stored.values()].count(True) == 1
    program = spikingbrain.load(tmp_path / "m.sbrain")
    for rows, call in ((1, program.step), (1, program.any), (4, program.any), (33, program.any)):
        x = torch.randn(rows, C)
        got = torch.from_numpy(np.asarray(call(x.numpy())))
        torch.testing.assert_close(got, model(x), rtol=2e-5, atol=2e-6)


class Limited(nn.Module):
    """Layers whose counts are made in another way, all of one input."""

    def __init__(self) -> None:
        super().__init__()
        linear, v = nn.Linear(H, C), torch.tensor([0.5])
        drop = [spiking.Budget(3, coding, "drop") for coding in ("bitwise_ternary", "twos_complement")]
        self.static = spiking.SpikeLinear.of(linear, group_size=64, static_threshold=v)
        self.budget = spiking.SpikeLinear.of(linear, group_size=64, budget=drop[0])
        self.both = spiking.SpikeLinear.of(linear, group_size=64, static_threshold=v, budget=drop[1])
        for layer in self.children():
            layer.silent = 0.9

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.children()]


@torch.no_grad()
def test_static_thresholds_and_budgets_have_events(tmp_path: Path) -> None:
    model = Limited().eval()
    artifact = spikingbrain.export(
        model, {"step": spikingbrain.Entry((torch.randn(2, H),))}, tmp_path / "m.sbrain"
    )
    assert [s["form"] for s in artifact.manifest["entries"]["step"]["spikes"]] == ["events"] * 3
    stored = json.loads(bytes(artifact.member(REPORT)))["weights"]
    assert [any("pack_channels" in step for step in w["recipe"]) for w in stored.values()].count(True) == 3
    program = spikingbrain.load(tmp_path / "m.sbrain")
    for share in (0.0, 0.1, 1.0):
        x = torch.randn(2, H) * (torch.rand(2, H) < share)
        x[0, 5] = 1e5  # a count of 18 bits
        for got, y in zip(program.step(x.numpy()), model(x), strict=True):
            torch.testing.assert_close(torch.from_numpy(np.asarray(got)), y, rtol=2e-5, atol=2e-6)


@torch.no_grad()
def test_layers_by_hand_tell_it_too() -> None:
    x = F.relu(torch.randn(1, H) - 1)
    for told, form in ((0.9, "events"), (0.3, "dense"), (None, "dense")):
        layer = ByHand(told)
        torch._dynamo.reset()
        found = spikingbrain.explain(layer, x)
        assert [(s.silent, s.form) for s in found.spikes] == [(told or 0.0, form)]
        fast = torch.compile(layer, backend="spikingbrain")
        torch.testing.assert_close(fast(x), layer(x), rtol=2e-5, atol=2e-6)
