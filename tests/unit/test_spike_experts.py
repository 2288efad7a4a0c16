"""Spiking layers of experts: against a spiking layer per row, and what `spike` makes of a model that has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikingbrain.models import spiking
from spikingbrain.models.spiking import SpikeExpertLinear, SpikeLinear, SpikingError
from spikingbrain.models.spikingbrain.experts import ExpertLinear

EXPERTS = {"none": [], "one": [1], "odd": [0, 2, 2, 0, 3, 2, 0], "all to one": [2] * 5}  # of 4


def reference(layer: SpikeExpertLinear, x: Tensor, expert: Tensor) -> Tensor:
    linears = [
        SpikeLinear(codes, scale, k=layer.k) for codes, scale in zip(layer.codes, layer.scale, strict=True)
    ]
    rows = [linears[e](row.unsqueeze(0))[0] for e, row in zip(expert.tolist(), x, strict=True)]
    return torch.stack(rows) if rows else x.new_empty(0, layer.codes.shape[1])


@pytest.mark.parametrize(("group_size", "bits"), [(None, 8), (16, 8), (24, 4)])
@pytest.mark.parametrize("name", EXPERTS)
def test_each_row_spikes_through_its_expert(name: str, group_size: int | None, bits: int) -> None:
    torch.manual_seed(0)
    layer = SpikeExpertLinear.of(ExpertLinear(4, 48, 10), group_size=group_size, bits=bits)
    assert layer.codes.dtype == torch.int8 and int(layer.codes.abs().max()) == 2 ** (bits - 1) - 1
    x = torch.randn(len(EXPERTS[name]), 48) * torch.logspace(-6, 6, len(EXPERTS[name])).unsqueeze(1)
    expert = torch.tensor(EXPERTS[name], dtype=torch.int64)
    torch.testing.assert_close(layer(x, expert), reference(layer, x, expert), rtol=1e-6, atol=0)


def test_weights_are_those_of_each_expert_rounded() -> None:
    experts = ExpertLinear(3, 16, 5)
    layer = SpikeExpertLinear.of(experts, group_size=8)
    for weight, codes, scale, told in zip(
        experts.weight, layer.codes, layer.scale, layer.weight(), strict=True
    ):
        alone, alone_scale = spiking.quantise_weight(weight.detach(), 8)
        assert torch.equal(codes, alone) and torch.equal(scale, alone_scale)
        torch.testing.assert_close(told, spiking.dequantise_weight(alone, alone_scale))


def test_the_form_without_sizes_that_depend_on_data(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SpikeExpertLinear.of(ExpertLinear(4, 48, 10), group_size=16)
    x, expert = torch.randn(7, 48), torch.tensor(EXPERTS["odd"])
    expected = layer(x, expert)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(layer(x, expert), expected, rtol=1e-6, atol=0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 4)
        self.up = ExpertLinear(4, 32, 24)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(x, self.router(x).argmax(-1))
        return y


def test_a_model_with_experts_spikes() -> None:
    model = Model()
    x = torch.randn(9, 32)
    before = model(x)
    report = spiking.spike(model, skip=["router"], k=8)
    assert [(r.name, r.inputs, r.outputs, r.group_size) for r in report.replaced] == [("up", 32, 96, 32)]
    assert 0 < report.replaced[0].error < 0.01
    assert isinstance(model.up, SpikeExpertLinear) and not list(model.up.parameters())
    assert (model(x) - before).norm() < 0.1 * before.norm()


@pytest.mark.parametrize(
    "options", [{"training": True}, {"threshold": "static", "calibration": [torch.randn(5, 32)]}]
)
def test_what_experts_have_not(options: dict[str, Any]) -> None:
    model = Model()
    report = spiking.spike(model, **options)
    assert [r.name for r in report.replaced] == ["router"]
    assert report.kept == {"up": "experts: adaptive thresholds, no budget and inference only"}
    assert isinstance(model.up, ExpertLinear)


class Mixture(nn.Module):
    """A gated mixture; the first expert sees few rows, the last none."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = ExpertLinear(4, 48, 40), ExpertLinear(4, 48, 40)
        self.down = ExpertLinear(4, 40, 24)

    def forward(self, x: Tensor) -> Tensor:
        expert = (x[:, 0] > 0).long() + 1
        expert[:10] = 0
        hidden = torch.nn.functional.silu(self.gate(x, expert)) * self.up(x, expert)
        y: Tensor = self.down(hidden, expert)
        return y


def rows(count: int, seed: int) -> Tensor:
    """Rows whose channels depend on each other: 6 dimensions and a little noise."""
    generator, mix = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=generator) @ torch.randn(6, 48, generator=mix)
    return x + 0.05 * torch.randn(count, 48, generator=generator)


@torch.no_grad()
def test_experts_are_calibrated_by_the_rows_sent_to_them() -> None:
    def spiked(calibration: list[Tensor] | None) -> tuple[Mixture, spiking.SpikeReport, float]:
        torch.manual_seed(0)
        model = Mixture()
        x = rows(500, 1)
        wanted = model(x)[10:]
        report = spiking.spike(model, bits=4, calibration=calibration)
        return model, report, float((model(x)[10:] - wanted).norm() / wanted.norm())

    _, _, plain = spiked(None)
    model, report, calibrated = spiked([rows(600, seed) for seed in (2, 3)])
    assert calibrated < 0.75 * plain
    assert report.calibrated and report.unfitted == {name: [0, 3] for name in ("gate", "up", "down")}
    assert "too few rows seen to change weights: up, experts 0, 3" in str(report)
    assert torch.equal(model.gate.channel_scale, model.up.channel_scale)  # which fire once for both
    torch.manual_seed(0)
    kept = Mixture().up.weight.detach()
    told = model.up.weight()
    step = (model.up.scale * model.up.channel_scale.max()).amax()
    assert (told[[0, 3]] - kept[[0, 3]]).abs().max() <= step
    assert (told[[1, 2]] - kept[[1, 2]]).abs().max() > step


def test_silence_of_experts_is_measured_and_told() -> None:
    torch.manual_seed(0)
    model = Mixture()
    spiking.spike(model, only=["down"])
    found = spiking.measure_silence(model, [rows(50, 1) * (torch.arange(48) < 9)])
    assert isinstance(model.down, SpikeExpertLinear)
    assert found == {"down": model.down.silent} and 0 < found["down"] < 1
    model.down.silent = -1
    with pytest.raises(SpikingError, match=r"silent = -1\n.*it is a share"):
        model(rows(20, 1))


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model = Model()
    with torch.no_grad():
        model.up.weight[2, 3, 4] = torch.nan
    with pytest.raises(SpikingError, match=r"(?s)NaN or infinite.*at: up"):
        spiking.spike(model, only=["up"])
