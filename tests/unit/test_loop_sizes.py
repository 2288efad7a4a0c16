"""Loops that carry tensors of several dynamic sizes: the defect of IREE that ``loop_sizes`` works around."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler.tools")
pytest.importorskip("iree.runtime")

from iree import runtime
from iree.compiler import tools
from torch_mlir import ir

from spikingbrain.backend_iree.loop_sizes import bound_sizes
from spikingbrain.passes import dialect

# Sums over time, stacked as they are and doubled.
MODULE = """
#id = affine_map<(d0) -> (d0)>
func.func @sums(%s0: tensor<?xf32>, %x: tensor<?x?xf32>) -> (tensor<?xf32>, tensor<?x?xf32>, tensor<?x?xf32>) {
  %two = arith.constant 2.0 : f32
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %n = tensor.dim %s0, %c0 : tensor<?xf32>
  %steps = tensor.dim %x, %c0 : tensor<?x?xf32>
  %row = tensor.empty(%n) : tensor<?xf32>
  %stack = tensor.empty(%steps, %n) : tensor<?x?xf32>
  %r:3 = scf.for %t = %c0 to %steps step %c1 iter_args(%s = %s0, %a = %stack, %b = %stack)
      -> (tensor<?xf32>, tensor<?x?xf32>, tensor<?x?xf32>) {
    %now = tensor.extract_slice %x[%t, 0] [1, %n] [1, 1] : tensor<?x?xf32> to tensor<?xf32>
    %sum = linalg.generic {indexing_maps = [#id, #id, #id], iterator_types = ["parallel"]}
        ins(%s, %now : tensor<?xf32>, tensor<?xf32>) outs(%row : tensor<?xf32>) {
    ^bb0(%p: f32, %q: f32, %o: f32):
      %y = arith.addf %p, %q : f32
      linalg.yield %y : f32
    } -> tensor<?xf32>
    %double = linalg.generic {indexing_maps = [#id, #id], iterator_types = ["parallel"]}
        ins(%sum : tensor<?xf32>) outs(%row : tensor<?xf32>) {
    ^bb0(%p: f32, %o: f32):
      %y = arith.mulf %p, %two : f32
      linalg.yield %y : f32
    } -> tensor<?xf32>
    %a1 = tensor.insert_slice %sum into %a[%t, 0] [1, %n] [1, 1] : tensor<?xf32> into tensor<?x?xf32>
    %b1 = tensor.insert_slice %double into %b[%t, 0] [1, %n] [1, 1] : tensor<?xf32> into tensor<?x?xf32>
    scf.yield %sum, %a1, %b1 : tensor<?xf32>, tensor<?x?xf32>, tensor<?x?xf32>
  }
  return %r#0, %r#1, %r#2 : tensor<?xf32>, tensor<?x?xf32>, tensor<?x?xf32>
}
"""


def _load(bounded: bool) -> Any:
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.parse(MODULE)
        if bounded:
            bound_sizes(module)
        code = tools.compile_str(
            str(module), target_backends=["llvm-cpu"], extra_args=["--iree-llvmcpu-target-cpu=generic"]
        )
    config = runtime.Config("local-sync")
    context = runtime.SystemContext(config=config)
    context.add_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, code))
    return context.modules.module


@pytest.mark.parametrize(
    "bounded",
    [
        True,
        pytest.param(
            False, marks=pytest.mark.xfail(strict=True, reason="IREE 3.13; if it passes, loop_sizes can go")
        ),
    ],
)
def test_places_of_carried_tensors(bounded: bool) -> None:
    x = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    last, sums, doubles = [r.to_host() for r in _load(bounded).sums(np.zeros(5, np.float32), x)]
    expected = np.cumsum(x, 0, dtype=np.float32)
    np.testing.assert_allclose(last, expected[-1], rtol=1e-6)
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(doubles, 2 * expected, rtol=1e-5, atol=1e-6)
