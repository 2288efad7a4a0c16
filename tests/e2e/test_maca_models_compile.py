"""All kernels of a small SpikingBrain are taken by the public device compilers; the report shows what each needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import spikingbrain
from spikingbrain.backend_maca.toolchains import TOOLCHAINS
from spikingbrain.models.spikingbrain import SpikingBrain, tiny_7b
from spikingbrain.tools import cli


@pytest.mark.slow
def test_all_kernels_of_a_model_compile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    installed = [toolchain.arch for toolchain in TOOLCHAINS if toolchain.command()]
    if not installed:
        pytest.skip("neither nvcc nor clang is installed")
    torch.manual_seed(0)
    model = SpikingBrain(tiny_7b()).eval()
    tokens, state = torch.zeros(1, 5, dtype=torch.int64), model.initial_state(1, 16)
    length = torch.export.Dim("T", min=1, max=64)
    entries = {
        "prefill": spikingbrain.Entry((tokens, state), {"last_only": True}, {"tokens_BT": {1: length}}),
        "decode": spikingbrain.Entry((tokens[:, :1], state), {"last_only": True}),
    }
    path = tmp_path / "tiny.sbrain"
    artifact = spikingbrain.export(
        model, entries, path, state="state", target="maca", options={"resources": True}
    )
    source = bytes(artifact.code["kernels.maca"]).decode()
    assert cli.main(["report", str(path), "--kernels"]) == 0
    heading, _, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == installed
    assert len(rows) == source.count("__global__")
    for row in rows:
        assert re.fullmatch(rf"\w+( +\d+){{{3 * len(installed)}}}", row), row
        numbers = [int(word) for word in row.split()[1:]]
        assert all(0 < registers <= 256 for registers in numbers[::3])
        assert all(shared <= 48 << 10 for shared in numbers[2::3])
