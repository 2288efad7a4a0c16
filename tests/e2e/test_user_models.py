"""Ordinary modules through export and load: equal to eager, or refused in one clear message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import spikingbrain
from spikingbrain.errors import CompileError, SpikingBrainError, UnsupportedOp

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any] | None]
RUNS: dict[str, Callable[[], Case]] = {}
REFUSED: dict[str, tuple[Callable[[], Case], type[SpikingBrainError], str]] = {}


class Function(nn.Module):
    """A module whose forward is ``function(self, x)``."""

    def __init__(self, function: Callable[..., Any], **members: nn.Module | nn.Parameter):
        super().__init__()
        self._function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self._function(self, x)


def runs(make: Callable[[], Case]) -> Callable[[], Case]:
    RUNS[make.__name__] = make
    return make


def refused(kind: type[SpikingBrainError], text: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def note(make: Callable[[], Case]) -> Callable[[], Case]:
        REFUSED[make.__name__] = make, kind, text
        return make

    return note


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4))


@runs
def transformer_layer() -> Case:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), (torch.randn(2, 7, 32),), None


@runs
def causal_attention_of_any_length() -> Case:
    model = Function(lambda _, x: F.scaled_dot_product_attention(x, x, x, is_causal=True))
    return model, (torch.randn(2, 3, 7, 16),), {"x": {2: torch.export.Dim("T", min=2, max=64)}}


@runs
def convolution() -> Case:
    layers = [nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.GELU()]
    return nn.Sequential(*layers).eval(), (torch.randn(2, 4, 9),), None


@runs
def token_shift() -> Case:
    model = Function(lambda _, x: F.pad(x, (0, 0, 1, -1)) + x)
    return model, (torch.randn(2, 7, 4),), {"x": {1: torch.export.Dim("T", min=1, max=64)}}


@runs
def recurrent() -> Case:
    return (
        Function(lambda self, x: self.cell(x), cell=nn.GRU(8, 16, batch_first=True)),
        (torch.randn(2, 5, 8),),
        None,
    )


@runs
def half() -> Case:
    return mlp().half(), (torch.randn(3, 8).half(),), None


@runs
def bfloat() -> Case:
    return mlp().bfloat16(), (torch.randn(3, 8).bfloat16(),), None


@runs
def double() -> Case:
    return mlp().double(), (torch.randn(3, 8).double(),), None


@runs
def containers_and_none() -> Case:
    return (
        Function(lambda _, x: {"a": x * 2, "b": (x.sum(), None, x > 0), "c": torch.ones(2)}),
        (torch.randn(3, 8),),
        None,
    )


@runs
def routed_experts() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        odds = self.router(x).softmax(-1)
        best, chosen = odds.topk(2, -1)
        gates = torch.zeros_like(odds).scatter(-1, chosen, best)
        return torch.einsum("te,tef->tf", gates, torch.einsum("td,edf->tef", x, self.experts))

    model = Function(forward, router=nn.Linear(8, 4), experts=nn.Parameter(torch.randn(4, 8, 8)))
    return model, (torch.randn(6, 8),), {"x": {0: torch.export.Dim("N", min=1, max=64)}}


@runs
def strides_and_writes_into_temporaries() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight).clone()
        y[:, 1] = 0
        y += 1
        return y

    model = Function(forward, weight=nn.Parameter(torch.randn(8, 4).t()))
    return model, (torch.randn(8, 3).t(),), None


@runs
def reductions() -> Case:
    model = Function(lambda _, x: (x.cumsum(1), x.sort(-1)[0], x.argmax(-1), x.std(-1)))
    return model, (torch.randn(3, 8),), {"x": {0: torch.export.Dim("N", min=1, max=9)}}


class AnyArguments(nn.Module):
    """Forward with variable arguments and an optional one that stays None."""

    def forward(self, x: Tensor, *more: Tensor, mask: Tensor | None = None, **named: Tensor) -> Tensor:
        return x + sum(more) * named["factor"] if mask is None else x


def test_variable_arguments(tmp_path: Path) -> None:
    x, factor = torch.randn(3), torch.randn(3)
    entry = spikingbrain.Entry((x, x + 1, x + 2), {"mask": None, "factor": factor})
    spikingbrain.export(AnyArguments(), {"main": entry}, tmp_path / "a.sbrain")
    got = spikingbrain.load(tmp_path / "a.sbrain").main(x, x + 1, x + 2, factor)
    np.testing.assert_allclose(got, AnyArguments()(x, x + 1, x + 2, factor=factor).numpy(), rtol=1e-6)


@runs
def nothing() -> Case:
    return Function(lambda _, x: x * 2), (torch.randn(0, 4),), None


@pytest.mark.parametrize("name", RUNS)
def test_equals_eager(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, arguments, shapes = RUNS[name]()
    spikingbrain.export(
        model, {"main": spikingbrain.Entry(arguments, dynamic_shapes=shapes)}, tmp_path / "a.sbrain"
    )
    results = spikingbrain.load(tmp_path / "a.sbrain").call("main", *arguments)
    expected = [leaf for leaf in pytree.tree_leaves(model(*arguments)) if leaf is not None]
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}.get(
        arguments[0].dtype, 1e-5
    )
    assert len(results) == len(expected)
    for got, wanted in zip(results, expected, strict=True):
        numbers = wanted.detach().double().numpy()
        np.testing.assert_allclose(np.asarray(got, np.float64), numbers, rtol=tolerance, atol=tolerance)


@refused(CompileError, "changes the buffer 'count'")
def counts_calls() -> Case:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x + self.count

    return Counter(), (torch.randn(3),), None


@refused(CompileError, "changes an argument in place")
def writes_its_argument() -> Case:
    return Function(lambda _, x: x.add_(1) * 2), (torch.randn(3),), None


@refused(UnsupportedOp, "draws random numbers")
def draws() -> Case:
    return Function(lambda _, x: x + torch.rand(3)), (torch.randn(3),), None


@refused(UnsupportedOp, "no exact lowering for aten.logcumsumexp")
def sums_of_exponentials() -> Case:
    return Function(lambda _, x: torch.logcumsumexp(x, 0)), (torch.randn(8),), None


@refused(UnsupportedOp, "complex numbers")
def transforms() -> Case:
    return Function(lambda _, x: torch.fft.fft(x).abs()), (torch.randn(8),), None


@refused(UnsupportedOp, "selects by a mask")
def selects() -> Case:
    return Function(lambda _, x: x[x > 0]), (torch.randn(8),), None


@refused(CompileError, "torch.export cannot capture")
def branches_on_data() -> Case:
    return Function(lambda _, x: x if x.sum() > 0 else -x), (torch.randn(3),), None


@refused(UnsupportedOp, "side effects")
def inverts() -> Case:
    return Function(lambda _, x: torch.linalg.inv(x)), (torch.randn(3, 3),), None


@refused(CompileError, "which is no tensor")
def returns_a_number() -> Case:
    return Function(lambda _, x: (x, 3)), (torch.randn(3),), None


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_in_the_users_words(name: str, tmp_path: Path) -> None:
    make, kind, text = REFUSED[name]
    model, arguments, shapes = make()
    with pytest.raises(kind) as caught:
        spikingbrain.export(
            model, {"main": spikingbrain.Entry(arguments, dynamic_shapes=shapes)}, tmp_path / "a.sbrain"
        )
    assert text in str(caught.value)
    if name != "returns_a_number":
        assert "test_user_models.py" in str(caught.value)  # the user's own line
    assert not list(tmp_path.iterdir())
