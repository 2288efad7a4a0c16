"""Weights that expect the rounding of their inputs, and weights that are rounded together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spikingbrain.models import spiking
from spikingbrain.models.spiking.compensate import Compensation, rounded_together
from spikingbrain.models.spiking.errors import SpikingError
from spikingbrain.models.spiking.quantise import weight_scale


class Forked(nn.Module):
    """Two layers that share their input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(48, 40), nn.Linear(48, 40), nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(torch.tanh(self.a(x)) * self.b(x))
        return y


@pytest.fixture
def model() -> Forked:
    torch.manual_seed(0)
    return Forked().eval()


def texts(count: int) -> list[Tensor]:
    """Inputs whose channels depend on each other: 6 dimensions and a little noise."""
    generator = torch.Generator().manual_seed(count)
    mix = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    return [
        torch.randn(2, 50, 6, generator=generator) @ mix + 0.05 * torch.randn(2, 50, 48, generator=generator)
        for _ in range(count)
    ]


def told(_: str, x: Tensor) -> Tensor:
    return spiking.spiking(x)


def test_the_weights_are_those_of_least_squares(model: Forked) -> None:
    calls = texts(8)
    found = Compensation(model, {"a": model.a, "b": model.b}, calls, told, damping=0.0)
    x = torch.cat([call.flatten(0, 1) for call in calls])
    for name, layer in (("a", model.a), ("b", model.b)):
        with torch.no_grad():
            wanted = torch.linalg.lstsq(spiking.spiking(x).double(), (x @ layer.weight.mT).double()).solution
        torch.testing.assert_close(found.weight(name).double(), wanted.mT, atol=2e-4, rtol=1e-3)


def test_layers_with_one_input_share_what_is_gathered(model: Forked) -> None:
    found = Compensation(model, {"a": model.a, "b": model.b, "c": model.c}, texts(2), told)
    assert found.products("a") is found.products("b") and found.products("c")[0].tokens == 200


def test_several_passes_gather_the_same(model: Forked) -> None:
    layers = {"a": model.a, "b": model.b, "c": model.c}
    whole = Compensation(model, layers, texts(2), told)
    pieces = Compensation(model, layers, texts(2), told, memory=1)
    for name in layers:
        assert torch.equal(whole.weight(name), pieces.weight(name))


def test_a_calibrated_model_errs_less() -> None:
    @torch.no_grad()
    def error(calibration: list[Tensor] | None) -> float:
        torch.manual_seed(0)
        model = Forked().eval()
        wanted = [model(x) for x in texts(3)]
        spiking.spike(model, bits=4, calibration=calibration)
        return sum(float((model(x) - y).norm() / y.norm()) for x, y in zip(texts(3), wanted, strict=True))

    assert error(texts(20)) < 0.75 * error(None)


def test_independent_channels_are_rounded_to_nearest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(10, 24)
    scale = weight_scale(weight, 8, 4)
    codes = rounded_together(weight, scale, torch.eye(24, dtype=torch.float64) * 3, 7)
    nearest = (weight / scale.repeat_interleave(8, 1)).round()
    assert torch.equal(codes, nearest)


def test_rounding_together_errs_less_than_to_nearest() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(20, 200), torch.randn(500, 30) @ torch.randn(30, 200)
    scale = weight_scale(weight, None, 4)
    products = x.double().mT @ x.double() + 0.01 * torch.eye(200)
    codes = rounded_together(weight, scale, products, 7)
    assert codes.abs().max() <= 7 and torch.equal(codes, codes.round())
    nearest = (weight / scale).round()
    ours, theirs = (((c * scale - weight) @ x.mT).norm() for c in (codes, nearest))
    assert ours < 0.5 * theirs


def test_a_layer_that_no_call_reaches_is_named(model: Forked) -> None:
    found = Compensation(model, {"a": model.a, "other": nn.Linear(48, 2)}, texts(1), told)
    with pytest.raises(SpikingError, match=r"saw nothing(.|\n)*other"):
        found.weight("a")
