"""Triton kernels compiled ahead of time, without a GPU: they fit what a MetaX GPU has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from spikingbrain.backend_maca.triton import attention, recurrence, resources, scan
from spikingbrain.backend_maca.triton.device import SHARED_BYTES


def check(targets: list[str], only: str) -> None:
    for target in targets:
        if needs := resources.missing(target):
            pytest.skip(f"compiling for {target} needs {needs}")
    found = [used for _, used in resources.table(targets, only)]
    assert found
    for used in found:
        assert used.shared <= SHARED_BYTES, used
        assert 0 < used.registers <= 256, used
        assert used.target != "gfx942" or used.stack == 0, used


@pytest.mark.parametrize("problem", ["recurrence key bfloat16 pair_scores", "spikes 2048 rows"])
def test_kernels_fit_waves_of_64_lanes(problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check(["gfx942"], problem)


def test_kernels_compile_for_nvidia(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check(["sm_80"], "spikes 1 rows spike_gemm")


@pytest.mark.slow
def test_all_kernels_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check(list(resources.TARGETS), "")


def test_launches_are_recorded_and_kernels_put_back() -> None:
    kernel = resources.recurrence_kernels.carry_states
    with resources.recorded() as launches:
        resources.problems()["recurrence head float32"]()
        assert resources.recurrence_kernels.carry_states is not kernel
    assert resources.recurrence_kernels.carry_states is kernel
    # one step: all in one; forward: states, scores, outputs;
    # backward: states both ways, scores and their gradients, those of v, q and k
    assert len(launches) == 1 + 3 + 7
    assert all(launch.options == {"num_warps": 4, "num_stages": 1} for launch in launches)


def test_a_batch_of_any_size_lies_on_the_first_axis_of_grids() -> None:
    """The other axes end at 65535."""
    x = torch.empty(70000, 2, 2, 16, device="meta")
    decay, state = x[..., 0], torch.empty(70000, 2, 16, 16, device="meta")
    with resources.recorded() as launches:
        recurrence.forward(x, x, x, decay, state, "head", False)
        recurrence.backward(x, state, x, x, x, decay, state, "head", False)
        scan.linear_scan(x.flatten(2), x.flatten(2), None, False, False)
        attention.backward(x, x, x, x, *attention.forward(x, x, x, 8, 0, None), 8, 0, None)
    assert {launch.kernel.__name__ for launch in launches} > {"attend_key_gradients", "pair_scores"}
    assert all(launch.grid[0] >= 70000 and max(launch.grid[1:], default=1) == 1 for launch in launches)
