"""The packed linear kernel against numpy, for every row tail, odd sizes and the instruction sets that run here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")
compiler = pytest.importorskip("iree.compiler.tools")
runtime = pytest.importorskip("iree.runtime")

from torch_mlir import ir  # noqa: E402
from torch_mlir.dialects import func  # noqa: E402

from spikingbrain.artifact import numpy_dtype  # noqa: E402
from spikingbrain.backend_iree.dispatch import wrap_kernels  # noqa: E402
from spikingbrain.passes import dialect  # noqa: E402
from spikingbrain.passes.kernels.linear import emit_linear, packed_block, schedule  # noqa: E402
from spikingbrain.passes.linalg_build import converted  # noqa: E402
from spikingbrain.target import Target  # noqa: E402
from spikingbrain.tuning import Tuning  # noqa: E402

V4 = Target("x86-64-v4", "cpu", "iree", "x86-64", "x86-64-v4", frozenset({"fma", "avx512f"}), 512, 32)
V3 = Target("x86-64-v3", "cpu", "iree", "x86-64", "x86-64-v3", frozenset({"fma", "avx2"}), 256, 16)
V2 = Target("x86-64-v2", "cpu", "iree", "x86-64", "x86-64-v2", frozenset(), 128, 16)
SMALL_L2 = dataclasses.replace(V3, name="small-l2", tuning=Tuning(l2_bytes=1 << 13, linear_streams=2))
TARGETS = [V4, V3, V2, SMALL_L2]

# entry point -> input channels, columns, rows (None: dynamic), with a residual
CASES = {
    "odd": (37, 70, None, False),
    "one_row": (130, 67, 1, False),
    "one_row_residual": (64, 128, 1, True),
    "tiny": (1, 1, None, False),
    "three_rows": (64, 64, 3, False),
    "residual": (203, 33, None, True),
    "several_groups": (64, 1000, None, False),
    "even_steps": (24, 16, None, False),
    "bfloat16": (203, 70, None, False),
    "float16": (130, 67, 1, True),
}
STORED = {"bfloat16": "bf16", "float16": "f16"}  # entry point -> type of the weight, f32 unless named


def _processor_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()


def _tensor(*shape: int | None) -> ir.Type:
    dynamic = ir.ShapedType.get_dynamic_size()
    return ir.RankedTensorType.get([dynamic if s is None else s for s in shape], ir.F32Type.get())


def _packed(weight: np.ndarray, block: int) -> np.ndarray:
    n, k = weight.shape
    blocks = -(-n // block)
    padded = np.zeros((blocks * block, k), np.float32)
    padded[:n] = weight
    return np.ascontiguousarray(padded.reshape(blocks, block, k).transpose(0, 2, 1))


def _module(target: Target, cases: dict[str, tuple[int, int, int | None, bool]]) -> ir.Module:
    context = dialect.load()
    with context, ir.Location.unknown():
        module = ir.Module.create()
        block = packed_block(target)
        for name, (k, n, rows, residual) in cases.items():
            types = [_tensor(rows, k), _tensor(-(-n // block), k, block), *[_tensor(rows, n)] * residual]
            with ir.InsertionPoint(module.body):
                entry = func.FuncOp(name, (types, [_tensor(rows, n)])).add_entry_block()
            with ir.InsertionPoint(entry):
                x, weight, *addend = entry.arguments
                weight = converted(weight, ir.Type.parse(STORED.get(name, "f32")))
                func.ReturnOp([emit_linear(x, weight, n, target, addend[0] if addend else None)])
    dialect.verify(module)
    return module


def _load(module: ir.Module, target: Target) -> Any:
    code = compiler.compile_str(
        str(module), target_backends=["llvm-cpu"], extra_args=[f"--iree-llvmcpu-target-cpu={target.cpu}"]
    )
    config = runtime.Config("local-sync")
    context = runtime.SystemContext(config=config)
    context.add_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, code))
    return context.modules.module


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def compiled(request: pytest.FixtureRequest) -> tuple[Target, Any]:
    target = request.param
    wanted = {"x86-64-v4": "avx512f", "x86-64-v3": "avx2", "x86-64-v2": "sse4_2"}[target.cpu]
    if wanted not in _processor_flags():
        pytest.skip(f"this processor has no {wanted}")
    module = _module(target, CASES)
    wrap_kernels(module)
    return target, _load(module, target)


def _check(compiled: tuple[Target, Any], case: str, x: np.ndarray, rng: np.random.Generator) -> None:
    target, program = compiled
    k, n, _, residual = CASES[case]
    weight = (
        rng.standard_normal((n, k))
        .astype(numpy_dtype(case if case in STORED else "float32"))
        .astype(np.float32)
    )
    addend = [rng.standard_normal((len(x), n)).astype(np.float32)] * residual
    y = program[case](x, _packed(weight, packed_block(target)), *addend).to_host()
    expected = x.astype(np.float64) @ weight.T + (addend[0] if addend else 0)
    bound = np.abs(x).astype(np.float64) @ np.abs(weight).T + 1  # of the terms that were added up
    assert y.shape == expected.shape
    assert np.all(np.abs(y - expected) <= 1e-6 * bound)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_numpy(compiled: tuple[Target, Any], case: str) -> None:
    rng = np.random.default_rng(0)
    k, _, rows, _ = CASES[case]
    for m in [*range(15), 23] if rows is None else [rows]:
        _check(compiled, case, rng.standard_normal((m, k)).astype(np.float32), rng)


def test_more_rows_than_a_workgroup_takes(compiled: tuple[Target, Any]) -> None:
    rng = np.random.default_rng(1)
    rows = schedule(24, compiled[0]).group_rows + 5
    _check(compiled, "even_steps", rng.standard_normal((rows, 24)).astype(np.float32), rng)


def test_values_of_any_size(compiled: tuple[Target, Any]) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((9, 37)) * 10.0 ** rng.integers(-36, 36, (9, 37))
    _check(compiled, "odd", x.astype(np.float32), rng)


def test_infinity_stays_in_its_row(compiled: tuple[Target, Any]) -> None:
    target, program = compiled
    rng = np.random.default_rng(3)
    x = rng.standard_normal((8, 37)).astype(np.float32)
    weight = _packed(rng.standard_normal((70, 37)).astype(np.float32), packed_block(target))
    clean = program.odd(x, weight).to_host()
    x[3, 5], x[6, 36] = np.inf, np.nan
    y = program.odd(x, weight).to_host()
    others = [0, 1, 2, 4, 5, 7]
    assert np.array_equal(y[others], clean[others])
    assert np.all(np.isinf(y[3])) and np.all(np.isnan(y[6]))


def test_result_does_not_depend_on_the_rows_beside_it(compiled: tuple[Target, Any]) -> None:
    target, program = compiled
    rng = np.random.default_rng(4)
    x = rng.standard_normal((14, 64)).astype(np.float32)
    weight = _packed(rng.standard_normal((1000, 64)).astype(np.float32), packed_block(target))
    together = program.several_groups(x, weight).to_host()
    for row in (0, 6, 12, 13):
        alone = program.several_groups(x[row : row + 1], weight).to_host()
        # Tiles of one and two rows add in another order.
        assert np.allclose(alone, together[row : row + 1], rtol=1e-5, atol=1e-5)


def test_one_kernel_per_shape() -> None:
    context = dialect.load()
    with context, ir.Location.unknown():
        module = ir.Module.create()
        types = [_tensor(None, 64), _tensor(1, 64, 64)]
        with ir.InsertionPoint(module.body):
            entry = func.FuncOp("main", (types, [_tensor(None, 64)])).add_entry_block()
        with ir.InsertionPoint(entry):
            x, weight = entry.arguments
            for _ in range(3):
                x = emit_linear(x, weight, 64, V4)
            func.ReturnOp([x])
    names = [op.name.value for op in module.body.operations]
    assert names == ["linear_k64_n64_m", "main"]


def test_refuses_a_weight_packed_otherwise() -> None:
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            entry = func.FuncOp("main", ([_tensor(None, 64), _tensor(4, 64, 16)], [])).add_entry_block()
        with (
            ir.InsertionPoint(entry),
            pytest.raises(
                ValueError, match=r"a packed weight of 64 columns is \[1, 64, 64\], got \[4, 64, 16\]"
            ),
        ):
            emit_linear(*entry.arguments, 64, V4)


def test_refuses_a_target_without_vectors() -> None:
    with pytest.raises(ValueError, match="target 'gpu' has no vector registers: use the portable form"):
        packed_block(Target("gpu", "gpu", "iree", "spirv"))
