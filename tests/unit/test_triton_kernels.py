"""Triton kernels against plain references, by Triton's interpreter: forward and backward, odd sizes, extremes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

# Errors relative to the largest value: of float32 sums, and of operands rounded to 8 or 11 bits.
BOUNDS = {
    "bfloat16": 1e-2,
    "attention in bfloat16": 1e-2,
    "delta rule in bfloat16": 2e-2,
    "float16": 2e-3,
    "elements in float16": 1e-3,
}
CASES = """
no decay/no decay, exclusive, one step/no steps/one step, gates of keys
one step, gates of heads, extreme/gates of heads, extreme/gates of heads, exclusive
gates of keys, extreme/gates of keys, exclusive/bfloat16/float16
delta rule/delta rule, one step/delta rule, gates of heads, extreme/delta rule, gates of keys/delta rule in bfloat16
elements, factors of any sign/elements, logarithms, backwards/elements in float16
causal/window and sinks, later queries/many sinks/one query/no queries/attention in bfloat16
positions, window and sinks/positions, queries that see nothing/positions, one query
bytes/bytes, weights turned/counts outside int8/groups/clamped thresholds/clamped thresholds: large/no rows
other settings: gates of heads/other settings: gates of keys/other settings: one step/other settings: delta rule
other settings: elements/other settings: attention/other settings: bytes
"""


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    script = Path(__file__).with_name("triton_interpreted.py")
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made: dict[str, dict[str, float]] = json.loads(done.stdout)
    return made


NAMES = [name for line in CASES.strip().splitlines() for name in line.split("/")]


def test_every_case_is_judged(found: dict[str, dict[str, float]]) -> None:
    assert sorted(found) == sorted(NAMES)


@pytest.mark.parametrize("case", NAMES)
def test_kernel(case: str, found: dict[str, dict[str, float]]) -> None:
    errors = found[case]
    empty = case.startswith("no ") and case.split()[1] in ("queries", "rows")
    assert errors or empty
    wrong = {
        name: e
        for name, e in errors.items()
        if e > (0 if name in ("different", "NaN") else BOUNDS.get(case, 2e-6))
    }
    assert not wrong, errors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no GPU")
def test_kernels_on_a_gpu() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "triton_kernels.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
