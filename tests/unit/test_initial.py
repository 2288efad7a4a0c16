"""What is stored of a state's first values is enough to make them again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spikingbrain.errors import CompileError
from spikingbrain.frontend.initial import initial_values


def rebuilt(value: Tensor, shape: list[int | str], batch: int = 1) -> tuple[Tensor, int]:
    """Returns a fresh state tensor as the runtime makes it, and how many numbers were stored for it."""
    [field], blocks = initial_values([{"name": "x", "shape": shape}], [value])
    fresh = torch.full([batch if isinstance(d, str) else d for d in shape], field["fill"], dtype=value.dtype)
    if "block" not in field:
        return fresh, 0
    block = blocks["x"]
    places = zip(field["block"], block.shape, shape, strict=True)
    fresh[tuple(slice(None) if isinstance(d, str) else slice(a, a + n) for a, n, d in places)] = block
    return fresh, block.numel()


@pytest.mark.parametrize("shape", [[3], [2, 5], [2, 3, 4, 5], [0, 3], []])
def test_values_come_back(shape: list[int | str]) -> None:
    torch.manual_seed(0)
    for others in [0, 1, 1, 2, 2, 3, 3, 4]:
        value = torch.full(shape, 7.0)
        if value.numel():
            value.view(-1)[torch.randint(0, value.numel(), (others,))] = torch.randn(others)
        found, stored = rebuilt(value, shape)
        assert torch.equal(found, value)
        assert stored <= value.numel() and (stored > 0) == (len(value.unique()) > 1)


def test_a_cache_is_stored_up_to_its_last_filled_slot() -> None:
    cache = torch.zeros(2, 1000, 4)
    cache[:, 3:8] = torch.randn(5, 4)
    found, stored = rebuilt(cache, ["B", 1000, 4], batch=3)
    assert stored == 20 and torch.equal(found, cache[:1].expand(3, -1, -1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers(value: float) -> None:
    filled = torch.full((2, 3), value)
    assert torch.equal(rebuilt(filled, [2, 3])[0].nan_to_num(5), filled.nan_to_num(5))
    filled[0, 1] = 0
    assert torch.equal(rebuilt(filled, [2, 3])[0].nan_to_num(5), filled.nan_to_num(5))
    filled[1] = filled[0]
    assert torch.equal(rebuilt(filled, ["B", 3], 2)[0].nan_to_num(5), filled.nan_to_num(5))


def test_entries_may_differ_by_rounding_only() -> None:
    row = torch.randn(1, 6)
    assert torch.equal(rebuilt(torch.cat([row, row * (1 + 1e-6)]), ["B", 6], 2)[0], row.expand(2, -1))
    for other in (row * 1.01, row + 0.01):
        with pytest.raises(CompileError, match="other values in each entry of axis 0"):
            rebuilt(torch.cat([row, other]), ["B", 6])
    with pytest.raises(CompileError, match="other values in each entry of axis 1"):
        rebuilt(torch.tensor([[5, 6]]), [1, "B"])
