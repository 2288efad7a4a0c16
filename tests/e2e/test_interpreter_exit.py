"""Results that a script still holds when it ends: no crash, and nothing on standard error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_COMPILED = """
import torch
x = torch.randn(8, 8)
with torch.no_grad():
    kept = torch.compile(lambda x: (x.sin() * x).exp().sum(-1), backend="spikingbrain")(x)
"""
_LOADED = """
import numpy as np, spikingbrain, sys
program = spikingbrain.load(sys.argv[1])
kept = program.main(np.ones((2, 3), np.float32))
"""


def ended(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=300
    )


def test_results_outlive_the_interpreter() -> None:
    done = ended(_COMPILED)
    assert (done.returncode, done.stderr) == (0, "")


def test_results_of_an_artifact_do(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import spikingbrain

    entry = spikingbrain.Entry((torch.ones(2, 3),))
    spikingbrain.export(torch.nn.Linear(3, 4), {"main": entry}, tmp_path / "linear.sbrain")
    done = ended(_LOADED, str(tmp_path / "linear.sbrain"))
    assert (done.returncode, done.stderr) == (0, "")
