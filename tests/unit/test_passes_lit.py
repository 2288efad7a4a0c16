"""Runs the IR tests under tests/passes with lit, one pytest test for each file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lit")
pytest.importorskip("filecheck")
pytest.importorskip("torch_mlir")

from spikingbrain.passes import pipeline

FOLDER = Path(__file__).parents[1] / "passes"
FILES = sorted(FOLDER.glob("*.mlir"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_ir(file: Path, tmp_path: Path) -> None:
    lit = "from lit.main import main; main()"  # lit.main does nothing when run as a module
    command = [sys.executable, "-c", lit, "-v", "--param", f"exec_root={tmp_path}", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "PASS: " in done.stdout, done.stdout + done.stderr


def test_every_pass_has_a_file() -> None:
    assert set(pipeline.PASSES) <= {f.stem for f in FILES}
