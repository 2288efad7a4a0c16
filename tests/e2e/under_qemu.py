"""Runs IREE modules of AArch64 on another machine, under qemu."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from spikingbrain import artifact
from spikingbrain.code_cache import versions


def aarch64_runner(folder: Path) -> list[str]:
    """Returns the command that runs IREE modules of AArch64 under emulation, or skips."""
    emulator, libraries = shutil.which("qemu-aarch64-static"), Path("/usr/aarch64-linux-gnu")
    if emulator is None or not (libraries / "lib/libstdc++.so.6").exists():
        pytest.skip("needs qemu-user-static, libc6-arm64-cross and libstdc++6-arm64-cross")
    version = versions()["iree-base-compiler"]
    wanted = ["--platform", "manylinux_2_28_aarch64", "--only-binary=:all:", "--no-deps"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "0", "--timeout", "10"]
    try:
        command = [*pip, *wanted, "-d", str(folder), f"iree-base-runtime=={version}"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip("the IREE runtime for AArch64 cannot be downloaded here")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        runner = content.extract("iree/_runtime_libs/iree-run-module", folder)
    Path(runner).chmod(0o755)
    return [emulator, "-L", str(libraries), runner]


def call(
    runner: Sequence[str], folder: Path, entry: str, arguments: Sequence[np.ndarray], results: int
) -> list[np.ndarray]:
    """Calls an entry of the artifact that is unpacked in ``folder``; returns its results."""
    outputs = [folder / f"result{i}.npy" for i in range(results)]
    for i, array in enumerate(arguments):
        np.save(folder / f"argument{i}.npy", array)
    command = [
        *runner,
        "--device=local-sync",
        f"--module={folder / 'code/module.vmfb'}",
        f"--parameters=model={folder / artifact.WEIGHTS}",
        f"--function={entry}",
        *(f"--input=@{folder / f'argument{i}.npy'}" for i in range(len(arguments))),
        *(f"--output=@{path}" for path in outputs),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    return [np.load(path) for path in outputs]
