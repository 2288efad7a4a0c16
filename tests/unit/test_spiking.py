"""Spiking layers in plain PyTorch: codings are exact both ways, the neuron counts what it says, linears add integers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spikingbrain.models import spiking
from spikingbrain.models.spiking import SpikeLinear, SpikeLinearTraining, SpikingError

SIGNED = ("ternary", "bitwise_ternary", "twos_complement")


# Codings


@pytest.mark.parametrize("coding", spiking.CODINGS)
@pytest.mark.parametrize("largest", [0, 1, 2, 3, 7, 8, 127, 128, 3572])
def test_every_coding_gives_its_counts_back(coding: str, largest: int) -> None:
    generator = torch.Generator().manual_seed(largest)
    low = -largest if coding in SIGNED else 0
    counts = torch.randint(low, largest + 1, (5, 7), generator=generator)
    counts[0, :2] = torch.tensor([low, largest])
    train = spiking.encode(counts, coding)
    assert train.shape == (spiking.steps_needed(counts, coding), 5, 7)
    assert set(train.unique().tolist()) <= ({-1, 0, 1} if "ternary" in coding else {0, 1})
    torch.testing.assert_close(spiking.decode(train, coding), counts)
    longer = spiking.encode(counts.float(), coding, train.shape[0] + 3)
    torch.testing.assert_close(spiking.decode(longer, coding), counts)


@pytest.mark.parametrize("coding", spiking.CODINGS)
def test_a_linear_layer_is_a_sum_of_active_columns(coding: str) -> None:
    weight = torch.randint(-127, 128, (6, 11))
    counts = torch.randint(-9 if coding in SIGNED else 0, 10, (4, 11))
    train = spiking.encode(counts, coding)
    steps = spiking.codings.step_weights(train.shape[0], coding)
    y = torch.zeros(4, 6, dtype=torch.int64)
    for s, step in zip(train, steps, strict=True):
        for token, channel in s.nonzero().tolist():
            y[token] += step * s[token, channel] * weight[:, channel]
    torch.testing.assert_close(y, counts @ weight.mT)


@pytest.mark.parametrize("coding", spiking.CODINGS)
@pytest.mark.parametrize("steps", [0, 1, 3, 4])
def test_a_budget_of_steps_loses_nothing_unnoticed(coding: str, steps: int) -> None:
    counts = torch.arange(-20 if coding in SIGNED else 0, 21)
    train, rest = spiking.budget(counts, coding, steps)
    assert train.shape[0] == steps
    torch.testing.assert_close(spiking.decode(train, coding) + rest, counts)
    fits = rest == 0
    for count in counts[fits].tolist():
        assert spiking.steps_needed(torch.tensor([count]), coding) <= steps


@pytest.mark.parametrize("coding", spiking.CODINGS)
def test_firing_counts_the_spikes_of_the_train(coding: str) -> None:
    counts = torch.randint(-30 if coding in SIGNED else 0, 31, (50,))
    train, found = spiking.encode(counts, coding), spiking.firing(counts, coding)
    assert found.steps == train.shape[0]
    assert found.spikes == pytest.approx(float(train.abs().sum() / 50))
    assert found.silent == pytest.approx(float((train == 0).all(0).float().mean()))
    assert found.sparsity == pytest.approx(float((train == 0).float().mean()))


def test_what_a_coding_cannot_hold_is_refused() -> None:
    with pytest.raises(SpikingError, match=r"count of -1 .*binary"):
        spiking.encode(torch.tensor([-1]), "binary")
    with pytest.raises(SpikingError, match="2 steps for counts that need 3"):
        spiking.encode(torch.tensor([4]), "bitwise", 2)
    with pytest.raises(SpikingError, match="no integers"):
        spiking.encode(torch.tensor([0.5]))
    with pytest.raises(SpikingError, match="no integers"):
        spiking.encode(torch.tensor([float("nan")]))
    with pytest.raises(SpikingError, match="unknown coding"):
        spiking.encode(torch.tensor([1]), "morse")


# The neuron


def test_thresholds_and_counts_follow_the_equation() -> None:
    x = torch.randn(3, 5, 64) * torch.tensor([1.0, 1e-6, 1e6]).view(3, 1, 1)
    counts, v = spiking.spike_counts(x)
    expected = (x.abs().double().mean(-1, keepdim=True) / 3).clamp(1e-5, 1e4)
    torch.testing.assert_close(v, expected.float())
    assert torch.equal(counts, counts.round())
    assert bool(((x - counts * v).abs() <= v * 0.50001 + 1e-6 * x.abs()).all())
    sizes = counts[:2].abs().sum(-1)
    assert bool((sizes <= 3.5 * 64).all())


def test_a_token_that_is_not_finite_spoils_itself_only() -> None:
    x = torch.randn(4, 16)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    counts, v = spiking.spike_counts(x)
    assert counts[1].isnan().all() and v[1].isnan()
    assert v[2] == 1e4 and counts[2, 5] == float("inf") and counts[2, :5].isfinite().all()
    assert counts[[0, 3]].isfinite().all()


def test_gradients_pass_the_neuron_as_if_it_were_not_there() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    weight = torch.randn(2, 8)
    (spiking.spiking(x) * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight)


def test_integrate_and_fire_reaches_the_count() -> None:
    x = torch.tensor([0.0, 0.4, 0.6, -2.2, 7.3, -0.9])
    v = torch.tensor(1.0)
    current = torch.zeros(20, 6)
    current[0] = x
    spikes, rest = spiking.integrate_and_fire(current, v, signed=True, potential=0.5 * x.sign())
    torch.testing.assert_close(spikes.sum(0), torch.round(x))
    torch.testing.assert_close(rest + v * spikes.sum(0), x + 0.5 * x.sign())


# Linear layers


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 8, 16, 48])
def test_a_spiking_linear_adds_integers(group_size: int | None, bits: int) -> None:
    linear = nn.Linear(48, 10)
    layer = SpikeLinear.of(linear, group_size=group_size, bits=bits)
    assert layer.codes.dtype == torch.int8 and int(layer.codes.abs().max()) == 2 ** (bits - 1) - 1
    x = torch.randn(2, 3, 48)
    counts, v = spiking.spike_counts(x)
    groups = 48 // (group_size or 48)
    sums = (counts.long().view(2, 3, 1, groups, -1) * layer.codes.long().view(10, groups, -1)).sum(-1)
    expected = (sums.double() * layer.scale).sum(-1) * v + linear.bias
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    error = (layer.weight() - linear.weight).abs().view(10, groups, -1)
    assert bool((error <= layer.scale.unsqueeze(-1) * 0.5001).all())


@pytest.mark.parametrize("group_size", [None, 8])
def test_one_token_without_a_batch(group_size: int | None) -> None:
    layer, x = SpikeLinear.of(nn.Linear(16, 5), group_size=group_size), torch.randn(16)
    assert torch.equal(layer(x), layer(x[None])[0])


def test_sums_are_exact_for_as_many_channels_as_float32_holds() -> None:
    assert spiking.exact_dtype(37_000, 3.0, torch.int8) == torch.float32
    assert spiking.exact_dtype(38_000, 3.0, torch.int8) == torch.float64
    assert spiking.exact_dtype(200, 3.0, torch.int16) == torch.float64


def test_training_layers_round_and_pass_gradients() -> None:
    linear = nn.Linear(16, 4)
    layer = SpikeLinearTraining.of(linear, group_size=8)
    assert layer.weight is linear.weight
    x = torch.randn(5, 16, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, layer.frozen()(x.detach()), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    told = spiking.spiking(x.detach())
    torch.testing.assert_close(layer.weight.grad, told.sum(0).expand(4, 16), rtol=1e-5, atol=1e-5)
    assert x.grad is not None and bool(x.grad.abs().gt(0).all())


def test_groups_that_do_not_divide_are_refused_with_those_that_do() -> None:
    with pytest.raises(
        SpikingError, match=r"groups of 128 weights in rows of 576(.|\n)*9, 12, .* 64, .* 96, "
    ):
        spiking.quantise_weight(torch.randn(4, 576), 128)


def test_given_scales_keep_codes_beyond_a_byte() -> None:
    weight = torch.tensor([[1.0, -0.2, 0.1, 0.0]])
    codes, _ = spiking.quantise_weight(weight, scale=torch.tensor([[0.005]]))
    assert codes.dtype == torch.int16 and codes.tolist() == [[200, -40, 20, 0]]


# Conversion


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2)
        )
        self.head = nn.Linear(32, 50, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        y: torch.Tensor = self.head(x)
        return y


def test_a_model_spikes_but_for_its_head() -> None:
    model = Model()
    before = model(torch.arange(20))
    report = spiking.spike(model, k=8.0)
    assert [r.name for r in report.replaced] == ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"]
    assert list(report.kept) == ["head"] and "head" in str(report)
    assert isinstance(model.blocks[0][0], SpikeLinear) and isinstance(model.head, nn.Linear)
    after = model(torch.arange(20))
    assert 0 < (after - before).norm() / before.norm() < 0.1


def test_layers_are_chosen_by_name() -> None:
    model = Model()
    report = spiking.spike(model, only=["blocks.*.0"], skip=["blocks.1.*"])
    assert [r.name for r in report.replaced] == ["blocks.0.0"]
    with pytest.raises(SpikingError, match="no linear layer is called 'blok"):
        spiking.spike(Model(), only=["blok*"])
    whole = Model()
    assert len(spiking.spike(whole, head=True).replaced) == 5


def test_a_refused_conversion_changes_nothing() -> None:
    model = Model()
    with pytest.raises(SpikingError, match=r"groups of 48 (.|\n)*blocks.0.0"):
        spiking.spike(model, group_size=48)
    assert isinstance(model.blocks[0][0], nn.Linear)
    with torch.no_grad():
        model.blocks[1][2].weight[0, 0] = float("nan")
    with pytest.raises(SpikingError, match=r"NaN(.|\n)*blocks.1.2"):
        spiking.spike(model)
    assert isinstance(model.blocks[0][0], nn.Linear)


def test_calibration_tames_large_channels() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    sizes = torch.ones(64)
    sizes[:3] = 60.0  # what raises the threshold of all other channels

    @torch.no_grad()
    def error(calibration: list[torch.Tensor] | None) -> float:
        model = nn.Sequential(nn.Linear(64, 32))
        model[0].load_state_dict(linear.state_dict())
        spiking.spike(model, calibration=calibration)
        x = torch.randn(200, 64) * sizes
        return float((model(x) - linear(x)).norm() / linear(x).norm())

    assert error([torch.randn(100, 64) * sizes]) < 0.6 * error(None)
