"""Who provides matrix products on MetaX GPUs changes the steps of a program, not its results."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torch_mlir")

import spikingbrain
from spikingbrain.backend_maca.run.emulate import compiler
from spikingbrain.tools import cli

needs_cxx = pytest.mark.skipif(shutil.which(compiler()) is None, reason="no C++ compiler")


class Model(torch.nn.Module):
    """A projection with a sum, and products of two values."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(20, 40, bias=False)
        self.down = torch.nn.Linear(40, 20, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.down(torch.relu(self.up(x)))
        return (y @ x.transpose(-1, -2)) @ y


@needs_cxx
def test_providers_change_the_steps_and_not_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model, rows = Model().eval(), torch.export.Dim("rows", min=1, max=64)
    for providers, calls in (("", 4), ("linear=own", 2)):
        path = tmp_path / f"{calls}.sbrain"
        entry = spikingbrain.Entry((torch.zeros(8, 20),), dynamic_shapes={"x": {0: rows}})
        options = {"providers": providers}
        spikingbrain.export(model, {"main": entry}, path, target="maca-emulator", options=options)
        program = spikingbrain.load(path)
        for count in (1, 16, 17, 40):
            x = np.random.default_rng(count).standard_normal((count, 20), dtype=np.float32)
            with torch.no_grad():
                want = model(torch.from_numpy(x)).numpy()
            np.testing.assert_allclose(program.main(x), want, rtol=2e-5, atol=2e-4)
        assert cli.main(["report", str(path)]) == 0
        assert re.search(rf"  main: \d+ own, {calls} mcblas\n", capsys.readouterr().out)
