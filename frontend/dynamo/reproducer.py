"""Writes a difference that ``compare`` found as a folder that shows it without the model."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

from spikingbrain.code_cache import versions
from spikingbrain.frontend.dynamo.compare import Finding, Trial

_SCRIPT = '''"""{title}

Compiles module.mlir, runs it on the inputs in inputs.pt and compares with what torch computes. Exit code 0: the same,
1: different. README.txt says more.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import device, inf, nan  # noqa: F401  (names that the code below may use)

from spikingbrain.frontend.dynamo.compare import run_text
from spikingbrain.frontend.dynamo.tolerance import difference


def eager(self, {parameters}):
{body}


here = Path(__file__).resolve().parent
saved = torch.load(here / "inputs.pt")
weights = SimpleNamespace(**{{f"w{{i}}": w for i, w in enumerate(saved["weights"])}})
expected = eager(weights, *saved["inputs"])
text = (here / "module.mlir").read_text()
found = run_text(text, saved["inputs"], saved["weights"], {target!r}, {options!r})
told = [difference(a, e.contiguous()) for a, e in zip(found, expected, strict=True)]
for number, text in enumerate(told):
    print(f"result {{number}}: {{text or 'the same'}}")
sys.exit(int(any(told)))
'''

_README = """{finding}

repro.py      shows it: python repro.py
module.mlir   the region as the compiler's passes get it; spikingbrain opt runs them one by one
inputs.pt     its inputs and weights, for torch.load

target {target}, options {options}
{versions}
Python {python}, {machine}
"""


def write(finding: Finding, folder: Path) -> None:
    """Writes the reproducer of a finding that names an op."""
    trial = finding.region
    assert trial is not None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "module.mlir").write_text(trial.text)
    torch.save({"inputs": trial.inputs, "weights": trial.weights}, folder / "inputs.pt")
    parameters, body = _source(trial)
    title = f"{finding.op} differs from torch when compiled. Cause: {finding.step}."
    script = _SCRIPT.format(
        title=title, parameters=parameters, body=body, target=trial.target, options=trial.options
    )
    (folder / "repro.py").write_text(script)
    (folder / "README.txt").write_text(
        _README.format(
            finding=finding,
            target=trial.target,
            options=json.dumps(trial.options),
            versions=", ".join(f"{name} {version}" for name, version in versions().items()),
            python=platform.python_version(),
            machine=platform.platform(),
        )
    )


def _source(trial: Trial) -> tuple[str, str]:
    """Returns the parameters and the body of the Python function that FX writes for the region."""
    code = trial.graph.graph.python_code("self").src
    head, _, body = code.partition("\n    ")
    parameters = head.partition("forward(self, ")[2].rpartition(")")[0]
    return parameters, "    " + body.rstrip()
