"""Runs generated kernels on the emulator: compiles them with the system's C++ compiler, follows the plan."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spikingbrain.artifact import cache_folder
from spikingbrain.backend_maca.plan import FORMAT, evaluate
from spikingbrain.errors import CallError, CorruptArtifact, MissingDependency, NewerFormat, SpikingBrainError

HEADERS = Path(__file__).parent / "emulator"
FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fvisibility=hidden",  # each library has an emulator of its own
    "-fwrapv",
    "-fno-strict-aliasing",
    "-w",
)
ORDERS = ("forward", "reverse", "shuffled")
MAX_GRID = (1 << 31) - 1
POISON = 0xCD  # what memory holds before a kernel writes it
GUARD_BYTES = 64  # poisoned memory around every buffer that kernels write

_one_launch_at_a_time = threading.Lock()  # a library emulates one machine

Array = np.ndarray[Any, Any]


class KernelFault(SpikingBrainError):
    """Raised when the emulator catches a kernel breaking a rule of the machine."""


class KernelBuildError(SpikingBrainError):
    """Raised when the C++ compiler refuses generated kernels."""


def compiler() -> str:
    """Returns the C++ compiler's command."""
    return os.environ.get("CXX", "g++")


def compiler_version() -> str:
    """Returns the compiler's own description of itself, empty when there is none."""
    try:
        return subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def build(source: str, kernels: Sequence[str], flags: Sequence[str] = ()) -> Path:
    """Compiles kernels for the emulator into a cached shared library; ``kernels`` can be launched."""
    version = compiler_version()
    if not version:
        raise MissingDependency(
            f"the C++ compiler '{compiler()}' is needed to run kernels on the emulator",
            hint="install g++, or name another compiler in CXX",
        )
    text = source + "\n" + "".join(f"SB_LAUNCHER({name})\n" for name in kernels)
    parts = [version, *FLAGS, *flags, text, *(p.read_text() for p in sorted(HEADERS.glob("*.h")))]
    library = cache_folder() / "maca" / (hashlib.sha256("\0".join(parts).encode()).hexdigest() + ".so")
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            (Path(folder) / "kernels.maca").write_text(text)
            command = [
                compiler(),
                *FLAGS,
                *flags,
                f"-I{HEADERS}",
                "-x",
                "c++",
                "kernels.maca",
                "-o",
                "kernels.so",
            ]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise KernelBuildError("the generated kernels do not compile", why=done.stderr.strip()[:2000])
            os.replace(Path(folder) / "kernels.so", library)
    return library


class Kernels:
    """Compiled kernels, launched by name."""

    def __init__(self, library: Path, order: str = "forward"):
        if order not in ORDERS:
            raise CallError(f"unknown thread order {order!r}", hint=f"one of {', '.join(ORDERS)}")
        self.library, self.order = ctypes.CDLL(str(library)), order

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        arguments: Sequence[Any],
    ) -> None:
        """Runs a kernel; arguments are ctypes values, passed by address. Raises KernelFault."""
        if not all(0 < size <= MAX_GRID for size in grid) or np.prod(grid) > MAX_GRID:
            raise CallError(f"kernel '{name}' cannot be launched", why=f"grid {list(grid)} is out of range")
        run = getattr(self.library, f"sb_launch_{name}")
        run.restype = ctypes.c_char_p
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        sizes = [(ctypes.c_uint * 3)(*three) for three in (grid, block)]
        with _one_launch_at_a_time:
            fault = run(*sizes, ctypes.c_uint(shared_bytes), addresses, ORDERS.index(self.order))
        if fault:
            raise KernelFault(f"kernel '{name}' breaks a rule of the machine", why=fault.decode())


class Program:
    """Kernels with their plan and weights: the ``Executable`` of this backend. Buffers are numpy arrays."""

    def __init__(self, source: str, plan: Mapping[str, Any], weights: Mapping[str, Array], order: str = ""):
        if plan.get("format", FORMAT + 1) > FORMAT:
            raise NewerFormat(
                "the launch plan is of a later format", why=f"this package reads up to {FORMAT}"
            )
        self.plan, self.weights = plan, weights
        order = order or os.environ.get("SPIKINGBRAIN_EMULATOR_ORDER", "forward")
        self.kernels = Kernels(build(source, sorted(plan["kernels"])), order)
        self.fixed = {name: self._fixed_buffers(entry) for name, entry in plan["entries"].items()}

    def to_device(self, array: Array) -> Array:
        """Copies a host array into a buffer."""
        return np.array(array, order="C", copy=True)

    def to_host(self, buffer: Array) -> Array:
        """Copies a buffer to the host."""
        return np.array(buffer, copy=True)

    def call(self, entry: str, arguments: Sequence[Array]) -> list[Array]:
        """Runs an entry point; the sizes of all arguments are checked first."""
        if entry not in self.plan["entries"]:
            raise CallError(f"no entry point '{entry}'", hint=f"one of {', '.join(self.plan['entries'])}")
        plan = self.plan["entries"][entry]
        inputs = [i for i, b in enumerate(plan["buffers"]) if b["role"] == "input"]
        if len(arguments) != len(inputs):
            raise CallError(f"'{entry}' takes {len(inputs)} arguments, got {len(arguments)}")
        shapes = {i: np.shape(a) for i, a in zip(inputs, arguments, strict=True)}
        buffers = dict(self.fixed[entry])
        for position, (i, array) in enumerate(zip(inputs, arguments, strict=True)):
            buffers[i] = _checked(array, plan["buffers"][i], shapes, f"argument {position} of '{entry}'")
        for formula, message in plan["checks"]:
            if not evaluate(formula, shapes):
                raise CallError(f"arguments of '{entry}' do not fit together", why=message)
        guards: list[Array] = []
        for i, record in enumerate(plan["buffers"]):
            if record["role"] == "temporary":
                buffers[i], memory = _guarded(record, [evaluate(s, shapes) for s in record["shape"]])
                guards.append(memory)
        for launch in plan["launches"]:
            self._launch(launch, buffers, shapes)
            if any((m[:GUARD_BYTES] != POISON).any() or (m[-GUARD_BYTES:] != POISON).any() for m in guards):
                raise KernelFault(f"kernel '{launch['kernel']}' writes outside its buffers")
        return [
            buffers[o["buffer"]].reshape([evaluate(s, shapes) for s in o["shape"]]) for o in plan["outputs"]
        ]

    def _launch(
        self, launch: Mapping[str, Any], buffers: Mapping[int, Array], shapes: Mapping[int, Any]
    ) -> None:
        grid = [evaluate(size, shapes) for size in launch["grid"]]
        if 0 in grid:
            return
        kernel = self.plan["kernels"][launch["kernel"]]
        arguments = [
            ctypes.c_void_p(buffers[a["buffer"]].ctypes.data)
            if "buffer" in a
            else ctypes.c_int64(evaluate(a["value"], shapes))
            for a in launch["arguments"]
        ]
        # static shared memory is part of the kernel, so no dynamic bytes are asked for
        self.kernels.launch(launch["kernel"], grid, (kernel["threads"], 1, 1), 0, arguments)

    def _fixed_buffers(self, entry: Mapping[str, Any]) -> dict[int, Array]:
        """Returns the buffers that no call changes: weights, as they are mapped, and constants."""
        fixed: dict[int, Array] = {}
        for i, record in enumerate(entry["buffers"]):
            if record["role"] == "weight":
                if record["key"] not in self.weights:
                    raise CorruptArtifact(f"the weight '{record['key']}' is missing")
                fixed[i] = _checked(self.weights[record["key"]], record, {}, f"weight '{record['key']}'")
            elif record["role"] == "constant":
                values = np.frombuffer(base64.b64decode(record["data"]), _storage(record["dtype"]))
                shape = record["shape"]  # a single value stands for all
                fixed[i] = np.full(shape, values[0]) if values.size == 1 else values.reshape(shape)
        return fixed


def _storage(dtype: str) -> np.dtype[Any]:
    """Returns the numpy type that holds a dtype; bfloat16 travels as its 16 bits."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def _checked(array: Array, record: Mapping[str, Any], shapes: Mapping[int, Any], what: str) -> Array:
    """Returns the array when it has the declared type and shape, contiguous; raises CallError otherwise."""
    if not isinstance(array, np.ndarray):
        raise CallError(f"{what} is a {type(array).__name__}", hint="pass a numpy array")
    wanted = [size if isinstance(size, int) else "?" for size in record["shape"]]
    fits = len(wanted) == array.ndim and all(w in ("?", n) for w, n in zip(wanted, array.shape, strict=True))
    if not fits:
        raise CallError(f"{what} has shape {list(array.shape)}, declared {wanted}")
    if str(array.dtype) != record["dtype"] and array.dtype != _storage(record["dtype"]):
        raise CallError(f"{what} is {array.dtype}, declared {record['dtype']}")
    return np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis


def _guarded(record: Mapping[str, Any], shape: Sequence[int]) -> tuple[Array, Array]:
    """Returns a poisoned buffer, and the memory it lies in with guards on both sides."""
    kind = _storage(record["dtype"])
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    memory = np.full(size + 2 * GUARD_BYTES, POISON, np.uint8)
    return memory[GUARD_BYTES : GUARD_BYTES + size].view(kind).reshape(shape), memory
