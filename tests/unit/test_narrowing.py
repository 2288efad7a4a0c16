"""f64 to f16: IREE's conversion loses denormal numbers, so ours goes by way of f32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_mlir import ir

from spikingbrain.backend_iree.narrowing import narrow_by_f32
from spikingbrain.passes.context import new_context

NARROW = """
#all = affine_map<(d0) -> (d0)>
func.func @f(%x: tensor<8xf64>) -> tensor<8xf16> {
  %out = tensor.empty() : tensor<8xf16>
  %y = linalg.generic {indexing_maps = [#all, #all], iterator_types = ["parallel"]}
    ins(%x : tensor<8xf64>) outs(%out : tensor<8xf16>) {
  ^bb0(%a: f64, %b: f16):
    %c = arith.truncf %a : f64 to f16
    linalg.yield %c : f16
  } -> tensor<8xf16>
  return %y : tensor<8xf16>
}
"""
HALFS = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)


def test_f32_comes_between() -> None:
    with new_context(), ir.Location.unknown():
        module = ir.Module.parse(NARROW)
        assert narrow_by_f32(module) == 1
        assert "arith.truncf %in : f64 to f32" in str(module) and ": f32 to f16" in str(module)
        assert narrow_by_f32(module) == 0


@pytest.mark.parametrize("other", ["f32", "bf16"])
def test_other_types_stay(other: str) -> None:
    with new_context(), ir.Location.unknown():
        assert narrow_by_f32(ir.Module.parse(NARROW.replace("f16", other))) == 0


def test_iree_still_needs_it() -> None:
    """When this fails, ``backend_iree/narrowing.py`` can go."""
    compiler, rt = pytest.importorskip("iree.compiler"), pytest.importorskip("iree.runtime")
    flags = ["--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"]
    flags += ["--iree-llvmcpu-target-cpu=host", "--iree-input-demote-f64-to-f32=false"]
    code = compiler.compile_str(NARROW, extra_args=flags)
    context = rt.SystemContext(config=rt.Config("local-sync"))
    context.add_vm_module(rt.VmModule.copy_buffer(context.instance, code))
    x = np.full(8, 6e-5)
    assert (x.astype(np.float16) != 0).all()
    assert (np.asarray(context.modules.module.f(x)) == 0).all()


@pytest.mark.gate
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_every_half_and_what_lies_between() -> None:
    exact = HALFS.double()
    x = torch.cat([exact * factor for factor in (1, 1 + 2**-11, 1 + 2**-11 + 2**-40, 1 - 2**-12)])

    def narrow(x: torch.Tensor) -> torch.Tensor:
        return (x * 1.0).half()

    found = torch.compile(narrow, backend="spikingbrain", options={"library": False, "threads": 1})(x)
    torch.testing.assert_close(found, narrow(x), rtol=0, atol=0, equal_nan=True)
