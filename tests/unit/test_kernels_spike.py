"""Spiking projections against integers in numpy, bit for bit: the portable form and the kernels of every instruction set."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler.tools")
pytest.importorskip("iree.runtime")

import spike_cases
from spike_cases import Array, Case
from torch_mlir import ir

from spikingbrain.backend_iree import cpu
from spikingbrain.passes import dialect, pipeline
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.kernels.spike_dot import choose
from spikingbrain.passes.spike_to_int import SpikeToInt
from spikingbrain.target import Target

V3_FEATURES = frozenset({"avx", "avx2", "fma"})
PORTABLE = Target("portable", "cpu", "iree", "x86-64", "x86-64-v3", V3_FEATURES)
V4_FEATURES = V3_FEATURES | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


def _x86(name: str, cpu: str, features: frozenset[str], bits: int, registers: int) -> Target:
    return Target(name, "cpu", "iree", "x86-64", cpu, features, bits, registers)


VNNI = _x86("avx512-vnni", "x86-64-v4", V4_FEATURES | {"avx512vnni"}, 512, 32)
V4 = _x86("avx512", "x86-64-v4", V4_FEATURES, 512, 32)
# AVX-VNNI has the same instruction in an encoding of its own, which processors with AVX-512 may lack
VNNI_256 = _x86("vnni-256", "x86-64-v4", V4_FEATURES | {"avx512vnni"}, 256, 16)
V3 = _x86("avx2", "x86-64-v3", V3_FEATURES, 256, 16)
V2 = _x86("sse", "x86-64-v2", frozenset(), 128, 16)
TARGETS = [PORTABLE, VNNI, *(pytest.param(t, marks=pytest.mark.slow) for t in (V3, V4, VNNI_256, V2))]

CASES = {
    "odd": Case(37, 70),
    "one_row": Case(130, 67, rows=1, bias=True),
    "five_rows": Case(52, 40, bits=4, rows=5, bias=True),
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
    "long": Case(18944, 17),
    "long_nibbles": Case(18944, 5, bits=4),
    "long_wide_codes": Case(18944, 9, bits=16),
}
SHORT = [name for name, case in CASES.items() if case.k < 1000]


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def compiled(request: pytest.FixtureRequest) -> Any:
    missing = request.param.features - cpu.features()
    if missing or cpu.architecture() != "x86-64":
        pytest.skip(f"this processor has no {', '.join(sorted(missing)) or 'x86-64 code'}")
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


def pieces(case: Case, rows: Array) -> list[Array]:
    """Returns rows as a case takes them: all at once, or each as often as its number of rows."""
    return [rows] if case.rows is None else [np.tile(row, (case.rows, 1)) for row in rows]


def outliers(rng: np.random.Generator, m: int, k: int, size: float) -> Array:
    """Returns rows of ordinary values with a few that are ``size`` times larger."""
    x = rng.standard_normal((m, k))
    return np.where(rng.random((m, k)) < 0.01, x * size, x)


@pytest.mark.parametrize("name", SHORT)
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
        for m in (1, 5, 16) if case.rows is None else (case.rows,):
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
    for part in pieces(case, rows):
        check(compiled, name, part)


@pytest.mark.parametrize("name", ["per_channel", "groups_64", "nibbles", "wide_codes"])
def test_many_rows(compiled: Any, name: str) -> None:
    rng = np.random.default_rng(3)
    check(compiled, name, outliers(rng, 512, CASES[name].k, 300))


@pytest.mark.parametrize("name", CASES)
def test_one_hot_rows(compiled: Any, name: str) -> None:
    """All of a row's spikes in one channel: the largest count there is, k times K."""
    case = CASES[name]
    hot = np.arange(0, case.k, max(1, case.k // 7))
    rows = (np.arange(case.k) == hot[:, None]).astype(float)
    rows = np.concatenate([rows, -rows])
    for part in pieces(case, rows):
        check(compiled, name, part)


@pytest.mark.parametrize("name", ["long", "long_nibbles", "long_wide_codes"])
def test_sums_at_their_bounds(compiled: Any, name: str) -> None:
    """Extreme codes under the largest sums of counts, (k + 1/2) K, those of 16 bits beyond i32."""
    case = CASES[name]
    high = spike_cases.LARGEST[case.bits]
    weights = case.weights(np.random.default_rng(0))
    weights["w"][::2], weights["w"][1::2] = -high - 1, high
    # three of four values round 3.5 up to 4, the fourth 1.5 to 2: on average 3 thresholds, and 3.5 counts
    halves = np.where(np.arange(case.k) % 4, 3.5, 1.5)
    ones, hot, hundreds = np.ones(case.k), np.zeros(case.k), np.zeros(case.k)
    hot[5], hundreds[::99] = 1, 1
    x = np.stack([halves, -halves, ones, -ones, hot, -hundreds]).astype(np.float32)
    got, (expected, _) = compiled[name](x, weights), spike_cases.linear(x, weights, case.bias)
    counts, _ = spike_cases.encode(x)
    assert np.abs(counts[0]).sum() == 3.5 * case.k and np.abs(counts).max() > 32767
    np.testing.assert_array_equal(got, expected)


def lowered(text: str, target: Target) -> tuple[str, list[str]]:
    """Returns the module after spike-to-int, and the pass's remarks."""
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.parse(text)
        context = PassContext(target)
        pipeline.run([SpikeToInt()], module, context)
        return str(module), [record.reason for record in context.records]


def test_projections_of_one_input_share_its_counts() -> None:
    """Also where each has an encoder of its own."""
    one, two = (Case(64, n).function("f").splitlines() for n in (32, 48))
    again = [re.sub(r"%(w|s|y|v|counts)\b", r"%\1_2", line) for line in two[2:-2]]
    module, _ = lowered("\n".join([*one[:-2], *again, *one[-2:]]), VNNI)
    assert module.count("callee = @spike_encode") == 1
    assert module.count("callee = @spike_linear") == 2


@pytest.mark.parametrize(
    ("case", "target", "reason"),
    [
        (Case(64, 32), VNNI, "kernel"),
        (Case(64, 32), PORTABLE, "linalg: the target has no dot products of such integers"),
        (Case(12, 20, groups=4), VNNI, "linalg: groups of 3 channels; a step takes 4"),
        (Case(24, 20, groups=2, bits=4), VNNI, "linalg: groups of 12 channels; a step takes 8"),
        (Case(70000, 20), VNNI, "linalg: 70000 channels; sums may exceed 32 bits"),
    ],
)
def test_which_form_is_taken(case: Case, target: Target, reason: str) -> None:
    module, reasons = lowered(case.function("f"), target)
    assert reasons[0] == reason
    assert ("spikingbrain_control.launch" in module) == (reason == "kernel")


def test_avx_vnni_compiles() -> None:
    """The processors that have it are not those that test: the numbers are those of vnni-256."""
    target = _x86("avx-vnni", "x86-64-v3", V3_FEATURES | {"avxvnni"}, 256, 16)
    assert choose(target, 8) == choose(VNNI_256, 8)
    code, _ = spike_cases.compile_cases({"f": Case(64, 32)}, target)
    assert code
