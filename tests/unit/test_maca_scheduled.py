"""Hand-scheduled kernels on the MACA backend: how a launch gets its memory, and every feature a kernel may use."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest

pytest.importorskip("torch_mlir")

from test_maca import compile_text, needs_cxx, random, run
from torch_mlir import ir
from torch_mlir.dialects import arith, func, memref, tensor

from spikingbrain.errors import PassFailed
from spikingbrain.passes import dialect
from spikingbrain.passes.kernels.builders import (
    add,
    compare,
    floor_div,
    get,
    index,
    launch,
    mul,
    put,
    when,
)
from spikingbrain.passes.wave_kernels.builders import kernel, thread


def module_text(
    inputs: Sequence[str],
    result: str,
    build: Callable[[list[ir.Value]], ir.Value],
    kernels: Callable[[], None],
) -> str:
    """Returns a module with one entry: ``kernels`` adds the kernels, ``build`` the body, which returns the result."""
    with dialect.load(), ir.Location.file("model.py", 5, 1):
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            anchor = func.FuncOp("main", ([ir.Type.parse(t) for t in inputs], [ir.Type.parse(result)]))
        with ir.InsertionPoint(anchor.add_entry_block()):
            kernels()
            func.ReturnOp([build(list(anchor.entry_block.arguments))])
        return str(module.operation.get_asm(enable_debug_info=True))


def mem(text: str) -> ir.Type:
    return ir.Type.parse(f"memref<{text}>")


def ten(text: str) -> ir.Type:
    return ir.Type.parse(f"tensor<{text}>")


def per_element(size: ir.Value, block: ir.Value, body: Callable[[ir.Value], None]) -> None:
    """Runs ``body`` on the elements of blocks of 64."""
    at = add(mul(block, 64), thread())
    when(compare("slt", at, size), lambda: body(at))


def add_kernel(tied: bool = False) -> None:
    """Adds ``total``: y = a + b, or a += b."""

    def body(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        a, b, y = buffers if not tied else [*buffers, buffers[0]]
        size = memref.dim(a, index(0))
        per_element(size, block[0], lambda at: put(arith.addf(get(a, [at]), get(b, [at])), y, [at]))

    kernel("total", [mem("?xf32")] * (2 if tied else 3), 64, body)


def total(a: ir.Value, b: ir.Value, tied: bool = False) -> ir.Value:
    size, one = tensor.dim(a, index(0)), index(1)
    grid = [floor_div(add(size, 63), 64), one, one]
    return launch("total", a.type, grid, [a, b], [] if tied else [size], 0 if tied else -1).result


PAIR = ["tensor<?xf32>"] * 2


@needs_cxx
@pytest.mark.parametrize("size", [0, 1, 64, 131])
def test_a_launch_gets_new_memory_for_its_result(size: int) -> None:
    text = module_text(PAIR, PAIR[0], lambda v: total(total(*v), v[1]), add_kernel)
    a, b = random(size), random(size, seed=1)
    np.testing.assert_array_equal(run(text, a, b), a + b + b)


@needs_cxx
def test_a_tied_input_that_is_read_later_is_copied() -> None:
    """The second launch reads what the first one would have overwritten."""

    def body(v: list[ir.Value]) -> ir.Value:
        first = total(v[0], v[1], tied=True)
        return total(total(first, v[1], tied=True), first, tied=True)

    text = module_text(PAIR, PAIR[0], body, lambda: add_kernel(tied=True))
    a, b = random(70), random(70, seed=1)
    copy = a.copy()
    np.testing.assert_array_equal(run(text, a, b), (a + b + b) + (a + b))
    np.testing.assert_array_equal(a, copy)
    copies = [
        x
        for x in json.loads(compile_text(text)["plan.json"])["entries"]["main"]["launches"]
        if "copy" in x["kernel"]
    ]
    assert len(copies) == 2  # the argument, and the first sum


@needs_cxx
def test_one_tensor_as_tied_and_plain_input_of_a_launch_is_two_buffers() -> None:
    text = module_text(PAIR, PAIR[0], lambda v: total(v[0], v[0], tied=True), lambda: add_kernel(tied=True))
    a = random(70)
    np.testing.assert_array_equal(run(text, a, a), a + a)


@needs_cxx
def test_views_become_contiguous_and_prefixes_stay() -> None:
    text = """
    func.func private @total(%bx: index, %by: index, %bz: index, %a: memref<6xf32>, %b: memref<6xf32>, %y: memref<6xf32>)
        attributes {spikingbrain.threads = 64 : i64} {
      %c6 = arith.constant 6 : index
      %t = gpu.thread_id x
      %inside = arith.cmpi slt, %t, %c6 : index
      scf.if %inside {
        %0 = memref.load %a[%t] : memref<6xf32>
        %1 = memref.load %b[%t] : memref<6xf32>
        %2 = arith.addf %0, %1 : f32
        memref.store %2, %y[%t] : memref<6xf32>
      }
      return
    }
    func.func public @main(%x: tensor<6x7xf32>, %z: tensor<20xf32>) -> tensor<6xf32> {
      %one = arith.constant 1 : index
      %column = tensor.extract_slice %x[0, 3] [6, 1] [1, 1] : tensor<6x7xf32> to tensor<6xf32>
      %prefix = tensor.extract_slice %z[0] [6] [1] : tensor<20xf32> to tensor<6xf32>
      %middle = tensor.extract_slice %z[7] [6] [1] : tensor<20xf32> to tensor<6xf32>
      %w = "spikingbrain.parameter"() {sources = ["w"], recipe = []} : () -> tensor<6xf32>
      %0 = "spikingbrain_control.launch"(%one, %one, %one, %column, %prefix) {callee = @total, tied = [-1]}
        : (index, index, index, tensor<6xf32>, tensor<6xf32>) -> tensor<6xf32>
      %1 = "spikingbrain_control.launch"(%one, %one, %one, %0, %middle) {callee = @total, tied = [-1]}
        : (index, index, index, tensor<6xf32>, tensor<6xf32>) -> tensor<6xf32>
      %2 = "spikingbrain_control.launch"(%one, %one, %one, %1, %w) {callee = @total, tied = [-1]}
        : (index, index, index, tensor<6xf32>, tensor<6xf32>) -> tensor<6xf32>
      return %2 : tensor<6xf32>
    }
    """
    x, z, w = random(6, 7), random(20, seed=1), random(6, seed=2)
    np.testing.assert_array_equal(run(text, x, z, weights={"w": w}), x[:, 3] + z[:6] + z[7:13] + w)


@needs_cxx
def test_kernels_of_one_name_are_told_apart() -> None:
    """A scheduled kernel is named as the first copy is, and in another way than the entry may be."""

    def rename(text: str) -> str:
        return text.replace("@total", "@copy_0")

    text = rename(
        module_text(PAIR, PAIR[0], lambda v: total(v[0], v[1], tied=True), lambda: add_kernel(tied=True))
    )
    a, b = random(70), random(70, seed=1)
    np.testing.assert_array_equal(run(text, a, b), a + b)
    assert sorted(json.loads(compile_text(text)["plan.json"])["kernels"]) == ["copy_0", "copy_0_"]


def test_each_place_that_launches_a_kernel_is_in_its_comment() -> None:
    text = module_text(PAIR, PAIR[0], lambda v: total(total(*v), v[1]), add_kernel)
    second = text.rindex("loc(#loc)", 0, text.rindex("return"))
    text = text[:second] + 'loc("model.py":9:1)' + text[second + len("loc(#loc)") :]
    source = compile_text(text)["kernels.maca"].decode()
    assert "// total, at model.py:5\n// total, at model.py:9\nextern" in source


def test_a_launch_that_does_not_fit_its_kernel_is_an_error() -> None:
    text = module_text(PAIR, PAIR[0], lambda v: total(*v), add_kernel).replace(
        "memref<?xf32>", "memref<8xf32>"
    )
    with pytest.raises(PassFailed, match=r"the launch of 'total' does not fit the kernel"):
        compile_text(text)
