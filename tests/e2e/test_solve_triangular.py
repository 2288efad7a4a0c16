"""Triangular systems, compiled: every form, gradients, and what a singular one gives."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import spikingbrain
from spikingbrain.frontend.solve_triangular import solve_triangular

OPTIONS = {"library": False, "strict": True}
FORMS = [
    dict(zip(("upper", "left", "unitriangular"), flags, strict=True))
    for flags in itertools.product((False, True), repeat=3)
]


class Solved(nn.Module):
    """With a diagonal, since systems with ones there may become products with an inverse before."""

    def forward(self, a: Tensor, b: Tensor) -> list[Tensor]:
        solve = torch.linalg.solve_triangular
        return [solve(a, b, upper=False), solve(a, b.mT, upper=True, left=False)]


def systems(
    size: int, dtype: torch.dtype = torch.float32, batch: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Returns well-conditioned matrices, full ones, of which a solver reads a triangle, and right sides for all of a batch."""
    generator = torch.Generator().manual_seed(size)
    a = torch.randn(*batch, size, size, generator=generator) / size
    a += torch.diag_embed(torch.rand(size, generator=generator) + 1)
    return a, torch.randn(size, 3, generator=generator)


def compiled(target: str = "cpu") -> Any:
    torch._dynamo.reset()
    return torch.compile(Solved(), backend="spikingbrain", options={**OPTIONS, "target": target})


@pytest.mark.parametrize(
    "form",
    [pytest.param(f, marks=[pytest.mark.slow] * (i not in (2, 5, 6))) for i, f in enumerate(FORMS)],
    ids=lambda f: "-".join(k for k, v in f.items() if v),
)
def test_every_form_of_the_lowering(form: dict[str, bool]) -> None:
    for size, batch in ((7, (2,)), (131, ())):
        a, b = systems(size, batch=batch)
        b = b if form["left"] else b.mT
        found = make_fx(lambda a, b: solve_triangular(a, b, **form), tracing_mode="fake")(a, b)(a, b)
        torch.testing.assert_close(found, torch.linalg.solve_triangular(a, b, **form))


def test_gradients() -> None:
    a, b = (t.requires_grad_() for t in systems(7, batch=(2,)))
    found, wanted = compiled()(a, b), Solved()(a, b)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)
    gradients = [torch.autograd.grad(sum(x.square().sum() for x in xs), (a, b)) for xs in (found, wanted)]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_a_singular_system_is_infinite_where_torchs_is() -> None:
    a, b = systems(5)
    a[2, 2] = 0
    b[2, 1] = float("inf")
    b[0, 2] = float("nan")
    found, wanted = compiled()(a, b), Solved()(a, b)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.slow
def test_on_the_emulator() -> None:
    a, b = systems(5, batch=(2,))
    for x, y in zip(compiled("maca-emulator")(a, b), Solved()(a, b), strict=True):
        torch.testing.assert_close(x, y)


def test_exported(tmp_path: Path) -> None:
    class One(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(a, b, upper=False)

    a, b = systems(6)
    spikingbrain.export(One(), {"main": spikingbrain.Entry((a, b))}, tmp_path / "solved.sbrain")
    found = torch.as_tensor(spikingbrain.load(tmp_path / "solved.sbrain").main(a.numpy(), b.numpy()))
    torch.testing.assert_close(found, One()(a, b))
