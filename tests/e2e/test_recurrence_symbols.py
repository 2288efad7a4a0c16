"""A loop over time in a model whose batch changes is raised once, for all sizes; gradients are eager's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import spikingbrain
from spikingbrain.frontend.dynamo.report import collect_found

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    state = q.new_zeros(q.shape[0], 3, 5, 4)
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None] + k[:, t, ..., None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


def test_a_batch_that_changes() -> None:
    torch.manual_seed(0)
    fast = torch.compile(gla, backend="spikingbrain")
    with collect_found() as found:
        for batch in (2, 3, 5, 1):
            shapes = [(batch, 9, 3, 5)] * 2 + [(batch, 9, 3, 4), (batch, 9, 3, 5)]
            q, k, v, g = (torch.randn(s) for s in shapes)
            inputs = [x.requires_grad_() for x in (q, k, v, -g.abs())]
            results, expected = fast(*inputs), gla(*inputs)
            gradients = torch.autograd.grad(sum(r.sin().sum() for r in results), inputs)
            wanted = torch.autograd.grad(sum(r.sin().sum() for r in expected), inputs)
            for a, e in zip([*results, *gradients], [*expected, *wanted], strict=True):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    assert len(found.recurrences) <= 3  # for the first size, for any size, and for a batch of one
    assert {(r.status, r.op) for r in found.recurrences} == {("raised", "linear_recurrence")}


class Normed(torch.nn.Module):
    """What dynamic=True makes a symbol of besides sizes: the eps of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(4, 1e-3)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        normed: Tensor = self.norm(gla(q, k, v, g)[0])
        return normed


@torch.no_grad()
def test_numbers_that_are_symbols() -> None:
    torch.manual_seed(0)
    model = Normed()
    fast = torch.compile(model, backend="spikingbrain", dynamic=True)
    with collect_found() as found:
        for batch, eps in ((2, 1e-3), (3, 1e-3), (3, 0.5)):
            model.norm.eps = eps
            shapes = [(batch, 6, 3, 5)] * 2 + [(batch, 6, 3, 4), (batch, 6, 3, 5)]
            q, k, v, g = (torch.randn(s) for s in shapes)
            torch.testing.assert_close(
                fast(q, k, v, -g.abs()), model(q, k, v, -g.abs()), rtol=1e-4, atol=1e-5
            )
    assert {(r.status, r.op) for r in found.recurrences} == {("raised", "linear_recurrence")}


class ReadWhereDataSays(torch.nn.Module):
    """A leaky sum over time, read at a step that is data, and the first step of as many as data says."""

    def forward(self, x: Tensor, place: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at, n = place.item(), count.item()
        torch._check(at >= 0)
        torch._check(at < x.shape[1])
        torch._check(n > 0)
        torch._check(n <= x.shape[1])
        state, outputs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = 0.9 * state + x[:, t]
            outputs.append(state)
        shorter = x[:, :n] * 2
        return torch.stack(outputs, 1).select(1, at), x[:, at], shorter[:, 0:1] + shorter[:, 0].unsqueeze(1)


def test_places_that_are_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = ReadWhereDataSays(), (torch.randn(2, 12, 4), torch.tensor(5), torch.tensor(3))
    spikingbrain.export(model, {"main": spikingbrain.Entry(inputs)}, tmp_path / "places.sbrain")
    program = spikingbrain.load(tmp_path / "places.sbrain")
    for at, n in ((5, 3), (0, 1), (11, 12)):
        given = (inputs[0], torch.tensor(at), torch.tensor(n))
        for found, wanted in zip(program.main(*given), model(*given), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-5)
