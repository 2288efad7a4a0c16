"""`spikingbrain::grouped_linear` and its kin: one product per row, derivatives, what torch asks of an op, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import spikingbrain.frontend.ops  # noqa: F401  (registers the ops)
from spikingbrain.errors import OptionError, ShapeError
from spikingbrain.models import spiking

linear, outer = torch.ops.spikingbrain.grouped_linear, torch.ops.spikingbrain.grouped_outer
spike_linear = torch.ops.spikingbrain.spike_grouped_linear

EXPERTS = {"none": [], "one": [2], "odd": [0, 2, 2, -1, 0, 2, 3], "all to one": [1] * 5}  # of 4


def operands(experts: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(experts), 5, dtype=torch.float64, generator=generator)
    weight = torch.randn(4, 3, 5, dtype=torch.float64, generator=generator)
    return x.to(dtype), weight.to(dtype), torch.tensor(experts, dtype=torch.int64)


def reference(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    return torch.stack([weight[e] @ row for e, row in zip(expert.tolist(), x, strict=True)])


@pytest.mark.parametrize("name", EXPERTS)
def test_each_row_goes_through_its_expert(name: str) -> None:
    x, weight, expert = operands(EXPERTS[name])
    expected = reference(x, weight, expert) if len(x) else x.new_empty(0, 3)
    torch.testing.assert_close(linear(x, weight, expert), expected)
    torch.testing.assert_close(linear(x, weight.mT.contiguous(), expert, True), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_floats(dtype: torch.dtype) -> None:
    x, weight, expert = operands(EXPERTS["odd"], dtype)
    torch.testing.assert_close(linear(x, weight, expert), reference(x, weight, expert))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", [n for n in EXPERTS if EXPERTS[n]])
def test_first_and_second_derivatives(name: str, transposed: bool) -> None:
    x, weight, expert = operands(EXPERTS[name])
    weight = weight.mT.contiguous() if transposed else weight
    leaves = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: linear(x, w, expert, transposed), leaves)
    assert torch.autograd.gradgradcheck(lambda x, w: linear(x, w, expert, transposed), leaves)


def test_gradients_without_rows_are_zero() -> None:
    x, weight, expert = operands([])
    linear(x.requires_grad_(), weight.requires_grad_(), expert).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 5)
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("name", ["one", "odd"])
def test_torch_can_rely_on_the_ops(name: str) -> None:
    x, weight, expert = operands(EXPERTS[name])
    x.requires_grad_()
    weight.requires_grad_()
    torch.library.opcheck(linear.default, (x, weight, expert))
    torch.library.opcheck(linear.default, (x, weight.detach().mT, expert, True))
    torch.library.opcheck(outer.default, (x, x.detach(), expert, 4))


def test_what_does_not_fit_is_refused() -> None:
    x, weight, expert = operands(EXPERTS["odd"])
    with pytest.raises(IndexError, match="expert 4 is out of bounds for 4 experts"):
        linear(x, weight, expert + 1)
    with pytest.raises(IndexError, match="expert -5 is out of bounds for 4 experts"):
        linear(x, weight, expert - 4)
    with pytest.raises(ShapeError, match=r"shapes \[7, 5\], \[4, 3, 5\], \[7\]"):
        linear(x, weight, expert, True)
    with pytest.raises(ShapeError, match=r"shapes \[7, 5\], \[4, 3, 5\], \[6\]"):
        linear(x, weight, expert[1:])
    with pytest.raises(ShapeError, match=r"torch\.float32, torch\.float64 and torch\.int64"):
        linear(x.float(), weight, expert)
    with pytest.raises(ShapeError, match=r"torch\.float64, torch\.float64 and torch\.int32"):
        linear(x, weight, expert.int())
    with pytest.raises(ShapeError, match=r"grouped_outer: shapes \[7, 5\], \[6, 5\], \[7\]"):
        outer(x, x[1:], expert, 4)


# Spikes


def spiking_operands(experts: list[int], groups: int = 2, bits: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(experts), 16, generator=generator)
    counts, threshold = spiking.spike_counts(x)
    codes, scale = spiking.quantise_weight(torch.randn(12, 16, generator=generator), 16 // groups, bits)
    expert = torch.tensor(experts, dtype=torch.int64)
    return counts, threshold.squeeze(-1), codes.view(4, 3, 16), scale.view(4, 3, groups), expert


@pytest.mark.parametrize("name", EXPERTS)
def test_spikes_go_through_their_expert(name: str) -> None:
    for groups, bits in ((1, 8), (4, 4)):
        counts, threshold, codes, scale, expert = spiking_operands(EXPERTS[name], groups, bits)
        y = spike_linear(counts, threshold, codes, scale, expert, bits)
        assert y.shape == (len(counts), 3)
        for row, v, e, result in zip(counts, threshold, expert, y, strict=True):
            sums = (row.long() * codes[e].long()).view(3, groups, -1).sum(-1)
            torch.testing.assert_close(result, (sums.float() * scale[e]).sum(-1) * v, rtol=1e-6, atol=0)


def test_sums_of_counts_are_exact_beyond_what_float32_holds() -> None:
    counts = torch.full((1, 40_000), 3572.0)
    counts[0, -1] = 3571.0
    codes = torch.full((2, 1, 40_000), 127, dtype=torch.int8)
    y = spike_linear(counts, torch.ones(1), codes, torch.ones(2, 1, 1), torch.tensor([1]))
    assert y.item() == float(torch.tensor(127 * (3572 * 39_999 + 3571), dtype=torch.float64).float())


def test_torch_can_rely_on_the_spiking_op() -> None:
    torch.library.opcheck(spike_linear.default, spiking_operands(EXPERTS["odd"]))


def test_spikes_that_do_not_fit_are_refused() -> None:
    counts, threshold, codes, scale, expert = spiking_operands(EXPERTS["odd"])
    with pytest.raises(IndexError, match="expert 4 is out of bounds"):
        spike_linear(counts, threshold, codes, scale, expert + 1)
    with pytest.raises(OptionError, match="codes of 16 bits"):
        spike_linear(counts, threshold, codes, scale, expert, 16)
    with pytest.raises(ShapeError, match="codes have 4 bits"):
        spike_linear(counts, threshold, codes, scale, expert, 4)
    with pytest.raises(ShapeError, match=r"torch\.int32"):
        spike_linear(counts, threshold, codes, scale, expert.int())
    with pytest.raises(ShapeError, match=r"shapes \[7, 16\], \[7\], \[4, 3, 16\], \[4, 3, 3\]"):
        spike_linear(counts, threshold, codes, torch.ones(4, 3, 3), expert)
