"""Kernel launches become IREE executables; results tied to an input are written in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")
compiler = pytest.importorskip("iree.compiler.tools")
runtime = pytest.importorskip("iree.runtime")

from torch_mlir import ir  # noqa: E402
from torch_mlir.dialects import func  # noqa: E402

from spikingbrain.backend_iree.dispatch import wrap_kernels  # noqa: E402
from spikingbrain.passes import dialect  # noqa: E402
from spikingbrain.passes.kernels.cache_write import emit_cache_write  # noqa: E402

# Adds each row of %a to the running total %s, and the number of rows of %a to what it writes.
KERNEL = """
func.func private @add_row(%x: index, %y: index, %z: index,
                           %a: memref<?x4xf32>, %s: memref<4xf32>, %o: memref<?x4xf32>) {
  %c0 = arith.constant 0 : index
  %rows = memref.dim %a, %c0 : memref<?x4xf32>
  %i = arith.index_cast %rows : index to i32
  %f = arith.sitofp %i : i32 to f32
  %count = vector.broadcast %f : f32 to vector<4xf32>
  %row = vector.load %a[%x, %c0] : memref<?x4xf32>, vector<4xf32>
  %total = vector.load %s[%c0] : memref<4xf32>, vector<4xf32>
  %sum = arith.addf %row, %total : vector<4xf32>
  %out = arith.addf %sum, %count : vector<4xf32>
  vector.store %out, %o[%x, %c0] : memref<?x4xf32>, vector<4xf32>
  vector.store %sum, %s[%c0] : memref<4xf32>, vector<4xf32>
  return
}
"""
LAUNCH = (
    '"spikingbrain_control.launch"(%n, %c1, %c1, {a}, {s}, %n) {{callee = @add_row, tied = [1, -1]}}'
    " : (index, index, index, tensor<?x4xf32>, tensor<4xf32>, index) -> (tensor<4xf32>, tensor<?x4xf32>)"
)
MAIN = f"""
func.func @main(%a: tensor<?x4xf32>, %s: tensor<4xf32>)
    -> (tensor<4xf32>, tensor<?x4xf32>, tensor<4xf32>, tensor<?x4xf32>) {{
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %n = tensor.dim %a, %c0 : tensor<?x4xf32>
  %s1, %o1 = {LAUNCH.format(a="%a", s="%s")}
  %s2, %o2 = {LAUNCH.format(a="%o1", s="%s1")}
  return %s1, %o1, %s2, %o2 : tensor<4xf32>, tensor<?x4xf32>, tensor<4xf32>, tensor<?x4xf32>
}}
"""


def _load(module: ir.Module) -> tuple[Any, Any]:
    code = compiler.compile_str(
        str(module), target_backends=["llvm-cpu"], extra_args=["--iree-llvmcpu-target-cpu=host"]
    )
    config = runtime.Config("local-sync")
    context = runtime.SystemContext(config=config)
    context.add_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, code))
    return context.modules.module, config.device


def _run_add_row(a: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = np.empty_like(a)
    for i, row in enumerate(a):
        s = row + s
        out[i] = s + len(a)
    return s, out


def test_kernel_is_shared_and_nothing_of_the_launches_remains() -> None:
    module = ir.Module.parse(KERNEL + MAIN, dialect.load())
    dialect.verify(module)
    wrap_kernels(module)
    module.operation.verify()
    assert [op.operation.name for op in module.body.operations] == ["stream.executable", "func.func"]
    text = str(module)
    assert "spikingbrain" not in text
    assert text.count('"flow.dispatch"') == 2


def test_results_of_shared_kernel_with_dynamic_sizes() -> None:
    module = ir.Module.parse(KERNEL + MAIN, dialect.load())
    wrap_kernels(module)
    program, _ = _load(module)
    for rows in (0, 1, 5):
        a = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
        s = np.full(4, 3, np.float32)
        s1, o1 = _run_add_row(a, s)
        s2, o2 = _run_add_row(o1, s1)
        results = [r.to_host() for r in program.main(a, s)]
        for result, expected in zip(results, [s1, o1, s2, o2], strict=True):
            assert np.array_equal(result, expected)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "callee = @add_row",
            "callee = @missing",
            "launch of 'missing', which is not a function of the module",
        ),
        ("  return\n}", "  cf.br ^end\n^end:\n  return\n}", "kernel 'add_row' must have a body of one block"),
        ("callee = @add_row", "callee = @main", "kernel 'main' is of type"),
    ],
)
def test_refuses_a_launch_that_breaks_the_contract(old: str, new: str, message: str) -> None:
    module = ir.Module.parse((KERNEL + MAIN).replace(old, new), dialect.load())
    with pytest.raises(ValueError, match=message):
        wrap_kernels(module)


def test_refuses_launches_that_tie_differently() -> None:
    text = KERNEL.replace(", %s: memref<4xf32>, %o", ", %s: memref<4xf32>, %t: memref<4xf32>, %o") + MAIN
    text = text.replace("tied = [1, -1]", "tied = [-1, -1]", 1)
    module = ir.Module.parse(text, dialect.load())
    with pytest.raises(
        ValueError, match=r"launches of 'add_row' tie different results: \[-1, -1\] and \[1, -1\]"
    ):
        wrap_kernels(module)


def _cache_module(shapes: list[list[int | None]], element: str, keep: bool) -> ir.Module:
    """Builds main(cache, rows, slots, slots2): two writes in a row, or with ``keep`` both from the same cache."""
    context = dialect.load()
    with context, ir.Location.unknown():
        module = ir.Module.create()
        dynamic = ir.ShapedType.get_dynamic_size()
        elements = [ir.Type.parse(element), ir.Type.parse(element), ir.IntegerType.get_signless(64)]
        types = [
            ir.RankedTensorType.get([dynamic if s is None else s for s in shape], e)
            for shape, e in zip(shapes, elements, strict=True)
        ]
        with ir.InsertionPoint(module.body):
            entry = func.FuncOp("main", ([*types, types[2]], [types[0]] * 2)).add_entry_block()
        with ir.InsertionPoint(entry):
            cache, rows, slots, more_slots = entry.arguments
            first = emit_cache_write(cache, rows, slots)
            second = emit_cache_write(cache if keep else first, rows, more_slots)
            func.ReturnOp([first, second])
    dialect.verify(module)
    wrap_kernels(module)
    return module


def _write(cache: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
    result = cache.copy()
    for b, t in np.ndindex(slots.shape):
        if 0 <= slots[b, t] < cache.shape[1]:
            result[b, slots[b, t]] = rows[b, t]
    return result


@pytest.mark.parametrize(
    ("shapes", "sizes", "element", "dtype"),
    [
        ([[None, 10, 3, 64], [None, None, 3, 64], [None, None]], (2, 10, 4, 3, 64), "f32", np.float32),
        ([[1, None, 3, 21], [1, None, 3, 21], [1, None]], (1, 7, 9, 3, 21), "f16", np.float16),
        ([[1, 7], [1, None], [1, None]], (1, 7, 3), "i64", np.int64),
        ([[2, 5, 2, 133], [2, 1, 2, 133], [2, 1]], (2, 5, 1, 2, 133), "i8", np.int8),
    ],
)
@pytest.mark.parametrize("keep", [False, True])
def test_cache_write(
    shapes: list[list[int | None]], sizes: tuple[int, ...], element: str, dtype: type, keep: bool
) -> None:
    program, _ = _load(_cache_module(shapes, element, keep))
    rng = np.random.default_rng(0)
    batch, capacity, time, *row = sizes
    cache = (rng.standard_normal((batch, capacity, *row)) * 50).astype(dtype)
    for steps in (time, 0) if shapes[1][1] is None else (time,):
        rows = (rng.standard_normal((batch, steps, *row)) * 50).astype(dtype)
        slots, more_slots = rng.integers(-3, capacity + 3, (2, batch, steps))
        if steps:
            slots[0, 0], more_slots[0, -1] = np.iinfo(np.int64).min, np.iinfo(np.int64).max
        first, second = (r.to_host() for r in program.main(cache, rows, slots, more_slots))
        expected = _write(cache, rows, slots)
        assert np.array_equal(first, expected)
        assert np.array_equal(second, _write(cache if keep else expected, rows, more_slots))


def test_cache_is_written_in_place() -> None:
    context = dialect.load()
    text = """
    func.func @main(%cache: tensor<1x8x2x16xf32>, %rows: tensor<1x?x2x16xf32>, %slots: tensor<1x?xi64>)
        -> tensor<1x8x2x16xf32> {
      %c = "spikingbrain.cache_write"(%cache, %rows, %slots)
         : (tensor<1x8x2x16xf32>, tensor<1x?x2x16xf32>, tensor<1x?xi64>) -> tensor<1x8x2x16xf32>
      return %c : tensor<1x8x2x16xf32>
    }"""
    module = ir.Module.parse(text, context)
    write = module.body.operations[0].body.blocks[0].operations[0]
    with ir.InsertionPoint(write), ir.Location.unknown(context):
        write.results[0].replace_all_uses_with(emit_cache_write(*write.operands))
    write.operation.erase()
    wrap_kernels(module)
    program, device = _load(module)
    cache = runtime.asdevicearray(device, np.zeros((1, 8, 2, 16), np.float32))
    rows = np.ones((1, 1, 2, 16), np.float32)
    result = program.main(cache, rows, np.array([[3]]))
    # The caller's buffer holds the row: no copy of the cache was made.
    assert np.array_equal(cache.to_host(), result.to_host())
    assert cache.to_host()[0, 3].all() and cache.to_host().sum() == 32


def test_cache_of_odd_elements_is_refused() -> None:
    with pytest.raises(ValueError, match="no cache of i1: its elements are not 8, 16, 32 or 64 bits wide"):
        _cache_module([[1, 4], [1, 1], [1, 1]], "i1", keep=False)
