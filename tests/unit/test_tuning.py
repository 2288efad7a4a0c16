"""Settings of kernels, and the search for them with programs whose times are made up."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spikingbrain import tuning
from spikingbrain.build import options_by_target
from spikingbrain.errors import OptionError
from spikingbrain.search import Built, Found, Timing, known, relevant, search
from spikingbrain.target import Target
from spikingbrain.tuning import SETTINGS, USUAL, tuned

CALLS: dict[str, list[Any]] = {"prefill": [], "decode": []}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decode_key": 128}, "unknown setting 'decode_key'"),
        ({"decode_keys": 100}, "16 to 4096 in steps of 16"),
        ({"decode_keys": 128.0}, "16 to 4096"),
        ({"linear_streams": 3}, "one of 1, 2, 4, 8, 16"),
        ({"recurrence_steps": 32}, "4 to 16"),
        ({"firing_percent": "45"}, "0 to 800"),
        ({"l2_bytes": True}, "1024 to"),
    ],
)
def test_what_cannot_be_a_setting_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        USUAL.with_changes(changes)


def test_settings_are_those_that_kernels_read() -> None:
    options = SimpleNamespace(tuning={"decode_keys": 256})
    assert tuned(Target("cpu", "cpu", "iree", "x86-64"), options).tuning.decode_keys == 256
    vulkan = Target("vulkan", "gpu", "iree", "spirv")
    for name in ("decode_keys", "share_keys"):
        with pytest.raises(OptionError, match=f"kernels for vulkan do not read '{name}'"):
            tuned(vulkan, SimpleNamespace(tuning={name: 256}))
    with_waves = dataclasses.replace(vulkan, wave_kernels=True)
    assert tuned(with_waves, SimpleNamespace(tuning={"share_keys": 256})).tuning.share_keys == 256


def test_each_of_several_targets_takes_its_own() -> None:
    both = {"decode_keys": 256, "share_keys": 64}
    found = options_by_target("maca,cpu", {"tuning": both})
    assert found == {"maca": {"tuning": {"share_keys": 64}}, "cpu": {"tuning": {"decode_keys": 256}}}
    assert options_by_target("cpu", {"tuning": both}) == {"cpu": {"tuning": both}}  # refused later
    with pytest.raises(OptionError, match="unknown setting 'keys'"):
        options_by_target("maca,cpu", {"tuning": {"keys": 1}})


def test_the_page_names_every_setting() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text().partition("## Triton kernels")[0]
    told = {row[0]: row[1:3] for row in re.findall(r"^\| `(\w+)` \| (\d+) \| ([\d, ]+) \|", page, re.M)}
    usual = dataclasses.asdict(USUAL)
    assert told == {n: (str(usual[n]), ", ".join(map(str, s.tried))) for n, s in SETTINGS.items()}
    assert all(s.allowed.count(usual[n]) and all(map(s.allowed.count, s.tried)) for n, s in SETTINGS.items())


def test_settings_are_read_from_json(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    file.write_text(json.dumps({"query_rows": 32}))
    assert tuning.read(file) == {"query_rows": 32}
    file.write_text("[]")
    with pytest.raises(OptionError, match="holds no settings"):
        tuning.read(file)
    with pytest.raises(OptionError, match="cannot read"):
        tuning.read(tmp_path / "missing.json")


class _Machine:
    """Programs that take made-up seconds, read by a clock of their own: `factors` of a setting's value, for each entry point.

    With such a value, an entry point's results are off by what ``wrong`` says.
    """

    def __init__(
        self,
        factors: Mapping[Any, tuple[float, float]],
        noise: float = 0.0,
        wrong: Mapping[str, float] | None = None,
    ) -> None:
        self.factors, self.noise, self.wrong, self.now = factors, noise, wrong or {}, 0.0
        self.random = np.random.default_rng(0)

    def build(self, settings: Mapping[str, Any]) -> Built:
        chosen = [self.factors[item] for item in settings.items() if item in self.factors]
        prefill, decode = np.prod([(1.0, 0.3), *chosen], axis=0)
        seconds = {"prefill": prefill, "decode": decode}

        def call(entry: str, *_: Any, state: None) -> list[Any]:
            self.now += seconds[entry] * (1 + self.noise * self.random.standard_normal())
            return [np.array([1.0, self.wrong.get(entry, 0.0) if chosen else 0.0])]

        entries = {name: SimpleNamespace(uses_state=False) for name in seconds}
        program: Any = SimpleNamespace(entries=entries, call=call)
        return Built(sorted(i for i in settings.items() if i in self.factors), program)

    def search(self, *settings: str) -> Found:
        return search(self.build, Timing(CALLS, clock=lambda: self.now), settings)


def test_what_is_faster_is_kept_and_built_upon() -> None:
    machine = _Machine(
        {("decode_keys", 64): (1.0, 0.9), ("decode_keys", 256): (1.0, 0.8), ("query_rows", 32): (0.7, 1.0)}
    )
    found = machine.search("decode_keys", "query_rows", "recurrence_steps")
    assert found.settings == {"decode_keys": 256, "query_rows": 32}
    tried = {(t.setting, t.value): t for t in found.trials[:-1]}
    assert not tried["decode_keys", 64].kept and tried["decode_keys", 256].kept
    faster = tried["query_rows", 32].outcome.faster  # type: ignore[union-attr]
    np.testing.assert_allclose(faster["prefill"], 1 / 0.7)
    assert tried["query_rows", 128].outcome is None  # the same code
    last = found.trials[-1]
    assert last.setting == "all" and last.kept and last.outcome
    np.testing.assert_allclose(list(last.outcome.faster.values()), [1 / 0.7, 1 / 0.8])


def test_what_costs_another_entry_point_is_not_kept() -> None:
    assert _Machine({("decode_keys", 256): (1.1, 0.5)}).search("decode_keys").settings == {}


def test_a_gain_within_noise_is_not_kept() -> None:
    factors = {("decode_keys", 256): (1.0, 0.96)}
    assert _Machine(factors).search("decode_keys").settings == {"decode_keys": 256}
    assert _Machine(factors, noise=0.2).search("decode_keys").settings == {}


@pytest.mark.parametrize("wrong", [0.01, np.nan, np.inf])
@pytest.mark.parametrize("entry", list(CALLS))
def test_other_results_are_never_kept(entry: str, wrong: float) -> None:
    factors = {("decode_keys", 256): (0.5, 0.5)}
    found = _Machine(factors, wrong={entry: wrong}).search("decode_keys")
    assert found.settings == {} and "other results" in str(found.trials[1])
    assert _Machine(factors, wrong={entry: 1e-5}).search("decode_keys").settings == {"decode_keys": 256}


def test_a_budget_ends_the_search() -> None:
    machine = _Machine({("decode_keys", 256): (0.5, 0.5)})
    found = search(machine.build, Timing(CALLS), ["decode_keys", "query_rows"], budget=-1.0)
    assert found == Found({}, (), ("decode_keys", "query_rows"))


def test_settings_of_another_machine_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    for name, told in ((tuning.cpu(), 0), ("another", 1)):
        tuning.warn_of_another(SimpleNamespace(path="a", manifest={"tuned": {"cpu": name}}))  # type: ignore[arg-type]
        assert len(caplog.records) == told
    assert "tuned on 'another'" in caplog.text


def test_only_what_kernels_of_the_model_read_is_searched() -> None:
    def found(op: str, reason: str) -> list[str]:
        return relevant([{"status": "lowered", "op": f"spikingbrain.{op}", "reason": reason}], "cpu")

    assert found("attention", "kernel") == ["decode_keys", "query_rows"]
    assert found("attention", "linalg: why") == found("spike_linear", "linalg: why") == []
    assert "firing_percent" in found("spike_linear", "kernel of events, 80% silent")
    assert found("spike_linear", "kernel") == ["spike_ahead_bytes"]
    with pytest.raises(OptionError, match="no setting 'tiles'"):
        known(["tiles"], "cpu")
