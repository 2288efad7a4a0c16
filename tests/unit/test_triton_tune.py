"""Settings of the Triton kernels: what they may be, that launches follow them, and the search, with a clock that pretends."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime import OutOfResources

from spikingbrain.backend_maca.triton import resources, settings, tune
from spikingbrain.errors import OptionError, TargetError

SMALL = tune.Sizes(40, 64, 96, 4, 2, 32, 64)
SHAPES = tune.problems(SMALL, "meta")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"decode_keys": 64}, "unknown setting 'decode_keys'"),
        ({"scan_warps": 3}, "scan_warps is 3\n  because: it must be one of 1, 2, 4, 8"),
        ({"scan_warps": True}, "scan_warps is True"),
        ([1], "holds no settings"),
        ("nowhere.json", "cannot read nowhere.json"),
    ],
)
def test_what_cannot_be_a_setting_is_refused(given: Any, words: str) -> None:
    with pytest.raises(OptionError, match=re.escape(words)):
        settings.read(given)


def test_settings_of_another_device_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"tuning": {"scan_warps": 8}, "device": "C500"}))
    assert settings.read(file, "C500") == {"scan_warps": 8} and not caplog.records
    assert settings.read(str(file), "H200") == {"scan_warps": 8}
    assert "was tuned for 'C500', this is 'H200'" in caplog.text


def test_the_page_names_every_setting() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| ([\d, ]+) \| (\w+)", page, re.M)
    of_triton = [row for row in rows if row[0] in settings.SETTINGS]
    usual = vars(settings.USUAL)
    assert of_triton == [
        (name, str(usual[name]), ", ".join(map(str, s.tried)), s.ops) for name, s in settings.SETTINGS.items()
    ]


def launches(op: str, dtype: str, changes: dict[str, int]) -> list[str]:
    sizes = tune.Sizes(2048, 512, 1024, 4, 2, 128, 4096, dtype)
    with settings.using(changes), resources.recorded() as found:
        for problem in tune.problems(sizes, "meta")[op].values():
            problem()
    return [f"{x.key} {x.grid}" for x in found]


@pytest.mark.parametrize("name", settings.SETTINGS)
def test_launches_follow_every_setting(name: str) -> None:
    setting, usual = settings.SETTINGS[name], vars(settings.USUAL)[name]
    dtype = "float32" if "float" in name or name == "delta_numbers" else "bfloat16"
    # the smaller of these two decides
    beside = {"attention_rows": {"attention_numbers": 16384}, "attention_numbers": {"attention_rows": 128}}
    changes = beside.get(name, {})
    found = [launches(setting.ops, dtype, changes | {name: value}) for value in (usual, *setting.tried)]
    assert found[0] == launches(setting.ops, dtype, changes)
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


class Pretended:
    """A device whose kernels take as long as it says, some of them more than it has."""

    def __init__(self, factors: dict[tuple[str, int], float], too_large: tuple[str, int] = ("", 0)):
        self.factors, self.too_large, self.now, self.off = factors, too_large, 0.0, 0.0

    def run(self) -> Sequence[Tensor]:
        chosen = vars(settings.current())
        if chosen.get(self.too_large[0]) == self.too_large[1]:
            raise OutOfResources(90000, 65536, "shared memory")
        factors = (f for (name, value), f in self.factors.items() if chosen[name] == value)
        self.now += torch.tensor([1.0, *factors]).prod().item()
        return [torch.ones(3) + (self.off if chosen["scan_warps"] == 8 else 0)]

    def search(self, *chosen: str, dtype: str = "bfloat16") -> Any:
        shapes = SHAPES["scan"]
        builder = tune.Builder(shapes, dict.fromkeys(shapes, self.run))
        sizes = dataclasses.replace(SMALL, dtype=dtype)
        compare = tune.timing(dict.fromkeys(shapes, ()), sizes, 9, lambda: self.now)
        return tune.search_op("scan", builder, compare, chosen, None, lambda _: None)


def test_kernels_are_timed_with_each_setting() -> None:
    device = Pretended(
        {("scan_warps", 8): 0.8, ("scan_stages", 2): 1.3, ("scan_channels", 64): 0.5}, ("scan_channels", 64)
    )
    found = device.search("scan_channels", "scan_warps", "scan_stages", "spike_warps")
    assert found.settings == {"scan_warps": 8}
    trials = {(t.setting, t.value): t for t in found.trials if t.setting != "all"}
    assert {name for name, _ in trials} == {"scan_channels", "scan_warps", "scan_stages"}
    assert "shared memory" in trials["scan_channels", 64].refused and not trials["scan_channels", 64].kept
    assert "shared memory" in str(trials["scan_channels", 64])
    kept = trials["scan_warps", 8].outcome
    assert kept is not None and kept.faster["prefill"] == pytest.approx(1 / 0.8) and kept.difference == 0


@pytest.mark.parametrize(
    ("dtype", "off", "kept"), [("bfloat16", 5e-3, 8), ("bfloat16", 2e-2, 0), ("float32", 5e-3, 0)]
)
def test_other_results_are_not_kept(dtype: str, off: float, kept: int) -> None:
    device = Pretended({("scan_warps", 8): 0.5})
    device.off = off
    assert device.search("scan_warps", dtype=dtype).settings == ({"scan_warps": kept} if kept else {})


def test_the_model_knows_every_kernel() -> None:
    with resources.recorded() as found:
        for problem in resources.problems().values():
            problem()
    assert {x.kernel.__name__ for x in found} == set(tune.RESULTS)
    for x in found:
        constants, _ = tune.RESULTS[x.kernel.__name__]
        assert all(isinstance(x.arguments[c], int) for c in constants)


def test_the_model_ranks_waves_and_refuses_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_device() -> None:
        raise TargetError("none")

    def compiled(launch: resources.Launch, target: str) -> resources.Usage:
        waves = launch.options["num_warps"]
        stack = 16 if launch.options["num_stages"] > 1 else 0
        return resources.Usage(launch.kernel.__name__, target, 1024, 128 // waves, stack)

    monkeypatch.setattr(tune.device, "find", no_device)
    monkeypatch.setattr(resources, "compile_launch", compiled)
    monkeypatch.setattr(resources, "missing", lambda target: "")
    path = tmp_path / "settings.json"
    assert tune.main(["-o", str(path), "--tokens", "40", "--width", "64", "--ops", "scan"]) == 0
    told = json.loads(path.read_text())
    assert told["judged_by"] == "a model for gfx942, not a measurement" and "device" not in told
    trials = {(t["setting"], t["value"]): t for t in told["trials"]}
    # 4 waves have all of 256 channels, more have nothing to do; 2 are half as many in flight
    assert {n: trials["scan_warps", n]["faster"]["prefill"] for n in (2, 8)} == {2: 0.5, 8: 1.0}
    assert told["tuning"] == {} == settings.read(path)
    assert trials["scan_stages", 2]["refused"] == "scan_elements spills 16 bytes of a thread"
    assert "not a measurement" in capsys.readouterr().out
    arguments = ["--tokens", "40", "--ops", "recurrence", "--settings", "recurrence_warps"]
    assert tune.main(["-o", str(path), *arguments]) == 0
    assert json.loads(path.read_text())["tuning"] == {"recurrence_warps": 8}  # few blocks of large tiles
    capsys.readouterr()
    assert tune.main(["-o", str(path), "--settings", "scan_channels"]) == 1
    assert "no model of scan_channels" in capsys.readouterr().err
    assert tune.main(["-o", str(path), "--heads", "5", "--key-heads", "2"]) == 1
    assert tune.main(["-o", str(path), "--head-size", "512"]) == 1
    assert "head_size is 512\n  because: heads of 512" in capsys.readouterr().err
