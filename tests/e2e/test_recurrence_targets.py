"""Recurrences on every target: vector kernels of narrower machines, the forms without kernels of graphics cards."""

from __future__ import annotations

import functools
import json
import platform
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from under_qemu import aarch64_runner, call

import spikingbrain
from spikingbrain import errors
from spikingbrain.artifact import REPORT
from spikingbrain.frontend.ops import linear_recurrence, linear_scan, selective_scan
from spikingbrain.models.reference import recurrences as reference

X86 = platform.machine() in ("x86_64", "AMD64")
B, H, S, K, V, C, N = 2, 6, 2, 20, 24, 37, 5  # rows that are no whole vectors of any machine
LENGTHS = (1, 45)  # a step of decoding, and blocks with a rest
LONGEST = 512


def lif(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A neuron that fires and is reset."""
    spikes = []
    for t in range(x.shape[1]):
        v = 0.9 * v + x[:, t]
        fired = (v >= 1).to(v.dtype)
        spikes.append(fired)
        v = v - fired
    return torch.stack(spikes, 1), v


@dataclass(frozen=True)
class Case:
    """One entry: a function of tensors whose axes are letters, at any length."""

    function: Callable[..., Any]
    reference: Callable[..., Any]
    axes: str

    def inputs(self, steps: int) -> list[Tensor]:
        sizes = {"B": B, "T": steps, "H": H, "S": S, "K": K, "V": V, "C": C, "N": N}
        generator = torch.Generator().manual_seed(steps)
        drawn = []
        for text in self.axes.split():
            axes, _, kind = text.partition(":")
            x = torch.randn([sizes[a] for a in axes], generator=generator)
            drawn.append(KINDS[kind](x))
        return drawn

    def entry(self, name: str) -> spikingbrain.Entry:
        time = Dim("T", min=1, max=LONGEST)
        tensors = self.inputs(5)
        by_tensor: list[Any] = [{1: time} if "T" in text.split(":")[0] else {} for text in self.axes.split()]
        return spikingbrain.Entry((name, tensors), dynamic_shapes={"tensors": by_tensor})


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "log": lambda x: nn.functional.logsigmoid(x) / 4,
    "factor": torch.sigmoid,
    "unit": lambda x: nn.functional.normalize(x, dim=-1),
    "erase": lambda x: -0.5 * nn.functional.normalize(x, dim=-1),
    "small": lambda x: x / 4,
    "step": nn.functional.softplus,
    "rate": lambda x: -x.abs(),
    "drive": lambda x: x.abs(),
}

RECURRENCE = "BTHK:small BTSK:small BTSV"


def recurrence(axes: str, names: str, **options: Any) -> Case:
    """Returns a case of ``linear_recurrence`` with further operands; its state is given."""

    def run(op: Callable[..., Any], *tensors: Tensor) -> Any:
        further = dict(zip(names.split(), tensors[3:], strict=True))
        return op(*tensors[:3], **further, **options)

    partial = functools.partial
    axes = f"{RECURRENCE} {axes}".strip()
    return Case(partial(run, linear_recurrence), partial(run, reference.linear_recurrence), axes)


RANK_ONE, NAMES = "BTSK:erase BTSK:unit", "erase predict"
CASES = {
    "none": recurrence("", ""),
    "head": recurrence("BTS:log BSKV", "decay state", decay_axis="head", log_decay=True),
    "key": recurrence("BTSK:log BSKV", "decay state", decay_axis="key", log_decay=True, reverse=True),
    "value": recurrence("BTSV:factor BSKV", "decay state", decay_axis="value"),
    "bonus": recurrence(
        "BTSK:log SK BSKV", "decay bonus state", decay_axis="key", log_decay=True, exclusive=True
    ),
    "delta": recurrence(f"{RANK_ONE} BSKV", f"{NAMES} state"),
    "gated_delta": recurrence(
        f"BTS:log {RANK_ONE} BSKV", f"decay {NAMES} state", decay_axis="head", log_decay=True
    ),
    "rwkv7": recurrence(f"BTSK:factor {RANK_ONE}", f"decay {NAMES}", decay_axis="key", exclusive=True),
    "scan": Case(linear_scan, reference.linear_scan, "BTC:factor BTC BC"),
    "mamba": Case(selective_scan, reference.selective_scan, "BTC BTC:step CN:rate BTN BTN BCN"),
    "lif": Case(lif, lif, "BTC:drive BC"),
}


class Recurrences(nn.Module):
    """All cases as entries of one module."""

    def forward(self, name: str, tensors: list[Tensor]) -> Any:
        return CASES[name].function(*tensors)


def export(target: str, path: Path) -> list[dict[str, Any]]:
    """Compiles all cases for a target; returns the compiler's records."""
    entries = {name: case.entry(name) for name, case in CASES.items()}
    made = spikingbrain.export(Recurrences(), entries, path, target=target)
    records: list[dict[str, Any]] = json.loads(bytes(made.member(REPORT)))["records"]
    return records


def check(call: Callable[[str, list[np.ndarray]], Any], shortest: int = 1) -> None:
    """Compares all cases, at all lengths, with loops in PyTorch."""
    for name, case in CASES.items():
        for steps in (n for n in LENGTHS if name != "lif" or n >= shortest):
            tensors = case.inputs(steps)
            results = call(name, [x.numpy() for x in tensors])
            for got, want in zip(results, case.reference(*tensors), strict=True):
                scale = max(1.0, float(want.abs().max()))
                np.testing.assert_allclose(
                    got, want.numpy(), rtol=0, atol=1e-5 * scale, err_msg=f"{name}, {steps}"
                )


def forms(records: list[dict[str, Any]]) -> set[str]:
    """Returns what recurrences were lowered to; a linear_scan first becomes a pointwise_scan."""
    passes = ("lower-recurrence", "lower-scan", "lower-pointwise-scan")
    return {r["reason"] for r in records if r["pass_name"] in passes} - {"pointwise_scan"}


def runs(target: str) -> bool:
    """Tells whether code for a target runs on this machine."""
    (status,) = [s for s in spikingbrain.targets() if s.target.name == target]
    return status.runs


@pytest.mark.qemu
def test_kernels_on_aarch64(tmp_path: Path) -> None:
    """Registers of 128 bits, NEON's multiplications and additions."""
    runner = aarch64_runner(tmp_path)
    records = export("aarch64", tmp_path / "m.sbrain")
    assert forms(records) == {"kernel"}
    with zipfile.ZipFile(tmp_path / "m.sbrain") as made:
        made.extractall(tmp_path)
    check(lambda name, arrays: call(runner, tmp_path, name, arrays, 2))


@pytest.mark.skipif(not X86, reason="needs a processor of that kind")
def test_kernels_of_avx2(tmp_path: Path) -> None:
    """Registers of 256 bits, and half as many of them as the host may have."""
    records = export("x86-64-v3", tmp_path / "m.sbrain")
    assert forms(records) == {"kernel"}
    if runs("x86-64-v3"):
        program = spikingbrain.load(tmp_path / "m.sbrain")
        check(lambda name, arrays: program.call(name, *arrays))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["vulkan", "cuda"])
def test_forms_without_kernels(target: str, tmp_path: Path) -> None:
    records = export(target, tmp_path / "m.sbrain")
    assert "kernel" not in forms(records)
    if runs(target):
        program = spikingbrain.load(tmp_path / "m.sbrain")
        check(lambda name, arrays: program.call(name, *arrays), shortest=2 if target == "vulkan" else 1)


def test_forms_that_vulkan_finds_hard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decays of value channels once made a dispatch of 152 bytes of offsets and sizes, where drivers take 128.

    The neuron's program leaves the last step out of its loop, which makes no turn for one step: IREE 3.13 fails there.
    """
    monkeypatch.setattr(sys.modules[__name__], "CASES", {name: CASES[name] for name in ("value", "lif")})
    export("vulkan", tmp_path / "m.sbrain")
    if not runs("vulkan"):
        pytest.skip("no Vulkan device")
    program = spikingbrain.load(tmp_path / "m.sbrain")
    check(lambda name, arrays: program.call(name, *arrays), shortest=2)
    with pytest.raises(errors.CallError, match="entry 'lif' failed on the device") as caught:
        program.call("lif", *CASES["lif"].inputs(1))
    assert "give it more steps" in caught.value.hint
