"""Rewrites on AOTAutograd's graphs: each gives what the ops it replaces give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from spikingbrain.frontend.dynamo import rewrites
from spikingbrain.frontend.dynamo.constant_scatters import fuse_constant_scatters

aten = torch.ops.aten


def traced(function: Callable[..., Any], *inputs: Tensor) -> torch.fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*inputs)


def targets(module: torch.fx.GraphModule) -> list[Any]:
    return [n.target for n in module.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    ("dim", "start", "end"), [(0, 1, 4), (1, 0, 6), (-1, -3, 9223372036854775807), (1, 2, -1), (0, None, 3)]
)
def test_a_slice_of_a_constant_is_padding(dim: int, start: int | None, end: int) -> None:
    def scatter(x: Tensor) -> Tensor:
        return aten.slice_scatter.default(aten.full.default([5, 7], 0.5), x, dim, start, end)

    x = torch.randn(aten.slice.Tensor(torch.empty(5, 7), dim, start, end).shape)
    module = traced(scatter, x)
    assert fuse_constant_scatters(module.graph, indices_are_checked=True) == 1
    module.recompile()
    assert torch.equal(module(x), scatter(x))
    assert aten.slice_scatter.default not in targets(module)


def test_an_index_that_nobody_checked_is_left_to_torch() -> None:
    module = traced(
        lambda i: aten.full.default([4, 6], 0.0).scatter(1, i, 1.0), torch.zeros(4, 1, dtype=torch.int64)
    )
    assert fuse_constant_scatters(module.graph, indices_are_checked=False) == 0


def test_a_slice_with_steps_stays() -> None:
    def scatter(x: Tensor) -> Tensor:
        return aten.slice_scatter.default(aten.full.default([6], 0.0), x, 0, 0, 6, 2)

    assert fuse_constant_scatters(traced(scatter, torch.randn(3)).graph, indices_are_checked=True) == 0


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("from_tensor", [False, True])
def test_one_element_of_each_row_is_a_comparison(dim: int, from_tensor: bool) -> None:
    shape = [4, 6]
    shape[dim] = 1
    index, source = torch.randint(0, 4, shape), torch.randn(shape)

    def scatter(i: Tensor, s: Tensor) -> Tensor:
        return aten.full.default([4, 6], 0.0).scatter(dim, i, s if from_tensor else -1.0)

    module = traced(scatter, index, source)
    assert fuse_constant_scatters(module.graph, indices_are_checked=True) == 1
    module.recompile()
    assert torch.equal(module(index, source), scatter(index, source))


def test_a_constant_like_another_tensor_counts() -> None:
    def scatter(x: Tensor, i: Tensor) -> Tensor:
        return aten.full_like.default(x, 0.0).scatter(1, i, -1.0)

    inputs = torch.randn(4, 6), torch.randint(0, 6, (4, 1))
    module = traced(scatter, *inputs)
    assert rewrites_done(module) == 1
    assert torch.equal(module(*inputs), scatter(*inputs))


def rewrites_done(module: torch.fx.GraphModule) -> int:
    done = fuse_constant_scatters(module.graph, indices_are_checked=True)
    module.recompile()
    return done


def test_several_elements_of_a_row_stay() -> None:
    index = torch.randint(0, 6, (4, 2))
    module = traced(lambda i: aten.full.default([4, 6], 0.0).scatter(1, i, 1.0), index)
    assert fuse_constant_scatters(module.graph, indices_are_checked=True) == 0


def test_products_with_frozen_weights_become_linear() -> None:
    def model(x: Tensor, w: Tensor, b: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return aten.mm.default(x, w.t()), aten.addmm.default(b, x, w.t()), aten.mm.default(x, other.t())

    inputs = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5), torch.randn(5, 4)
    module = traced(model, *inputs)
    weight = module.graph.find_nodes(op="placeholder")[1]
    raised = rewrites.raise_linears(module.graph, {weight})
    module.recompile()
    assert [n.target for n in raised] == [aten.linear.default] * 2
    assert targets(module).count(aten.mm.default) == 1
    for actual, expected in zip(module(*inputs), model(*inputs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_copies_of_inputs_and_of_results_stay() -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        y = x.sin()
        return x.clone(), x.t().clone().t(), y, y.clone().view(-1), y.clone().cos()

    module = traced(model, torch.randn(3, 4))
    assert rewrites.drop_noop_copies(module.graph) == 1
    assert targets(module).count(aten.clone.default) == 3
