"""Spiking projections by experts against integers in numpy, bit for bit: the portable form and the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler.tools")
pytest.importorskip("iree.runtime")

import spike_cases
from iree import runtime
from iree.compiler import tools
from spike_cases import Array
from test_kernels_spike import PORTABLE, V3, V4, VNNI
from torch_mlir import ir

from spikingbrain.backend_iree import cpu
from spikingbrain.backend_iree.dispatch import wrap_kernels
from spikingbrain.passes import dialect, pipeline
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.kernels.spike_dot import choose
from spikingbrain.passes.lower_grouped_linear import LowerGroupedLinear
from spikingbrain.passes.spike_to_int import SpikeToInt
from spikingbrain.passes.weights_to_arguments import WeightsToArguments
from spikingbrain.target import Target


@dataclass(frozen=True)
class Case:
    experts: int
    k: int
    columns: int
    groups: int = 1
    bits: int = 8
    rows: int | None = None  # None: any number
    silent: float | None = None  # the share that is told

    def function(self, name: str) -> str:
        m = "?" if self.rows is None else self.rows
        x, v, e, y = (
            f"tensor<{m}x{self.k}xf32>",
            f"tensor<{m}xf32>",
            f"tensor<{m}xi64>",
            f"tensor<{m}x{self.columns}xf32>",
        )
        w, s = (
            f"tensor<{self.experts}x{self.columns}x{n}x{t}>"
            for n, t in ((self.k, "i8"), (self.groups, "f32"))
        )
        settings = f"bits = {self.bits} : i64"
        settings += "" if self.silent is None else f", silent = {self.silent} : f64"
        return f"""
func.func @{name}(%x: {x}, %e: {e}) -> {y} attributes {{spikingbrain.weight_arguments}} {{
  %w = "spikingbrain.parameter"() {{sources = ["w"], recipe = []}} : () -> {w}
  %s = "spikingbrain.parameter"() {{sources = ["s"], recipe = []}} : () -> {s}
  %c, %v = "spikingbrain.spike_encode"(%x) {{k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64}} : ({x}) -> ({x}, {v})
  %y = "spikingbrain.spike_grouped_linear"(%c, %v, %w, %s, %e) {{{settings}}} : ({x}, {v}, {w}, {s}, {e}) -> {y}
  return %y : {y}
}}"""

    def weights(self, rng: np.random.Generator) -> dict[str, Array]:
        each = [
            spike_cases.Case(self.k, self.columns, self.groups, self.bits).weights(rng)
            for _ in range(self.experts)
        ]
        return {name: np.stack([w[name] for w in each]) for name in ("w", "s")}


CASES = {
    "odd": Case(5, 37, 70),
    "grouped": Case(4, 256, 64, groups=4),
    "few_rows": Case(3, 52, 40, rows=3),
    "one_row": Case(3, 128, 67, groups=2, rows=1),
    "nibbles": Case(3, 96, 33, groups=3, bits=4),
    "nibbles_row": Case(3, 96, 70, bits=4, rows=1),
    "groups_of_3": Case(3, 12, 20, groups=4),  # no kernel takes them
    "events": Case(4, 130, 70, rows=8, silent=0.9),
    "events_grouped": Case(3, 384, 33, groups=3, rows=1, silent=0.9),
    "events_nibbles": Case(3, 96, 70, groups=2, bits=4, rows=2, silent=0.9),
    "events_rows": Case(4, 64, 40, silent=0.9),  # any number of rows: all channels are multiplied
}


class Program:
    def __init__(self, target: Target):
        with dialect.load(), ir.Location.unknown():
            module = ir.Module.parse("".join(case.function(name) for name, case in CASES.items()))
            context = PassContext(target)
            pipeline.run([SpikeToInt(), LowerGroupedLinear()], module, context)
            forms = [
                str(module).count(f"func.func private @spike_grouped_{form}") for form in ("linear", "events")
            ]
            events = [name for name in CASES if name.startswith("events")]
            assert forms == [len(CASES) - 1 - len(events) if choose(target, 8) else 0, len(events)]
            pipeline.clean(module)
            pipeline.run([WeightsToArguments()], module, context)
            pipeline.check_lowered(module)
            wrap_kernels(module)
            features = ",".join(f"+{feature}" for feature in sorted(target.features))
            flags = [
                f"--iree-llvmcpu-target-cpu={target.cpu}",
                f"--iree-llvmcpu-target-cpu-features={features}",
                "--iree-input-demote-f64-to-f32=false",
            ]
            code = tools.compile_str(str(module), target_backends=["llvm-cpu"], extra_args=flags)
        self.stored = context.weight_arguments
        config = runtime.Config("local-sync")
        self.system = runtime.SystemContext(config=config)
        self.system.add_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, code))

    def __call__(self, name: str, x: Array, expert: Array, weights: dict[str, Array]) -> Array:
        given = spike_cases.packed(self.stored[name], weights)
        result: Array = self.system.modules.module[name](x, expert, *given).to_host()
        return result


TARGETS = [VNNI, *(pytest.param(t, marks=pytest.mark.slow) for t in (PORTABLE, V3, V4))]


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def program(request: pytest.FixtureRequest) -> Program:
    missing = request.param.features - cpu.features()
    if missing or cpu.architecture() != "x86-64":
        pytest.skip(f"this processor has no {', '.join(sorted(missing)) or 'x86-64 code'}")
    return Program(request.param)


def check(program: Program, name: str, x: Array, expert: Array) -> None:
    weights = CASES[name].weights(np.random.default_rng(0))
    x = x.astype(np.float32)
    got = program(name, x, expert, weights)
    assert got.shape == (len(x), CASES[name].columns)
    for row, e, y in zip(x, expert, got, strict=True):
        if not -CASES[name].experts <= e < CASES[name].experts:
            assert np.all(np.isnan(y))
            continue
        expected, _ = spike_cases.linear(row[None], {n: w[e] for n, w in weights.items()}, bias=False)
        np.testing.assert_array_equal(y, expected[0])


@pytest.mark.parametrize("name", CASES)
def test_each_row_adds_integers_of_its_expert(program: Program, name: str) -> None:
    """Ordinary rows, outliers whose counts need more than a byte, rows that are computed from floats."""
    rng = np.random.default_rng(1)
    case = CASES[name]
    for m in (0, 1, 2, 23) if case.rows is None else (case.rows,) * 4:
        x = rng.standard_normal((m, case.k))
        x = np.where(rng.random(x.shape) < 0.03, x * 3000, x)
        x *= 10.0 ** rng.integers(-4, 4, (m, 1))
        x[m // 2 :][:1, 0] = rng.choice([np.nan, np.inf, 1e30])
        check(program, name, x, rng.integers(0, case.experts, m))


@pytest.mark.parametrize("share", [0.0, 0.04, 0.3, 1.0])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("events")])
def test_any_share_of_channels_fires(program: Program, name: str, share: float) -> None:
    """Rows of one call take either way, each by itself: its channels that fire, or all."""
    rng, case = np.random.default_rng(4), CASES[name]
    m = case.rows or 11
    x = rng.standard_normal((m, case.k))
    shares = np.where(np.arange(m) % 2, share, 0.1)[:, None]
    x = np.where(rng.random(x.shape) < shares, x + np.copysign(1, x), 0)
    x[0, 3] = 500  # a count beyond a byte
    check(program, name, x, rng.integers(-1, case.experts, m))


def test_one_expert_with_all_rows(program: Program) -> None:
    rng = np.random.default_rng(2)
    check(program, "odd", rng.standard_normal((31, 37)), np.full(31, 3))
    check(program, "nibbles", rng.standard_normal((13, 96)), np.full(13, 2))


def test_numbers_from_the_end_and_experts_that_do_not_exist(program: Program) -> None:
    rng = np.random.default_rng(3)
    far = 2**62
    check(program, "odd", rng.standard_normal((10, 37)), np.array([0, 5, -1, 2, -6, far, 2, -far, -5, 4]))
    check(program, "few_rows", rng.standard_normal((3, 52)), np.array([-3, 3, 1]))
