"""IREE's sorts that write over what others read, and the copies that avoid it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_mlir import fx, ir

import spikingbrain
from spikingbrain.backend_iree.sorts import keep_sort_results, own_sort_operands
from spikingbrain.passes.context import new_context

SORTS = """
#same = affine_map<(d0, d1) -> (d0, d1)>
func.func @f(%x: tensor<?x4xf32>, %y: tensor<?x4xf32>) -> (tensor<?x4xi64>, tensor<?x4xi64>) {
  %zero = arith.constant 0 : index
  %n = tensor.dim %x, %zero : tensor<?x4xf32>
  %empty = tensor.empty(%n) : tensor<?x4xi64>
  %places = linalg.generic {indexing_maps = [#same], iterator_types = ["parallel", "parallel"]} outs(%empty : tensor<?x4xi64>) {
  ^bb0(%a: i64):
    %i = linalg.index 1 : index
    %c = arith.index_cast %i : index to i64
    linalg.yield %c : i64
  } -> tensor<?x4xi64>
  %first:2 = DIALECT.sort dimension(1) outs(%x, %places : tensor<?x4xf32>, tensor<?x4xi64>) {
  ^bb0(%a: f32, %b: f32, %i: i64, %j: i64):
    %c = arith.cmpf oge, %a, %b : f32
    DIALECT.yield %c : i1
  } -> tensor<?x4xf32>, tensor<?x4xi64>
  %second:2 = DIALECT.sort dimension(1) outs(%y, %places : tensor<?x4xf32>, tensor<?x4xi64>) {
  ^bb0(%a: f32, %b: f32, %i: i64, %j: i64):
    %c = arith.cmpf oge, %a, %b : f32
    DIALECT.yield %c : i1
  } -> tensor<?x4xf32>, tensor<?x4xi64>
  return %first#1, %second#1 : tensor<?x4xi64>, tensor<?x4xi64>
}
"""


def test_sorts_read_copies() -> None:
    with new_context(), ir.Location.unknown():
        module = ir.Module.parse(SORTS.replace("DIALECT", "tm_tensor"))
        assert own_sort_operands(module) == 4
        assert str(module).count("arith.select") == str(module).count("util.optimization_barrier") == 4


def test_iree_still_needs_it() -> None:
    """When this fails, ``own_sort_operands`` can go."""
    compiler, rt = pytest.importorskip("iree.compiler"), pytest.importorskip("iree.runtime")
    flags = ["--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"]
    source = SORTS.replace("DIALECT", "iree_linalg_ext")
    code = compiler.compile_str(source, extra_args=[*flags, "--iree-llvmcpu-target-cpu=host"])
    context = rt.SystemContext(config=rt.Config("local-sync"))
    context.add_vm_module(rt.VmModule.copy_buffer(context.instance, code))
    x, y = np.array([[1, 4, 2, 3]], np.float32), np.array([[4, 3, 2, 1]], np.float32)
    first, second = (np.asarray(r).tolist() for r in context.modules.module.f(x, y))
    assert [first, second] != [[[1, 3, 2, 0]], [[0, 1, 2, 3]]]


PLACES_ALONE = """
func.func @f(%x: tensor<2x?xf32>, %places: tensor<2x?xi64>) -> tensor<2x?xi64> {
  %sorted:2 = DIALECT.sort dimension(1) outs(%x, %places : tensor<2x?xf32>, tensor<2x?xi64>) {
  ^bb0(%a: f32, %b: f32, %i: i64, %j: i64):
    %c = arith.cmpf ole, %a, %b : f32
    DIALECT.yield %c : i1
  } -> tensor<2x?xf32>, tensor<2x?xi64>
  return %sorted#1 : tensor<2x?xi64>
}
"""


def test_results_that_nothing_reads_are_kept() -> None:
    with new_context(), ir.Location.unknown():
        module = ir.Module.parse(PLACES_ALONE.replace("DIALECT", "tm_tensor"))
        assert keep_sort_results(module) == 1
        assert keep_sort_results(module) == 0
        assert str(module).count("util.optimization_barrier") == 1


def test_iree_still_fails_where_a_result_is_not_read() -> None:
    """When this fails, ``keep_sort_results`` can go."""
    compiler = pytest.importorskip("iree.compiler")
    flags = ["--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"]
    source = PLACES_ALONE.replace("DIALECT", "iree_linalg_ext")
    with pytest.raises(Exception, match="exceeded stack allocation limit"):
        compiler.compile_str(source, extra_args=[*flags, "--iree-llvmcpu-target-cpu=host"])


def test_places_alone_of_any_length(tmp_path: Path) -> None:
    class Places(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argsort(dim=-1, descending=True)

    length = torch.export.Dim("T", min=1, max=64)
    entry = spikingbrain.Entry((torch.randn(2, 11),), dynamic_shapes={"x": {1: length}})
    spikingbrain.export(Places(), {"main": entry}, tmp_path / "a.sbrain")
    program = spikingbrain.load(tmp_path / "a.sbrain")
    for n in (1, 11, 64):
        x = torch.randn(2, n)
        np.testing.assert_array_equal(program.main(x), Places()(x).numpy())


class Sorts(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        y = x + 1
        return [*x.topk(2), *(x.flip(-1) * 2).topk(3), *y.sort(dim=-1), y * 2, y.argsort(dim=-1), x * 3]


def test_what_was_sorted_is_read_by_others_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    length = torch.export.Dim("T", min=1, max=64)
    entry = spikingbrain.Entry((torch.randn(5, 4),), dynamic_shapes={"x": {0: length}})
    spikingbrain.export(Sorts(), {"main": entry}, tmp_path / "a.sbrain")
    program = spikingbrain.load(tmp_path / "a.sbrain")
    for rows in (1, 5, 33):
        x = torch.randn(rows, 4)
        for got, expected in zip(program.main(x), Sorts()(x), strict=True):
            np.testing.assert_array_equal(got, expected.numpy())


class StableSorts(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        ways = [(-1, False), (-1, True), (0, True)]
        return [part for dim, down in ways for part in torch.sort(x, dim=dim, descending=down, stable=True)]


def test_what_is_equal_keeps_its_order_and_nan_is_largest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 9, (37, 101)).float()
    x[:, 1], x[:, 0], x[3, 5], x[4] = math.nan, math.inf, -0.0, math.nan
    x[:, 50:60] = x[:, 50:60].masked_fill(torch.rand(37, 10) < 0.3, math.nan)
    spikingbrain.export(StableSorts(), {"main": spikingbrain.Entry((x,))}, tmp_path / "s.sbrain")
    found = spikingbrain.load(tmp_path / "s.sbrain").main(x)
    for got, wanted in zip(found, StableSorts()(x), strict=True):
        np.testing.assert_array_equal(got, wanted.numpy())


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort().values


def test_torch_mlir_still_forgets_nan() -> None:
    """When this fails, ``order_nan`` can go."""
    lowered = fx.export_and_import(Plain(), torch.zeros(3), output_type="linalg-on-tensors")
    assert "tm_tensor.sort" in str(lowered) and "cmpf uno" not in str(lowered)
