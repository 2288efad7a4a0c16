"""Settings of kernels for MetaX GPUs are searched: by a model without a card, by time on a card that is pretended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_mlir")

from test_maca import needs_cxx
from test_maca_device import card, clean, runtimes  # noqa: F401

import spikingbrain
from spikingbrain.errors import OptionError
from spikingbrain.frontend.ops import linear_recurrence
from spikingbrain.tools import cli

SIZES = [(1, 3, 1, 8), (1, 3, 1, 8), (1, 3, 1, 1024)]  # 64 waves of 16 columns


class Recurrence(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_recurrence(q, k, v)[0]


def tuned(path: Path, target: str, settings: list[str], **more: Any) -> Any:
    torch.manual_seed(0)
    given = [torch.randn(size) for size in SIZES]
    entries = {"main": spikingbrain.Entry(tuple(given))}
    calls = {"main": [x.numpy() for x in given]}
    made = spikingbrain.tune(Recurrence(), entries, path, calls, target=target, settings=settings, **more)
    return made, Recurrence()(*given), calls["main"]


def test_a_model_judges_without_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tuned.sbrain"
    made, _, _ = tuned(path, "maca", ["step_waves"])
    told = made.manifest["tuned"]
    assert told["judged_by"] == "a cost model, not a measurement" and "cpu" not in told
    trials = {t["value"]: t for t in told["trials"] if t["setting"] == "step_waves"}
    assert trials[4]["faster"]["main"] > 1.0 < trials[8]["faster"]["main"]  # more processors have work
    kept = max(trials, key=lambda waves: trials[waves]["faster"]["main"])
    assert made.manifest["options"] in ({}, {"tuning": {"step_waves": kept}})
    assert "work" not in made.manifest["options"]
    assert cli.main(["report", str(path)]) == 0
    assert "searched, by a cost model, not a measurement\n" in capsys.readouterr().out
    with pytest.raises(OptionError, match="no setting 'decode_keys'"):
        tuned(path, "maca", ["decode_keys"])


@needs_cxx
@pytest.mark.slow
def test_the_emulator_compares_results(tmp_path: Path) -> None:
    made, expected, given = tuned(tmp_path / "tuned.sbrain", "maca-emulator", ["staged_steps"])
    trial, _ = made.manifest["tuned"]["trials"]  # 4 steps are all, 16 as many
    assert trial["difference"] == 0.0
    found = spikingbrain.load(made, device="maca-emulator").main(*given)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@needs_cxx
def test_time_judges_on_a_card(card: Any, tmp_path: Path) -> None:  # noqa: F811
    made, expected, given = tuned(tmp_path / "tuned.sbrain", "maca", ["step_waves"], rounds=3)
    told = made.manifest["tuned"]
    assert told["judged_by"] == "time"
    trial = told["trials"][0]
    assert trial["noise"]["main"] > 0 and trial["difference"] < 1e-6
    np.testing.assert_allclose(spikingbrain.load(made).main(*given), expected, atol=1e-5)
