"""Event files and golden vectors: they give back the counts and the outputs of their layers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spike_models import Shared, seen, static
from torch import Tensor

from spikingbrain.models import spiking
from spikingbrain.models.spiking import Budget, SpikingError
from spikingbrain.models.spiking.events import events, write_events
from spikingbrain.models.spiking.golden import write_golden
from spikingbrain.models.spiking.observe import LayerCounts


@pytest.fixture
def model() -> Shared:
    torch.manual_seed(0)
    return Shared()


# Event files


def test_events_give_the_counts_back(tmp_path: Path) -> None:
    inputs = [seen([[0, 1, -2], [5, 0, -17]]), LayerCounts(("other",), 1, torch.tensor([[3]]), torch.ones(1))]
    for coding in spiking.CODINGS:
        number = write_events(tmp_path / "e.csv", inputs, coding)
        assert write_events(tmp_path / "e.npz", inputs, coding) == number
        rows = list(csv.reader((tmp_path / "e.csv").open()))
        assert rows[0] == ["layer", "token", "step", "neuron", "sign"] and len(rows) == number + 1
        stored = np.load(tmp_path / "e.npz")
        names = [str(stored["layers"][i]) for i in stored["layer"]]
        columns = [stored[f].tolist() for f in ("token", "step", "neuron", "sign")]
        as_text = [list(map(str, row)) for row in zip(names, *columns, strict=True)]
        assert rows[1:] == as_text and str(stored["coding"]) == coding
        told = inputs[0].counts if coding in spiking.codings.SIGNED else inputs[0].counts.abs()
        weights = spiking.codings.step_weights(spiking.steps_needed(told, coding), coding).tolist()
        counts = torch.zeros(2, 3, dtype=torch.int64)
        for layer, token, step, neuron, sign in rows[1:]:
            if layer == "layer":
                counts[int(token), int(neuron)] += weights[int(step)] * int(sign)
        torch.testing.assert_close(counts, inputs[0].counts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.csv", "e.npz"]


def test_events_of_a_budget_are_those_that_it_holds() -> None:
    (token,) = events(seen([[9, -1]], budget=Budget(2)))
    assert token.tolist() == [[0, 0, 0, 1], [0, 0, 1, -1], [0, 1, 0, 1]]


def test_events_of_an_unknown_kind_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(SpikingError, match=r"a file \.csv or \.npz"):
        write_events(tmp_path / "e.txt", [seen([[1]])])
    with pytest.raises(SpikingError, match="unknown coding"):
        write_events(tmp_path / "e.csv", [seen([[1]])], "morse")
    assert not list(tmp_path.iterdir())


# Golden vectors


@pytest.mark.parametrize("budget", [None, Budget(2), Budget(2, "ternary", "drop")])
@pytest.mark.parametrize("static", [False, True])
def test_golden_vectors_say_how_the_output_comes_about(
    model: Shared, tmp_path: Path, budget: Budget | None, static: bool
) -> None:
    x = torch.randn(5, 8)
    expected: dict[str, Tensor] = {}
    how: dict[str, Any] = {"threshold": "static", "calibration": [x]} if static else {}
    spiking.spike(model, 3.0, 4, budget=budget, only=["a", "b"], **how)
    for name in ("a", "b"):
        expected[name] = getattr(model, name)(x)
    assert write_golden(model, [x, x + 1], tmp_path / "golden") == 2
    index = json.loads((tmp_path / "golden" / "index.json").read_text())
    assert list(index["layers"]) == ["b", "a"]
    for name, about in index["layers"].items():
        z = np.load(tmp_path / "golden" / about["file"])
        assert {n: [str(z[n].dtype), list(z[n].shape)] for n in z.files} == about["arrays"]
        weights = np.array(about["step_weights"])
        held = (z["train"].astype(np.int64) * weights[:, None, None]).sum(0)
        np.testing.assert_array_equal(held + z["remainder"], z["counts"])
        if budget is None or budget.remainder == "exact":
            np.testing.assert_array_equal(np.round(z["input"] / z["threshold"][:, None]), z["counts"])
        counts, codes = z["counts"].astype(np.int64), z["codes"].astype(np.int64)
        sums = np.einsum("tgc,ngc->tng", counts.reshape(5, 2, 4), codes.reshape(-1, 2, 4))
        np.testing.assert_array_equal(sums, z["sums"])
        y = z["threshold"][:, None] * (z["scale"] * z["sums"]).sum(-1) + (z["bias"] if name == "a" else 0)
        np.testing.assert_allclose(y, z["output"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(z["output"], expected[name].numpy())


def test_trains_of_many_thousand_steps_are_not_written(tmp_path: Path) -> None:
    layer = static(2, 1, 0.5, 7)
    layer.budget = None
    with pytest.raises(SpikingError, match="a train of 20000 steps"):
        write_golden(layer, [torch.tensor([[10_000.0, 0.0]])], tmp_path / "golden", "ternary")
    assert write_golden(layer, [torch.tensor([[10_000.0, 0.0]])], tmp_path / "golden") == 1


def test_golden_vectors_overwrite_nothing(model: Shared, tmp_path: Path) -> None:
    spiking.spike(model)
    (tmp_path / "golden").mkdir()
    write_golden(model, [torch.randn(1, 8)], tmp_path / "golden")  # an empty folder is filled
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(SpikingError, match="is there already"):
        write_golden(model, [torch.randn(1, 8)], tmp_path / "golden")
    with pytest.raises(SpikingError, match="no folder"):
        write_golden(model, [torch.randn(1, 8)], tmp_path / "none" / "golden")
    with pytest.raises(RuntimeError):
        write_golden(model, [torch.randn(1, 9)], tmp_path / "broken")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
