"""Spiking projections against integers in numpy, bit for bit: the portable form and the kernels of every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler.tools")
pytest.importorskip("iree.runtime")

import spike_cases
from spike_cases import Array, Case

from spikingbrain.target import Target

V3_FEATURES = frozenset({"avx", "avx2", "fma"})
PORTABLE = Target("portable", "cpu", "iree", "x86-64", "x86-64-v3", V3_FEATURES)
V4_FEATURES = V3_FEATURES | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


def _x86(name: str, cpu: str, features: frozenset[str], bits: int, registers: int) -> Target:
    return Target(name, "cpu", "iree", "x86-64", cpu, features, bits, registers)


VNNI = _x86("avx512-vnni", "x86-64-v4", V4_FEATURES | {"avx512vnni"}, 512, 32)
TARGETS = [PORTABLE, VNNI]

CASES = {
    "odd": Case(37, 70),
    "one_row": Case(130, 67, rows=1, bias=True),
    "tiny": Case(1, 1),
    "per_channel": Case(576, 64, bias=True),
    "groups_64": Case(576, 80, groups=9),
    "groups_128": Case(512, 33, groups=4, bias=True),
    "groups_of_3": Case(12, 20, groups=4),
    "nibbles": Case(96, 70, bits=4),
    "nibbles_grouped": Case(256, 64, groups=4, bits=4, rows=1),
    "nibbles_odd": Case(45, 17, bits=4, bias=True),
    "wide_codes": Case(320, 48, bits=16, bias=True),
    "wide_codes_grouped": Case(256, 70, groups=2, bits=16),
    "wide_codes_row": Case(512, 65, groups=4, bits=16, rows=1),
}


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def compiled(request: pytest.FixtureRequest) -> Any:
    return spike_cases.programs(CASES, request.param)


def check(compiled: Any, name: str, x: Array, seed: int = 0) -> None:
    """Compares bit for bit; rows whose sums f64 cannot hold, within the rounding of single terms."""
    case, x = CASES[name], x.astype(np.float32)
    weights = case.weights(np.random.default_rng(seed))
    got = compiled[name](x, weights)
    expected, fused = spike_cases.linear(x, weights, case.bias)
    largest = np.abs(spike_cases.encode(x)[0].astype(np.float64)).sum(-1) * 2.0 ** (case.bits - 1)
    vast = np.isfinite(largest) & (largest > 2.0**53)
    exact = np.where(got == fused, fused, expected)
    np.testing.assert_array_equal(got[~vast], exact[~vast])
    bound = (
        1e-6 * np.abs(x[vast]).max(-1, initial=0)[:, None] * np.abs(weights["w"]).max() * weights["s"].max()
    )
    with np.errstate(invalid="ignore"):
        close = np.abs(got[vast].astype(np.float64) - exact[vast]) <= bound
    assert np.all(close | (got[vast] == exact[vast]))


def outliers(rng: np.random.Generator, m: int, k: int, size: float) -> Array:
    """Returns rows of ordinary values with a few that are ``size`` times larger."""
    x = rng.standard_normal((m, k))
    return np.where(rng.random((m, k)) < 0.01, x * size, x)


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_rows(compiled: Any, name: str) -> None:
    rng = np.random.default_rng(0)
    case = CASES[name]
    for m in [0, *range(1, 15), 23] if case.rows is None else [case.rows]:
        check(compiled, name, rng.standard_normal((m, case.k)))


@pytest.mark.parametrize("name", CASES)
def test_counts_of_every_size(compiled: Any, name: str) -> None:
    """Counts beyond int8, beyond int16 and beyond int32, next to ordinary rows."""
    rng = np.random.default_rng(1)
    case = CASES[name]
    for size in (1e2, 1e3, 1e5, 1e9):
        for m in (1, 5, 16) if case.rows is None else (1,):
            check(compiled, name, outliers(rng, m, case.k, size))


@pytest.mark.parametrize("name", CASES)
def test_rows_that_are_not_ordinary(compiled: Any, name: str) -> None:
    rng = np.random.default_rng(2)
    case = CASES[name]
    ordinary = rng.standard_normal((12, case.k))
    rows = ordinary.copy()
    rows[1], rows[3], rows[4] = 0, rows[3] * 1e-12, rows[4] * 1e-30
    rows[5, 0], rows[6, -1] = np.nan, np.inf
    rows[8], rows[10, case.k // 2] = rows[8] * 1e7, 3e38
    for part in [rows] if case.rows is None else rows[:, None]:
        check(compiled, name, part)


@pytest.mark.parametrize("name", ["per_channel", "groups_64", "nibbles", "wide_codes"])
def test_many_rows(compiled: Any, name: str) -> None:
    rng = np.random.default_rng(3)
    check(compiled, name, outliers(rng, 512, CASES[name].k, 300))


@pytest.mark.parametrize("name", CASES)
def test_one_hot_rows(compiled: Any, name: str) -> None:
    """All of a row's spikes in one channel: the largest count there is, k times K."""
    case = CASES[name]
    rows = np.eye(case.k)[:: max(1, case.k // 7)]
    for part in [rows, -rows] if case.rows is None else rows[:, None]:
        check(compiled, name, part)
