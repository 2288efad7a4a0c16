"""Training through tensors that are written slice by slice leaves nothing to eager."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def running(x: Tensor) -> Tensor:
    """Running sums of products, written into the rows of a tensor made before, and into the columns of another."""
    rows, columns = x.new_zeros(x.shape), x.new_zeros(x.shape).mT.contiguous().mT
    h = torch.zeros_like(x[0])
    for t in range(len(x)):
        h = h * x[t].sigmoid() + x[t]
        rows[t] = h
        columns[t] = rows[t].tanh()
    return (rows * columns).sum()


@pytest.mark.parametrize("target", ["cpu", pytest.param("maca-emulator", marks=pytest.mark.slow)])
def test_gradients(target: str, fresh_dynamo: None) -> None:
    torch.manual_seed(0)
    found = torch.randn(3, 5, requires_grad=True)
    wanted = found.detach().clone().requires_grad_()
    torch.compile(running, backend="spikingbrain", options={"strict": True, "target": target})(
        found
    ).backward()
    running(wanted).backward()
    torch.testing.assert_close(found.grad, wanted.grad)
