"""Matrix products of the MACA backend: which are calls of mcblas, and that the calls mean what the model says."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")

from test_maca import Array, compile_text, load, needs_cxx, random, run

from spikingbrain.backend_maca.plan.plan import evaluate
from spikingbrain.backend_maca.run.blas import Blas, BlasError
from spikingbrain.backend_maca.run.emulate import compiler
from spikingbrain.errors import MissingDependency

BODIES = {
    "f32": "%p = arith.mulf %a, %v : f32\n %s = arith.addf %c, %p : f32\n linalg.yield %s : f32",
    "bf16": "%p = arith.mulf %a, %v : bf16\n %s = arith.addf %c, %p : bf16\n linalg.yield %s : bf16",
    "i8": "%d = arith.extsi %a : i8 to i32\n %f = arith.extsi %v : i8 to i32\n"
    "%p = arith.muli %d, %f : i32\n %s = arith.addi %c, %p : i32\n linalg.yield %s : i32",
}


def text(form: str, sizes: dict[str, str], kind: str = "f32", initial: str = "0") -> str:
    """Returns a module for a product such as "bmk,bkn->bmn"; sizes are numbers or "?"."""
    first, _, rest = form.partition(",")
    second, _, third = rest.partition("->")
    loops = "".join(dict.fromkeys(third + first + second))
    result = {"i8": "i32"}.get(kind, kind)

    def tensor(letters: str, element: str) -> str:
        return "tensor<" + "x".join([*(sizes[x] for x in letters), element]) + ">"

    maps = [f"affine_map<({', '.join(loops)}) -> ({', '.join(x)})>" for x in (first, second, third)]
    iterators = ", ".join('"parallel"' if x in third else '"reduction"' for x in loops)
    dims, found = "", []
    for at, letter in enumerate(third):
        if sizes[letter] == "?":
            owner, letters = ("%x", first) if letter in first else ("%w", second)
            element = tensor(letters, kind)
            dims += f"%i{at} = arith.constant {letters.index(letter)} : index\n"
            dims += f"%d{at} = tensor.dim {owner}, %i{at} : {element}\n"
            found.append(f"%d{at}")
    a, b, c = tensor(first, kind), tensor(second, kind), tensor(third, result)
    zero = initial if result == "i32" else f"{initial}.0"
    return f"""
    func.func public @main(%x: {a}, %w: {b}) -> {c} {{
      {dims}
      %e = tensor.empty({", ".join(found)}) : {c}
      %zero = arith.constant {zero} : {result}
      %init = linalg.fill ins(%zero : {result}) outs(%e : {c}) -> {c}
      %y = linalg.generic {{indexing_maps = [{", ".join(maps)}], iterator_types = [{iterators}]}}
          ins(%x, %w : {a}, {b}) outs(%init : {c}) {{
      ^bb0(%a: {kind}, %v: {kind}, %c: {result}):
        {BODIES[kind]}
      }} -> {c}
      return %y : {c}
    }}
    """


def steps(code: Any) -> list[dict[str, Any]]:
    launches: list[dict[str, Any]] = json.loads(code["plan.json"])["entries"]["main"]["launches"]
    return launches


SIZES = {"b": "3", "m": "19", "n": "28", "k": "12"}
FORMS = [
    "mk,kn->mn",
    "mk,nk->mn",
    "km,kn->mn",
    "mk,nk->nm",
    "bmk,bkn->bmn",
    "bkm,bnk->bmn",
    "bmk,kn->bmn",
    "bmk,bnk->bnm",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_order_of_axes_is_one_call(form: str) -> None:
    """No kernel is left, so no compiler is asked for; the zeros of the result are part of the call."""
    code = compile_text(text(form, SIZES))
    (step,) = steps(code)
    batched = form[:4] in ("bmk,", "bkm,") and "b" in form.partition(",")[2].partition("->")[0]
    assert step["library"] == ("mcblasGemmStridedBatchedEx" if batched else "mcblasGemmEx")
    inputs, _, result = form.partition("->")
    first, second = inputs.split(",")
    x = random(*(int(SIZES[a]) for a in first))
    w = random(*(int(SIZES[a]) for a in second), seed=1)
    (got,) = load(code).call("main", [x, w])
    want = np.einsum(f"{first},{second}->{result}", x.astype(np.float64), w.astype(np.float64))
    np.testing.assert_array_equal(got, want.astype(np.float32))


@needs_cxx
@pytest.mark.parametrize("rows", [0, 1, 16, 17, 40])
def test_rows_decide_at_the_call(rows: int) -> None:
    """Up to 16 rows a kernel computes the product, more are a call; both are in the plan."""
    code = compile_text(text("mk,kn->mn", SIZES | {"m": "?"}))
    assert [step.get("library") for step in steps(code)].count("mcblasGemmEx") == 1
    x, w = random(rows, 12), random(12, 28, seed=1)
    (got,) = load(code).call("main", [x, w])
    np.testing.assert_allclose(got, x @ w, rtol=1e-5, atol=1e-5)


def test_small_products_and_chosen_ones_are_kernels() -> None:
    for sizes, providers in [({"m": "16"}, ""), ({"n": "16"}, ""), ({}, "matmul=own")]:
        report: dict[str, Any] = {}
        code = compile_text(text("mk,kn->mn", SIZES | sizes), report=report, providers=providers)
        assert all("kernel" in step for step in steps(code))
        assert report["steps"] == {"main": {"own": 1, "mcblas": 0}}


def test_what_the_result_holds_is_added_to() -> None:
    code = compile_text(text("mk,kn->mn", SIZES, initial="2"))
    fill, call = steps(code)
    assert "kernel" in fill and call["adds"]


@needs_cxx
def test_a_product_is_added_to_what_was_there() -> None:
    x, w = random(19, 12), random(12, 28, seed=1)
    got = run(text("mk,kn->mn", SIZES, initial="2"), x, w)
    np.testing.assert_allclose(got, 2 + x @ w, rtol=1e-5, atol=1e-5)


def test_bytes_are_multiplied_exactly() -> None:
    """The largest sums there are; rows of 4 bytes or the product is a kernel."""
    x = np.full((19, 12), -128, np.int8)
    w = np.full((12, 28), -128, np.int8)
    w[:, 1::2] = 127
    (got,) = load(compile_text(text("mk,kn->mn", SIZES, "i8"))).call("main", [x, w])
    np.testing.assert_array_equal(got, x.astype(np.int32) @ w.astype(np.int32))
    assert all("kernel" in s for s in steps(compile_text(text("mk,kn->mn", SIZES | {"k": "13"}, "i8"))))


def bfloat16(values: Array) -> Array:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def single(values: Array) -> Array:
    return (values.astype(np.uint32) << 16).view(np.float32)


def test_halves_are_summed_wide_and_rounded_once() -> None:
    x, w = bfloat16(random(19, 12)), bfloat16(random(12, 28, seed=1))
    code = compile_text(text("mk,kn->mn", SIZES, "bf16"))
    (got,) = load(code).call("main", [x, w])
    np.testing.assert_array_equal(got, bfloat16(single(x).astype(np.float64) @ single(w).astype(np.float64)))
    assert steps(code)[0]["compute"] == "float32"


def linear(rows: str, addend: bool) -> str:
    """A launch that says that it multiplies; its kernel writes ones, to be told from the call."""
    x, w, y = f"{rows}x12xf32", "28x12xf32", f"{rows}x28xf32"
    more = ", %r" if addend else ""
    return f"""
    func.func private @ones(%bx: index, %by: index, %bz: index, %x: memref<{x}>, %w: memref<{w}>,
        {f"%r: memref<{y}>, " if addend else ""} %y: memref<{y}>) attributes {{spikingbrain.threads = 64 : i64}} {{
      %t = gpu.thread_id x
      %n = arith.constant 28 : index
      %one = arith.constant 1.0 : f32
      %in = arith.cmpi ult, %t, %n : index
      scf.if %in {{
        memref.store %one, %y[%bx, %t] : memref<{y}>
      }}
      return
    }}
    func.func public @main(%x: tensor<{x}>, %w: tensor<{w}>, %r: tensor<{y}>) -> tensor<{y}> {{
      %c0 = arith.constant 0 : index
      %one = arith.constant 1 : index
      %m = tensor.dim %x, %c0 : tensor<{x}>
      %y = "spikingbrain_control.launch"(%m, %one, %one, %x, %w{more}{", %m" if rows == "?" else ""})
        {{callee = @ones, tied = [-1], spikingbrain.multiplies}} : (index, index, index, tensor<{x}>, tensor<{w}>
        {f", tensor<{y}>" if addend else ""}{", index" if rows == "?" else ""}) -> tensor<{y}>
      return %y : tensor<{y}>
    }}
    """


@needs_cxx
@pytest.mark.parametrize("addend", [False, True])
def test_a_projection_of_many_rows_is_a_call(addend: bool) -> None:
    program = load(compile_text(linear("?", addend)))
    for rows in (16, 17):
        x, w, r = random(rows, 12), random(28, 12, seed=1), random(rows, 28, seed=2)
        (got,) = program.call("main", [x, w, r])
        want = np.ones((rows, 28)) if rows == 16 else x @ w.T + (r if addend else 0)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_projection_of_a_known_number_of_rows_is_one_or_the_other() -> None:
    assert [s.get("library") for s in steps(compile_text(linear("17", False)))] == ["mcblasGemmEx"]
    assert [s.get("kernel") for s in steps(compile_text(linear("16", False)))] == ["ones"]
    assert [s.get("kernel") for s in steps(compile_text(linear("17", False), providers="linear=own"))] == [
        "ones"
    ]


STAND_IN = r"""
#include <stdint.h>
#include <string.h>
// Column-major products as the reference manual of a BLAS defines them, on memory of the host.
static double get(const void* p, int type, long long i) {
  if (type == 0) return ((const float*)p)[i];
  if (type == 3) return ((const int8_t*)p)[i];
  if (type == 10) return ((const int32_t*)p)[i];
  uint32_t bits = (uint32_t)((const uint16_t*)p)[i] << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
extern "C" {
int mcblasCreate(void** handle) { *handle = new long(7); return 0; }
int mcblasDestroy(void* handle) { return *(long*)handle == 7 ? 0 : 1; }
int mcblasSetStream(void* handle, void* stream) { return stream == (void*)5 ? 0 : 3; }
int mcblasGemmStridedBatchedEx(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
    int type_a, int lda, long long stride_a, const void* b, int type_b, int ldb, long long stride_b, const void* beta,
    void* c, int type_c, int ldc, long long stride_c, int batch, int compute, int algorithm) {
  const bool whole = compute == 72;
  if (*(long*)handle != 7 || algorithm != -1 || lda < (op_a ? k : m) || ldb < (op_b ? n : k) || ldc < m) return 7;
  if (whole && (lda % 4 || ldb % 4 || ldc % 4)) return 15;
  const double one = whole ? *(const int32_t*)alpha : *(const float*)alpha;
  const double before = whole ? *(const int32_t*)beta : *(const float*)beta;
  for (int s = 0; s < batch; ++s)
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j) {
        double sum = 0;
        for (int l = 0; l < k; ++l)
          sum += get(a, type_a, s * stride_a + (op_a ? l + (long long)i * lda : i + (long long)l * lda)) *
                 get(b, type_b, s * stride_b + (op_b ? j + (long long)l * ldb : l + (long long)j * ldb));
        const long long at = s * stride_c + i + (long long)j * ldc;
        sum = one * sum + (before ? before * get(c, type_c, at) : 0);
        if (type_c == 10) ((int32_t*)c)[at] = (int32_t)(int64_t)sum;
        else ((float*)c)[at] = (float)sum;
      }
  return 0;
}
int mcblasGemmEx(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int type_a,
    int lda, const void* b, int type_b, int ldb, const void* beta, void* c, int type_c, int ldc, int compute, int algorithm) {
  return mcblasGemmStridedBatchedEx(handle, op_a, op_b, m, n, k, alpha, a, type_a, lda, 0, b, type_b, ldb, 0, beta, c,
                                    type_c, ldc, 0, 1, compute, algorithm);
}
}
"""


@pytest.fixture(scope="module")
def blas(tmp_path_factory: pytest.TempPathFactory) -> Blas:
    folder = tmp_path_factory.mktemp("blas")
    (folder / "blas.cpp").write_text(STAND_IN)
    subprocess.run([compiler(), "-shared", "-fPIC", "blas.cpp", "-o", "blas.so"], cwd=folder, check=True)
    return Blas(str(folder / "blas.so"))


@needs_cxx
@pytest.mark.parametrize(
    ("form", "kind", "initial"),
    [*((form, "f32", "0") for form in FORMS), ("mk,nk->mn", "i8", "2"), ("mk,kn->mn", "f32", "2")],
)
def test_calls_of_the_library_are_what_its_manual_says(
    blas: Blas, form: str, kind: str, initial: str
) -> None:
    """The emulator and a plain library written from the manual agree, argument by argument."""
    *_, step = steps(compile_text(text(form, SIZES, kind, initial)))
    first, second, result = form.replace("->", ",").split(",")
    generator = np.random.default_rng(5)
    # small integers, so that sums of any order are the same
    x, w = (generator.integers(-9, 10, [int(SIZES[a]) for a in letters]) for letters in (first, second))
    x, w = (a.astype(np.int8 if kind == "i8" else np.float32) for a in (x, w))
    y = np.full([int(SIZES[a]) for a in result], int(initial), np.int32 if kind == "i8" else np.float32)
    arrays = {0: x, 1: w}
    operands = [arrays.get(a["buffer"], y) for a in step["arguments"]]
    want = np.einsum(f"{first},{second}->{result}", x.astype(np.int64), w.astype(np.int64)) + int(initial)
    blas.multiply(step, [a.ctypes.data for a in operands], lambda size: evaluate(size, {}), stream=5)
    np.testing.assert_array_equal(y, want)


@needs_cxx
def test_failures_of_the_library_are_named(blas: Blas) -> None:
    (step,) = steps(compile_text(text("mk,kn->mn", SIZES)))
    with pytest.raises(BlasError, match=r"mcblasSetStream failed\n  because: it returned 3"):
        blas.multiply(step, [0, 0, 0], lambda size: evaluate(size, {}))
    with pytest.raises(MissingDependency, match=r"the matrix library /none.so does not load"):
        Blas("/none.so")
