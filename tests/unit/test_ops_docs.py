"""docs/recurrence-ops.md: its code runs, and its signatures are the ops'."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

from spikingbrain.frontend.ops import substitutions

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "recurrence-ops.md").read_text()


def test_the_code(tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 100, 4, 64]) torch.Size([2, 4, 32, 64])" in done.stdout


def test_the_signatures() -> None:
    signatures = dict(re.findall(r"^`(\w+)\(([^)]*)\) -> ", PAGE, re.M))
    assert set(signatures) == {"linear_recurrence", "linear_scan", "selective_scan"}
    for name, arguments in signatures.items():
        assert list(inspect.signature(getattr(substitutions, name)).parameters) == arguments.split(", ")
