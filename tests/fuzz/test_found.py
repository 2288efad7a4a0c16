"""What fuzzing found, minimised, is run for good.

``python tests/fuzz/minimise.py --seed N --out tests/fuzz/found/<name>.py`` adds a model; the name says what was wrong.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("saved", sorted(FOLDER.glob("found/*.py")), ids=lambda saved: saved.stem)
def test_agrees_with_eager(saved: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--backend", "spikingbrain", "--files", str(saved)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
