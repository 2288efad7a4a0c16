"""torch.compile with target maca: our ops on Triton kernels, by Triton's interpreter; the choice of a device, faked."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

import spikingbrain
from spikingbrain.backend import TorchKernel, TorchKernels
from spikingbrain.errors import MissingDependency, TargetError
from spikingbrain.frontend.dynamo import on_device
from spikingbrain.frontend.dynamo.ops import Kind
from spikingbrain.frontend.dynamo.options import parse
from spikingbrain.frontend.ops import on_device as registry

pytest.importorskip("triton", reason="Triton is not installed")

from spikingbrain.backend_maca.triton import bridge, device


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    script = Path(__file__).with_name("triton_in_torch.py")
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


def test_results_and_gradients_are_eager_ones(found: dict[str, Any]) -> None:
    assert len(found["errors"]) == 1 + 1 + 4  # the result, the gradients of x, of two weights and two biases
    assert max(found["errors"]) < 1e-6
    assert max(found["bonus"]) < 2e-6
    assert max(found["delta rule"]) < 5e-6  # forward and backward, in strict mode: all of it on kernels


def test_settings_are_those_of_one_compilation(found: dict[str, Any]) -> None:
    channels = [set(seen) for seen in found["channels"]]
    assert channels == [{256}, {64}, {64}, {128}, {256}]
    assert all(len(seen) >= 2 for seen in found["channels"])  # forward and backward
    assert found["wrong setting"].startswith(
        "tuning: scan_channels is 100\n  because: it must be one of 64, 128"
    )
    with pytest.raises(spikingbrain.errors.OptionError, match="option 'tuning' with target 'cpu'"):
        parse({"tuning": {"scan_channels": 64}})


def test_spikes_are_exact(found: dict[str, Any]) -> None:
    assert found["spikes are the same"]
    assert found["of layer"] < 1e-6
    assert "compiled" in [r["status"] for r in found["regions of spikes"] if "spike_linear" in r["ops"]]


def test_attention_over_a_window_runs_on_kernels(found: dict[str, Any]) -> None:
    assert len(found["attention"]) == 4 and max(found["attention"]) < 2e-6
    raised, left = found["found of attention"]
    assert (raised["status"], raised["reason"]) == ("raised", "a window of 6 and 2 sinks")
    assert (left["status"], left["reason"]) == ("torch's", "queries see later positions")
    ours = {"window_attention", "window_attention_backward"}
    regions = [r for r in found["regions of attention"] if ours & set(r["ops"])]
    assert [(r["kind"], r["status"]) for r in regions] == [("forward", "compiled"), ("backward", "compiled")]


def test_explain_tells_what_runs_where(found: dict[str, Any]) -> None:
    ours = {"linear_recurrence", "linear_recurrence_backward", "linear_scan"}
    told = [(r["kind"], r["status"], r["ops"][0]) for r in found["regions"] if ours & set(r["ops"])]
    assert sorted(told) == [
        ("backward", "compiled", "linear_recurrence_backward"),
        *[("backward", "compiled", "linear_scan")]
        * 2,  # the gradient of decays that are factors has one in either graph
        *[("backward", "eager", "linear_recurrence")] * 2,
        ("forward", "compiled", "linear_recurrence"),
        *[("forward", "compiled", "linear_scan")] * 2,
        ("forward", "eager", "linear_recurrence"),
    ]
    [refused] = [r for r in found["regions"] if r["status"] == "eager" and r["kind"] == "forward"]
    assert refused["reason"].endswith("takes its logarithm (log_decay=True)")
    body = f"linear_recurrence runs its eager body on cpu: {refused['reason']}"
    assert found["log"].count(body) == 1


def test_wrong_shapes_are_refused_as_by_the_body(found: dict[str, Any]) -> None:
    assert found["refused"].startswith("linear_recurrence: v has shape [1, 9, 2, 8]")


def test_providers_are_chosen_once_in_a_process(found: dict[str, Any]) -> None:
    assert found["second choice"].startswith(
        "providers 'attention=torch' after ''\n  because: kernels take the place"
    )


@pytest.fixture
def no_device_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Lets a test say what torch's device is."""
    on_device.kernels_of.cache_clear()
    monkeypatch.setattr(device, "INTERPRETED", False)
    monkeypatch.delenv("MACA_PATH", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    yield monkeypatch
    on_device.kernels_of.cache_clear()


def test_metax_is_told_by_the_version_of_torch(no_device_known: pytest.MonkeyPatch) -> None:
    no_device_known.setattr(torch, "__version__", "2.6.0+metax3.2")
    assert device.find() == device.Device("metax", "cuda", "GPU")


def test_metax_is_told_by_the_vendors_runtime(no_device_known: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_device_known.setattr(torch.version, "cuda", "12.8")
    no_device_known.setenv("MACA_PATH", str(tmp_path))
    assert device.find().kind == "nvidia"  # a path alone tells nothing
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmcruntime.so").touch()
    assert device.find().kind == "metax"


def test_another_vendors_device_is_refused(no_device_known: pytest.MonkeyPatch) -> None:
    no_device_known.setattr(torch.version, "cuda", None)
    with pytest.raises(TargetError, match="GPU is neither a MetaX nor an NVIDIA device"):
        device.find()


def test_no_triton_is_one_error(no_device_known: pytest.MonkeyPatch) -> None:
    no_device_known.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"try: .*pip install 'spikingbrain\[triton\]'"):
        device.find()


def test_no_device_is_one_error(no_device_known: pytest.MonkeyPatch) -> None:
    no_device_known.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TargetError) as caught:
        spikingbrain.compile(torch.nn.Identity(), target="maca")
    assert str(caught.value).startswith("target 'maca' cannot run inside torch here\n  because: torch ")
    assert "has no MetaX or NVIDIA device" in str(caught.value)


def test_the_benchmark_says_that_it_needs_a_gpu(
    no_device_known: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_device_known.setattr(torch.cuda, "is_available", lambda: False)
    script = Path(__file__).parents[2] / "benchmarks" / "triton_kernels.py"
    no_device_known.setattr(sys, "argv", [str(script)])
    no_device_known.syspath_prepend(str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    told = capsys.readouterr().out
    assert told.startswith("nothing is measured: this benchmark needs a GPU\ntarget 'maca' cannot run")


def test_a_device_takes_the_ops_on_it(no_device_known: pytest.MonkeyPatch) -> None:
    no_device_known.setattr(torch, "__version__", "2.6.0+metax3.2")
    installed: list[str] = []
    no_device_known.setattr(on_device, "_install", lambda name, kernels: installed.append(name))
    no_device_known.setattr(registry, "_installed", {})
    assert parse({"target": "maca"}).target == "maca"
    differentiated = ("linear_recurrence", "window_attention")
    both = {f"{name}{suffix}" for name in differentiated for suffix in ("", "_backward")}
    assert set(installed) == both | {"linear_scan", "spike_linear"}
    kernels = on_device.kernels_of("maca")
    assert kernels is not None and (kernels.device, kernels.name) == ("cuda", "Triton on GPU")
    assert on_device.kernels_of("cpu") is None

    def verdict(where: str, dtype: torch.dtype, **options: Any) -> Any:
        with FakeTensorMode():
            q, k, decay = (torch.empty(1, 5, n, 8, device=where, dtype=dtype) for n in (2, 2, 2))
        graph = fx.Graph()
        nodes = [graph.placeholder(name) for name in "qkd"]
        for node, value in zip(nodes, (q, k, decay), strict=True):
            node.meta["val"] = value
        call = graph.call_function(
            torch.ops.spikingbrain.linear_recurrence.default,
            (nodes[0], nodes[1], nodes[1], nodes[2]),
            options,
        )
        call.meta["val"] = (q, k)
        return on_device.verdicts(graph, kernels)[call]

    keys = {"decay_axis": "key", "log_decay": True}
    assert verdict("cuda", torch.bfloat16, **keys).kind is Kind.KERNEL
    for case, reason in [
        (verdict("cpu", torch.float32, **keys), "a tensor on cpu; the target's are on cuda"),
        (verdict("cuda", torch.float64, **keys), "float64; the Triton kernel computes on float32"),
        (verdict("cuda", torch.float32, decay_axis="value", log_decay=True), "a decay of values has no"),
        (verdict("cuda", torch.float32, decay_axis="key"), "a decay given as a factor"),
    ]:
        assert case.kind is Kind.EAGER and case.reason.startswith(reason)


def test_what_spike_kernels_refuse() -> None:
    counts, threshold, scale = torch.empty(3, 40), torch.empty(3), torch.empty(5, 1)
    refuse = bridge.kernels(device.Device("nvidia", "cuda", "GPU")).table["spike_linear"].refuse

    def reason(codes: torch.Tensor, bits: int) -> str | None:
        return refuse(counts, threshold, codes, scale, None, bits)

    assert reason(torch.empty(5, 40, dtype=torch.int8), 8) is None
    assert "the Triton kernel takes int8" in str(reason(torch.empty(5, 40, dtype=torch.int16), 16))
    assert "the Triton kernel takes int8" in str(reason(torch.empty(5, 40), 8))
    assert "70000 channels" in str(reason(torch.empty(5, 70000, dtype=torch.int8, device="meta"), 8))


def test_the_first_kernels_of_a_device_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_installed", {})
    willing, unwilling = (TorchKernel(lambda *_, r=r: r, lambda *_: None) for r in (None, "a reason"))
    first = TorchKernels("meta", "first", {"linear_scan": willing, "spike_linear": unwilling})
    assert registry.remember(first)
    assert not registry.remember(TorchKernels("meta", "second", {}))
    assert registry.installed("meta") is first
    taken = [
        registry.takes(*c)
        for c in (("linear_scan", "meta"), ("spike_linear", "meta"), ("linear_scan", "cpu"))
    ]
    assert taken == [True, False, False]
