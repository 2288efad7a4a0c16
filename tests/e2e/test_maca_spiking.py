"""A spiking model on the MetaX emulator and on the CPU: the same bits, with fewer launches than projections."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import spikingbrain
from spikingbrain.artifact import REPORT
from spikingbrain.backend_maca.run import emulate
from spikingbrain.models.spikingbrain import SpikingBrain, tiny_7b


class Gated(nn.Module):
    """A feed-forward layer of numbers that both targets compute exactly, apart from what is tested."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((40, 70), (40, 70), (70, 33)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.gate(x)) * self.up(x))


@pytest.mark.skipif(shutil.which(emulate.compiler()) is None, reason="no C++ compiler")
def test_integers_are_those_of_the_cpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Gated().eval()
    spikingbrain.spike(model, k=3, group_size=None)
    length = torch.export.Dim("T", min=1, max=64)
    entry = spikingbrain.Entry((torch.randn(2, 5, 40),), dynamic_shapes={"x": {1: length}})
    programs = {}
    for target in ("maca-emulator", "cpu"):
        artifact = spikingbrain.export(model, {"main": entry}, tmp_path / f"{target}.sbrain", target=target)
        programs[target] = spikingbrain.load(tmp_path / f"{target}.sbrain")
        if target == "maca-emulator":
            (plan,) = json.loads(bytes(artifact.code["plan.json"]))["entries"].values()
            kernels = [step["kernel"].split("_k")[0] for step in plan["launches"]]
            # for few rows, which are encoded where they are multiplied, and for more
            assert kernels.count("spike_encode") == 2
            assert [name for name in kernels if name.startswith("spike_linear")] == [
                "spike_linear_i8_l128"
            ] * 4
    for steps in (1, 3, 17):
        x = torch.randn(2, steps, 40)
        x[0, 0, 3] = 200  # a count beyond a byte
        ours, cpu = (program.main(x.numpy()) for program in programs.values())
        np.testing.assert_array_equal(ours, cpu)
        np.testing.assert_allclose(ours, model(x).detach().numpy(), atol=1e-4)


def test_a_spiking_layer_takes_as_few_launches_as_one_of_floats(tmp_path: Path) -> None:
    """Four layers of six launches at most, though groups of 80 channels share a scale; three more for all of them."""
    torch.manual_seed(0)
    model = SpikingBrain(tiny_7b()).eval()
    spikingbrain.spike(model)
    entry = spikingbrain.Entry(
        (torch.zeros(1, 1, dtype=torch.int64), model.initial_state(1, 16)), {"last_only": True}
    )
    artifact = spikingbrain.export(
        model, {"decode": entry}, tmp_path / "spikes.sbrain", state="state", target="maca"
    )
    figures = json.loads(bytes(artifact.member(REPORT)))["one_token"]["decode"]
    assert figures["launches"] <= 27
    assert figures["bytes"] <= 1.15 * figures["least"]
