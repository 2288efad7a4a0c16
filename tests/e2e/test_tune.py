"""Models compiled with other settings of kernels compute the same; the search stores what it found in the artifact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import spikingbrain
from spikingbrain import tuning
from spikingbrain.errors import ArtifactError, OptionError, TargetError
from spikingbrain.models.spiking import spike
from spikingbrain.models.spikingbrain import SpikingBrain, tiny_7b
from spikingbrain.tools import cli

EXTREME = {
    "l2_bytes": 1 << 10,
    "linear_streams": 1,
    "spike_ahead_bytes": 0,
    "firing_percent": 0,
    "event_steps_ahead": 0,
    "decode_keys": 16,
    "query_rows": 16,
    "recurrence_steps": 4,
}


@pytest.mark.slow
def test_settings_do_not_change_results(tmp_path: Path) -> None:
    """Linear and window attention, spiking projections, a float head: all kernels that have settings but those of events."""
    torch.manual_seed(0)
    model = SpikingBrain(replace(tiny_7b(), layers=tiny_7b().layers[:2], window=40)).eval()
    spike(model)
    state, tokens = model.initial_state(1, 64), torch.zeros(1, 5, dtype=torch.int64)
    entries = {
        "prefill": spikingbrain.Entry((tokens, state), {}, {"tokens_BT": {1: Dim("T", min=1, max=64)}}),
        "decode": spikingbrain.Entry((tokens[:, :1], state)),
    }
    ids = np.random.default_rng(0).integers(0, 256, (1, 50))
    results = []
    for name, options in (("usual", {}), ("extreme", {"tuning": EXTREME})):
        artifact = spikingbrain.export(
            model, entries, tmp_path / f"{name}.sbrain", state="state", options=options
        )
        program = spikingbrain.load(artifact)
        own = program.new_state()
        results.append([program.prefill(ids[:, :-1], state=own), program.decode(ids[:, -1:], state=own)])
        assert artifact.manifest["options"] == options
    for usual, extreme in zip(*results, strict=True):
        np.testing.assert_allclose(usual, extreme, atol=1e-5)
    assert tuning.read(tmp_path / "extreme.sbrain") == EXTREME


def test_a_search_stores_what_it_tried(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(300, 40).eval(), torch.randn(1, 300)
    path = tmp_path / "tuned.sbrain"
    calls = {"main": [x.numpy()]}
    said: list[str] = []
    entries = {"main": spikingbrain.Entry((x,))}
    made = spikingbrain.tune(
        model, entries, path, calls, settings=["linear_streams"], rounds=3, progress=said.append
    )
    tried = [t for t in made.manifest["tuned"]["trials"] if t["setting"] == "linear_streams"]
    assert [t["value"] for t in tried] == [2, 8]
    assert all(t["faster"]["main"] > 0 < t["noise"]["main"] for t in tried)  # other code, and timed
    assert sum(s.startswith("linear_streams") for s in said) == 2
    kept = {t["setting"]: t["value"] for t in tried if t["kept"]}
    assert made.manifest["options"].get("tuning", {}) in (kept, {})
    got = spikingbrain.load(path).main(x.numpy())
    np.testing.assert_allclose(got, model(x).detach().numpy(), atol=1e-5)
    with pytest.raises(OptionError, match="no entry point 'other'"):
        spikingbrain.tune(model, entries, path, {"other": []})
    with pytest.raises(TargetError, match="'riscv64' cannot be searched here"):
        spikingbrain.tune(model, entries, path, calls, target="riscv64")


def test_settings_of_an_artifact_are_told_and_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.zeros(1, 300)
    model, entries = nn.Linear(300, 40).eval(), {"main": spikingbrain.Entry((x,))}
    path = tmp_path / "tuned.sbrain"
    options = {"tuning": {"linear_streams": 2}}
    tuned = spikingbrain.export(model, entries, path, options=options)
    usual = spikingbrain.export(model, entries, tmp_path / "usual.sbrain")
    assert tuning.read(path) == options["tuning"]
    assert {**tuned.code_for(tuned.targets[0])} != {**usual.code_for(usual.targets[0])}
    assert cli.main(["report", str(path)]) == 0
    assert "settings of kernels for cpu: linear_streams 2" in capsys.readouterr().out
    with pytest.raises(ArtifactError, match="settings that every export has"):
        tuning.read(usual.path)
    assert cli.main(["tune", str(path), "-o", str(tmp_path / "again.sbrain")]) == 1
    assert "it holds code, and not the model" in capsys.readouterr().err
    with pytest.raises(OptionError, match="unknown setting 'streams'"):
        spikingbrain.export(model, entries, path, options={"tuning": {"streams": 2}})
