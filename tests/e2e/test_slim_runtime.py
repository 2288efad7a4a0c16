"""An artifact runs where there is no torch: in an environment that holds the slim installation only."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import spikingbrain

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.gate]  # it installs packages

THERE = """
import importlib.util, sys
import numpy as np
import spikingbrain

for name in ("torch", "torch_mlir", "iree.compiler", "networkx"):
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    assert found is None, f"{name} is installed"

path, inputs, results, saved = sys.argv[1:]
program = spikingbrain.load(path, verify=True)
given = np.load(inputs)
state = program.new_state(batch=2)
outputs = [program.step(given[name], state=state) for name in sorted(given)]
state.save(saved)
np.savez(results, *outputs, **{"state_" + k: v for k, v in state.snapshot().items()})

try:
    spikingbrain.export(None, {}, "never")
except ImportError as error:
    print(error)
"""


class Running(nn.Module):
    """Returns each projected token less the mean of all tokens up to the end of this call."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 40), nn.Linear(40, 8)

    def forward(
        self, x: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        y = self.down(torch.relu(self.up(x)))
        total, count = state["total"] + y.sum(1), state["count"] + x.shape[1]
        return y - (total / count[:, None])[:, None], {"total": total, "count": count}


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs a C++ compiler")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files behind
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "tests", "__pycache__"))
    run(*PIP, "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, source)
    return next(folder.glob("spikingbrain-*.whl"))


@pytest.fixture(scope="module")
def slim_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with ``spikingbrain[iree]`` from a wheel."""
    folder = tmp_path_factory.mktemp("slim")
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder / "environment")
    python = folder / "environment" / "bin" / "python"
    run(*PIP, "--python", python, "install", "--quiet", f"{wheel}[iree]")
    return python


@pytest.fixture(scope="module")
def oldest_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with ``spikingbrain`` alone: of Python 3.10 where that is installed."""
    folder = tmp_path_factory.mktemp("oldest")
    run(_python_3_10() or sys.executable, "-m", "venv", "--without-pip", folder)
    run(*PIP, "--python", folder / "bin" / "python", "install", "--quiet", wheel)
    return folder / "bin" / "python"


def _python_3_10() -> Path | None:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which("python3.10"), *pyenv.glob("3.10.*/bin/python")]
    for candidate in filter(None, candidates):
        done = subprocess.run(
            [candidate, "-c", "import sys, ctypes; print(sys.version)"], capture_output=True, text=True
        )
        if done.stdout.startswith("3.10."):  # a launcher of pyenv's may be there without it
            return Path(candidate)
    return None


def test_an_artifact_runs_without_torch(slim_python: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Running().eval()
    batch, length = Dim("B", min=1, max=8), Dim("T", min=1, max=64)
    state = {"total": torch.zeros(2, 8), "count": torch.zeros(2, dtype=torch.int64)}
    entry = spikingbrain.Entry(
        (torch.randn(2, 5, 8), state), dynamic_shapes={"x": {0: batch, 1: length}, "state": {0: batch}}
    )
    path = tmp_path / "running.sbrain"
    spikingbrain.export(model, {"step": entry}, path, state="state")

    inputs = {f"x{i}": torch.randn(2, length, 8).numpy() for i, length in enumerate((9, 1, 30))}
    np.savez(tmp_path / "inputs.npz", **inputs)
    environment = {**os.environ, "SPIKINGBRAIN_CACHE": str(tmp_path / "cache")}
    files = [path, tmp_path / "inputs.npz", tmp_path / "results.npz", tmp_path / "saved.safetensors"]
    output = run(slim_python, "-I", "-c", THERE, *files, env=environment, cwd=tmp_path)

    results = np.load(tmp_path / "results.npz")
    here = spikingbrain.load(path)
    own = here.new_state(batch=2)
    for i, x in enumerate(inputs.values()):
        with torch.no_grad():
            expected, state = model(torch.from_numpy(x), state)
        np.testing.assert_allclose(results[f"arr_{i}"], expected.numpy(), atol=1e-5)
        np.testing.assert_array_equal(
            results[f"arr_{i}"], here.step(x, state=own)
        )  # the same code, the same bits
    np.testing.assert_allclose(results["state_total"], state["total"].numpy(), atol=1e-4)
    np.testing.assert_array_equal(results["state_count"], [40, 40])
    own.load(files[-1])
    np.testing.assert_array_equal(own.snapshot()["total"], results["state_total"])
    assert "pip install 'spikingbrain[compile]'" in output


ON_A_CARD = """
import importlib.util, sys
import numpy as np
import spikingbrain

path, inputs, results, version = sys.argv[1:]
torch_is_there = importlib.util.find_spec("torch") is not None
assert torch_is_there == (version != "none"), "torch is there against expectation, or is not"
for name in ("torch_mlir", "iree"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed"
given = dict(np.load(inputs))
if torch_is_there:
    import torch

    assert torch.__version__.split("+")[0] == version, torch.__version__
    given = {name: torch.from_numpy(x) for name, x in given.items()}
program = spikingbrain.load(path, device="maca-emulator")
state = program.new_state(batch=2)
np.savez(results, *(program.step(given[name], state=state) for name in sorted(given)), **state.snapshot())
"""


@pytest.fixture(scope="module")
def python_with_torch_2_6(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Like ``oldest_python``, with the oldest torch that a vendor's stack brings; 5 GB, with its GPU libraries."""
    folder = tmp_path_factory.mktemp("torch-2.6")
    run(_python_3_10() or sys.executable, "-m", "venv", "--without-pip", folder)
    install = [*PIP, "--python", folder / "bin" / "python", "install", "--quiet", "--no-cache-dir"]
    run(*install, wheel)
    done = subprocess.run([*install, "torch==2.6.0"], capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"torch 2.6 cannot be installed here: {done.stderr[-300:]}")
    yield folder / "bin" / "python"
    shutil.rmtree(folder)


@needs_a_compiler
def test_code_for_a_card_runs_on_the_emulator_with_numpy_alone(oldest_python: Path, tmp_path: Path) -> None:
    _code_for_a_card_runs(oldest_python, "none", tmp_path)


@needs_a_compiler
@pytest.mark.skipif("CI" not in os.environ, reason="installs 5 GB; runs where CI is set")
def test_code_for_a_card_runs_beside_torch_2_6(python_with_torch_2_6: Path, tmp_path: Path) -> None:
    _code_for_a_card_runs(python_with_torch_2_6, "2.6.0", tmp_path)


def _code_for_a_card_runs(python: Path, torch_version: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Running().eval()
    batch, length = Dim("B", min=1, max=8), Dim("T", min=1, max=64)
    state = {"total": torch.zeros(2, 8), "count": torch.zeros(2, dtype=torch.int64)}
    shapes = {"x": {0: batch, 1: length}, "state": {0: batch}}
    entry = spikingbrain.Entry((torch.randn(2, 5, 8), state), dynamic_shapes=shapes)
    path = tmp_path / "running.sbrain"
    spikingbrain.export(model, {"step": entry}, path, state="state", target="maca,cpu")
    inputs = {f"x{i}": torch.randn(2, length, 8).numpy() for i, length in enumerate((9, 1))}
    np.savez(tmp_path / "inputs.npz", **inputs)
    environment = {**os.environ, "SPIKINGBRAIN_CACHE": str(tmp_path / "cache")}
    files = [path, tmp_path / "inputs.npz", tmp_path / "results.npz"]
    run(python, "-I", "-c", ON_A_CARD, *files, torch_version, env=environment, cwd=tmp_path)
    results, here = np.load(files[-1]), spikingbrain.load(path, device="maca-emulator")
    own = here.new_state(batch=2)
    for i, x in enumerate(inputs.values()):
        np.testing.assert_array_equal(results[f"arr_{i}"], here.step(x, state=own))
    np.testing.assert_array_equal(results["count"], [10, 10])


def test_the_command_works_without_torch(slim_python: Path) -> None:
    command = slim_python.with_name("spikingbrain")
    listing = run(command, "targets")
    assert "pip install 'spikingbrain[compile]'" in listing
    assert re.search(r"^maca +gpu +maca +no .*compiling needs torch-mlir", listing, re.M)
    for arguments in (["opt", "--list"], ["run", "smollm2", "Once"], ["compile", "smollm2", "-o", "never"]):
        refused = subprocess.run([command, *arguments], capture_output=True, text=True)
        assert refused.returncode == 1
        assert "\nerror: compiling needs " in "\n" + refused.stderr
        assert refused.stderr.endswith("try: pip install 'spikingbrain[compile]'\n")
