"""IREE's wrong fusion of a reduction that is read twice, and the barrier that avoids it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_mlir import ir

from spikingbrain.backend_iree.double_reads import separate_double_reads
from spikingbrain.frontend.dynamo.report import collect
from spikingbrain.passes.context import new_context

PAIRS = """
#by_row = affine_map<(d0, d1) -> (d0)>
#by_column = affine_map<(d0, d1) -> (d1)>
#both = affine_map<(d0, d1) -> (d0, d1)>
#turned = affine_map<(d0, d1) -> (d1, d0)>
func.func @f(%x: tensor<8x34xf32>) -> tensor<34x34xf32> {
  %zero = arith.constant 0.0 : f32
  %empty = tensor.empty() : tensor<34xf32>
  %init = linalg.fill ins(%zero : f32) outs(%empty : tensor<34xf32>) -> tensor<34xf32>
  %sum = linalg.generic {indexing_maps = [#turned, #by_row], iterator_types = ["parallel", "reduction"]}
    ins(%x : tensor<8x34xf32>) outs(%init : tensor<34xf32>) {
  ^bb0(%a: f32, %b: f32):
    %c = arith.addf %a, %b : f32
    linalg.yield %c : f32
  } -> tensor<34xf32>
  %out = tensor.empty() : tensor<34x34xf32>
  %pairs = linalg.generic {indexing_maps = [#by_row, FIRST, #both], iterator_types = ["parallel", "parallel"]}
    ins(%sum, %sum : tensor<34xf32>, tensor<34xf32>) outs(%out : tensor<34x34xf32>) {
  ^bb0(%a: f32, %b: f32, %u: f32):
    %c = arith.subf %a, %b : f32
    linalg.yield %c : f32
  } -> tensor<34x34xf32>
  return %pairs : tensor<34x34xf32>
}
"""


@pytest.mark.parametrize(("second", "barriers"), [("#by_column", 1), ("#by_row", 0)])
def test_a_barrier_where_the_index_maps_differ(second: str, barriers: int) -> None:
    with new_context(), ir.Location.unknown():
        module = ir.Module.parse(PAIRS.replace("FIRST", second))
        assert separate_double_reads(module) == barriers
        assert str(module).count("util.optimization_barrier") == barriers


def test_iree_still_needs_it() -> None:
    """When this fails, ``backend_iree/double_reads.py`` can go."""
    compiler, rt = pytest.importorskip("iree.compiler"), pytest.importorskip("iree.runtime")
    flags = ["--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"]
    code = compiler.compile_str(
        PAIRS.replace("FIRST", "#by_column"), extra_args=[*flags, "--iree-llvmcpu-target-cpu=host"]
    )
    context = rt.SystemContext(config=rt.Config("local-sync"))
    context.add_vm_module(rt.VmModule.copy_buffer(context.instance, code))
    x = np.random.default_rng(0).random((8, 34), dtype=np.float32)
    sums = x.sum(0)
    assert abs(np.asarray(context.modules.module.f(x)) - (sums[:, None] - sums)).max() > 0.1


@pytest.mark.parametrize("dynamic", [False, True])
def test_differences_of_sums_are_right(dynamic: bool) -> None:
    def pairs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = x.mean(1) * 2 + 1
        return s[:, :, None] - s[:, None, :], (s.exp()[:, :, None] * s[:, None, :]).sum(-1)

    torch._dynamo.reset()
    x = torch.randn(3, 8, 34)
    fast = torch.compile(pairs, backend="spikingbrain", dynamic=dynamic)
    with collect() as reports:
        results = fast(x)
    assert reports[0].count("eager") == 0
    for a, e in zip(results, pairs(x), strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4)
