"""What the CPU of this machine can do, in LLVM's feature names."""

from __future__ import annotations

import functools
import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ARCHITECTURES = {
    "x86_64": "x86-64",
    "AMD64": "x86-64",
    "aarch64": "aarch64",
    "arm64": "aarch64",
    "riscv64": "riscv64",
}

# The levels of the x86-64 psABI, in LLVM's names, as far as generated code depends on them.
X86_64_V3 = frozenset({"avx", "avx2", "fma", "f16c", "sse3", "ssse3", "sse4.1", "sse4.2"})
X86_64_V4 = X86_64_V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@functools.cache
def architecture() -> str:
    """Returns this machine's instruction set, e.g. ``"x86-64"``."""
    machine = platform.machine()
    return ARCHITECTURES.get(machine, machine)


@functools.cache
def features() -> frozenset[str]:
    """Returns the extensions this CPU supports, as IREE's own detection reports them."""
    found = tool("iree-cpuinfo")
    if found is None:
        return frozenset()
    lines = subprocess.run([found], capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = (line.split() for line in lines)
    return frozenset(pair[0] for pair in pairs if len(pair) == 2 and pair[1] == "1")


def tool(name: str) -> str | None:
    """Returns the path of one of IREE's command line tools, or None.

    Taken from inside the packages where it is there: the commands beside Python are scripts that start Python again.
    """
    for package, folder in (("iree.compiler", "_mlir_libs"), ("iree.runtime", "../_runtime_libs")):
        spec = importlib.util.find_spec(package) if importlib.util.find_spec("iree") else None
        if spec and spec.origin and (native := Path(spec.origin).parent / folder / name).exists():
            return str(native.resolve())
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


def vector_bits(arch: str, enabled: frozenset[str]) -> tuple[int, int]:
    """Returns the width and number of vector registers that generated kernels may use (0, 0: none)."""
    if arch == "x86-64":
        if enabled >= X86_64_V4:
            return 512, 32
        return (256, 16) if {"avx2", "fma"} <= enabled else (128, 16)
    return (128, 32) if arch == "aarch64" else (0, 0)
