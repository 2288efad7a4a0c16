"""Conversions to bf16: IREE drops them where it computes with the result at once, so ours are integer arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_mlir import ir

import spikingbrain
from spikingbrain.backend_iree.rounding import keep_roundings
from spikingbrain.passes.context import new_context

ROUND = """
#all = affine_map<(d0, d1) -> (d0, d1)>
func.func @f(%x: tensor<8x8xf32>) -> tensor<8x8xbf16> {
  %empty = tensor.empty() : tensor<8x8xbf16>
  %y = linalg.generic {indexing_maps = [#all, #all], iterator_types = ["parallel", "parallel"]}
    ins(%x : tensor<8x8xf32>) outs(%empty : tensor<8x8xbf16>) {
  ^bb0(%a: f32, %b: bf16):
    %c = arith.truncf %a : f32 to bf16
    linalg.yield %c : bf16
  } -> tensor<8x8xbf16>
  READ
  return %z : tensor<8x8xbf16>
}
"""
EACH = """%z = linalg.generic {indexing_maps = [#all, #all], iterator_types = ["parallel", "parallel"]}
    ins(VALUE : tensor<8x8xbf16>) outs(%empty : tensor<8x8xbf16>) {
  ^bb0(%a: bf16, %b: bf16):
    BODY
    linalg.yield %d : bf16
  } -> tensor<8x8xbf16>"""
WIDEN = """%k = arith.constant 1.5 : f32
    %e = arith.extf %a : bf16 to f32
    %m = arith.mulf %e, %k : f32
    %d = arith.truncf %m : f32 to bf16"""
TURN = (
    "%t = linalg.transpose ins(%y : tensor<8x8xbf16>) outs(%empty : tensor<8x8xbf16>) permutation = [1, 0]\n"
)
WIDENED = EACH.replace("VALUE", "%y").replace("BODY", WIDEN)
READ = {
    "widened": (WIDENED, 1),
    "widened after a transposition": (TURN + EACH.replace("VALUE", "%t").replace("BODY", WIDEN), 1),
    "computed with in bf16": (
        EACH.replace("VALUE", "%y").replace("BODY", "%d = arith.addf %a, %a : bf16"),
        1,
    ),
    "multiplied": (
        "%z = linalg.matmul ins(%y, %y : tensor<8x8xbf16>, tensor<8x8xbf16>)"
        " outs(%empty : tensor<8x8xbf16>) -> tensor<8x8xbf16>",
        0,
    ),
    "returned": ("%z = tensor.cast %y : tensor<8x8xbf16> to tensor<8x8xbf16>", 0),
}
# Every bf16 number and what lies right after it, right before, on and right after the tie, and right before the next.
UPPER = torch.arange(1 << 16, dtype=torch.int32) << 16
EVERY = torch.cat([UPPER + lower for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(torch.float32)
NORMAL = EVERY[~(EVERY.abs() < 2 * torch.finfo(torch.float32).tiny)]


def rewritten(text: str) -> tuple[int, str]:
    with new_context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        count = keep_roundings(module)
        assert module.operation.verify()
        return count, str(module)


@pytest.mark.parametrize(("read", "count"), READ.values(), ids=READ)
def test_only_what_is_computed_with_is_rewritten(read: str, count: int) -> None:
    found, text = rewritten(ROUND.replace("READ", read))
    assert found == count == text.count("arith.bitcast") // 2
    assert rewritten(text)[0] == 0


def test_vectors_and_f64_are_rewritten_and_constants_are_not() -> None:
    found, text = rewritten("""
func.func @f(%x: vector<4xf64>) -> vector<4xf32> {
  %half = arith.constant 0.5 : f32
  %a = arith.truncf %x : vector<4xf64> to vector<4xbf16>
  %b = arith.truncf %half : f32 to bf16
  %c = vector.broadcast %b : bf16 to vector<4xbf16>
  %d = arith.addf %a, %c : vector<4xbf16>
  %e = arith.extf %d : vector<4xbf16> to vector<4xf32>
  return %e : vector<4xf32>
}""")
    assert found == 1
    assert "vector<4xf64> to vector<4xf32>" in text and "vector<4xi16> to vector<4xbf16>" in text


def test_iree_still_needs_it() -> None:
    """When this fails, ``backend_iree/rounding.py`` can go."""
    compiler, rt = pytest.importorskip("iree.compiler"), pytest.importorskip("iree.runtime")
    flags = ["--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"]
    flags += ["--iree-llvmcpu-target-cpu=host"]
    x = torch.full((8, 8), 1 + 3 * 2**-9)  # rounds to 1 + 2**-7; its product with 1.5 rounds otherwise
    expected = round_twice(x)

    def run(text: str) -> Tensor:
        context = rt.SystemContext(config=rt.Config("local-sync"))
        code = compiler.compile_str(text, extra_args=flags)
        context.add_vm_module(rt.VmModule.copy_buffer(context.instance, code))
        return torch.from_numpy(np.asarray(context.modules.module.f(x.numpy())).view(np.int16)).view(
            torch.bfloat16
        )

    text = ROUND.replace("READ", WIDENED)
    assert (run(text) != expected).all()
    assert (run(rewritten(text)[1]) == expected).all()


def round_twice(x: Tensor) -> Tensor:
    return (x.bfloat16().float() * 1.5).bfloat16()


def negate_rounded(x: Tensor) -> Tensor:
    """Leaves denormal numbers, which compiled arithmetic takes for zero, as they are."""
    return -x.bfloat16().float()


def compute_in_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16() + 1


def round_turned(x: Tensor) -> Tensor:
    return (x.view(6, -1).bfloat16().t().reshape(-1).float() * 1.5).bfloat16()


def round_doubles(x: Tensor) -> Tensor:
    return ((x.double() * (1 + 2**-30)).bfloat16().double() * 1.5).bfloat16()


def round_halfs_to_bfloat16(x: Tensor) -> Tensor:
    return (x.half().bfloat16().float() * 1.5).bfloat16()


def round_to_half(x: Tensor) -> Tensor:
    return (x.half().float() * 1.5).half()


FUNCTIONS = [
    (round_twice, NORMAL),
    (negate_rounded, EVERY),
    (compute_in_bfloat16, NORMAL),
    (round_turned, EVERY.where(EVERY.abs() >= 2 * torch.finfo(torch.float32).tiny, 0.0)),
    (round_doubles, NORMAL),
    (round_halfs_to_bfloat16, NORMAL[~(NORMAL.abs() < 2**-13)]),
    (round_to_half, NORMAL[~(NORMAL.abs() < 2**-13)]),
]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("function", "x"), FUNCTIONS, ids=[f.__name__ for f, _ in FUNCTIONS])
def test_torch_compile_rounds_as_torch(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    found = torch.compile(function, backend="spikingbrain", options={"library": False, "threads": 1})(x)
    assert_same_bits(found, function(x))


@pytest.mark.gate
@pytest.mark.slow
def test_export_rounds_as_torch(tmp_path: Path) -> None:
    class Rounding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return round_twice(x)

    x = NORMAL
    path = spikingbrain.export(Rounding(), {"main": spikingbrain.Entry((x,))}, tmp_path / "rounding").path
    found = spikingbrain.load(path).main(x.numpy())
    assert_same_bits(torch.from_numpy(found.view(np.int16)).view(torch.bfloat16), round_twice(x))


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Compares bit for bit; any NaN is the same as any other, as torch's own depend on the processor."""
    bits = torch.int16 if expected.dtype.itemsize == 2 else torch.int32
    same = (found.view(bits) == expected.view(bits)) | (found.isnan() & expected.isnan())
    assert found.dtype == expected.dtype
    assert same.all(), f"{int((~same).sum())} of {same.numel()} elements differ"
