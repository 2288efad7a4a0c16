"""A tensor to the power of a tensor, at the edges of the domain: C's rules, digits and gradients."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spikingbrain

INF, NAN = float("inf"), float("nan")
TINY = torch.finfo(torch.float32).tiny
BASES = [0.0, 1.0, 1 + 2**-23, 1 - 2**-24, 0.5, 2.0, 3.0, 1 / 3, 1e-3, 7.5, 1e10, 3e38, 2e-38, INF]
EXPONENTS = [0.0, 1.0, 2.0, 3.0, 0.5, 2.5, 1 / 3, 17.0, 127.0, 149.0, 2.0**24 - 1, 2.0**24, 3e9, 1e38, INF]


def grid() -> tuple[Tensor, Tensor]:
    """Returns every base, of both signs, with every exponent, and some random ones."""
    bases, exponents = ([*v, *(-x for x in v), NAN] for v in (BASES, EXPONENTS))
    pairs = torch.tensor(list(itertools.product(bases, exponents)))
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(300, 2, generator=generator).mul(torch.tensor([10.0, 20.0])).abs()
    return torch.cat([pairs, random])[:, 0].clone(), torch.cat([pairs, random])[:, 1].clone()


class Power(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x**y, (-2.0) ** y


def compiled(target: str) -> object:
    torch._dynamo.reset()
    options = {"strict": True, "library": False, "target": target}
    return torch.compile(Power(), backend="spikingbrain", options=options)


def assert_ulps(found: Tensor, wanted: Tensor, ulps: float, zero: float = TINY) -> None:
    """What is below ``zero`` may be 0: denormal numbers are."""
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    same |= (found.abs() <= zero) & (wanted.abs() <= zero)
    near = (found - wanted).abs() <= ulps * torch.finfo(wanted.dtype).eps * wanted.abs()
    wrong = ~(same | (near & wanted.isfinite()))
    assert not wrong.any(), (found[wrong], wanted[wrong])


@pytest.mark.parametrize("target", ["cpu", pytest.param("maca-emulator", marks=pytest.mark.slow)])
def test_every_case_of_pow(target: str) -> None:
    x, y = grid()
    with torch.no_grad():
        found = compiled(target)(x, y)  # type: ignore[operator]
    for power, base in zip(found, (x, torch.full_like(y, -2.0)), strict=True):
        assert_ulps(power, (base.double() ** y.double()).float(), 1)


def test_gradients() -> None:
    x, y = (t.requires_grad_() for t in grid())
    found = torch.autograd.grad(sum(p.sum() for p in compiled("cpu")(x, y)), (x, y))  # type: ignore[operator]
    wanted = torch.autograd.grad(sum(p.sum() for p in Power()(x, y)), (x, y))
    for a, b in zip(found, wanted, strict=True):
        assert_ulps(a, b, 16, zero=200 * TINY)  # a denormal power times an exponent


@pytest.mark.slow
def test_halfs_are_rounded_once() -> None:
    x, y = (t.to(torch.bfloat16) for t in grid())
    found, _ = compiled("cpu")(x, y)  # type: ignore[operator]
    assert_ulps(found, (x.double() ** y.double()).to(torch.bfloat16), 0)


def test_exported_power_and_reciprocal(tmp_path: Path) -> None:
    class Both(Power):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return *super().forward(x, y), x.reciprocal()

    x, y = grid()
    spikingbrain.export(Both(), {"main": spikingbrain.Entry((x, y))}, tmp_path / "power.sbrain")
    found = spikingbrain.load(tmp_path / "power.sbrain").main(x.numpy(), y.numpy())
    for power, base in zip(found[:2], (x, torch.full_like(y, -2.0)), strict=True):
        assert_ulps(torch.as_tensor(np.array(power)), (base.double() ** y.double()).float(), 1)
    assert_ulps(torch.as_tensor(np.array(found[2])), x.reciprocal(), 0)
