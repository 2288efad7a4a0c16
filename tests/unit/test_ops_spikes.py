"""`spikingbrain::spike_encode` and `spike_linear`: what torch asks of an op, exactness, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import spikingbrain.frontend.ops  # noqa: F401  (registers the ops)
from spikingbrain.errors import OptionError, ShapeError
from spikingbrain.models import spiking

encode, linear = torch.ops.spikingbrain.spike_encode, torch.ops.spikingbrain.spike_linear


def operands(groups: int = 2, bias: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 16, generator=generator), torch.randn(5, 16, generator=generator)
    counts, threshold = encode(x)
    codes, scale = spiking.quantise_weight(weight, 16 // groups)
    return [counts, threshold, codes, scale, torch.randn(5, generator=generator) if bias else None]


def test_torch_can_rely_on_the_ops() -> None:
    torch.library.opcheck(encode.default, (torch.randn(2, 3, 8), 2.5, 1e-4, 1e3))
    torch.library.opcheck(linear.default, tuple(operands()))
    given = operands(1, False)
    activation = torch.randn(2, 3, 16, requires_grad=True)
    weight = torch.randn(5, 16, requires_grad=True)
    torch.library.opcheck(linear.default, (*given, 8, activation, weight))


def test_gradients_are_those_of_the_float_product() -> None:
    counts, threshold, codes, scale, bias = operands()
    leaves = [torch.randn(2, 3, 16), torch.randn(5, 16), bias]
    leaves = [t.clone().requires_grad_() for t in leaves if t is not None]
    got = torch.autograd.grad(
        linear(counts, threshold, codes, scale, leaves[2], 8, leaves[0], leaves[1]).square().sum(), leaves
    )
    with torch.no_grad():
        outgoing = 2 * linear(counts, threshold, codes, scale, leaves[2])
    wanted = torch.autograd.grad(torch.nn.functional.linear(*leaves), leaves, outgoing)
    for actual, expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("size", [1, 40_000])
def test_sums_are_exact_beyond_what_float32_holds(size: int) -> None:
    counts = torch.full((1, size), 3572.0)
    counts[0, -1] = 3571.0
    codes = torch.full((1, size), 127, dtype=torch.int8)
    y = linear(counts, torch.ones(1), codes, torch.ones(1, 1))
    assert y.item() == float(torch.tensor(127 * (3572 * (size - 1) + 3571), dtype=torch.float64).float())


def test_float_weights_are_rounded_by_the_scale() -> None:
    counts, threshold, codes, scale, bias = operands()
    assert codes is not None and scale is not None
    weight = spiking.dequantise_weight(codes, scale) + 0.2 * scale.repeat_interleave(8, 1)
    torch.testing.assert_close(
        linear(counts, threshold, weight, scale.unsqueeze(-1), bias),
        linear(counts, threshold, codes, scale, bias),
        rtol=0,
        atol=0,
    )


def test_what_does_not_fit_is_refused() -> None:
    counts, threshold, codes, scale, bias = operands()
    assert codes is not None and scale is not None
    with pytest.raises(ShapeError, match="float64"):
        encode(torch.randn(3, 4, dtype=torch.float64))
    with pytest.raises(OptionError, match="3 bits"):
        linear(counts, threshold, codes, scale, bias, 3)
    with pytest.raises(ShapeError, match=r"\[5, 16\]"):
        linear(counts, threshold, codes, torch.ones(5, 3), bias)
    with pytest.raises(ShapeError, match="weight codes"):
        linear(counts, threshold, codes, scale, bias, 4)
