"""Static thresholds and budgets: what they change in a layer, and what is refused."""

from __future__ import annotations

import pytest
import torch
from spike_models import Shared
from torch import nn

from spikingbrain.models import spiking
from spikingbrain.models.spiking import Budget, SpikeLinear, SpikingError


@pytest.fixture
def model() -> Shared:
    torch.manual_seed(0)
    return Shared()


def test_a_static_threshold_is_the_mean_of_the_adaptive_ones(model: Shared) -> None:
    x = torch.randn(5, 8)
    adaptive = spiking.threshold(x, 2.0)
    report = spiking.spike(model, 2.0, calibration=[x[:2], x[2:]], threshold="static")
    assert "thresholds fixed by calibration" in str(report)
    assert isinstance(model.a, SpikeLinear) and model.a.static_threshold is not None
    torch.testing.assert_close(model.a.static_threshold, adaptive.mean().view(1))
    counts, v = model.a.counts(x)
    torch.testing.assert_close(counts, torch.round(x / adaptive.mean()))
    assert v.shape == (1,)
    y = v * (counts @ (model.a.codes * model.a.scale).mT) + model.a.bias
    torch.testing.assert_close(model.a(x), y)


def test_static_thresholds_need_calibration_and_serve_inference(model: Shared) -> None:
    with pytest.raises(SpikingError, match="static thresholds without calibration"):
        spiking.spike(model, threshold="static")
    with pytest.raises(SpikingError, match="in training"):
        spiking.spike(model, threshold="static", calibration=[torch.randn(1, 8)], training=True)
    with pytest.raises(SpikingError, match=r"threshold 'fixed'\n  try: adaptive or static"):
        spiking.spike(model, threshold="fixed")


@pytest.mark.parametrize("coding", ["ternary", "bitwise_ternary", "twos_complement"])
def test_a_budget_saturates_or_changes_nothing(coding: str) -> None:
    linear, x = nn.Linear(16, 5), torch.randn(7, 16)
    free = SpikeLinear.of(linear, k=6.0)
    exact = SpikeLinear.of(linear, k=6.0, budget=Budget(2, coding))
    drop = SpikeLinear.of(linear, k=6.0, budget=Budget(2, coding, "drop"))
    torch.testing.assert_close(exact(x), free(x), rtol=0, atol=0)
    counts, v = free.counts(x)
    held, _ = drop.counts(x)
    train, rest = spiking.budget(counts, coding, 2)
    torch.testing.assert_close(held.long(), spiking.decode(train, coding))
    assert rest.any()
    torch.testing.assert_close(drop(x), v * (held @ (free.codes * free.scale).mT) + free.bias)


def test_budgets_that_hold_no_signed_count_are_refused() -> None:
    for coding, steps in (("binary", 3), ("bitwise", 3), ("ternary", 0), ("twos_complement", 1)):
        with pytest.raises(SpikingError, match="counts have both signs"):
            Budget(steps, coding)
    with pytest.raises(SpikingError, match="remainder 'lose'"):
        Budget(3, remainder="lose")
