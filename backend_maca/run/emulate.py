"""Kernels on the emulated machine: compiled by the system's C++ compiler, launched by name, checked as they run.

``emulator/`` has the machine, which is compiled once, and the header that stands in for the SDK's. Kernels are compiled
with a call before each load and store, so that the machine sees accesses outside buffers, races and unwritten memory.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spikingbrain.artifact import cache_folder
from spikingbrain.backend_maca.emulator_flags import COMMON_FLAGS, KERNEL_FLAGS, MACHINE_FLAGS
from spikingbrain.backend_maca.plan.resolve import MAX_GRID
from spikingbrain.errors import CallError, MissingDependency, SpikingBrainError

HEADERS = Path(__file__).parents[1] / "emulator"
MACHINE = HEADERS / "sb_machine.cpp"
ORDERS = ("forward", "reverse", "shuffled")
POISON = np.uint16(0xFFCD)  # not-a-number in f32, f16 and bf16: what memory holds before a kernel writes it

_one_launch_at_a_time = threading.Lock()  # a library emulates one machine

Array = np.ndarray[Any, Any]


class KernelFault(SpikingBrainError):
    """Raised when the emulator catches a kernel breaking a rule of the machine."""


class KernelBuildError(SpikingBrainError):
    """Raised when the C++ compiler refuses generated kernels."""


class _Extent(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("bytes", ctypes.c_uint64))


def compiler() -> str:
    """Returns the C++ compiler's command."""
    return os.environ.get("CXX") or "g++"


@functools.lru_cache(maxsize=4)
def _version(command: str) -> str:
    try:
        return subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def compiler_version() -> str:
    """Returns the compiler's own description of itself, empty when there is none."""
    return _version(compiler())


def _registers_filled(version: str) -> list[str]:
    """Returns the flag that fills a thread's own arrays with a large number first, for compilers that know it."""
    found = re.search(r"(clang version|\)) (\d+)\.", version)
    known = found and int(found[2]) >= (8 if found[1].startswith("clang") else 12)
    return ["-ftrivial-auto-var-init=pattern"] if known else []


def poison(memory: Array) -> None:
    """Fills contiguous memory with what unwritten memory holds."""
    flat = memory.reshape(-1).view(np.uint8)
    flat[: flat.size // 2 * 2].view(np.uint16)[:] = POISON
    flat[flat.size // 2 * 2 :] = POISON & 0xFF


def build(source: str, kernels: Sequence[str], flags: Sequence[str] = ()) -> Path:
    """Compiles kernels for the emulator into a cached shared library; ``kernels`` can be launched."""
    version = compiler_version()
    if not version:
        raise MissingDependency(
            f"the C++ compiler '{compiler()}' is needed to run kernels on the emulator",
            hint="install g++, or name another compiler in CXX",
        )
    text = source + "\n" + "".join(f"SB_LAUNCHER({name})\n" for name in kernels)
    files = [p.read_text() for p in sorted(HEADERS.iterdir()) if p.is_file()]
    flags = [*_registers_filled(version), *flags]
    parts = [version, *COMMON_FLAGS, *KERNEL_FLAGS, *flags, text, *files]
    library = cache_folder() / "maca" / (hashlib.sha256("\0".join(parts).encode()).hexdigest() + ".so")
    if _is_whole(library):
        return library
    try:
        _build(text, library, _build_machine(version, files, flags), flags)
    except OSError as error:
        raise KernelBuildError(
            "the compiled kernels have no place",
            why=str(error),
            hint="SPIKINGBRAIN_CACHE names another folder",
        ) from error
    return library


def _build(text: str, library: Path, machine: Path, flags: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        (Path(folder) / "kernels.maca").write_text(text)
        arguments = [*COMMON_FLAGS, *KERNEL_FLAGS, *flags, f"-I{HEADERS}", "-x", "c++", "-c", "kernels.maca"]
        _compile([*arguments, "-o", "kernels.o"], folder)
        _compile(["-shared", "kernels.o", str(machine), "-lm", "-o", "kernels.so"], folder)
        os.replace(Path(folder) / "kernels.so", library)


def _build_machine(version: str, files: Sequence[str], flags: Sequence[str]) -> Path:
    """Compiles the machine, once for all kernels."""
    parts = [version, *COMMON_FLAGS, *MACHINE_FLAGS, *flags, *files]
    machine = cache_folder() / "maca" / (hashlib.sha256("\0".join(parts).encode()).hexdigest() + ".o")
    machine.parent.mkdir(parents=True, exist_ok=True)
    if not _is_whole(machine):
        with tempfile.TemporaryDirectory(dir=machine.parent) as folder:
            _compile([*COMMON_FLAGS, *MACHINE_FLAGS, *flags, "-c", str(MACHINE), "-o", "machine.o"], folder)
            os.replace(Path(folder) / "machine.o", machine)
    return machine


def _is_whole(file: Path) -> bool:
    """Returns whether an object file is there to its end; to load one that is cut short kills the process."""
    if not sys.platform.startswith("linux"):  # objects have another form there
        return file.exists()
    try:
        with file.open("rb") as opened:
            head, size = opened.read(64), file.stat().st_size
        (start,), (each, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    except (OSError, struct.error):
        return False
    return head[:4] == b"\x7fELF" and size >= int(start) + int(each) * int(
        count
    )  # the table of sections is last


def _compile(arguments: Sequence[str], folder: str) -> None:
    done = subprocess.run([compiler(), *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise KernelBuildError("the generated kernels do not compile", why=done.stderr.strip()[:2000])


class Kernels:
    """Compiled kernels, launched by name."""

    def __init__(self, library: Path, order: str = "forward"):
        if order not in ORDERS:
            raise CallError(f"unknown thread order {order!r}", hint=f"one of {', '.join(ORDERS)}")
        self.path, self.order = library, order
        self.library = ctypes.CDLL(str(library))

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        arguments: Sequence[Any],
    ) -> None:
        """Runs a kernel. Raises KernelFault.

        Arguments are numpy arrays, whose memory is all that the kernel may touch, and ctypes values. With pointers
        among these, accesses to global memory are not checked.
        """
        if not all(0 < size <= MAX_GRID for size in grid) or np.prod(grid) > MAX_GRID:
            raise CallError(f"kernel '{name}' cannot be launched", why=f"grid {list(grid)} is out of range")
        run = getattr(self.library, f"sb_launch_{name}")
        run.restype = ctypes.c_char_p
        arrays = [a for a in arguments if isinstance(a, np.ndarray)]
        if any(isinstance(a, ctypes.c_void_p) for a in arguments):
            arrays = []
        extents = (_Extent * max(1, len(arrays)))(*(_Extent(a.ctypes.data, a.nbytes) for a in arrays))
        values = [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        sizes = [(ctypes.c_uint * 3)(*three) for three in (grid, block)]
        with _one_launch_at_a_time:
            self.library.sb_buffers(extents, ctypes.c_uint(len(arrays)))
            fault = run(*sizes, ctypes.c_uint(shared_bytes), addresses, ORDERS.index(self.order))
        if fault:
            why = re.sub(
                r"\{pc (0x[0-9a-f]+)\}",
                lambda found: self._line(int(found[1], 16)),
                fault.decode(errors="replace"),
            )
            raise KernelFault(f"kernel '{name}' breaks a rule of the machine", why=why)

    def _line(self, address: int) -> str:
        """Returns the line of the source that a return address belongs to, where binutils can tell."""
        anchor = ctypes.cast(self.library.sb_buffers, ctypes.c_void_p).value or 0
        try:
            names = _tool(["nm", "-D", str(self.path)])
            start = int(next(n.split()[0] for n in names.splitlines() if n.endswith(" sb_buffers")), 16)
            offset = address - 1 - anchor + start
            found = _tool(["addr2line", "-e", str(self.path), hex(offset)])
        except (OSError, subprocess.CalledProcessError):
            return "a line"
        number = re.search(r":(\d+)", found)
        return f"line {number[1]}" if number else "a line"


def _tool(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
