"""The debug mode check_finite: the first spiking layer whose input holds NaN or infinity is named, through every door."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spikingbrain
from spikingbrain.errors import NotFinite, OptionError
from spikingbrain.frontend.dynamo.options import parse
from spikingbrain.models import spiking
from spikingbrain.models.spiking import SpikeLinear, SpikeLinearTraining, SpikingError

C = 16
NAN, INFINITY = float("nan"), float("inf")


class Model(nn.Module):
    """Spiking layers in a row and side by side, and one that is written down and left in floats."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(SpikeLinear.of(nn.Linear(C, C)) for _ in range(2))
        self.gate, self.up = (SpikeLinear.of(nn.Linear(C, C, bias=False)) for _ in range(2))
        self.last = nn.Parameter(torch.randn(C, C))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.log(layer(x).abs())
        y = self.gate(x) * self.up(x)
        v = (y.abs().mean(-1, keepdim=True) / 3).clamp(1e-5, 1e4)
        return nn.functional.linear(torch.round(y / v) * v, self.last)


class WithState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(x + state), state + 1


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def test_compiled_names_the_first_layer_and_row() -> None:
    model = Model()
    fast = spikingbrain.compile(model, check_finite=True)
    for steps in (3, 5, 7):  # sizes become symbols
        x = torch.randn(2, steps, C)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-3)
        x[1, 2, 3] = NAN
        x[1, 1] = -INFINITY
        for _ in range(2):
            with pytest.raises(
                NotFinite, match=r"layer 'layers\.0' holds infinity in row \[1, 1\]\n  at: .*\n(.|\n)*2 of"
            ):
                fast(x)
        x[1, 2, 4] = INFINITY
        x[1, 1] = 0
        with pytest.raises(NotFinite, match=r"NaN and infinity in row \[1, 2\]"):
            fast(x)
    x = torch.randn(2, 7, C)
    for name, where in (("layers.0", "'layers.1'"), ("layers.1", "'gate, up'"), ("gate", r"layer holds")):
        bad = model.get_submodule(name)
        kept = bad.scale[5].clone()
        bad.scale[5] = NAN
        with pytest.raises(NotFinite, match=f"{where}(.|\n)*14 of 14 rows"):
            fast(x)
        bad.scale[5] = kept
    torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-3)


def test_exported_names_it_and_keeps_its_results_and_state(tmp_path: Path) -> None:
    model, example = WithState(), (torch.randn(2, 4, C), torch.zeros(2, 1, C))
    shapes = {"x": {1: torch.export.Dim("T", min=1, max=64)}}
    entries = {"main": spikingbrain.Entry(example, {}, shapes)}
    artifact = spikingbrain.export(model, entries, tmp_path / "m.sbrain", state="state", check_finite=True)
    layers = [watched["layer"] for watched in artifact.manifest["entries"]["main"]["watched"]]
    assert layers == ["model.layers.0", "model.layers.1", "model.gate, model.up", "model"]
    assert len(artifact.manifest["entries"]["main"]["outputs"]) == 1
    program = spikingbrain.load(artifact)
    state = program.new_state()
    for step, steps in enumerate((4, 1, 9)):
        x = torch.randn(2, steps, C)
        wanted, _ = model(x, torch.full((2, 1, C), float(step)))
        np.testing.assert_allclose(program.main(x, state=state), wanted, rtol=1e-3, atol=1e-3)
    x[0, 3, 1] = NAN
    with pytest.raises(
        NotFinite,
        match=r"'model\.layers\.0' holds NaN in row \[0, 3\]\n  at: .*linear\.py(.|\n)*1 of 18 rows",
    ):
        program.main(x, state=state)
    wanted, _ = model(example[0], torch.full((2, 1, C), 4.0))
    np.testing.assert_allclose(program.main(example[0], state=state), wanted, rtol=1e-3, atol=1e-3)


def test_training_is_checked() -> None:
    model = nn.Sequential(SpikeLinearTraining(C, C), nn.GELU(), SpikeLinearTraining(C, 4))
    with torch.enable_grad():
        fast = spikingbrain.compile(model, check_finite=True)
        x = torch.randn(5, C)
        fast(x).sum().backward()
        got = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(x).sum().backward()
        for actual, parameter in zip(got, model.parameters(), strict=True):
            torch.testing.assert_close(actual, parameter.grad, rtol=1e-4, atol=1e-4)
        x[3, 4] = INFINITY
        with pytest.raises(NotFinite, match=r"layer '0' holds infinity in row \[3\]"):
            fast(x)


def test_eager_layers_are_checked() -> None:
    model, x = Model(), torch.randn(2, 3, C)
    with spiking.check_finite(model):
        torch.testing.assert_close(model(x), model(x))
        x[1, 2, 3] = NAN
        with pytest.raises(SpikingError, match=r"'layers\.0' holds NaN in row \[1, 2\]\n(.|\n)*1 of 6 rows"):
            model(x)
    assert model(x).isnan().any()


def test_level_0_refuses() -> None:
    with pytest.raises(OptionError, match="check_finite at level 0"):
        parse({"check_finite": True, "level": 0})
