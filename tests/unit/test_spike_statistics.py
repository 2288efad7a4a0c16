"""Statistics of spikes, and the weight blocks that silent channels save."""

from __future__ import annotations

import json

import pytest
import torch
from spike_models import Shared, seen
from torch import Tensor

from spikingbrain.models import spiking
from spikingbrain.models.spiking import Budget, SpikingError
from spikingbrain.models.spiking.blocks import skipped, skipped_in_all
from spikingbrain.models.spiking.observe import LayerCounts, observe_counts
from spikingbrain.models.spiking.statistics import Statistics, statistics, total


@pytest.fixture
def model() -> Shared:
    torch.manual_seed(0)
    return Shared()


def test_statistics_are_exact() -> None:
    found = statistics(seen([[0, 1, -2, 3], [0, 0, 7, -17]], outputs=10))
    assert (found.tokens, found.channels, found.values, found.largest) == (2, 4, 8, 17)
    assert found.histogram == {-17: 1, -2: 1, 0: 3, 1: 1, 3: 1, 7: 1}
    assert found.spikes == {
        "binary": 30,
        "ternary": 30,
        "bitwise": 1 + 1 + 2 + 3 + 2,
        "bitwise_ternary": 1 + 1 + 2 + 3 + 2,
        "twos_complement": 1 + 5 + 2 + 3 + 5,  # -2 = 111110, -17 = 101111
    }
    assert found.steps == dict(zip(spiking.CODINGS, (17, 17, 5, 5, 6), strict=True))
    assert (found.share(0, 0), found.share(0, 7), found.share(17), found.share(128)) == (
        3 / 8,
        7 / 8,
        1 / 8,
        0,
    )
    assert found.sparsity == {
        "silent": 3 / 8,
        "needed_steps": 1 - 9 / 40,
        "window": 1 - (1 + 1 + 2 + 3 + 3) / 24,
    }
    assert (found.operations, found.multiplications) == (90, 80)
    assert found.energy == pytest.approx({"spikes": 45 * 0.03, "int8": 40 * 0.23, "fp16": 40 * 1.5})


@pytest.mark.parametrize("coding", spiking.CODINGS)
def test_spikes_are_those_of_the_train(coding: str) -> None:
    counts = torch.randint(-40, 41, (6, 9))
    told = counts.abs() if coding in ("binary", "bitwise") else counts
    train = spiking.encode(told, coding)
    found = statistics(seen(counts.tolist()))
    assert found.spikes[coding] == int(train.abs().sum())
    assert found.pairs[coding] == train.numel()


def test_the_total_lets_each_input_have_its_own_steps() -> None:
    small, large = statistics(seen([[1, 0]], outputs=3)), statistics(seen([[8, 0, 0, -1]], outputs=5))
    whole = total([small, large])
    assert whole.sparsity["needed_steps"] == 1 - 3 / (2 * 1 + 4 * 4)
    assert (whole.operations, whole.multiplications) == (3 + 10, 6 + 20)
    assert whole.histogram == {-1: 1, 0: 3, 1: 1, 8: 1} and whole.steps["bitwise_ternary"] == 4
    assert json.loads(json.dumps(whole.to_json()))["sizes"] == {"0": 3, "1": 2, "8": 1}


def test_a_silent_input_has_statistics() -> None:
    found = statistics(seen([[0, 0]]))
    assert found.largest == 0 and found.spikes_per_value() == 0
    assert found.sparsity == {"silent": 1, "needed_steps": 1, "window": 1}


def test_counts_are_observed_once_for_layers_that_share_them(model: Shared) -> None:
    spiking.spike(model, 3.0)
    x = torch.randn(2, 5, 8)
    shared, single = observe_counts(model, [x[:1], x[1:]])
    assert (shared.layers, shared.outputs, single.layers, single.outputs) == (("b", "a"), 10, ("c",), 3)
    counts, v = spiking.spike_counts(x.flatten(0, 1), 3.0)
    torch.testing.assert_close(shared.counts, counts.to(torch.int16))
    torch.testing.assert_close(shared.thresholds, v.flatten())
    assert single.counts.shape == (10, 6)


def test_layers_that_count_differently_share_nothing(model: Shared) -> None:
    spiking.spike(model, 3.0, only=["a"])
    spiking.spike(model, 2.0, only=["b"])
    assert [s.layers for s in observe_counts(model, [torch.randn(4, 8)])] == [("b",), ("a",)]


def test_what_a_budget_does_not_hold_is_counted(model: Shared) -> None:
    x = torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, -10.0]])
    (free, *_) = observe_counts_of(model, x, None)
    (exact, *_) = observe_counts_of(model, x, Budget(3))
    (drop, *_) = observe_counts_of(model, x, Budget(3, remainder="drop"))
    largest = int(free.counts.abs().max())
    assert largest > 7 and (free.beyond, exact.beyond, drop.beyond) == (0, 1, 1)
    assert exact.beyond_size == drop.beyond_size == largest - 7
    assert (int(exact.counts.min()), int(exact.held().min()), int(drop.counts.min())) == (-largest, -7, -7)


def observe_counts_of(model: Shared, x: Tensor, budget: Budget | None) -> list[LayerCounts]:
    copy = Shared()
    copy.load_state_dict(model.state_dict())
    spiking.spike(copy, 3.0, budget=budget)
    return observe_counts(copy, [x])


def test_models_without_spikes_are_refused(model: Shared) -> None:
    with pytest.raises(SpikingError, match="no layer of the model spikes"):
        observe_counts(model, [torch.randn(1, 8)])
    spiking.spike(model)
    with pytest.raises(SpikingError, match="no spiking layer was reached"):
        observe_counts(model, [])
    with pytest.raises(SpikingError, match=r"NaN or infinite\n  at: b"):
        observe_counts(model, [torch.full((1, 8), float("nan"))])


def test_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(SpikingError, match="no tokens"):
        statistics(LayerCounts(("layer",), 1, torch.zeros(0, 4, dtype=torch.int16), torch.zeros(0)))
    assert isinstance(total([statistics(seen([[1]]))]), Statistics)


# Weight blocks


def test_blocks_are_skipped_when_all_their_channels_are_silent() -> None:
    counts = torch.zeros(4, 80, dtype=torch.int16)
    counts[:, ::2] = 1  # every other channel fires: no block of two is silent, half of all are once ordered
    found = skipped(seen(counts.tolist(), outputs=3), 32)
    assert (found.blocks, found.as_is, found.ordered) == (2 * 3 * 3, 0, 2 * 3 * 1)
    assert skipped(seen(counts.tolist()), 2).as_is == 0
    assert skipped(seen(counts.tolist()), 2).ordered == 2 * 20
    counts[3] = 0  # a silent token needs no weights
    assert skipped(seen(counts.tolist()), 32).as_is == 3


def test_the_order_comes_from_other_tokens() -> None:
    counts = torch.zeros(2, 64)
    counts[0, :32], counts[1, ::2] = 1, 1
    (found,) = skipped_in_all([seen(counts.long().tolist())], [32])
    assert (found.blocks, found.as_is, found.ordered) == (2, 0, 0)
    with pytest.raises(SpikingError, match="from one token"):
        skipped(seen([[1]]), 32)
