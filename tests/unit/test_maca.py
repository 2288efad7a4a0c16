"""The MACA backend: kernels against numpy, the golden source, refusals, and what the emulator catches."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torch_mlir")

import spikingbrain
from spikingbrain.backend import StageContext
from spikingbrain.backend_maca.backend import MacaBackend
from spikingbrain.backend_maca.plan.plan import FORMAT, evaluate
from spikingbrain.backend_maca.run import emulate
from spikingbrain.backend_maca.run.emulate import ORDERS, KernelFault, Kernels, build
from spikingbrain.backend_maca.run.runtime import check_format
from spikingbrain.errors import (
    CallError,
    CorruptArtifact,
    MissingDependency,
    NewerFormat,
    SpikingBrainError,
    TargetError,
    UnsupportedOp,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "maca"
needs_cxx = pytest.mark.skipif(shutil.which(emulate.compiler()) is None, reason="no C++ compiler")
Array = np.ndarray[Any, Any]


def compile_text(
    text: str,
    target: str = "maca-emulator",
    until: str = "",
    report: dict[str, Any] | None = None,
    **options: str,
) -> Any:
    backend = MacaBackend()
    (status,) = [s for s in backend.targets() if s.target.name == target]
    context = StageContext(
        status.target, backend.options(**options), Path("."), {} if report is None else report
    )
    form: Any = text
    for name, stage in backend.stages(status.target).items():
        form = stage(form, context)
        if name == until:
            break
    return form


def load(code: Mapping[str, bytes], weights: Mapping[str, Array] | None = None) -> Any:
    return MacaBackend().load({n: memoryview(c) for n, c in code.items()}, {}, weights or {})


def run(
    text: str, *arguments: Array, weights: Mapping[str, Array] | None = None, entry: str = "main"
) -> Array:
    """Compiles and runs; all thread orders must agree bit for bit."""
    return in_every_order(load(compile_text(text), weights), entry, *arguments)


def in_every_order(program: Any, entry: str, *arguments: Array) -> Array:
    """Runs an entry point in all thread orders, which must agree bit for bit."""
    results = []
    for order in ORDERS:
        program.kernels.order = order
        results.append(program.call(entry, [program.to_device(a) for a in arguments]))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    return results[0][0]


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


MAPS = """
#id = affine_map<(i, j) -> (i, j)>
#row = affine_map<(i, j) -> (j)>
"""
ADD_AND_SCALE = """
func.func public @main(%x: tensor<?x?xf32>, %bias: tensor<?xf32>, %scale: tensor<?x?xf32>)
    -> tensor<?x?xf32> {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %m = tensor.dim %x, %c0 : tensor<?x?xf32>
  %n = tensor.dim %x, %c1 : tensor<?x?xf32>
  %e = tensor.empty(%m, %n) : tensor<?x?xf32>
  %y = linalg.generic {indexing_maps = [#id, #row, #id, #id], iterator_types = ["parallel", "parallel"]}
      ins(%x, %bias, %scale : tensor<?x?xf32>, tensor<?xf32>, tensor<?x?xf32>) outs(%e : tensor<?x?xf32>) {
  ^bb0(%a: f32, %b: f32, %s: f32, %o: f32):
    %0 = arith.addf %a, %b : f32
    %1 = arith.mulf %0, %s : f32
    linalg.yield %1 : f32
  } -> tensor<?x?xf32> loc("model.py":7:0)
  return %y : tensor<?x?xf32>
}
"""
ELEMENTWISE = MAPS + ADD_AND_SCALE

GEMV = """
#x = affine_map<(m, n, k) -> (m, k)>
#w = affine_map<(m, n, k) -> (n, k)>
#y = affine_map<(m, n, k) -> (m, n)>
func.func public @main(%x: tensor<?xKxf32>) -> tensor<?xNxf32> {
  %w = "spikingbrain.parameter"() {sources = ["layers.0.weight"], recipe = []} : () -> tensor<NxKxf32>
  %c0 = arith.constant 0 : index
  %zero = arith.constant 0.0 : f32
  %m = tensor.dim %x, %c0 : tensor<?xKxf32>
  %e = tensor.empty(%m) : tensor<?xNxf32>
  %init = linalg.fill ins(%zero : f32) outs(%e : tensor<?xNxf32>) -> tensor<?xNxf32> loc("model.py":11:0)
  %y = linalg.generic {indexing_maps = [#x, #w, #y], iterator_types = ["parallel", "parallel", "reduction"]}
      ins(%x, %w : tensor<?xKxf32>, tensor<NxKxf32>) outs(%init : tensor<?xNxf32>) {
  ^bb0(%a: f32, %b: f32, %o: f32):
    %p = arith.mulf %a, %b : f32
    %s = arith.addf %o, %p : f32
    linalg.yield %s : f32
  } -> tensor<?xNxf32> loc("model.py":12:0)
  return %y : tensor<?xNxf32>
}
"""
KEY = "layers.0.weight"


def gemv(n: int, k: int) -> str:
    return GEMV.replace("xNx", f"x{n}x").replace("Nx", f"{n}x").replace("xKx", f"x{k}x")


def wave_sum(products: Array) -> Array:
    """Adds the last axis in the order of a wave: lanes stride by 64, then the butterfly."""
    steps = -(-products.shape[-1] // 64)
    padded = np.zeros((*products.shape[:-1], steps * 64), np.float32)
    padded[..., : products.shape[-1]] = products
    lanes = np.zeros((*products.shape[:-1], 64), np.float32)
    for step in range(steps):
        lanes += padded[..., step * 64 : step * 64 + 64]
    for distance in (32, 16, 8, 4, 2, 1):
        lanes = lanes + lanes[..., np.arange(64) ^ distance]
    return lanes[..., 0]


@needs_cxx
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 257), (0, 4)])
def test_elementwise_is_exact_at_any_size(shape: tuple[int, int]) -> None:
    x, bias, scale = random(*shape), random(shape[1], seed=1), random(*shape, seed=2)
    np.testing.assert_array_equal(run(ELEMENTWISE, x, bias, scale), (x + bias) * scale)


@needs_cxx
@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 128), (1, 33, 201), (6, 7, 517), (0, 5, 128)])
def test_gemv_adds_in_the_order_of_a_wave(m: int, n: int, k: int) -> None:
    x, w = random(m, k), random(n, k, seed=1)
    y = run(gemv(n, k), x, weights={KEY: w})
    np.testing.assert_array_equal(y, wave_sum(x[:, None, :] * w[None]))
    np.testing.assert_allclose(y, x @ w.T, rtol=1e-4, atol=1e-4)


@needs_cxx
def test_short_rows_stay_in_one_thread() -> None:
    x, w = random(4, 9), random(3, 9, seed=1)
    expected = np.zeros((4, 3), np.float32)
    for k in range(9):
        expected += x[:, k, None] * w[None, :, k]
    assert "__shfl" not in compile_text(gemv(3, 9))["kernels.maca"].decode()
    np.testing.assert_array_equal(run(gemv(3, 9), x, weights={KEY: w}), expected)


@needs_cxx
def test_named_ops_views_and_copies() -> None:
    text = """
func.func public @main(%a: tensor<5x160xf32>, %v: tensor<160xf32>, %z: tensor<5xf32>) -> tensor<2x2xf32> {
  %y = linalg.matvec ins(%a, %v : tensor<5x160xf32>, tensor<160xf32>)
      outs(%z : tensor<5xf32>) -> tensor<5xf32>
  %s = tensor.extract_slice %y[1] [4] [1] : tensor<5xf32> to tensor<4xf32>
  %r = tensor.expand_shape %s [[0, 1]] output_shape [2, 2] : tensor<4xf32> into tensor<2x2xf32>
  return %r : tensor<2x2xf32>
}"""
    a, v, z = random(5, 160), random(160, seed=1), random(5, seed=2)
    kept = z.copy()
    np.testing.assert_allclose(run(text, a, v, z), (z + a @ v)[1:].reshape(2, 2), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(z, kept)  # arguments are never written


UNARY = """
#id = affine_map<(i) -> (i)>
func.func public @main(%x: tensor<?xIN>) -> tensor<?xOUT> {
  %c0 = arith.constant 0 : index
  %n = tensor.dim %x, %c0 : tensor<?xIN>
  %e = tensor.empty(%n) : tensor<?xOUT>
  %y = linalg.generic {indexing_maps = [#id, #id], iterator_types = ["parallel"]}
      ins(%x : tensor<?xIN>) outs(%e : tensor<?xOUT>) {
  ^bb0(%a: IN, %o: OUT):
    BODY
    linalg.yield %r : OUT
  } -> tensor<?xOUT> loc("model.py":3:0)
  return %y : tensor<?xOUT>
}
"""


def unary(body: str, source: str, result: str) -> str:
    return UNARY.replace("BODY", body).replace("IN", source).replace("OUT", result)


@needs_cxx
def test_bfloat16_is_computed_in_float_and_rounded_to_even() -> None:
    x = (random(999) * 100).view(np.uint32)
    stored = (x >> 16).astype(np.uint16)
    exact = (stored.astype(np.uint32) << 16).view(np.float32) * np.float32(1.5)
    bits = exact.view(np.uint32)
    expected = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    text = unary("%c = arith.constant 1.5 : bf16\n %r = arith.mulf %a, %c : bf16", "bf16", "bf16")
    np.testing.assert_array_equal(run(text, stored), expected)


@needs_cxx
def test_every_float16_survives_and_rounding_is_numpys() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    wide = run(unary("%r = arith.extf %a : f16 to f32", "f16", "f32"), every)
    np.testing.assert_array_equal(wide, every.astype(np.float32))
    ties = np.concatenate([random(2000) * np.float32(10.0) ** (i - 9) for i in range(15)])
    ties = np.concatenate([ties, wide[:31744] + np.diff(wide[:31745]) / 2, np.float32([65519, 65520, 1e30])])
    with np.errstate(over="ignore"):
        expected = ties.astype(np.float16)
    narrow = run(unary("%r = arith.truncf %a : f32 to f16", "f32", "f16"), ties.astype(np.float32))
    np.testing.assert_array_equal(narrow.view(np.uint16), expected.view(np.uint16))


@needs_cxx
@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_doubles_become_halves_as_in_torch(dtype: torch.dtype, kind: str) -> None:
    # by way of f32, so that what is just beside a tie may round twice
    ties = np.float64([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 65520, 0, 1e300, np.nan, 2**-24])
    x = np.concatenate([ties * (1 + e) for e in (0, 2**-40, -(2**-40), 2**-30, 2**-20)])
    found = run(unary(f"%r = arith.truncf %a : f64 to {kind}", "f64", kind), x)
    np.testing.assert_array_equal(
        torch.from_numpy(found.view(np.int16)).view(dtype).double(), torch.from_numpy(x).to(dtype).double()
    )


@needs_cxx
def test_integers_wrap_and_compare_as_in_mlir() -> None:
    x = np.array([2**31 - 1, -(2**31), -1, 0, 7], np.int32)
    body = """
    %c3 = arith.constant 3 : i32
    %0 = arith.muli %a, %c3 : i32
    %1 = arith.addi %0, %a : i32
    %2 = arith.shrui %1, %c3 : i32
    %3 = arith.cmpi ult, %2, %a : i32
    %4 = arith.extui %3 : i1 to i32
    %5 = arith.subi %2, %4 : i32
    %r = arith.maxsi %5, %c3 : i32"""
    with np.errstate(over="ignore"):
        sums = (x * np.int32(3) + x).view(np.uint32) >> np.uint32(3)
        expected = np.maximum((sums - (sums < x.view(np.uint32))).view(np.int32), 3)
    np.testing.assert_array_equal(run(unary(body, "i32", "i32"), x), expected)


@needs_cxx
@pytest.mark.parametrize(("kind", "dtype"), [("f32", np.float32), ("f64", np.float64)])
def test_maximum_propagates_nan(kind: str, dtype: Any) -> None:
    x = np.array([np.nan, -1, 2, -0.0, np.inf], dtype)
    body = f"%z = arith.constant 0.0 : {kind}\n %r = arith.maximumf %a, %z : {kind}"
    got = run(unary(body, kind, kind), x)
    np.testing.assert_array_equal(got, np.maximum(x, dtype(0)))
    assert not np.signbit(got[3])


@needs_cxx
def test_math_is_close_to_numpy() -> None:
    x = np.abs(random(100)) + np.float32(0.1)
    body = (
        "%0 = math.exp %a : f32\n %1 = math.rsqrt %0 : f32\n %2 = math.tanh %1 : f32\n %r = math.log %2 : f32"
    )
    expected = np.log(np.tanh(1 / np.sqrt(np.exp(x.astype(np.float64)))))
    np.testing.assert_allclose(run(unary(body, "f32", "f32"), x), expected, rtol=1e-5, atol=1e-6)


CONSTANTS = """
func.func public @main(%x: tensor<1xi64>) -> (tensor<3xi64>, tensor<3xi1>, tensor<3xbf16>, tensor<3xbf16>) {
  %0 = arith.constant dense_resource<a> : tensor<3xi64>
  %1 = arith.constant dense_resource<b> : tensor<3xi1>
  %2 = arith.constant dense_resource<c> : tensor<3xbf16>
  %3 = arith.constant dense<-2.5> : tensor<3xbf16>
  return %0, %1, %2, %3 : tensor<3xi64>, tensor<3xi1>, tensor<3xbf16>, tensor<3xbf16>
}
{-# dialect_resources: { builtin: {
  a: "0x08000000010000000000000002000000000000000300000000000080",
  b: "0x01000000010001",
  c: "0x02000000803F40C00000"
} } #-}"""


@needs_cxx
def test_constants_of_every_form_are_read() -> None:
    program = load(compile_text(CONSTANTS))
    numbers, flags, halves, same = program.call("main", [np.zeros(1, np.int64)])
    np.testing.assert_array_equal(numbers, [1, 2, 3 - 2**63])
    np.testing.assert_array_equal(flags, [True, False, True])
    np.testing.assert_array_equal(halves.view(np.uint16), np.uint16([0x3F80, 0xC040, 0]))
    np.testing.assert_array_equal(same.view(np.uint16), np.uint16([0xC020] * 3))
    with pytest.raises(UnsupportedOp, match="a constant of type tensor<3xi64> cannot be stored"):
        compile_text(CONSTANTS.split("{-#")[0])


@needs_cxx
def test_constant_tensors_travel_in_the_plan() -> None:
    text = """
func.func public @ENTRY() -> tensor<3xKIND> {
  %c = arith.constant dense<VALUES> : tensor<3xKIND>
  %e = tensor.empty() : tensor<3xKIND>
  %y = linalg.copy ins(%c : tensor<3xKIND>) outs(%e : tensor<3xKIND>) -> tensor<3xKIND>
  return %y : tensor<3xKIND>
}"""
    cases = [
        ("[1.0, 2.0, 3.0]", "f32", np.float32([1, 2, 3])),
        ("0.5", "f32", np.float32([0.5] * 3)),
        ("[1.5, -2.0, 0.0]", "f16", np.float16([1.5, -2, 0])),
        ("[5, -6, 7]", "i64", np.int64([5, -6, 7])),
        ("[true, false, true]", "i1", np.array([True, False, True])),
    ]
    entries = [
        text.replace("ENTRY", f"case{i}").replace("KIND", kind).replace("VALUES", values)
        for i, (values, kind, _) in enumerate(cases)
    ]
    program = load(compile_text("".join(entries)))
    for i, (_, _, expected) in enumerate(cases):
        (result,) = program.call(f"case{i}", [])
        assert result.dtype == expected.dtype
        np.testing.assert_array_equal(result, expected)


# The artifact's code and its errors.


@pytest.mark.parametrize(("name", "text"), [("elementwise", ELEMENTWISE), ("gemv", gemv(960, 576))])
def test_golden_source(name: str, text: str, golden: Callable[[str, str], None]) -> None:
    golden(f"maca/{name}.maca", compile_text(text, target="maca")["kernels.maca"].decode())


def test_equal_kernels_are_printed_once() -> None:
    other = ADD_AND_SCALE.replace("@main", "@other").replace('"model.py":7', '"model.py":9')
    text = ELEMENTWISE + other
    source = compile_text(text)["kernels.maca"].decode()
    assert source.count("__global__") == 1
    assert "at model.py:7\n" in source and "at model.py:9\n" in source


def test_an_op_outside_the_subset_is_refused_by_name_and_place() -> None:
    text = unary("%r = math.cttz %a : i32", "i32", "i32").replace(
        "i32\n    linalg", 'i32 loc("model.py":5:0)\n linalg'
    )
    with pytest.raises(UnsupportedOp) as refused:
        compile_text(text)
    assert str(refused.value) == (
        "'math.cttz' has no form in MACA C++\n"
        "  at: model.py:5\n"
        "  because: it is outside the printed subset\n"
        "  try: docs/maca.md lists the subset; lower the op to it, or keep this part off the 'maca' target"
    )


GPU = """
module attributes {gpu.container_module} {
  gpu.module @kernels {
    gpu.func @block_sum(%x: memref<?xf32>, %y: memref<?xf32>) workgroup(%s: memref<128xf32, 3>)
        kernel attributes {known_block_size = array<i32: 128, 1, 1>} {
      %c0 = arith.constant 0 : index
      %c1 = arith.constant 1 : index
      %c128 = arith.constant 128 : index
      %zero = arith.constant 0.0 : f32
      %b = gpu.block_id x
      %t = gpu.thread_id x
      %base = arith.muli %b, %c128 : index
      %i = arith.addi %base, %t : index
      %v = memref.load %x[%i] : memref<?xf32>
      memref.store %v, %s[%t] : memref<128xf32, 3>
      BARRIER
      %first = arith.cmpi eq, %t, %c0 : index
      scf.if %first {
        INSIDE
        %sum = scf.for %k = %c0 to %c128 step %c1 iter_args(%a = %zero) -> (f32) {
          %e = memref.load %s[%k] : memref<128xf32, 3>
          %n = arith.addf %a, %e : f32
          scf.yield %n : f32
        }
        memref.store %sum, %y[%b] : memref<?xf32>
      }
      gpu.return
    }
  }
}
"""


def block_sum(barrier: str = "gpu.barrier", inside: str = "") -> str:
    code = MacaBackend().stages(MacaBackend().targets()[0].target)["maca"]
    context = StageContext(MacaBackend().targets()[0].target, MacaBackend().options(), Path("."))
    text = GPU.replace("BARRIER", barrier).replace("INSIDE", inside)
    source: str = code(text, context)["kernels.maca"].decode()
    return source


def test_a_collective_under_a_thread_condition_is_refused() -> None:
    with pytest.raises(UnsupportedOp, match="part of a block could miss it"):
        block_sum(inside="gpu.barrier")


def test_arithmetic_on_storage_types_is_refused() -> None:
    extra = "%h = arith.truncf %v : f32 to bf16\n %h2 = arith.addf %h, %h : bf16\n gpu.barrier"
    with pytest.raises(UnsupportedOp, match="bf16 is for storage; extend to f32 first"):
        block_sum(barrier=extra)


@needs_cxx
def test_wrong_arguments_are_named() -> None:
    program = load(compile_text(ELEMENTWISE))
    x, bias = random(3, 5), random(5)
    for arguments, message in [
        ([x, bias], "'main' takes 3 arguments, got 2"),
        ([x, x, x], r"argument 1 of 'main' has shape \[3, 5\], declared \['\?'\]"),
        ([x, bias, x.astype(np.float64)], "argument 2 of 'main' is float64, declared float32"),
        ([x, random(4), x], r"sizes of the operands of linalg.generic addf, mulf differ, at model.py:7"),
    ]:
        with pytest.raises(CallError, match=message):
            program.call("main", arguments)
    with pytest.raises(CallError, match="no entry point 'prefill'"):
        program.call("prefill", [])


@needs_cxx
def test_loading_needs_no_compiler_packages(tmp_path: Path) -> None:
    for name, content in compile_text(ELEMENTWISE).items():
        (tmp_path / name).write_bytes(content)
    script = """
import pathlib, sys
sys.modules["torch"] = sys.modules["torch_mlir"] = None
import numpy as np
from spikingbrain.backend_maca.backend import MacaBackend
code = {p.name: memoryview(p.read_bytes()) for p in pathlib.Path(sys.argv[1]).iterdir()}
one = np.ones((2, 3), np.float32)
print(MacaBackend().load(code, {}, {}).call("main", [one, one[0], one])[0].sum())
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert done.stdout == "12.0\n", done.stderr


@needs_cxx
def test_missing_parts_are_named() -> None:
    code = compile_text(gemv(5, 9))
    with pytest.raises(CorruptArtifact, match=r"the weight 'layers.0.weight' is missing"):
        load(code)
    with pytest.raises(CorruptArtifact, match=r"the artifact has no plan.json"):
        load({"kernels.maca": b""})
    with pytest.raises(MissingDependency, match=r"the runtime libmcruntime\.so does not load"):
        load(compile_text(gemv(5, 9), target="maca"))


@needs_cxx
def test_a_size_that_depends_on_data_is_read_by_the_host() -> None:
    text = """
func.func public @main(%x: tensor<4xi64>, %t: tensor<8xf32>) -> tensor<?xf32> {
  %c0 = arith.constant 0 : index
  %v = tensor.extract %x[%c0] : tensor<4xi64> loc("model.py":4:0)
  %n = arith.index_cast %v : i64 to index
  %y = tensor.extract_slice %t[0] [%n] [1] : tensor<8xf32> to tensor<?xf32>
  return %y : tensor<?xf32>
}"""
    for size in (0, 3, 8):
        np.testing.assert_array_equal(run(text, np.int64([size, 9, 9, 9]), random(8)), random(8)[:size])


def test_an_op_without_lowering_is_refused_before_anything_runs() -> None:
    text = """
func.func public @main(%x: tensor<2x4xf32>, %w: tensor<3x4xf32>) -> tensor<2x3xf32> {
  %y = "spikingbrain.linear"(%x, %w) {columns = 3 : i64}
      : (tensor<2x4xf32>, tensor<3x4xf32>) -> tensor<2x3xf32> loc("model.py":8:0)
  return %y : tensor<2x3xf32>
}"""
    with pytest.raises(
        UnsupportedOp, match=r"'spikingbrain.linear' has no kernel for MetaX GPUs\n  at: model.py:8"
    ):
        compile_text(text)


def test_the_plan_is_readable() -> None:
    plan = json.loads(compile_text(gemv(5, 200))["plan.json"])
    entry = plan["entries"]["main"]
    assert [b["role"] for b in entry["buffers"]] == ["input", "weight", "temporary"]
    assert entry["buffers"][2]["shape"] == [["dim", 0, 0], 5]
    assert [launch["kernel"] for launch in entry["launches"]] == [
        "wave_mulf_addf_0"
    ]  # which starts from the fill's 0
    assert entry["launches"][0]["grid"] == [["ceildiv", ["mul", ["dim", 0, 0], 5], 4], 1, 1]
    assert entry["outputs"] == [{"buffer": 2, "shape": [["dim", 0, 0], 5]}]


# What the emulator catches in generated code; test_maca_emulator.py has the rules one by one.


@needs_cxx
def test_a_missing_barrier_in_generated_code_shows() -> None:
    x, y = random(3 * 128), np.zeros(3, np.float32)
    source = block_sum()
    assert "__shared__ float shared0[128];" in source
    for order in ORDERS:
        Kernels(build(source, ["block_sum"]), order).launch("block_sum", (3, 1, 1), (128, 1, 1), 0, [x, y])
        np.testing.assert_allclose(y, x.reshape(3, 128).sum(1), rtol=1e-4)
    broken = Kernels(build(block_sum(barrier=""), ["block_sum"]), "reverse")
    with pytest.raises(KernelFault, match=r"reads shared memory that thread .* without a barrier"):
        broken.launch("block_sum", (3, 1, 1), (128, 1, 1), 0, [x, y])


@needs_cxx
def test_a_write_outside_a_buffer_is_caught() -> None:
    code = compile_text(unary("%r = arith.addf %a, %a : f32", "f32", "f32"))
    code["kernels.maca"] = (
        code["kernels.maca"].replace(b"out0[thread", b"out0[1 + thread").replace(b"out0[i", b"out0[1 + i")
    )
    with pytest.raises(
        KernelFault, match=r"line \d+ writes 4 bytes outside all buffers; .* its byte \d+ of 40"
    ):
        load(code).call("main", [random(10)])


@needs_cxx
def test_a_temporary_that_nobody_has_written_is_not_a_number() -> None:
    code = compile_text(gemv(5, 200))
    plan = json.loads(code["plan.json"])
    plan["entries"]["main"]["launches"].clear()
    broken = {**code, "plan.json": json.dumps(plan).encode()}
    (result,) = load(broken, {KEY: random(5, 200)}).call("main", [random(2, 200)])
    assert np.isnan(result).all()


@needs_cxx
def test_source_that_does_not_compile_is_reported() -> None:
    with pytest.raises(SpikingBrainError, match=r"do not compile\n  because: .*error"):
        build("#include <mc_runtime.h>\nnonsense;", [])


def test_a_plan_of_another_format_is_refused() -> None:
    for number, error in ((FORMAT + 1, NewerFormat), (FORMAT - 1, TargetError)):
        with pytest.raises(error, match="launch plan is of"):
            check_format({"format": number})
    check_format({"format": FORMAT})


def test_a_size_that_divides_by_0_is_an_error_of_the_call() -> None:
    size = ["rem", 7, ["dim", 0, 1]]
    assert evaluate(size, {0: [2, 4]}) == 3
    with pytest.raises(CallError, match=r"divides by 0 for arguments of \[2, 0\]"):
        evaluate(size, {0: [2, 0]})
    guarded = ["select", ["gt", ["dim", 0, 1], 0], size, 5]
    assert [evaluate(guarded, {0: [2, n]}) for n in (4, 0)] == [3, 5]


class HalfSum(torch.nn.Module):
    def forward(self, x: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = total + x
        return total * 2, total


@needs_cxx
def test_a_state_of_bfloat16_is_forked_and_restored(tmp_path: Path) -> None:
    x = torch.tensor([1.0, -0.3], dtype=torch.bfloat16)
    entry = spikingbrain.Entry((x, torch.zeros_like(x)))
    spikingbrain.export(
        HalfSum(), {"step": entry}, tmp_path / "sum.sbrain", state="total", target="maca-emulator"
    )
    program = spikingbrain.load(tmp_path / "sum.sbrain")
    state = program.new_state()
    program.step(x, state=state)
    branch = state.fork()
    found = program.step(x, state=branch)
    assert found.dtype.name == "bfloat16"
    np.testing.assert_array_equal(found.astype(np.float32), (4 * x).float().numpy())
    branch.restore(state.snapshot())
    [kept] = branch.snapshot().values()
    np.testing.assert_array_equal(kept.astype(np.float32), x.float().numpy())
