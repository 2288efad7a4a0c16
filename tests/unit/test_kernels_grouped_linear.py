"""Projections by experts, portable and as kernels, against one product per row in numpy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler.tools")
pytest.importorskip("iree.runtime")

from iree import runtime
from iree.compiler import tools
from scan_targets import PORTABLE, V3, V4, runs_here
from torch_mlir import ir

from spikingbrain.backend_iree.dispatch import wrap_kernels
from spikingbrain.passes import dialect, pipeline, recipes
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.kernels.grouped_linear import emit_grouped_linear
from spikingbrain.passes.kernels.linear import schedule
from spikingbrain.passes.lower_grouped_linear import LowerGroupedLinear
from spikingbrain.passes.pack_weights import PackWeights
from spikingbrain.passes.weights_to_arguments import WeightsToArguments
from spikingbrain.target import Target
from spikingbrain.tuning import Tuning

Array = np.ndarray[Any, Any]

# K in parts, so that results are read again; panels of one column block to a workgroup
SMALL_CACHE = dataclasses.replace(V3, name="small-cache", tuning=Tuning(l2_bytes=1 << 13))
TARGETS = [PORTABLE, SMALL_CACHE, *(pytest.param(t, marks=pytest.mark.slow) for t in (V3, V4))]


@dataclasses.dataclass(frozen=True)
class Case:
    experts: int
    k: int
    columns: int
    rows: int | None = None  # None: any number
    kind: str = "f32"


CASES = {
    "odd": Case(5, 37, 70),
    "tiny": Case(1, 1, 1),
    "one_row": Case(3, 130, 67, rows=1),
    "few_rows": Case(4, 66, 33, rows=3),
    "fixed_rows": Case(40, 24, 16, rows=11),
    "several_groups": Case(3, 64, 1000),
    "halves": Case(5, 37, 70, kind="f16"),
}


def _function(name: str, case: Case) -> str:
    m = "?" if case.rows is None else case.rows
    n, k, o, kind = case.experts, case.k, case.columns, case.kind
    return f"""
func.func @{name}(%x: tensor<{m}x{k}x{kind}>, %e: tensor<{m}xi64>) -> tensor<{m}x{o}x{kind}>
    attributes {{spikingbrain.weight_arguments}} {{
  %w = "spikingbrain.parameter"() {{sources = ["w"], recipe = []}} : () -> tensor<{n}x{o}x{k}x{kind}>
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {{columns = {o} : i64}}
    : (tensor<{m}x{k}x{kind}>, tensor<{n}x{o}x{k}x{kind}>, tensor<{m}xi64>) -> tensor<{m}x{o}x{kind}>
  return %y : tensor<{m}x{o}x{kind}>
}}"""


class Program:
    def __init__(self, target: Target):
        with dialect.load(), ir.Location.unknown():
            module = ir.Module.parse("\n".join(_function(name, case) for name, case in CASES.items()))
            context = PassContext(target)
            pipeline.run([PackWeights(), LowerGroupedLinear()], module, context)
            assert ("spikingbrain_control.launch" in str(module)) == bool(target.vector_bits)
            pipeline.clean(module)  # of the weights that are not packed
            pipeline.run([WeightsToArguments()], module, context)
            pipeline.check_lowered(module)
            wrap_kernels(module)
            flags = [f"--iree-llvmcpu-target-cpu={target.cpu}"]
            code = tools.compile_str(str(module), target_backends=["llvm-cpu"], extra_args=flags)
        self.stored = context.weight_arguments
        config = runtime.Config("local-sync")
        self.context = runtime.SystemContext(config=config)
        self.context.add_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, code))

    def __call__(self, name: str, x: Array, weight: Array, expert: Array) -> Array:
        (stored,) = self.stored[name]
        packed = recipes.apply(stored.recipe, [weight])
        result: Array = self.context.modules.module[name](x, expert, packed).to_host()
        return result


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def program(request: pytest.FixtureRequest) -> Program:
    if not runs_here(request.param):
        pytest.skip(f"this processor has no {request.param.name}")
    return Program(request.param)


def reference(x: Array, weight: Array, expert: Array) -> Array:
    y = np.full((len(x), weight.shape[1]), np.nan)
    for r, e in enumerate(expert):
        if -len(weight) <= e < len(weight):
            y[r] = weight[e].astype(np.float64) @ x[r]
    return y


def check(program: Program, name: str, expert: Array, rng: np.random.Generator) -> None:
    case = CASES[name]
    kind = np.float16 if case.kind == "f16" else np.float32
    weight = rng.standard_normal((case.experts, case.columns, case.k)).astype(kind)
    x = rng.standard_normal((len(expert), case.k)).astype(kind)
    y, expected = program(name, x, weight, expert), reference(x, weight, expert)
    bound = 1e-6 * (reference(np.abs(x), np.abs(weight), expert) + 1)  # of the terms that were added up
    if kind == np.float16:
        bound += 2.0**-11 * np.abs(expected)  # rounded once
    assert y.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    assert np.all((np.abs(y - expected) <= bound) | np.isnan(expected))


@pytest.mark.parametrize("name", CASES)
def test_each_row_goes_through_its_expert(program: Program, name: str) -> None:
    rng = np.random.default_rng(0)
    case = CASES[name]
    for rows in (0, 1, 2, 5, 9, 23, 64) if case.rows is None else (case.rows,):
        check(program, name, rng.integers(0, case.experts, rows), rng)


def test_experts_without_rows_and_one_with_all(program: Program) -> None:
    rng = np.random.default_rng(1)
    check(program, "odd", np.full(31, 3), rng)
    check(program, "odd", np.array([4, 0, 4, 4, 0, 4, 0]), rng)


def test_numbers_from_the_end_and_experts_that_do_not_exist(program: Program) -> None:
    """As torch's indices are; what torch refuses is NaN, and reads no other memory."""
    rng = np.random.default_rng(2)
    far = 2**62
    check(program, "odd", np.array([0, 5, -1, 2, -6, far, 2, -far, -5, 4]), rng)
    check(program, "few_rows", np.array([-4, 4, 1]), rng)
    check(program, "fixed_rows", np.array([-41, 40, *range(9)]), rng)
    check(program, "odd", np.full(3, 5), rng)


def test_more_rows_than_a_workgroup_takes(program: Program) -> None:
    rng = np.random.default_rng(3)
    expert = rng.integers(0, 5, schedule(37, V3).group_rows + 200)
    expert[200:] = 1
    check(program, "odd", expert, rng)


def test_infinity_stays_in_its_row(program: Program) -> None:
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((5, 70, 37)).astype(np.float32)
    x, expert = rng.standard_normal((12, 37)).astype(np.float32), np.arange(12) % 2
    clean = program("odd", x, weight, expert)
    x[3, 5], x[6, 36] = np.inf, np.nan
    y = program("odd", x, weight, expert)
    others = [r for r in range(12) if r not in (3, 6)]
    np.testing.assert_array_equal(y[others], clean[others])
    assert np.all(np.isinf(y[3])) and np.all(np.isnan(y[6]))


def test_refuses_a_weight_packed_otherwise() -> None:
    text = "func.func @main(%x: tensor<?x8xf32>, %w: tensor<2x4x8x16xf32>, %e: tensor<?xi64>) { return }"
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.parse(text)
        entry = module.body.operations[0].regions[0].blocks[0]
        with (
            ir.InsertionPoint(entry),
            pytest.raises(ValueError, match=r"64 columns is \[2, 1, 8, 64\], got \[2, 4, 8, 16\]"),
        ):
            emit_grouped_linear(*entry.arguments, 64, V4, {})
