"""One artifact with code for several targets: which of it runs, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import spikingbrain
from spikingbrain import errors
from spikingbrain.artifact import REPORT, Artifact
from spikingbrain.tools import cli

X = torch.linspace(-2, 2, 3 * 24).reshape(3, 24)


class Counting(nn.Module):
    """Two projections, and the sum of all results so far."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 33), nn.Linear(33, 7, bias=False)

    def forward(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> Any:
        y = self.down(torch.relu(self.up(x)))
        return y, {"sum": state["sum"] + y.sum(0)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    return Counting().eval()


def export(model: nn.Module, path: Path, **options: Any) -> Artifact:
    entry = spikingbrain.Entry(
        (X, {"sum": torch.zeros(7)}), dynamic_shapes={"x": {0: torch.export.Dim("N", max=9)}}
    )
    return spikingbrain.export(model, {"main": entry}, path, state="state", **options)


@pytest.fixture(scope="module")
def both(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("targets") / "both.sbrain"
    export(model, path, target="maca, cpu", options={"providers": "linear=own,matmul=own"})
    return path


def test_each_device_runs_its_code(model: nn.Module, both: Path) -> None:
    wanted = model(X, {"sum": torch.zeros(7)})[0].detach()
    for device, ran in [("cpu", "cpu"), ("maca-emulator", "maca")]:
        program = spikingbrain.load(both, device=device)
        assert program.manifest["target"]["name"] == ran
        state = program.new_state()
        for _ in range(2):
            np.testing.assert_allclose(program.main(X.numpy(), state=state), wanted, atol=1e-5)
        np.testing.assert_allclose(state.field("sum"), 2 * wanted.sum(0), atol=1e-4)


def test_without_a_choice_the_first_that_runs_here_does(both: Path) -> None:
    cards = {s.target.name: s.runs for s in spikingbrain.targets()}
    assert spikingbrain.load(both).manifest["device"] == ("maca" if cards["maca"] else "cpu")


def test_a_reader_that_knows_one_target_finds_the_first(both: Path) -> None:
    artifact = Artifact(both)
    assert artifact.manifest["format"] == 1
    assert artifact.manifest["target"]["name"] == "maca"
    assert {"code/kernels.maca", "code/plan.json", "code/cpu/module.vmfb"} <= set(
        artifact.manifest["members"]
    )
    assert "kernels.maca" in artifact.code
    assert not any("/" in name for name in artifact.code)
    reports = json.loads(bytes(artifact.member(REPORT)))
    stored = {*reports["weights"], *reports["further_targets"]["cpu"]["weights"]}
    assert stored == set(artifact.weights())
    assert artifact.targets[1]["options"] == {}
    assert artifact.manifest["options"] == {"providers": "linear=own,matmul=own"}


def test_devices_that_do_not_fit_are_refused(both: Path) -> None:
    with pytest.raises(
        errors.WrongTarget, match="no code that riscv64 runs\n  because: it has code for maca, cpu"
    ):
        spikingbrain.load(both, device="riscv64")
    with pytest.raises(errors.TargetError, match="unknown target 'abacus'"):
        spikingbrain.load(both, device="abacus")


def test_when_nothing_runs_here_each_reason_is_given(model: nn.Module, tmp_path: Path) -> None:
    artifact = export(model, tmp_path / "none.sbrain", target=["cuda", "maca-cuda"])
    if any(s.runs for s in spikingbrain.targets() if s.target.name in ("cuda", "maca-cuda")):
        pytest.skip("a card is here")
    with pytest.raises(
        errors.WrongTarget, match=r"has code for cuda, maca-cuda: none runs here\n  because: .*; "
    ):
        spikingbrain.load(artifact)


def test_options_that_no_target_knows(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(errors.OptionError, match="unknown option 'colour' for maca, cpu"):
        export(model, tmp_path / "a", target="maca,cpu", options={"colour": 1})
    with pytest.raises(errors.OptionError, match="no target"):
        export(model, tmp_path / "a", target=" ,")


def test_the_report_names_all_targets(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(both)]) == 0
    assert ": for maca (maca), cpu (" in capsys.readouterr().out
