"""Torch's own tools for debugging, with this backend: its log settings and its minifier."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WAVE = """
import torch
torch.compile(lambda x: (x.tanh() * 2 + 1).exp(), backend="spikingbrain")(torch.ones(3))
"""

# Makes what holds a tanh wrong, in every process that imports it.
FAULT = """
import torch
from spikingbrain.frontend.dynamo import backend

compile_graph = backend.compile_graph


def faulty(module, kind, options):
    for node in module.graph.nodes:
        if node.target == torch.ops.aten.tanh.default:
            node.target = torch.ops.aten.sigmoid.default
    return compile_graph(module, kind, options)


backend.compile_graph = faulty
"""
MODEL = """
import fault, torch

def model(x):
    return ((x.sin() + 1).tanh() * 3).exp().sum(1) + x.cos().relu().mean(1)

torch.compile(model, backend="spikingbrain")(torch.randn(4, 8))
"""
LAUNCH = "import fault, runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"


def run(code: str, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(folder),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "torch"),
            **environment,
        },
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["spikingbrain", "+spikingbrain"])
def test_torch_logs(setting: str, tmp_path: Path) -> None:
    done = run(WAVE, tmp_path, TORCH_LOGS=setting)
    assert done.returncode == 0, done.stderr
    assert "ops compiled in 1 regions, 0 left" in done.stderr


@pytest.mark.slow
def test_the_minifier(tmp_path: Path) -> None:
    (tmp_path / "fault.py").write_text(FAULT)
    done = run(MODEL, tmp_path, TORCHDYNAMO_REPRO_AFTER="dynamo", TORCHDYNAMO_REPRO_LEVEL="4")
    assert "Bad accuracy detected" in done.stderr, done.stderr
    (launcher,) = tmp_path.rglob("minifier_launcher.py")
    done = run(LAUNCH, tmp_path, str(launcher))
    assert done.returncode == 0, done.stderr
    reproducer = (tmp_path / "repro.py").read_text()
    body = reproducer.partition("def forward")[2].partition("return")[0]
    assert ".tanh()" in body
    assert ".exp()" not in body and ".cos()" not in body and ".sin()" not in body
    assert "backend='spikingbrain'" in reproducer
