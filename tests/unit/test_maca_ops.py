"""Sorts, scans and scatters of the MACA backend against numpy, in every thread order."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")

from spikingbrain.backend import StageContext
from spikingbrain.backend_maca.backend import MacaBackend
from spikingbrain.backend_maca.run.emulate import ORDERS, compiler

pytestmark = pytest.mark.skipif(shutil.which(compiler()) is None, reason="no C++ compiler")
Array = np.ndarray[Any, Any]


def program(text: str) -> Any:
    return MacaBackend().load({n: memoryview(c) for n, c in members(text).items()}, {}, {})


def members(text: str) -> Any:
    """Returns the code of a module for the emulator, by file names."""
    backend = MacaBackend()
    (status,) = [s for s in backend.targets() if s.target.name == "maca-emulator"]
    context = StageContext(status.target, backend.options(), Path("."))
    form: Any = text
    for stage in backend.stages(status.target).values():
        form = stage(form, context)
    return form


def run(loaded: Any, *arguments: Array) -> list[Array]:
    """Runs entry ``main`` in every thread order, which must agree bit for bit."""
    results = []
    for order in ORDERS:
        loaded.kernels.order = order
        results.append(loaded.call("main", [loaded.to_device(a) for a in arguments]))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    return results[0]


SORT = """
func.func public @main(%x: tensor<SHAPExf32>, %i: tensor<SHAPExi64>) -> (tensor<SHAPExf32>, tensor<SHAPExi64>) {
  %y:2 = tm_tensor.sort dimension(DIM) outs(%x, %i : tensor<SHAPExf32>, tensor<SHAPExi64>) {
    ^bb0(%a: f32, %b: f32, %k: i64, %l: i64):
      %c = arith.cmpf PREDICATE, %a, %b : f32
      tm_tensor.yield %c : i1
  } -> tensor<SHAPExf32>, tensor<SHAPExi64>
  return %y#0, %y#1 : tensor<SHAPExf32>, tensor<SHAPExi64>
}"""


@pytest.mark.parametrize(
    ("shape", "declared", "predicate"),
    [
        ((3, 1), "3x1", "ole"),
        ((2, 7), "?x7", "oge"),
        ((1, 300), "?x?", "olt"),
        ((2, 256), "2x256", "olt"),
        ((1, 257), "1x257", "oge"),
        ((1, 1100), "1x1100", "ole"),
        ((2, 1100), "2x?", "oge"),
        ((1, 17000), "1x?", "ole"),
    ],
)
def test_sort_is_stable_and_nan_is_the_largest(shape: tuple[int, int], declared: str, predicate: str) -> None:
    x = np.random.default_rng(0).integers(-20, 20, shape).astype(np.float32)
    x[:, ::5] = np.nan
    x[:, 3::11] = -np.inf
    places = np.broadcast_to(np.arange(shape[1]), shape).copy()
    text = SORT.replace("SHAPE", declared).replace("DIM", "1").replace("PREDICATE", predicate)
    values, order = run(program(text), x, places)
    # numpy has NaN last when it sorts upwards; downwards it comes first here, as in torch
    rank = np.where(np.isnan(x), 1e30, np.where(np.isinf(x), -1e20, x)).astype(np.float64)
    wanted = np.argsort(-rank if predicate[1] == "g" else rank, axis=1, kind="stable")
    np.testing.assert_array_equal(order, wanted)
    np.testing.assert_array_equal(values, np.take_along_axis(x, wanted, 1))


def test_sort_along_another_axis() -> None:
    x = np.random.default_rng(1).standard_normal((5, 3), np.float32)
    places = np.broadcast_to(np.arange(5)[:, None], (5, 3)).copy()
    text = SORT.replace("SHAPE", "5x3").replace("DIM", "0").replace("PREDICATE", "olt")
    values, order = run(program(text), x, places)
    np.testing.assert_array_equal(values, np.sort(x, axis=0))
    np.testing.assert_array_equal(order, np.argsort(x, axis=0))


SCAN = """
func.func public @main(%x: tensor<SHAPExKIND>) -> (tensor<SHAPExKIND>, tensor<RESTxKIND>) {
  %zero = arith.constant ZERO : KIND
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %m = tensor.dim %x, %c0 : tensor<SHAPExKIND>
  %n = tensor.dim %x, %c1 : tensor<SHAPExKIND>
  %e = tensor.empty(%m, %n) : tensor<SHAPExKIND>
  %s = tensor.empty(%SIZE) : tensor<RESTxKIND>
  %z = linalg.fill ins(%zero : KIND) outs(%s : tensor<RESTxKIND>) -> tensor<RESTxKIND>
  %y:2 = tm_tensor.scan dimension(DIM) inclusive(true)
      ins(%x : tensor<SHAPExKIND>) outs(%e, %z : tensor<SHAPExKIND>, tensor<RESTxKIND>) {
    ^bb0(%a: KIND, %b: KIND):
      %c = arith.OP %a, %b : KIND
      tm_tensor.yield %c : KIND
  } -> tensor<SHAPExKIND>, tensor<RESTxKIND>
  return %y#0, %y#1 : tensor<SHAPExKIND>, tensor<RESTxKIND>
}"""


def scan(kind: str, op: str, axis: int) -> Any:
    text = SCAN.replace("SHAPE", "?x?").replace("REST", "?").replace("DIM", str(axis)).replace("OP", op)
    text = text.replace("SIZE", "nm"[axis]).replace("ZERO", "0.0" if kind[0] == "f" else "0")
    return program(text.replace("KIND", kind))


def test_running_sums_of_integers_are_exact() -> None:
    loaded = scan("i64", "addi", 1)
    for length in (1, 255, 256, 257, 700):
        x = np.random.default_rng(0).integers(-(2**40), 2**40, (3, length))
        sums, total = run(loaded, x)
        np.testing.assert_array_equal(sums, np.cumsum(x, 1))
        np.testing.assert_array_equal(total, x.sum(1))
    assert run(loaded, np.zeros((0, 5), np.int64))[0].shape == (0, 5)


def test_running_sums_of_floats_are_near_those_of_double() -> None:
    x = np.random.default_rng(0).standard_normal((300, 2), np.float32)
    sums, total = run(scan("f32", "addf", 0), x)
    wanted = np.cumsum(x.astype(np.float64), 0)
    np.testing.assert_allclose(sums, wanted, atol=1e-5)  # sums of up to 300 numbers near 1
    np.testing.assert_array_equal(total, sums[-1])


def test_exclusive_running_sums_begin_with_the_initial_value() -> None:
    text = SCAN.replace("inclusive(true)", "inclusive(false)").replace("SHAPE", "?x?").replace("REST", "?")
    text = text.replace("DIM", "0").replace("OP", "muli").replace("SIZE", "n").replace("ZERO", "3")
    loaded = program(text.replace("KIND", "i32"))
    for length in (1, 256, 257, 600):
        x = np.random.default_rng(1).integers(-9, 9, (length, 2), np.int32)
        products, last = run(loaded, x)
        wanted = np.cumprod(np.concatenate([np.full((1, 2), 3, np.int32), x[:-1]]), 0, np.int32)
        np.testing.assert_array_equal(products, wanted)
        np.testing.assert_array_equal(last, wanted[-1])


SCATTER = """
func.func public @main(%x: tensor<6x3xf32>, %i: tensor<NUMBERx1xi32>, %u: tensor<NUMBERx3xf32>) -> tensor<6x3xf32> {
  %y = tm_tensor.scatter {dimension_map = array<i64: 0>} unique_indices(UNIQUE)
      ins(%u, %i : tensor<NUMBERx3xf32>, tensor<NUMBERx1xi32>) outs(%x : tensor<6x3xf32>) {
    ^bb0(%new: f32, %old: f32):
      %s = arith.addf %old, %new : f32
      tm_tensor.yield %s : f32
  } -> tensor<6x3xf32>
  return %y : tensor<6x3xf32>
}"""


@pytest.mark.parametrize(
    ("unique", "rows", "declared"),
    [
        ("true", [4, 0, 9], "?"),
        ("false", [4, 0, 4, -1, 4, 9, 0], "?"),
        ("false", [4, 0, 4, -1, 4, 9, 0], "7"),
        ("false", [5, -1, 2, 6] * 90, "?"),
        ("false", [3], "1"),
        ("false", [], "?"),
    ],
)
def test_scattered_updates_are_applied_in_order_and_those_outside_dropped(
    unique: str, rows: list[int], declared: str
) -> None:
    random = np.random.default_rng(0)
    x, u = (random.standard_normal((n, 3), np.float32) for n in (6, len(rows)))
    kept, text = x.copy(), SCATTER.replace("UNIQUE", unique).replace("NUMBER", declared)
    (y,) = run(program(text), x, np.int32(rows).reshape(-1, 1), u)
    wanted = kept.copy()
    for row, update in zip(rows, u, strict=True):
        if 0 <= row < 6:
            wanted[row] += update
    np.testing.assert_array_equal(y, wanted)
    np.testing.assert_array_equal(x, kept)


LOOPS = """
#v = affine_map<(i) -> (i)>
func.func public @main(%x: tensor<?x5xf32>, %s: tensor<5xf32>, %t: tensor<5xf32>)
    -> (tensor<5xf32>, tensor<5xf32>, tensor<?x5xf32>) {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %n = tensor.dim %x, %c0 : tensor<?x5xf32>
  %e = tensor.empty(%n) : tensor<?x5xf32>
  %r:3 = scf.for %i = %c0 to %n step %c1 iter_args(%a = %s, %b = %t, %ys = %e)
      -> (tensor<5xf32>, tensor<5xf32>, tensor<?x5xf32>) {
    %row = tensor.extract_slice %x[%i, 0] [1, 5] [1, 1] : tensor<?x5xf32> to tensor<5xf32>
    %o = tensor.empty() : tensor<5xf32>
    %h = linalg.generic {indexing_maps = [#v, #v, #v, #v], iterator_types = ["parallel"]}
        ins(%a, %b, %row : tensor<5xf32>, tensor<5xf32>, tensor<5xf32>) outs(%o : tensor<5xf32>) {
      ^bb0(%p: f32, %q: f32, %z: f32, %u: f32):
        %0 = arith.mulf %p, %q : f32
        %1 = arith.addf %0, %z : f32
        linalg.yield %1 : f32
    } -> tensor<5xf32>
    %w = tensor.insert_slice %h into %ys[%i, 0] [1, 5] [1, 1] : tensor<5xf32> into tensor<?x5xf32>
    scf.yield %h, %a, %w : tensor<5xf32>, tensor<5xf32>, tensor<?x5xf32>
  }
  return %r#0, %r#1, %r#2 : tensor<5xf32>, tensor<5xf32>, tensor<?x5xf32>
}"""


def test_a_loop_over_time_carries_tensors_and_stacks_rows() -> None:
    loaded = program(LOOPS)
    for steps in (0, 1, 6):
        x = np.random.default_rng(0).standard_normal((steps, 5), np.float32)
        a, b = np.random.default_rng(1).standard_normal((2, 5), np.float32)
        found = run(loaded, x, a, b)
        rows = []
        for row in x:
            a, b = a * b + row, a  # what the loop swaps
            rows.append(a)
        for got, wanted in zip(found, (a, b, np.float32(rows).reshape(-1, 5)), strict=True):
            np.testing.assert_array_equal(got, wanted)


WHILE = """
#v = affine_map<(i) -> (i)>
#s = affine_map<(i) -> ()>
func.func public @main(%x: tensor<4xf32>) -> (tensor<4xf32>, tensor<i64>) {
  %limit = arith.constant 100.0 : f32
  %zero = arith.constant 0.0 : f32
  %one = arith.constant 1 : i64
  %start = arith.constant 0 : i64
  %r:2 = scf.while (%a = %x, %k = %start) : (tensor<4xf32>, i64) -> (tensor<4xf32>, i64) {
    %e = tensor.empty() : tensor<f32>
    %f = linalg.fill ins(%zero : f32) outs(%e : tensor<f32>) -> tensor<f32>
    %m = linalg.generic {indexing_maps = [#v, #s], iterator_types = ["reduction"]}
        ins(%a : tensor<4xf32>) outs(%f : tensor<f32>) {
      ^bb0(%p: f32, %o: f32):
        %0 = arith.maximumf %p, %o : f32
        linalg.yield %0 : f32
    } -> tensor<f32>
    %largest = tensor.extract %m[] : tensor<f32>
    %go = arith.cmpf olt, %largest, %limit : f32
    scf.condition(%go) %a, %k : tensor<4xf32>, i64
  } do {
  ^bb0(%a: tensor<4xf32>, %k: i64):
    %o = tensor.empty() : tensor<4xf32>
    %d = linalg.generic {indexing_maps = [#v, #v], iterator_types = ["parallel"]}
        ins(%a : tensor<4xf32>) outs(%o : tensor<4xf32>) {
      ^bb0(%p: f32, %u: f32):
        %0 = arith.addf %p, %p : f32
        linalg.yield %0 : f32
    } -> tensor<4xf32>
    %next = arith.addi %k, %one : i64
    scf.yield %d, %next : tensor<4xf32>, i64
  }
  %odd = arith.remsi %r#1, %two : i64
  %is = arith.cmpi eq, %odd, %one : i64
  %two = arith.constant 2 : i64
  %c = tensor.from_elements %r#1 : tensor<i64>
  %branch = scf.if %is -> (tensor<4xf32>) {
    scf.yield %x : tensor<4xf32>
  } else {
    scf.yield %r#0 : tensor<4xf32>
  }
  return %branch, %c : tensor<4xf32>, tensor<i64>
}""".replace(
    """  %two = arith.constant 2 : i64
  %c = """,
    "  %c = ",
).replace("  %start =", "  %two = arith.constant 2 : i64\n  %start =")


def test_the_host_reads_what_a_condition_needs() -> None:
    loaded = program(WHILE)
    for first in (3.0, 1.0, 200.0):
        x = np.float32([first, 0.5, -7, 0])
        value, count = x.copy(), 0
        while value.max() < 100:
            value, count = value + value, count + 1
        result, turns = run(loaded, x)
        assert turns == count
        np.testing.assert_array_equal(result, x if count % 2 else value)


TRIANGLE = """
#v = affine_map<(i) -> (i)>
#s = affine_map<(i) -> ()>
func.func public @main(%x: tensor<?xf32>) -> tensor<f32> {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %zero = arith.constant 0.0 : f32
  %n = tensor.dim %x, %c0 : tensor<?xf32>
  %e = tensor.empty() : tensor<f32>
  %f = linalg.fill ins(%zero : f32) outs(%e : tensor<f32>) -> tensor<f32>
  %r = scf.for %i = %c0 to %n step %c1 iter_args(%t = %f) -> (tensor<f32>) {
    %k = SIZE : index
    %d = tensor.extract_slice %x[0] [%k] [1] : tensor<?xf32> to tensor<?xf32>
    %q = tensor.empty(%k) : tensor<?xf32>
    %g = linalg.generic {indexing_maps = [#v, #v], iterator_types = ["parallel"]}
      ins(%d : tensor<?xf32>) outs(%q : tensor<?xf32>) {
      ^bb0(%a: f32, %o: f32):
        %0 = math.exp %a : f32
        linalg.yield %0 : f32
    } -> tensor<?xf32>
    %h = linalg.generic {indexing_maps = [#v, #s], iterator_types = ["reduction"]}
      ins(%g : tensor<?xf32>) outs(%t : tensor<f32>) {
      ^bb0(%a: f32, %o: f32):
        %0 = arith.addf %a, %o : f32
        linalg.yield %0 : f32
    } -> tensor<f32>
    %h2 = linalg.generic {indexing_maps = [#v, #s], iterator_types = ["reduction"]}
      ins(%g : tensor<?xf32>) outs(%h : tensor<f32>) {
      ^bb0(%a: f32, %o: f32):
        %0 = arith.addf %a, %o : f32
        linalg.yield %0 : f32
    } -> tensor<f32>
    scf.yield %h2 : tensor<f32>
  }
  return %r : tensor<f32>
}"""


@pytest.mark.parametrize("size", ["arith.subi %n, %i", "arith.addi %i, %c1"])
@pytest.mark.parametrize("is_read", [False, True])
def test_buffers_of_a_loop_may_grow_and_shrink(size: str, is_read: bool) -> None:
    text = TRIANGLE.replace("SIZE", size)
    if is_read:
        text = text.replace("%x: tensor<?xf32>)", "%x: tensor<?xf32>, %sizes: tensor<301xi64>)")
        words = "%k0 = SIZE : index\n %k1 = tensor.extract %sizes[%k0] : tensor<301xi64>"
        words += "\n %k = arith.index_cast %k1 : i64 to index"
        text = text.replace(f"%k = {size} : index", words.replace("SIZE", size))
    loaded = program(text)
    assert loaded.plan["entries"]["main"]["static"] is not is_read
    arguments = [np.zeros(300, np.float32), *[np.arange(301)] * is_read]
    assert run(loaded, *arguments)[0] == 300 * 301


BRANCH = """
#s = affine_map<() -> ()>
func.func public @main(%x: tensor<1xbf16>) -> tensor<f32> {
  %c0 = arith.constant 0 : index
  %one = arith.constant 1.0 : f32
  %two = arith.constant 2.0 : f32
  %v = tensor.extract %x[%c0] : tensor<1xbf16>
  %w = arith.extf %v : bf16 to f32
  %p = arith.cmpf ogt, %w, %two : f32
  %r = scf.if %p -> (tensor<f32>) {
    %e = tensor.empty() : tensor<f32>
    %f = linalg.fill ins(%two : f32) outs(%e : tensor<f32>) -> tensor<f32>
    scf.yield %f : tensor<f32>
  } else {
    %e = tensor.empty() : tensor<f32>
    %f = linalg.fill ins(%one : f32) outs(%e : tensor<f32>) -> tensor<f32>
    scf.yield %f : tensor<f32>
  }
  return %r : tensor<f32>
}"""


@pytest.mark.parametrize("value", [1.5, 2.0, 3.0, -1.0, np.nan])
def test_the_host_reads_bfloat16_as_a_number(value: float) -> None:
    bits = (np.float32([value]).view(np.uint32) >> 16).astype(np.uint16)
    assert run(program(BRANCH), bits)[0] == (2 if value > 2 else 1)


def test_a_tensor_of_no_scalars_is_empty() -> None:
    text = """
func.func public @main(%x: tensor<3xf32>) -> tensor<0xf32> {
  %e = tensor.from_elements : tensor<0xf32>
  return %e : tensor<0xf32>
}"""
    assert run(program(text), np.zeros(3, np.float32))[0].shape == (0,)
