"""Random models with fixed seeds through the backend, and proof that the harness would notice.

All of it runs in processes of its own: those fork, which a process that has used torch's threads cannot do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
MODELS = 6  # of a change; all tests together try more
WITH_RELU = 14  # a seed whose relu reaches an output, in forward and in backward


def call(program: str, *args: str, hash_seed: str = "0") -> tuple[int, str]:
    """Returns the exit status, and what was printed."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / program), *args],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.gate), MODELS, 2 * MODELS, 3 * MODELS])
def test_random_models_agree_with_eager(seed: int) -> None:
    numbers = ["--seed", str(seed), "--count", str(MODELS)]
    status, output = call("run.py", "--backend", "spikingbrain", *numbers, "--timeout", "300")
    assert status == 0, output
    summary = output.splitlines()[-1]
    assert summary.startswith(f"{MODELS} models"), output
    # Neither may grow unnoticed into what makes the run worthless.
    for kind, most in {"invalid": 1, "unstable": 5}.items():
        count = int(summary.split(f" {kind}")[0].split()[-1])
        assert count <= most, summary


@pytest.mark.slow
@pytest.mark.gate
def test_a_seed_makes_the_same_model_in_every_process() -> None:
    first = call("generate.py", "3", "8", hash_seed="1")
    assert first[0] == 0 and "torch.ops.aten" in first[1], first[1]
    assert first == call("generate.py", "3", "8", hash_seed="2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "found", "timeout"),
    [("relu_crashes", "1 abort", 60), ("relu_raises", "1 error", 60), ("hangs", "Timeout", 5)],
)
def test_a_seeded_failure_is_recorded(backend: str, found: str, timeout: int) -> None:
    seed = ["--seed", str(WITH_RELU), "--count", "1"]
    status, output = call("run.py", "--backend", f"seeded_bug:{backend}", *seed, "--timeout", str(timeout))
    assert status == 1 and found in output, output


@pytest.mark.slow
@pytest.mark.gate
def test_a_seeded_bug_is_found_and_minimised(tmp_path: Path) -> None:
    wrong = ["--backend", "seeded_bug:relu_is_identity"]
    status, output = call("run.py", *wrong, "--seed", str(WITH_RELU), "--count", "1", "--out", str(tmp_path))
    assert status == 1 and f"1 wrong ({WITH_RELU})" in output, output

    small = tmp_path / "small.py"
    status, output = call("minimise.py", *wrong, "--seed", str(WITH_RELU), "--out", str(small))
    assert status == 0 and small.read_text().count("torch.ops.aten") == 1, output
    assert "torch.ops.aten.relu.default" in small.read_text()

    saved = [str(small), str(tmp_path / f"seed_{WITH_RELU}.py")]
    status, output = call("run.py", *wrong, "--files", *saved)
    assert status == 1 and "2 wrong" in output, output
    status, output = call("run.py", "--backend", "eager", "--files", *saved)
    assert status == 0 and "2 passed" in output, output


@pytest.mark.slow
def test_only_what_moves_in_eager_is_unstable() -> None:
    for name, kind in {"rounds_differently": "unstable", "rounds_wrongly": "wrong"}.items():
        status, output = call(
            "run.py", "--backend", f"seeded_bug:{name}", "--files", str(FOLDER / "fragile.py")
        )
        assert f"1 {kind} (fragile)" in output and status == (kind == "wrong"), output
