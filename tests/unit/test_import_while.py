"""``torch.while_loop``: exported with all that its condition and body close over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch._higher_order_ops import while_loop

import spikingbrain
from spikingbrain.frontend.capture import Entry


class Powers(nn.Module):
    """Multiplies until a limit is passed; weight and limit are closed over."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.0, 1.5], [1.2, 0.1]]))

    def forward(self, x: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        def more(count: Tensor, x: Tensor) -> Tensor:
            return (x.abs().max() < limit) & (count < 50)

        def body(count: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return count + 1, x @ self.weight + limit * 0.01

        return while_loop(more, body, (torch.tensor(0), x))


def test_while_loop_closes_over_tensors(tmp_path: Path) -> None:
    model, x = Powers(), torch.tensor([[1.0, -0.5], [0.3, 0.2]])
    entry = Entry((x, torch.tensor(10.0)))
    program = spikingbrain.load(spikingbrain.export(model, {"main": entry}, tmp_path / "powers.sb"))
    for limit in (10.0, 100.0, 0.1):
        count, value = program.call("main", x.numpy(), np.float32(limit))
        with torch.no_grad():
            expected = model(x, torch.tensor(limit))
        assert int(count) == int(expected[0])
        np.testing.assert_allclose(value, expected[1].numpy(), rtol=1e-5)
