"""Mamba-2's chunks without a loop: raised in each way of writing them, and not where a single thing is otherwise."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from spikingbrain.frontend.recurrences.raising import raise_recurrences


def segments(g: Tensor, shifted: int = -1) -> Tensor:
    """Returns [..., i, j] = g[j + 1] + ... + g[i] by sums under a mask, as transformers writes it."""
    n = g.shape[-1]
    below = torch.ones(n, n, dtype=torch.bool).tril(shifted)
    sums = g[..., None].expand(*g.shape, n).masked_fill(~below, 0).cumsum(-2)
    return sums.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)


def differences(g: Tensor, shifted: int = -1) -> Tensor:
    """Returns the same as differences of running sums."""
    c = g.cumsum(-1)
    n = g.shape[-1]
    return (c[..., :, None] - c[..., None, :]).masked_fill(
        ~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf
    )


class Chunked(nn.Module):
    """Mamba-2 by einsum, or by products and sums; ``wrong`` names one thing to do otherwise."""

    def __init__(self, size: int, einsum: bool = True, sums=segments, wrong: str = "") -> None:
        super().__init__()
        self.size, self.einsum, self.sums, self.wrong = size, einsum, sums, wrong

    def forward(
        self, x: Tensor, g: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        length, wrong = x.shape[1], self.wrong
        behind = -length % self.size
        skip = 0.5 * F.pad(x, (0, 0, 0, 0, 0, behind))

        def chunks(y: Tensor) -> Tensor:
            y = F.pad(y, (0, 0) * (y.dim() - 2) + (0, behind))
            return y.reshape(y.shape[0], -1, self.size, *y.shape[2:])

        x, g, b, c = map(chunks, (x, g, b, c))
        g = g.permute(0, 3, 1, 2)
        total = g.cumsum(-1)
        mask = self.sums(g, 0 if wrong == "a gate counted twice" else -1).exp()
        keys = b.flip(3) if wrong == "other keys" else b
        decay = torch.exp((total[..., -1:] - total) * (2 if wrong == "twice the decay" else 1)).permute(
            0, 2, 3, 1
        )
        if self.einsum:
            inner = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", c, b, mask, x)
            states = torch.einsum("bclhn,bclh,bclhp->bchpn", keys, decay, x)
        else:
            scores = (c[:, :, :, None] * b[:, :, None]).sum(-1) * mask.permute(0, 2, 3, 4, 1)
            inner = (scores[..., None] * x[:, :, None]).sum(3)
            states = ((keys * decay[..., None])[..., None, :] * x[..., None]).sum(2)
        first = torch.zeros_like(states[:, :1]) if state is None else state[:, None]
        states = torch.cat([first, states], dim=1)
        last = total[..., 0] if wrong == "the gates of a first step" else total[..., -1]
        between = self.sums(F.pad(last, (1, 0))).exp().transpose(1, 3)
        states = (between[..., None, None] * states[:, :, None]).sum(1)
        final = states[:, -2 if wrong == "the state before" else -1]
        states = states[:, 1:] if wrong == "the chunk itself" else states[:, :-1]
        outer = torch.einsum("bclhn,bchpn->bclhp", c, states) * total.exp().permute(0, 2, 3, 1)[..., None]
        y = inner + (2 * outer if wrong == "twice the state" else outer)
        return (y.flatten(1, 2) + skip)[:, :length], final


def example(length: int, state: bool, batch: int = 2, heads: int = 3) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    sizes = (batch, length, heads)
    x, b, c = normal(*sizes, 4), normal(*sizes, 5), normal(*sizes, 5)
    return (x, -normal(*sizes).abs(), b, c) + ((normal(batch, heads, 4, 5),) if state else ())


def raised(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[str], str]:
    """Returns what became of a module, having compared its results, and the ops that are left."""
    graph = make_fx(module, tracing_mode="fake", pre_dispatch=True)(*inputs)
    found = [r.op for r in raise_recurrences(graph, keep_detach=False) if r.status == "raised"]
    for actual, wanted in zip(pytree.tree_leaves(graph(*inputs)), module(*inputs), strict=True):
        assert_close(actual, wanted, "result")
    return found, str(graph.code)


@pytest.mark.parametrize("state", [False, True], ids=["zeros", "a state enters"])
@pytest.mark.parametrize("length", [1, 5, 8, 11, 24])
def test_raised(length: int, state: bool) -> None:
    found, code = raised(Chunked(8), example(length, state))
    assert found == ["linear_recurrence"]
    assert not any(op in code for op in ("cumsum", "exp.", "pad", "einsum", "[2, 3, 8")), code


@pytest.mark.parametrize("sums", [segments, differences])
@pytest.mark.parametrize("einsum", [False, True])
def test_ways_of_writing(einsum: bool, sums: object) -> None:
    found, code = raised(Chunked(4, einsum, sums), example(14, True))
    assert found == ["linear_recurrence"] and "cumsum" not in code


@pytest.mark.parametrize(("batch", "heads"), [(1, 3), (2, 1), (1, 1)])
def test_axes_of_size_one(batch: int, heads: int) -> None:
    found, code = raised(Chunked(4), example(9, True, batch, heads))
    assert found == ["linear_recurrence"] and "cumsum" not in code


WRONG = (
    "a gate counted twice",
    "other keys",
    "twice the decay",
    "the gates of a first step",
    "the chunk itself",
    "twice the state",
)


@pytest.mark.parametrize("wrong", WRONG)
def test_one_thing_otherwise(wrong: str) -> None:
    found, _ = raised(Chunked(4, wrong=wrong), example(14, True))
    assert not found


def test_another_state_than_the_last() -> None:
    """The outputs are raised; the state is computed as it is written."""
    found, code = raised(Chunked(4, wrong="the state before"), example(14, True))
    assert found == ["linear_recurrence"] and "cumsum" in code
