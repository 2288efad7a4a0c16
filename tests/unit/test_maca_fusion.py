"""What the MACA backend puts into one kernel: launches counted, results equal to numpy's in every thread order."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")

from test_maca_ops import program, pytestmark, run  # noqa: F401  (skips without a compiler)

from spikingbrain.backend import StageContext
from spikingbrain.backend_maca.backend import MacaBackend
from spikingbrain.backend_maca.plan.resolve import resolve
from spikingbrain.backend_maca.plan.steps import Launch
from spikingbrain.backend_maca.run.emulate import KernelFault

NORM = """
#x = affine_map<(b, t, d) -> (b, t, d)>
#r = affine_map<(b, t, d) -> (b, t)>
#w = affine_map<(b, t, d) -> (d)>
#s = affine_map<(b, t) -> (b, t)>
func.func public @main(%x: tensor<?x?xWIDTHxf32>, %w: tensor<WIDTHxf32>) -> tensor<?x?xWIDTHxf32> {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %zero = arith.constant 0.0 : f32
  %n = arith.constant WIDTH.0 : f32
  %eps = arith.constant 1.0e-6 : f32
  %b = tensor.dim %x, %c0 : tensor<?x?xWIDTHxf32>
  %t = tensor.dim %x, %c1 : tensor<?x?xWIDTHxf32>
  %e = tensor.empty(%b, %t) : tensor<?x?xf32>
  %f = linalg.fill ins(%zero : f32) outs(%e : tensor<?x?xf32>) -> tensor<?x?xf32>
  %sum = linalg.generic {indexing_maps = [#x, #r], iterator_types = ["parallel", "parallel", "reduction"]}
      ins(%x : tensor<?x?xWIDTHxf32>) outs(%f : tensor<?x?xf32>) {
    ^bb0(%a: f32, %o: f32):
      %0 = arith.mulf %a, %a : f32
      %1 = arith.addf %o, %0 : f32
      linalg.yield %1 : f32
  } -> tensor<?x?xf32>
  %scale = linalg.generic {indexing_maps = [#s, #s], iterator_types = ["parallel", "parallel"]}
      ins(%sum : tensor<?x?xf32>) outs(%e : tensor<?x?xf32>) {
    ^bb0(%a: f32, %o: f32):
      %0 = arith.divf %a, %n : f32
      %1 = arith.addf %0, %eps : f32
      %2 = math.rsqrt %1 : f32
      linalg.yield %2 : f32
  } -> tensor<?x?xf32>
  %y0 = tensor.empty(%b, %t) : tensor<?x?xWIDTHxf32>
  %y = linalg.generic {indexing_maps = [#x, #r, #w, #x], iterator_types = ["parallel", "parallel", "parallel"]}
      ins(%x, %scale, %w : tensor<?x?xWIDTHxf32>, tensor<?x?xf32>, tensor<WIDTHxf32>)
      outs(%y0 : tensor<?x?xWIDTHxf32>) {
    ^bb0(%a: f32, %s: f32, %g: f32, %o: f32):
      %0 = arith.mulf %a, %s : f32
      %1 = arith.mulf %0, %g : f32
      linalg.yield %1 : f32
  } -> tensor<?x?xWIDTHxf32>
  return %y : tensor<?x?xWIDTHxf32>
}"""


def launches(loaded: Any) -> list[str]:
    return [step["kernel"] for step in loaded.plan["entries"]["main"]["launches"]]


@pytest.mark.parametrize("width", [17, 200, 3000])
def test_a_norm_is_one_kernel(width: int) -> None:
    loaded = program(NORM.replace("WIDTH", str(width)))
    assert launches(loaded) == ["rows_0"]
    for shape in ((2, 3), (1, 1), (0, 4)):
        x, w = (
            np.random.default_rng(0).standard_normal((2, *shape, width), np.float32)[0],
            np.ones(width, np.float32),
        )
        w += np.arange(width, dtype=np.float32) / width
        (y,) = run(loaded, x, w)
        exact = x.astype(np.float64)
        exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * w
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-6)


SOFTMAX = """
#x = affine_map<(i, j) -> (i, j)>
#r = affine_map<(i, j) -> (i)>
func.func public @main(%x: tensor<4x?xf32>) -> tensor<4x?xf32> {
  %c1 = arith.constant 1 : index
  %zero = arith.constant 0.0 : f32
  %low = arith.constant 0xFF800000 : f32
  %n = tensor.dim %x, %c1 : tensor<4x?xf32>
  %e = tensor.empty() : tensor<4xf32>
  %f = linalg.fill ins(%low : f32) outs(%e : tensor<4xf32>) -> tensor<4xf32>
  %m = linalg.generic {indexing_maps = [#x, #r], iterator_types = ["parallel", "reduction"]}
      ins(%x : tensor<4x?xf32>) outs(%f : tensor<4xf32>) {
    ^bb0(%a: f32, %o: f32):
      %0 = arith.maximumf %a, %o : f32
      linalg.yield %0 : f32
  } -> tensor<4xf32>
  %p0 = tensor.empty(%n) : tensor<4x?xf32>
  %p = linalg.generic {indexing_maps = [#x, #r, #x], iterator_types = ["parallel", "parallel"]}
      ins(%x, %m : tensor<4x?xf32>, tensor<4xf32>) outs(%p0 : tensor<4x?xf32>) {
    ^bb0(%a: f32, %b: f32, %o: f32):
      %0 = arith.subf %a, %b : f32
      %1 = math.exp %0 : f32
      linalg.yield %1 : f32
  } -> tensor<4x?xf32>
  %z = linalg.fill ins(%zero : f32) outs(%e : tensor<4xf32>) -> tensor<4xf32>
  %s = linalg.generic {indexing_maps = [#x, #r], iterator_types = ["parallel", "reduction"]}
      ins(%p : tensor<4x?xf32>) outs(%z : tensor<4xf32>) {
    ^bb0(%a: f32, %o: f32):
      %0 = arith.addf %a, %o : f32
      linalg.yield %0 : f32
  } -> tensor<4xf32>
  %y = linalg.generic {indexing_maps = [#x, #r, #x], iterator_types = ["parallel", "parallel"]}
      ins(%p, %s : tensor<4x?xf32>, tensor<4xf32>) outs(%p0 : tensor<4x?xf32>) {
    ^bb0(%a: f32, %b: f32, %o: f32):
      %0 = arith.divf %a, %b : f32
      linalg.yield %0 : f32
  } -> tensor<4x?xf32>
  return %y : tensor<4x?xf32>
}"""


def test_a_softmax_is_one_kernel() -> None:
    loaded = program(SOFTMAX)
    assert launches(loaded) == ["rows_0"]
    for length in (1, 63, 700):
        x = np.random.default_rng(0).standard_normal((4, length), np.float32) * 9
        exact = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
        (y,) = run(loaded, x)
        np.testing.assert_allclose(y, exact / exact.sum(1, keepdims=True), rtol=1e-5, atol=1e-7)


TRANSPOSED = """
#a = affine_map<(i, j) -> (i, j)>
#t = affine_map<(i, j) -> (j, i)>
func.func public @main(%x: tensor<?x300xf32>) -> (tensor<?x300xf32>, tensor<300x?xf32>) {
  %c0 = arith.constant 0 : index
  %m = tensor.dim %x, %c0 : tensor<?x300xf32>
  %e = tensor.empty(%m) : tensor<?x300xf32>
  %y = linalg.generic {indexing_maps = [#a, #a], iterator_types = ["parallel", "parallel"]}
      ins(%x : tensor<?x300xf32>) outs(%e : tensor<?x300xf32>) {
    ^bb0(%a: f32, %o: f32):
      %0 = math.exp %a : f32
      linalg.yield %0 : f32
  } -> tensor<?x300xf32>
  %g = tensor.empty(%m) : tensor<300x?xf32>
  %z = linalg.generic {indexing_maps = [#t, #a], iterator_types = ["parallel", "parallel"]}
      ins(%y : tensor<?x300xf32>) outs(%g : tensor<300x?xf32>) {
    ^bb0(%a: f32, %o: f32):
      %0 = arith.addf %a, %a : f32
      linalg.yield %0 : f32
  } -> tensor<300x?xf32>
  return %y, %z : tensor<?x300xf32>, tensor<300x?xf32>
}"""


def test_ops_that_read_other_rows_stay_apart() -> None:
    loaded = program(TRANSPOSED)
    assert len(launches(loaded)) == 2
    x = np.random.default_rng(0).standard_normal((7, 300), np.float32)
    y, z = run(loaded, x)
    np.testing.assert_allclose(y, np.exp(x), rtol=1e-6)
    np.testing.assert_array_equal(z, (y + y).T)


STEP = """
#v = affine_map<(i) -> (i)>
func.func public @main(%x: tensor<?xf32>, %s: tensor<?xf32>, %k: tensor<?xf32>) -> (tensor<?xf32>, tensor<?xf32>, tensor<?xf32>)
    DONATED {
  %r = linalg.generic {indexing_maps = [#v, #v], iterator_types = ["parallel"]}
      ins(%x : tensor<?xf32>) outs(%s : tensor<?xf32>) {
    ^bb0(%a: f32, %o: f32):
      %0 = arith.addf %a, %o : f32
      linalg.yield %0 : f32
  } -> tensor<?xf32>
  %c0 = arith.constant 0 : index
  %n = tensor.dim %x, %c0 : tensor<?xf32>
  %e = tensor.empty(%n) : tensor<?xf32>
  %y = linalg.generic {indexing_maps = [#v, #v], iterator_types = ["parallel"]}
      ins(%r : tensor<?xf32>) outs(%e : tensor<?xf32>) {
    ^bb0(%a: f32, %o: f32):
      %0 = arith.mulf %a, %a : f32
      linalg.yield %0 : f32
  } -> tensor<?xf32>
  return %y, %r, %k : tensor<?xf32>, tensor<?xf32>, tensor<?xf32>
}"""


@pytest.mark.parametrize("donated", [True, False])
def test_state_is_updated_where_it_lies(donated: bool) -> None:
    loaded = program(STEP.replace("DONATED", "attributes {spikingbrain.donated = [1, 2]}" if donated else ""))
    x, s, k = np.random.default_rng(0).standard_normal((3, 400), np.float32)
    given, before = loaded.to_device(s), s.copy()
    y, new, same = loaded.call("main", [x, given, k])
    np.testing.assert_array_equal(new, before + x)
    np.testing.assert_array_equal(y, new * new)
    np.testing.assert_array_equal(same, k)
    assert np.shares_memory(new, given) is donated
    if not donated:
        np.testing.assert_array_equal(given, before)


def report(text: str) -> dict[str, Any]:
    backend = MacaBackend()
    (status,) = [s for s in backend.targets() if s.target.name == "maca-emulator"]
    context = StageContext(status.target, backend.options(), Path("."))
    form: Any = text
    for stage in backend.stages(status.target).values():
        form = stage(form, context)
    return context.report


def test_figures_of_one_token_count_what_is_touched() -> None:
    # x and the state, then the state and y, of one number each; nobody can do with less than the state
    found = report(STEP.replace("DONATED", "attributes {spikingbrain.donated = [1]}"))["one_token"]
    assert found["main"] == {
        "launches": 2,
        "chain": 2,
        "streams": 1,
        "waits": 0,
        "bytes": 16,
        "least": 4,
        "workspace": 0,
        "workspace_least": 0,
    }


TWICE = """
#v = affine_map<(i) -> (i)>
func.func public @main(%x: tensor<?xf32>, %y: tensor<?xf32>) -> tensor<?xf32> {
  %c0 = arith.constant 0 : index
  %c2 = arith.constant 2 : index
  %n = tensor.dim %x, %c0 : tensor<?xf32>
  %m = arith.muli %n, %c2 : index
  %e = tensor.empty(%m) : tensor<?xf32>
  %z = linalg.generic {indexing_maps = [#v, #v], iterator_types = ["parallel"]}
      ins(%y : tensor<?xf32>) outs(%e : tensor<?xf32>) {
    ^bb0(%a: f32, %o: f32):
      %0 = math.exp %a : f32
      linalg.yield %0 : f32
  } -> tensor<?xf32>
  return %z : tensor<?xf32>
}"""


def test_what_takes_no_sizes_of_one_has_no_figures() -> None:
    assert report(TWICE)["one_token"] == {}
    y = np.arange(6, dtype=np.float32)
    np.testing.assert_allclose(run(program(TWICE), np.zeros(3, np.float32), y)[0], np.exp(y), rtol=1e-6)


def test_short_rows_share_a_block() -> None:
    one = """
  %{0} = linalg.generic {{indexing_maps = [#a, #{2}], iterator_types = ["parallel", "{3}"]}}
      ins(%{1} : tensor<?x3xf32>) outs(%{4} : tensor<{5}xf32>) {{
    ^bb0(%p: f32, %o: f32):
      %0 = math.exp %p : f32
      %1 = arith.addf %0, %o : f32
      linalg.yield %1 : f32
  }} -> tensor<{5}xf32>"""
    text = """
#a = affine_map<(i, j) -> (i, j)>
#r = affine_map<(i, j) -> (i)>
func.func public @main(%x: tensor<?x3xf32>) -> (tensor<?x3xf32>, tensor<?xf32>) {
  %zero = arith.constant 0.0 : f32
  %c0 = arith.constant 0 : index
  %n = tensor.dim %x, %c0 : tensor<?x3xf32>
  %e0 = tensor.empty(%n) : tensor<?x3xf32>
  %e = linalg.fill ins(%zero : f32) outs(%e0 : tensor<?x3xf32>) -> tensor<?x3xf32>
  %f0 = tensor.empty(%n) : tensor<?xf32>
  %f = linalg.fill ins(%zero : f32) outs(%f0 : tensor<?xf32>) -> tensor<?xf32>"""
    text += one.format("y", "x", "a", "parallel", "e", "?x3") + one.format(
        "z", "y", "r", "reduction", "f", "?"
    )
    loaded = program(text + "\n  return %y, %z : tensor<?x3xf32>, tensor<?xf32>\n}")
    for rows, blocks in ((1, 1), (85, 1), (86, 2), (1000, 12)):
        x = np.random.default_rng(0).standard_normal((rows, 3), np.float32)
        (step,) = resolve(loaded.plan, "main", {0: x.shape}).steps
        assert isinstance(step, Launch) and step.grid[0] == blocks
        y, z = run(loaded, x)
        np.testing.assert_allclose(y, np.exp(x), rtol=1e-6)
        np.testing.assert_allclose(z, np.exp(y).sum(1), rtol=1e-6)


def test_a_fill_that_a_loop_reads_first_stays() -> None:
    text = """
#v = affine_map<(i) -> (i)>
#s = affine_map<(i) -> ()>
func.func public @main(%x: tensor<5xf32>) -> (tensor<f32>, tensor<f32>) {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %c3 = arith.constant 3 : index
  %two = arith.constant 2.0 : f32
  %e = tensor.empty() : tensor<f32>
  %f = linalg.fill ins(%two : f32) outs(%e : tensor<f32>) -> tensor<f32>
  %r = scf.for %i = %c0 to %c3 step %c1 iter_args(%a = %f) -> (tensor<f32>) {
    %o = tensor.empty() : tensor<f32>
    %d = linalg.generic {indexing_maps = [affine_map<() -> ()>, affine_map<() -> ()>], iterator_types = []}
        ins(%a : tensor<f32>) outs(%o : tensor<f32>) {
      ^bb0(%p: f32, %u: f32):
        %0 = arith.addf %p, %p : f32
        linalg.yield %0 : f32
    } -> tensor<f32>
    scf.yield %d : tensor<f32>
  }
  %y = linalg.generic {indexing_maps = [#v, #s], iterator_types = ["reduction"]}
      ins(%x : tensor<5xf32>) outs(%f : tensor<f32>) {
    ^bb0(%p: f32, %o: f32):
      %0 = arith.addf %p, %o : f32
      linalg.yield %0 : f32
  } -> tensor<f32>
  return %r, %y : tensor<f32>, tensor<f32>
}"""
    x = np.float32([1, 2, 3, 4, 5])
    doubled, total = run(program(text), x)
    assert (doubled, total) == (16, 17)


GATHERED = """
#v = affine_map<(i, j) -> (i, j)>
func.func public @main(%x: tensor<20x30xf32>, %w: tensor<30x40xf32>, %n: tensor<20x40xi64>)
    -> (tensor<20x40xf32>, tensor<20x40xf32>) {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %c3 = arith.constant 3 : index
  %zero = arith.constant 0.0 : f32
  %one = arith.constant 1.0 : f32
  %e = tensor.empty() : tensor<20x40xf32>
  %f = linalg.fill ins(%zero : f32) outs(%e : tensor<20x40xf32>) -> tensor<20x40xf32>
  %a = tensor.empty() : tensor<20x40xf32>
  %a0 = linalg.fill ins(%one : f32) outs(%a : tensor<20x40xf32>) -> tensor<20x40xf32>
  %r = scf.for %i = %c0 to %c3 step %c1 iter_args(%t = %a0) -> (tensor<20x40xf32>) {
    %g = linalg.generic {indexing_maps = [#v, #v], iterator_types = ["parallel", "parallel"]}
      ins(%n : tensor<20x40xi64>) outs(%t : tensor<20x40xf32>) {
      ^bb0(%k: i64, %o: f32):
        %k0 = arith.index_cast %k : i64 to index
        %q = tensor.extract %f[%c0, %k0] : tensor<20x40xf32>
        %s = arith.addf %q, %o : f32
        linalg.yield %s : f32
    } -> tensor<20x40xf32>
    scf.yield %g : tensor<20x40xf32>
  }
  %m = linalg.matmul ins(%x, %w : tensor<20x30xf32>, tensor<30x40xf32>) outs(%f : tensor<20x40xf32>) -> tensor<20x40xf32>
  return %m, %r : tensor<20x40xf32>, tensor<20x40xf32>
}"""


def test_a_fill_that_a_loop_reads_before_a_product_stays() -> None:
    x, w, places = np.ones((20, 30), np.float32), np.ones((30, 40), np.float32), np.zeros((20, 40), np.int64)
    product, read = run(program(GATHERED), x, w, places)
    np.testing.assert_array_equal(read, np.ones((20, 40)))
    np.testing.assert_array_equal(product, np.full((20, 40), 30))


def test_a_producer_with_an_assert_is_gone_when_its_users_have_copies() -> None:
    use = """
  %{0} = linalg.generic {{indexing_maps = [#v, #v], iterator_types = ["parallel"]}}
      ins(%p : tensor<40xf32>) outs(%e : tensor<40xf32>) {{
    ^bb0(%a: f32, %o: f32):
      %0 = arith.{1} %a, %a : f32
      linalg.yield %0 : f32
  }} -> tensor<40xf32>"""
    text = """
#v = affine_map<(i) -> (i)>
func.func public @main(%x: tensor<40xf32>) -> (tensor<40xf32>, tensor<40xf32>) {
  %zero = arith.constant 0.0 : f32
  %e = tensor.empty() : tensor<40xf32>
  %p = linalg.generic {indexing_maps = [#v, #v], iterator_types = ["parallel"]}
      ins(%x : tensor<40xf32>) outs(%e : tensor<40xf32>) {
    ^bb0(%a: f32, %o: f32):
      %1 = arith.cmpf one, %a, %zero : f32
      cf.assert %1, "a zero"
      %0 = arith.negf %a : f32
      linalg.yield %0 : f32
  } -> tensor<40xf32>"""
    text += use.format("y", "mulf") + use.format("z", "addf")
    text += "\n  return %y, %z : tensor<40xf32>, tensor<40xf32>\n}"
    x = np.arange(1, 41, dtype=np.float32)
    loaded = program(text)
    y, z = run(loaded, x)
    np.testing.assert_array_equal(y, x * x)
    np.testing.assert_array_equal(z, -2 * x)
    with pytest.raises(KernelFault, match="a zero"):
        loaded.call("main", [x - 1])


def test_a_sum_of_very_many_tensors_is_several_kernels() -> None:
    count = 130
    add = """linalg.generic {indexing_maps = [#v, #v, #v], iterator_types = ["parallel"]}
      ins(%s, %x : tensor<9xf32>, tensor<9xf32>) outs(%e : tensor<9xf32>) {
  ^bb0(%a: f32, %b: f32, %o: f32):
    %c = arith.addf %a, %b : f32
    linalg.yield %c : f32
  } -> tensor<9xf32>"""
    lines, last = [], "%x0"
    for i in range(1, count):
        lines.append(f"%s{i} = " + add.replace("%s,", f"{last},").replace("%x :", f"%x{i} :"))
        last = f"%s{i}"
    arguments = ", ".join(f"%x{i}: tensor<9xf32>" for i in range(count))
    text = f"""#v = affine_map<(i) -> (i)>
func.func public @main({arguments}) -> tensor<9xf32> {{
  %e = tensor.empty() : tensor<9xf32>
  {chr(10).join(lines)}
  return {last} : tensor<9xf32>
}}"""
    loaded = program(text)
    entry = loaded.plan["entries"]["main"]
    assert 2 <= len(entry["launches"]) <= 4
    assert max(len(step["arguments"]) for step in entry["launches"]) < 100
    values = list(np.random.default_rng(0).standard_normal((count, 9), np.float32))
    (found,) = loaded.call("main", values)
    np.testing.assert_array_equal(found, functools.reduce(np.add, values))
