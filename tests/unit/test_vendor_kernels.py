"""Providers of the vendor inside torch: what they are called with, what they refuse, and who comes next.

The packages are stand-ins (`stand_ins/`) that keep to the public signatures and refuse what the real ones do. Where fla is
installed, its own kernels run by Triton's interpreter, too.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

pytest.importorskip("triton", reason="Triton is not installed")

from spikingbrain.backend_maca.providers import installed
from spikingbrain.backend_maca.triton import bridge, device, vendor_attention, vendor_fla
from spikingbrain.frontend.ops import window_attention
from spikingbrain.frontend.ops.linear_recurrence import compute

REAL_FLA = installed("fla")
CPU = device.Device("interpreter", "cpu", "CPU")


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).with_name("stand_ins")))

    def forget() -> None:
        for name in [m for m in sys.modules if m.partition(".")[0] in ("fla", "flash_attn")]:
            del sys.modules[name]

    forget()
    importlib.invalidate_caches()
    yield
    forget()


Arguments = tuple[Any, ...]


def recurrence(
    steps: int,
    axis: str,
    dtype: torch.dtype = torch.float32,
    delta: bool = False,
    reverse: bool = False,
    **how: Any,
) -> Arguments:
    torch.manual_seed(0)
    q, k, erase, predict, g = (torch.randn(2, steps, 3, 8) for _ in range(5))
    v, state = torch.randn(2, steps, 3, 6), torch.randn(2, 3, 8, 6)
    gate = {"none": None, "head": g[..., 0], "key": g, "value": torch.randn_like(v)}[axis]
    gate = None if gate is None else logsigmoid(gate)
    if how.get("extreme") and gate is not None:
        gate[:, ::5] = -torch.inf
    vectors = [x.to(dtype) * 0.3 if delta else None for x in (erase, predict)]
    gate = None if gate is None else gate.to(dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype), gate, *vectors, None, state, axis, True, False, reverse


CASES: dict[str, dict[str, Any]] = {
    "few steps, gates of keys": dict(steps=5, axis="key", extreme=True),
    "few steps, gates of heads, backwards": dict(steps=5, axis="head", reverse=True),
    "few steps, gates of values": dict(steps=4, axis="value"),
    "one step": dict(steps=1, axis="none"),
    "chunks, gates of keys": dict(steps=37, axis="key", dtype=torch.bfloat16, extreme=True),
    "chunks, gates of heads, backwards": dict(steps=37, axis="head", dtype=torch.float16, reverse=True),
    "chunks": dict(steps=20, axis="none", dtype=torch.float16),
    "delta rule, gates of keys": dict(steps=7, axis="key", delta=True),
    "delta rule, gates of heads": dict(steps=7, axis="head", delta=True, reverse=True),
}


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    bound = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    assert found.shape == wanted.shape
    error = (found.double() - wanted.double()).abs().max()
    assert error <= bound * wanted.abs().max() + 1e-30 and not found.isnan().any(), error


@pytest.mark.parametrize("case", CASES)
def test_fla_computes_the_recurrence(case: str, stand_ins: None) -> None:
    given = recurrence(**CASES[case])
    dtype = given[0].dtype
    assert vendor_fla.refusal(*given) is None
    exact = tuple(x.double() if isinstance(x, Tensor) else x for x in given)
    leaves = [x.requires_grad_() for x in exact if isinstance(x, Tensor)]
    wanted = compute(*exact)
    with torch._C._AutoDispatchBelowAutograd():  # as inside an op
        found = vendor_fla.forward(*given)
    for a, b in zip(found, wanted, strict=True):
        close(a, b.detach(), dtype)
    of_results = [torch.randn_like(found[0]), torch.randn_like(found[1])]
    if given[4] is not None:
        assert "no backward" in str(vendor_fla.backward_refusal(*of_results, *given))
        return
    gradients = iter(torch.autograd.grad(wanted, leaves, [g.double() for g in of_results]))
    with torch._C._AutoDispatchBelowAutograd():
        returned = vendor_fla.backward(*of_results, *given)
    for x, gradient in zip(given[:8], returned, strict=True):
        if x is None:
            assert gradient.numel() == 0
        else:
            expected = next(gradients).nan_to_num(0.0)  # of a gate of minus infinity
            assert gradient.dtype == x.dtype
            close(gradient, expected, dtype)


REFUSED = {
    "float64": recurrence(5, "key", torch.float64),
    "float32 over more than 16 steps": recurrence(17, "key"),
    "rank-one part (erase, predict) over more than 16": recurrence(17, "key", torch.bfloat16, delta=True),
    "decay of values over more than 16": recurrence(17, "value", torch.bfloat16),
    "decay of values beside the rank-one": recurrence(5, "value", delta=True),
    "read of the state before": (*recurrence(5, "key")[:10], True, False),
    "decay given as a factor": (*recurrence(5, "key")[:9], False, False, False),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_fla_refuses(reason: str) -> None:
    assert reason in str(vendor_fla.refusal(*REFUSED[reason]))


def test_fla_has_a_state_for_each_head() -> None:
    q, k, *rest = recurrence(5, "key")
    assert "6 heads read 3 states" in str(vendor_fla.refusal(torch.cat((q, q), 2), k, *rest))


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_attention_computes_the_window(window: int, dtype: torch.dtype, stand_ins: None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, t, n, 8).to(dtype) for t, n in ((7, 4), (11, 2), (11, 2)))
    given = (q, k, v, window, 0, 0.3)
    assert vendor_attention.refusal(*given) is None
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    wanted, sums = window_attention(*exact, window, 0, 0.3)
    with torch._C._AutoDispatchBelowAutograd():
        o, logs = vendor_attention.forward(*given)
    close(o, wanted.detach(), dtype)
    close(logs, sums, dtype)
    do = torch.randn_like(o)
    with torch._C._AutoDispatchBelowAutograd():
        found = vendor_attention.backward(do, q, k, v, o, logs, window, 0, 0.3)
    for a, b in zip(found, torch.autograd.grad(wanted, exact, do.double()), strict=True):
        close(a, b, dtype)


def test_what_flash_attention_refuses() -> None:
    def reason(dtype: torch.dtype = torch.float16, size: int = 8, values: int = 8, sinks: int = 0) -> str:
        q, v = torch.empty(1, 3, 2, size, dtype=dtype), torch.empty(1, 3, 2, values, dtype=dtype)
        return str(vendor_attention.refusal(q, q, v, 4, sinks, None))

    assert "float32; mcFlashAttn computes on" in reason(torch.float32)
    assert "2 sinks" in reason(sinks=2)
    assert "values of 16 channels" in reason(values=16)
    assert "heads of 264" in reason(size=264, values=264)


def test_a_call_goes_to_the_next_provider_and_the_report_says_why(stand_ins: None) -> None:
    table = bridge.kernels(CPU, "linear_recurrence=fla").table
    recur, attend = table["linear_recurrence"], table["window_attention"]
    assert recur.told is not None and attend.told is not None
    assert recur.told(*recurrence(5, "key")) == "FLA"
    long = recurrence(20, "key")
    told = "Triton on CPU; not FLA: float32 over more than 16 steps; FLA's chunks multiply in TF32"
    assert recur.refuse(*long) is None and recur.told(*long) == told
    neither = (*long[:9], False, False, False)
    refused = "not FLA: a decay given as a factor; FLA takes its logarithm; not Triton on CPU: a decay given as a factor"
    assert str(recur.refuse(*neither)).startswith(refused)
    close(recur.run(*recurrence(5, "key"))[0], compute(*recurrence(5, "key"))[0], torch.float32)
    q = torch.empty(1, 3, 2, 8, dtype=torch.float16)
    assert attend.told(q, q, q, 2, 0, None) == "mcFlashAttn"  # the default where it is installed
    assert attend.told(q, q, q, 2, 1, None) == "Triton on CPU; not mcFlashAttn: 1 sinks; mcFlashAttn has none"


def test_torch_can_be_chosen() -> None:
    kernel = bridge.kernels(CPU, "attention=torch, linear_scan=torch").table["window_attention"]
    assert kernel.refuse() == "providers: attention=torch"


def test_another_version_of_fla_is_one_error(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(importlib.import_module("fla.ops.gla"), "fused_recurrent_gla")
    with pytest.raises(Exception, match=r"fla\.ops\.gla\.fused_recurrent_gla cannot be had"):
        vendor_fla.forward(*recurrence(5, "key"))


@pytest.mark.skipif(not REAL_FLA, reason="fla-core is not installed")
def test_the_kernels_of_fla_itself() -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("fla_interpreted.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(CASES)
    for case, errors in found.items():  # of results, and of gradients where FLA has them
        assert len(errors) > 5 or case.startswith("delta rule")
        assert max(errors) < (2e-3 if case.startswith("chunks") else 2e-6), case
