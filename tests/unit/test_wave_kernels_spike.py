"""Spiking projections by wave kernels against integers in numpy, bit for bit, on the emulator in every thread order."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")

import spike_cases
import test_kernels_spike_experts as experts
import test_wave_kernels_computed_rows as computed
from spike_cases import Array, Case
from wave_programs import Program, joined, run

from spikingbrain.backend_maca.plan.resolve import resolve
from spikingbrain.backend_maca.plan.steps import Launch
from spikingbrain.backend_maca.run import emulate
from spikingbrain.passes.lower_grouped_linear import LowerGroupedLinear
from spikingbrain.passes.spike_to_int import SpikeToInt

pytestmark = pytest.mark.skipif(shutil.which(emulate.compiler()) is None, reason="no C++ compiler")

CASES = {
    "tiny": Case(1, 1, rows=1),
    "odd": Case(37, 70),
    "rows": Case(300, 19, rows=3, bias=True),
    "no_rows": Case(20, 5, rows=0),
    "groups": Case(512, 33, groups=4, bias=True),
    "groups_row": Case(1280, 17, groups=20, rows=1),
    "groups_of_3": Case(12, 20, groups=4),  # no kernel takes them
    "groups_of_80": Case(240, 19, groups=3),
    "groups_of_24_row": Case(168, 17, groups=7, rows=1, bias=True),
    "nibbles_of_80_rows": Case(400, 18, groups=5, bits=4, rows=2),
    "wide_codes_of_10": Case(70, 20, groups=7, bits=16),
    "pieces": Case(20000, 3, rows=1),
    "pieces_of_groups": Case(18120, 3, groups=151, rows=1),  # of 120 channels
    "nibbles": Case(256, 20, groups=2, bits=4),
    "nibbles_row": Case(333, 17, bits=4, rows=2, bias=True),
    "wide_codes": Case(100, 40, bits=16, bias=True),
    "wide_codes_row": Case(256, 18, groups=4, bits=16, rows=1),
}
ROWS = (0, 1, 3, 17, 64, 67)


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(joined(CASES), [SpikeToInt()])


@pytest.fixture(scope="module")
def loaded(program: Program) -> Any:
    return program.load({name: weights(name) for name in CASES})


def weights(name: str) -> dict[str, Array]:
    return weights_of(CASES[name])


def weights_of(case: Case) -> dict[str, Array]:
    return case.weights(np.random.default_rng(0))


def check(loaded: Any, name: str, *x: Array) -> None:
    """Compares with sums of int64, or of f64 for rows that are too large for them."""
    for rows in x:
        rows = rows.astype(np.float32)
        expected, _ = spike_cases.linear(rows, weights(name), CASES[name].bias)
        np.testing.assert_array_equal(run(loaded, name, rows), expected)


def launched(program: Program, name: str, *shapes: tuple[int, ...]) -> list[str]:
    """Returns the kinds of kernels that run for inputs of some shapes."""
    plan = json.loads(bytes(program.code["plan.json"]))
    steps = resolve(plan, name, dict(enumerate(shapes))).steps
    return [step.kernel[:12] for step in steps if isinstance(step, Launch)]


def rows_of(case: Case) -> tuple[int, ...]:
    return ROWS if case.rows is None else (case.rows,)


def test_what_has_a_kernel(program: Program) -> None:
    refused = [r.reason for r in program.records if r.reason.startswith("linalg:")]
    assert refused == ["linalg: groups of 3 channels; 16 would be stored for each"]
    assert "__builtin_mxc_mma_16x16x16i8" in program.source


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_rows_and_counts_beyond_a_byte(loaded: Any, name: str) -> None:
    rng, case = np.random.default_rng(1), CASES[name]
    ordinary = [rng.standard_normal((m, case.k)) for m in rows_of(case)]
    outliers = [np.where(rng.random(x.shape) < 0.01, x * 1e3, x) for x in ordinary[-2:]]
    check(loaded, name, *ordinary, *outliers)


@pytest.mark.parametrize("name", CASES)
def test_rows_that_are_not_ordinary(loaded: Any, name: str) -> None:
    """Zeros, clamped thresholds, NaN, infinities, counts of more than 16 and 32 bits, next to ordinary rows."""
    rng, case = np.random.default_rng(2), CASES[name]
    rows = rng.standard_normal((20, case.k))
    rows[1], rows[3], rows[4] = 0, rows[3] * 1e-12, rows[4] * 1e-30
    rows[5, 0], rows[6, -1] = np.nan, np.inf
    rows[8], rows[10, case.k // 2], rows[17, case.k // 3] = rows[8] * 1e7, 3e7, -3e8
    rows[18] = np.arange(case.k) == case.k - 1
    m = case.rows
    check(loaded, name, *([rows] if m is None else [rows[at : at + m] for at in range(0, 20 - m, max(m, 3))]))


@pytest.mark.parametrize("bits", [8, 16])
def test_rows_at_the_limits_of_32_bits(bits: int) -> None:
    """Many channels, with counts just small enough for their sums, just too large, and of two bytes."""
    case = Case(18944, 3, bits=bits, rows=4)
    program = Program(joined({"main": case}), [SpikeToInt()])
    x = np.ones((4, case.k))
    x[1, 0], x[2, : case.k // 2] = 1e6, 0
    x[3] = np.random.default_rng(3).standard_normal(case.k)
    weights = case.weights(np.random.default_rng(0))
    expected, _ = spike_cases.linear(x.astype(np.float32), weights, False)
    got = run(program.load({"main": weights}), "main", x.astype(np.float32), orders=("shuffled",))
    np.testing.assert_array_equal(got, expected)


def test_projections_of_one_input_share_its_counts() -> None:
    text = joined({"main": Case(64, 8)})
    y = "tensor<?x8xf32>"
    (line,) = [line for line in text.splitlines() if "spike_linear" in line]
    again = line.replace("%y", "%z") + text[text.index(line) + len(line) : text.index("  return")]
    text = text.replace(f"-> {y} {{", f"-> ({y}, {y}) {{").replace("  return", f"{again}  return")
    program = Program(text.replace(f"return %y : {y}", f"return %y, %z : {y}, {y}"), [SpikeToInt()])
    assert launched(program, "main", (17, 64)) == ["spike_encode", "spike_linear", "spike_linear"]
    assert launched(program, "main", (1, 64)) == ["spike_linear", "spike_linear"]


@pytest.mark.parametrize("m", [None, 3])
def test_a_norm_before_and_a_sum_behind_are_no_launches(m: int | None) -> None:
    """Rows of numbers of one magnitude, a power of two, have norms that are exact in any order."""
    case = Case(70, 19, rows=m, bias=True)
    shape = "?" if m is None else str(m)
    x, y = f"tensor<{shape}x70xf32>", f"tensor<{shape}x19xf32>"
    norm = computed.NORM.replace("%x", "%z").replace("%h", "%x").replace("%s", "%t").replace("%b", "%d")
    norm = norm.replace("{M}", shape).replace("{K}", "70")
    norm = norm.replace("{size}", "%m" if m is None else "")
    before = f"""
  %g = "spikingbrain.parameter"() {{sources = ["main.g"], recipe = []}} : () -> tensor<70xf32>
  %c0 = arith.constant 0 : index
  %zero = arith.constant 0.0 : f32
  %channels = arith.constant 70.0 : f32
  %m = tensor.dim %z, %c0 : {x}
  %one = tensor.empty({"%m" if m is None else ""}) : tensor<{shape}xf32>
{norm}
  %counts,"""
    behind = f"""  %o = tensor.empty({"%m" if m is None else ""}) : {y}
  %sum = linalg.generic {{indexing_maps = [#row, #row, #row], iterator_types = ["parallel", "parallel"]}}
      ins(%residual, %y : {y}, {y}) outs(%o : {y}) {{
  ^bb0(%a1: f32, %a2: f32, %a3: f32):
    %s1 = arith.addf %a1, %a2 : f32
    linalg.yield %s1 : f32
  }} -> {y}
  return %sum"""
    text = (
        joined({"main": case}).replace(f"%x: {x}", f"%z: {x}, %residual: {y}").replace("%counts,", before, 1)
    )
    program = Program(computed.MAPS + text.replace("  return %y", behind), [SpikeToInt()])
    for rows in (1, 20) if m is None else (m,):
        encoded = ["spike_encode"] if rows > 1 else []
        shapes = (rows, 70), (rows, 19)
        assert launched(program, "main", *shapes) == [*encoded, "spike_linear"]
    rng, stored = np.random.default_rng(4), case.weights(np.random.default_rng(0))
    gain = rng.standard_normal(70).astype(np.float32)
    loaded = program.load({"main": {**stored, "g": gain}})
    for rows in (0, 1, 20) if m is None else (m,):
        signs = rng.choice(np.float32([-1, 1]), (rows, 70))
        residual = rng.standard_normal((rows, 19)).astype(np.float32)
        z = signs * np.float32(2) ** rng.integers(-9, 9, (rows, 1)).astype(np.float32)
        expected, _ = spike_cases.linear(signs * gain, stored, True)
        np.testing.assert_array_equal(run(loaded, "main", z, residual), expected + residual)
    if m is None:  # other norms are sums in one order, however many rows there are
        z, residual = rng.standard_normal((20, 70)).astype(np.float32), np.zeros((20, 19), np.float32)
        alone, many = (
            run(loaded, "main", z[:rows], residual[:rows], orders=("shuffled",)) for rows in (1, 20)
        )
        np.testing.assert_array_equal(alone, many[:1])


@pytest.mark.parametrize("groups", [1, 5])
def test_a_row_alone_is_that_row_among_many(groups: int) -> None:
    """The launch that encodes many rows and the blocks that encode a few have the same thresholds, bit for bit."""
    case = Case(1200, 5, groups=groups)
    loaded = Program(joined({"main": case}), [SpikeToInt()]).load({"main": weights_of(case)})
    x = np.random.default_rng(6).standard_normal((17, case.k)).astype(np.float32)
    many = run(loaded, "main", x, orders=("shuffled",))
    for first, end in ((0, 1), (1, 3), (3, 6)):
        np.testing.assert_array_equal(
            run(loaded, "main", x[first:end], orders=("shuffled",)), many[first:end]
        )


EXPERTS = {
    "odd": experts.Case(5, 37, 70),
    "groups": experts.Case(4, 256, 64, groups=4),
    "rows": experts.Case(3, 256, 40, groups=2, bits=4, rows=3),
    "groups_of_24": experts.Case(3, 72, 20, groups=3, rows=2),
    "groups_of_3": experts.Case(3, 12, 20, groups=4),  # no kernel takes them
}


@pytest.fixture(scope="module")
def loaded_experts() -> Any:
    program = Program(joined(EXPERTS), [SpikeToInt(), LowerGroupedLinear()])
    return program.load({name: weights_of_experts(name) for name in EXPERTS})


def weights_of_experts(name: str) -> dict[str, Array]:
    return EXPERTS[name].weights(np.random.default_rng(0))


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(loaded_experts: Any, name: str) -> None:
    rng, case, weights = np.random.default_rng(5), EXPERTS[name], weights_of_experts(name)
    for m in (0, 1, 9, 70) if case.rows is None else (case.rows,):
        x = rng.standard_normal((m, case.k)).astype(np.float32)
        x = np.where(rng.random(x.shape) < 0.02, x * np.float32(300), x)
        if m > 4:
            x[3], x[4, 0] = x[3] * np.float32(1e7), np.nan
        expert = rng.integers(-case.experts - 1, case.experts + 1, m)
        expected = np.full((m, case.columns), np.nan, np.float32)
        for e in range(case.experts):
            sent = (expert == e) | (expert == e - case.experts)
            one = {n: w[e] for n, w in weights.items()}
            expected[sent] = spike_cases.linear(x[sent], one, False)[0]
        np.testing.assert_array_equal(run(loaded_experts, name, x, expert), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_head_and_an_embedding_share_codes(bits: int) -> None:
    """Tokens read the codes as the head has packed them; one outside the table is zero."""
    case = Case(70, 37, bits=bits, rows=1)
    x, w = "tensor<1x70xf32>", "tensor<37x70xi8>"
    text = joined({"main": case}).replace(
        f"(%x: {x}) -> tensor<1x37xf32>",
        f"(%x: {x}, %ids: tensor<?xi64>) -> (tensor<?x70xi8>, tensor<1x37xf32>)",
    )
    row = f'%rows = "spikingbrain.embedding"(%ids, %w) {{rows = 37 : i64}} : (tensor<?xi64>, {w}) -> tensor<?x70xi8>'
    text = text.replace("  return %y : ", f"  {row}\n  return %rows, %y : tensor<?x70xi8>, ")
    program = Program(text, [SpikeToInt()])
    assert len(program.stored) == 2  # codes and scales
    codes = case.weights(np.random.default_rng(0))
    ids = np.array([0, 36, 5, 15, 16, 37, -1], np.int64)
    got = run(program.load({"main": codes}), "main", np.ones((1, 70), np.float32), ids)
    np.testing.assert_array_equal(got[:5], codes["w"][ids[:5]])
    assert not got[5:].any()
