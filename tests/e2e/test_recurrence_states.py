"""States in memory: what a compiled recurrence updates in place is nobody else's, whatever the sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import spikingbrain.frontend.ops  # noqa: F401  (registers the ops)

op = torch.ops.spikingbrain.linear_recurrence

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def shared_zeros(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Any:
    state = torch.zeros(q.shape[0], 3, 5, 4)
    first = op(q, k, v, g, None, None, None, state, "key", True, False, True)
    second = op(v, v, q, g, None, None, None, state.mT.contiguous(), "value", True, False, True)
    return *first, *second


def shared_argument(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Any:
    first = op(q, k, v, g, None, None, None, s, "key", True, False, False)
    second = op(q, k, v, g, None, None, None, s, "key", True, True, False)
    return *first, *second, s * 2


def chained(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Any:
    first, s = op(q, k, v, g, None, None, None, s, "key", True, False, False)
    second, s = op(q, k, v, g, None, None, None, s, "key", True, False, False)
    third, _ = op(q, k, v, g, None, None, None, None, "key", True, False, False)
    return first, second, third, s


def rank_one(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Any:
    first = op(q, k, v, g, -k / 5, k / 5, None, s, "key", True, False, False)
    second = op(q, k, v, g, -k / 5, k / 5, None, s, "key", True, False, True)
    return *first, *second


@pytest.mark.parametrize("function", [shared_zeros, shared_argument, chained, rank_one])
def test_states_that_others_read(function: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    fast = torch.compile(function, backend="spikingbrain", options={"strict": True})
    for batch in (2, 3, 5):  # the first size is compiled as a number, the second as a symbol
        q, k = torch.randn(batch, 11, 3, 5), torch.randn(batch, 11, 3, 5)
        v, g, s = torch.randn(batch, 11, 3, 4), -torch.rand(batch, 11, 3, 5), torch.randn(batch, 3, 5, 4)
        before = s.clone()
        with torch.no_grad():
            found, expected = fast(q, k, v, g, s), function(q, k, v, g, s)
        assert torch.equal(s, before)
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
