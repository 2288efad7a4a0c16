"""What a top-k chooses: in order, and written back without a scatter; the values are those of the ops as written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from spikingbrain.frontend.choices import compare_with_choices, sort_choices

aten = torch.ops.aten


def traced(function: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*inputs)


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("from_tensor", [False, True])
def test_chosen_places_are_compared_with(dim: int, from_tensor: bool) -> None:
    def scatter(x: Tensor) -> Tensor:
        best, chosen = x.topk(3, dim)
        return (
            aten.scatter.src(x, dim, chosen, -best) if from_tensor else aten.scatter.value(x, dim, chosen, 7)
        )

    x = torch.randn(5, 6)
    module = traced(scatter, x)
    assert compare_with_choices(module.graph) == 1
    module.recompile()
    assert torch.equal(module(x), scatter(x))
    assert not {aten.scatter.src, aten.scatter.value} & {n.target for n in module.graph.nodes}


@pytest.mark.parametrize(
    "scatter",
    [
        lambda x: aten.scatter.value(x[:, :4], 1, x.topk(2, 1)[1], 1.0),  # of a longer axis: may be outside
        lambda x: aten.scatter.value(x, 1, x.topk(2, 0)[1], 1.0),  # of the other axis
        lambda x: aten.scatter.value(x, 1, x.topk(2, 1)[1] + 1, 1.0),
        lambda x: aten.scatter.value(x, 1, x.topk(9, 1)[1], 1.0),  # many
        lambda x: aten.scatter.value(x, 1, x.topk(2, 1)[1][:3], 1.0),  # of some rows
        lambda x: aten.scatter.value_reduce(x, 1, x.topk(2, 1)[1], 1.0, reduce="add"),
    ],
)
def test_other_scatters_stay(scatter: Callable[[Tensor], Tensor]) -> None:
    assert compare_with_choices(traced(scatter, torch.randn(10, 10)).graph) == 0


def best_two(x: Tensor, **how: Any) -> Tensor:
    return x.topk(2, **how)[0]


def test_choices_in_any_order_are_in_order() -> None:
    x = torch.randn(4, 9)
    for given in ({"sorted": False}, {"largest": False, "sorted": False}, {"dim": 0, "sorted": False}):
        module = traced(partial(best_two, **given), x)
        assert sort_choices(module.graph) == 1
        module.recompile()
        assert torch.equal(module(x), best_two(x, **(given | {"sorted": True})))
    assert sort_choices(traced(best_two, x).graph) == 0
