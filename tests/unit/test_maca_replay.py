"""Launches that tests kept, run again on a pretended card: equal, different, faulty, hanging; a whole day with a card."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pretended_card import NVCC, Runtime

from spikingbrain.backend_maca.run import emulate, probe, replay
from spikingbrain.backend_maca.run.launches import Launches, Writer

pytestmark = pytest.mark.skipif(shutil.which(emulate.compiler()) is None, reason="no C++ compiler")

HEAD = "#include <mc_runtime.h>\n#include <stdint.h>\n"
KERNEL = """
extern "C" __global__ void __launch_bounds__(64)
{name}(const float* __restrict__ x, float* __restrict__ y, int64_t n) {{
  {body}
}}
"""
TIMES = "y[threadIdx.x] = x[threadIdx.x] * (float)n;"
SOURCES = [
    HEAD + KERNEL.format(name="times", body=TIMES),
    HEAD + KERNEL.format(name="beyond", body="y[threadIdx.x + n * 100000] = 1.0f;"),
    HEAD + KERNEL.format(name="forever", body="for (volatile int64_t i = 0; i < n; i = i * 1) {}"),
    HEAD + KERNEL.format(name="misspelt", body="y[0] = nonsense;"),
    HEAD + KERNEL.format(name="last", body=TIMES),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A machine with NVIDIA's driver and nvcc, as far as a process can tell."""
    folder = tmp_path_factory.mktemp("nvidia")
    Runtime(folder, "libcuda.so.1", "-DCUDA")
    (folder / "nvcc").write_text(NVCC)
    (folder / "nvcc").chmod(0o755)
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "SPIKINGBRAIN_CACHE": str(folder / "cache"),
    }


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of each source, in a file; what they should leave is written by hand."""
    return write(tmp_path_factory.mktemp("kept") / "launches.zip", range(len(SOURCES)))


def write(path: Path, sources: Iterable[int]) -> Path:
    writer = Writer(path)
    for i in sources:
        source = SOURCES[i]
        x, y, n = np.arange(64, dtype=np.float32), np.zeros(64, np.float32), ctypes.c_int64(3)
        after = [x, x * (3 if i != 4 else 4), n]  # of the last a wrong result is expected
        kernel = source.partition("(64)\n")[2].partition("(")[0]
        writer.add(source, kernel, (1, 1, 1), 64, 0, [x, y, n], after, f"test_{i}.py::test")
    writer.close()
    return path


def run(environment: dict[str, str], *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", replay.__name__, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_each_launch_has_its_outcome(environment: dict[str, str], kept: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    done = run(environment, kept, "--device", "maca-cuda", "--patience", "3", "-o", output)
    assert done.returncode == 1, done.stderr
    found = json.loads(output.read_text())
    assert found["counts"] == {"equal": 1, "failed": 3, "different": 1}
    assert (found["done"], found["all"], found["not_run"]) == (5, 5, [])
    why = {outcome["kernel"]: outcome["why"] for outcome in found["bad"]}
    assert set(why) == {"beyond", "forever", "misspelt", "last"}
    assert "writes 4 bytes outside all buffers" in why["beyond"]
    assert why["forever"] == "no answer in 3 s"
    assert "nonsense" in why["misspelt"]
    assert why["last"] == "argument 1, float32 [64]: 2.5e-01 of the largest entry"
    assert "failed: forever of test_2.py::test: no answer in 3 s" in done.stdout


def test_what_there_was_no_time_for_is_told(environment: dict[str, str], kept: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    assert run(environment, kept, "--device", "maca-cuda", "--seconds", "0", "-o", output).returncode == 0
    found = json.loads(output.read_text())
    assert (found["done"], len(found["not_run"])) == (0, 5)
    done = run(environment, kept, "--device", "maca-cuda", "--after", "4", "-o", output)
    assert "5 of 5 launches on maca-cuda: 1 different" in done.stdout


def test_a_machine_without_a_card_says_so_in_one_line(kept: Path) -> None:
    done = run({**os.environ, "LD_LIBRARY_PATH": ""}, kept, "--device", "maca-cuda")
    assert done.returncode == 2
    assert done.stderr.startswith("the runtime libcuda.so.1 does not load")


@pytest.mark.slow
def test_tests_run_on_a_card_and_keep_what_they_launch(environment: dict[str, str], tmp_path: Path) -> None:
    name = f"{Path(__file__).with_name('test_maca.py')}::test_short_rows_stay_in_one_thread"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name]
    command += ["--card", "maca-cuda", "--keep-launches", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (file,) = tmp_path.glob("*.zip")
    assert Launches([file])[0].test.endswith("test_short_rows_stay_in_one_thread")
    assert "1 equal" in run(environment, file, "--device", "maca-emulator").stdout


@pytest.mark.parametrize(
    ("found", "wanted", "error"),
    [
        (np.float32([1, 2]), np.float32([1, 4]), 0.5),
        (np.float32([np.nan, 2]), np.float32([np.nan, 2]), 0.0),
        (np.float32([np.nan, 2]), np.float32([1, 2]), float("inf")),
        (np.float32([1, 2]), np.float32([np.inf, 2]), float("inf")),
        (np.int32([1, 2]), np.int32([1, 3]), float("inf")),
        (np.uint16([0x3F80, 0x4000]), np.uint16([0x3F80, 0x4080]), 0.5),
    ],
)
def test_differences(found: Any, wanted: Any, error: float) -> None:
    assert replay.difference(found, wanted) == error


# benchmarks/on_a_card.py

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "on_a_card.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("carried")
    write(folder / "launches" / "launches.zip", (0, 4))
    return folder


def run_all(environment: dict[str, str], *words: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "run", *map(str, words)]
    environment = {**environment, "CUDA_VISIBLE_DEVICES": "", "SPIKINGBRAIN_PATIENCE": "2"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_what_a_card_does_is_told_in_numbers_and_on_a_page(
    environment: dict[str, str],
    folder: Path,
    tmp_path: Path,
) -> None:
    done = run_all(environment, folder, "-o", tmp_path, "--minutes", "0.7")
    assert done.returncode == 1, done.stderr
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert (steps["probe"]["card"], steps["probe"]["bad"]) == ("pretended card", [])
    assert len(steps["probe"]["found"]) == len(probe.PROBES)
    assert steps["model"]["models"] == {}
    assert steps["launches"]["counts"]["equal"] == 1
    assert "nothing is measured: this benchmark needs a GPU" in steps["triton"]["note"]
    page = (tmp_path / "page.html").read_text()
    for text in ("pretended card: 9 of 9 probes pass", "different: last of test_4.py::test"):
        assert text in page
    again = run_all(environment, folder, "-o", tmp_path / "more", "--minutes", "0.7", "--after", tmp_path)
    found = json.loads((tmp_path / "more" / "results.json").read_text())
    assert found["steps"]["launches"]["counts"] == {}, again.stderr  # all were run before
    assert found["earlier"]["steps"]["launches"]["counts"]["equal"] == 1


def test_without_a_card_there_is_one_line(folder: Path, tmp_path: Path) -> None:
    done = run_all({**os.environ, "LD_LIBRARY_PATH": ""}, folder, "-o", tmp_path)
    assert done.returncode == 2
    (line,) = done.stdout.splitlines()
    assert line.startswith("nothing was run: this needs a card; the runtime libcuda.so.1 does not load")


def test_what_there_was_no_time_for_is_said(folder: Path, tmp_path: Path) -> None:
    assert run_all(dict(os.environ), folder, "-o", tmp_path, "--minutes", "0.1").returncode == 1
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert {found["note"] for found in steps.values()} == {"no time was left"}
