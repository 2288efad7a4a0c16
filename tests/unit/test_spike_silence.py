"""Silent channels: how many there are, telling compilers, and putting them together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spikingbrain.models import spiking
from spikingbrain.models.spiking import SpikeLinear, SpikingError, measure_silence, order_channels


class MLP(nn.Module):
    """A feed-forward block of squared ReLU, most of whose hidden channels are silent; gated if asked."""

    def __init__(self, gated: bool = False, inputs: int = 64, hidden: int = 512) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(inputs, hidden), nn.Linear(hidden, inputs)
        self.gate = nn.Linear(inputs, hidden) if gated else None
        with torch.no_grad():
            self.up.bias -= torch.linspace(0, 2, hidden)[torch.randperm(hidden)]

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x)).square()
        return self.down(hidden if self.gate is None else hidden * self.gate(x))


def test_the_share_of_silent_channels_is_measured() -> None:
    torch.manual_seed(0)
    model, x = MLP(), torch.randn(3, 20, 64)
    spiking.spike(model)
    found = measure_silence(model, [x, (x[:1],)])
    counts = model.down.counts(torch.relu(model.up(torch.cat([x, x[:1]]))).square())[0]
    assert found["down"] == pytest.approx(float((counts == 0).double().mean()), abs=1e-12)
    assert 0.6 < found["down"] < 1 and found["up"] < 0.2
    assert model.down.silent == found["down"]


def test_padding_says_nothing() -> None:
    layer = SpikeLinear.of(nn.Linear(32, 8))
    x = torch.randn(10, 32)
    alone = measure_silence(layer, [x])
    assert measure_silence(layer, [torch.cat([x, torch.zeros(90, 32)])]) == alone


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(SpikingError, match="no layer of the model spikes"):
        measure_silence(nn.Linear(4, 4), [torch.randn(2, 4)])
    with pytest.raises(SpikingError, match="reached"):
        measure_silence(SpikeLinear.of(nn.Linear(4, 4)), [])
    layer = SpikeLinear.of(nn.Linear(4, 4))
    layer.silent = 1.5
    with pytest.raises(SpikingError, match=r"silent = 1.5\n.*it is a share"):
        layer(torch.randn(2, 4))


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "gated"])
@pytest.mark.parametrize("spikes", [False, True], ids=["float", "spiking"])
def test_channels_in_another_order_compute_the_same(gated: bool, spikes: bool) -> None:
    torch.manual_seed(1)
    model, texts = MLP(gated), [torch.randn(40, 64) for _ in range(3)]
    if spikes:
        spiking.spike(model, group_size=None, calibration=texts if gated else None)
    x = torch.randn(50, 64)
    with torch.no_grad():
        before, first_row = model(x), model.up(x)
    found = order_channels(model, texts, {"down": ["up", "gate"] if gated else "up"})["down"]
    assert not torch.equal(found.order, torch.arange(512))
    with torch.no_grad():
        torch.testing.assert_close(model.up(x), first_row[:, found.order], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert found.after[32] > found.before[32] + 0.05
    assert found.after[32] >= found.after[64] >= found.after[128]


def test_orders_that_would_change_the_result_are_refused() -> None:
    class Mixes(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)).cumsum(-1))

    model, x = Mixes(), torch.randn(9, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(SpikingError, match=r"not made channel by channel by up\n.*down"):
        order_channels(model, [x], {"down": "up"})
    with pytest.raises(SpikingError, match="no linear layer is called 'above'"):
        order_channels(model, [x], {"down": "above"})
    with pytest.raises(SpikingError, match="down has 64 outputs, the layer 512 inputs"):
        order_channels(model, [x], {"down": "down"})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    spiking.spike(model, group_size=64)
    with pytest.raises(SpikingError, match="8 groups of channels"):
        order_channels(model, [x], {"down": "up"})
