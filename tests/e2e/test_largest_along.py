"""The largest and the smallest along an axis, and their places, are compiled: those of torch, NaN and ties too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

INF, NAN = float("inf"), float("nan")
ROWS = [[1.0, 3.0, 3.0], [NAN, INF, NAN], [-INF, -INF, -INF], [0.0, -INF, INF], [2.0, 1.0, 1.0]]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def values(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.max(-1, keepdim=True).values + 1, x.min(0).values * 2


def pairs(x: Tensor) -> tuple[Tensor, ...]:
    y = x.int() if x.dtype is torch.bool else x
    places = y.argmax(0), y.argmin(-1, keepdim=True), y.argmax(), y[0, 0].argmin()
    return (*x.max(-1), *x.min(0, keepdim=True), *x[0, 0].max(0), *places)


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_values_alone_leave_nothing_to_eager() -> None:
    compiled = torch.compile(values, backend="spikingbrain", options={"strict": True})
    assert_same(compiled(torch.tensor(ROWS)), values(torch.tensor(ROWS)))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.int64, torch.bool))],
    ids=str,
)
def test_indices(dtype: torch.dtype) -> None:
    x = torch.tensor(ROWS)
    x = x if dtype.is_floating_point else x.nan_to_num(0, 4, -4).to(dtype)
    assert_same(torch.compile(pairs, backend="spikingbrain", options={"strict": True})(x), pairs(x))


@pytest.mark.slow
def test_gradients_go_to_the_first_of_equals() -> None:
    def loss(x: Tensor) -> Tensor:
        return x.max(-1).values.square().sum() + 3 * x.min(0).values.sum()

    found, wanted = (torch.tensor(ROWS)[[0, 4]].requires_grad_() for _ in range(2))
    torch.compile(loss, backend="spikingbrain")(found).backward()
    loss(wanted).backward()
    assert found.grad is not None and wanted.grad is not None
    assert_same((found.grad,), (wanted.grad,))
