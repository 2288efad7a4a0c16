"""The kernels of spiking projections for AArch64, under emulation: bit for bit what numpy makes of integers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from under_qemu import aarch64_runner

from spikingbrain.target import Target

sys.path.append(str(Path(__file__).parents[1] / "unit"))
import spike_cases
from spike_cases import Case

CASES = {
    "per_channel": Case(61, 70, bias=True),
    "grouped": Case(128, 33, groups=2),
    "nibbles": Case(96, 70, groups=3, bits=4),
    "wide_codes": Case(64, 20, bits=16),
    "events": Case(257, 70, silent=0.9, bias=True),
    "events_nibbles": Case(384, 70, groups=3, bits=4, silent=0.9),
}


@pytest.mark.qemu
@pytest.mark.parametrize(
    "features",
    [
        pytest.param(frozenset({"dotprod"}), id="sdot"),
        pytest.param(frozenset(), id="neon", marks=pytest.mark.slow),
    ],
)
def test_kernels(features: frozenset[str], tmp_path: Path) -> None:
    target = Target("aarch64", "cpu", "iree", "aarch64", "generic", features, 128, 32)
    flags = ["--iree-llvmcpu-target-triple=aarch64-unknown-linux-gnu"]
    code, stored = spike_cases.compile_cases(CASES, target, flags)
    (tmp_path / "module.vmfb").write_bytes(code)
    run = aarch64_runner(tmp_path)
    rng = np.random.default_rng(0)
    for name, case in CASES.items():
        weights = case.weights(rng)
        x = rng.standard_normal((9 if case.silent is None else 7, case.k)).astype(np.float32)
        if case.silent:
            x[rng.random(x.shape) < 1 - 0.2 / len(x)] = 0  # so few fire in all that events are taken
        x[rng.random(x.shape) < 0.02] *= 300
        x[1], x[3, 0], x[5, 0], x[6] = 0, np.inf, 1e7, x[6] * 1e9
        arguments = [x, *spike_cases.packed(stored[name], weights)]
        for i, array in enumerate(arguments):
            np.save(tmp_path / f"{i}.npy", array)
        command = [*run, "--device=local-sync", f"--module={tmp_path / 'module.vmfb'}", f"--function={name}"]
        command += [f"--input=@{tmp_path / f'{i}.npy'}" for i in range(len(arguments))]
        command += [f"--output=@{tmp_path / 'y.npy'}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stderr
        got = np.load(tmp_path / "y.npy")
        expected, fused = spike_cases.linear(x, weights, case.bias)
        np.testing.assert_array_equal(got, np.where(got == fused, fused, expected))
