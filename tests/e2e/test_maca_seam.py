"""One model, two backends: the same contract, stages and artifact serve MetaX (on the emulator) and the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import spikingbrain


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(40, 72), nn.Linear(72, 9, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.up(x))) + 1


@pytest.mark.parametrize("target", ["cpu", "maca-emulator"])
def test_the_same_export_runs_on_both_backends(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(2, 5, 40)
    length = torch.export.Dim("T", min=1, max=64)
    entry = spikingbrain.Entry((x,), dynamic_shapes={"x": {1: length}})
    spikingbrain.export(model, {"main": entry}, tmp_path / "gated.sbrain", target=target)
    program = spikingbrain.load(tmp_path / "gated.sbrain")
    for steps in (1, 5, 13):
        x = torch.randn(2, steps, 40)
        np.testing.assert_allclose(program.main(x.numpy()), model(x).detach().numpy(), atol=1e-6)


def test_code_for_the_card_is_source_that_the_emulator_runs(tmp_path: Path) -> None:
    model, x = Gated(), torch.randn(1, 1, 40)
    artifact = spikingbrain.export(
        model, {"main": spikingbrain.Entry((x,))}, tmp_path / "gated.sbrain", target="maca"
    )
    assert b'extern "C" __global__' in bytes(artifact.code["kernels.maca"])
    if not {s.target.name: s for s in spikingbrain.targets()}["maca"].runs:
        with pytest.raises(spikingbrain.errors.WrongTarget, match="try: --device maca-emulator"):
            spikingbrain.load(artifact)
    program = spikingbrain.load(artifact, device="maca-emulator")
    np.testing.assert_allclose(program.main(x.numpy()), model(x).detach().numpy(), atol=1e-6)
