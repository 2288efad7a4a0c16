"""Stacked linear layers of experts, against one product per row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spikingbrain.models.spikingbrain.experts import ExpertLinear


def reference(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    rows = [weight[e] @ row for e, row in zip(expert.tolist(), x, strict=True)]
    return torch.stack(rows) if rows else x.new_empty(0, weight.shape[1])


@pytest.mark.parametrize("experts", [[], [1], [0, 2, 2, 0, 3, 2, 0], [2] * 5], ids=len)
def test_each_row_goes_through_its_expert(experts: list[int]) -> None:
    """Expert 1 has no rows in most cases; one expert may have all of them."""
    torch.manual_seed(0)
    layer = ExpertLinear(4, 5, 3).double()
    x = torch.randn(len(experts), 5, dtype=torch.float64, requires_grad=True)
    expert = torch.tensor(experts, dtype=torch.int64)
    y = layer(x, expert)
    torch.testing.assert_close(y, reference(x, layer.weight, expert))
    if experts:
        assert torch.autograd.gradcheck(
            lambda x, w: torch.func.functional_call(layer, {"weight": w}, (x, expert)), (x, layer.weight)
        )
    else:
        y.sum().backward()
        assert x.grad is not None and layer.weight.grad is not None and not layer.weight.grad.any()


def test_no_sizes_that_depend_on_data_when_exported() -> None:
    layer = ExpertLinear(4, 5, 3)
    x, expert = torch.randn(7, 5), torch.tensor([0, 2, 2, 0, 3, 2, 0])
    rows = torch.export.Dim.DYNAMIC
    program = torch.export.export(layer, (x, expert), dynamic_shapes=({0: rows}, {0: rows}))
    torch.testing.assert_close(program.module()(x, expert), layer(x, expert))


@pytest.mark.parametrize("wrong", [4, -1])
def test_an_unknown_expert(wrong: int) -> None:
    with pytest.raises(IndexError, match=f"experts {min(wrong, 0)} to {max(wrong, 0)} of 4"):
        ExpertLinear(4, 5, 3)(torch.randn(2, 5), torch.tensor([0, wrong]))
