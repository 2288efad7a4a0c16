"""docs/torch-compile.md: its options are the backend's, and its code runs."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

from spikingbrain.frontend.dynamo.options import CompileOptions

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "torch-compile.md").read_text()


def test_the_table_of_options() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \| .+ \|$", PAGE, re.M)
    usual = dataclasses.asdict(CompileOptions())
    shown = [(name, repr(value).replace("'", '"')) for name, value in usual.items()]
    assert rows == shown


def test_the_code(tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ops compiled (" in done.stdout
