"""Runs generated kernels on the emulator: compiles them with the system's C++ compiler, follows the plan."""

from __future__ import annotations

import base64
import ctypes
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from spikingbrain.backend_maca import dlpack, library
from spikingbrain.backend_maca.emulate import Kernels, build, poison
from spikingbrain.backend_maca.plan import FORMAT, evaluate
from spikingbrain.errors import CallError, CorruptArtifact, NewerFormat

ALIGNMENT = 16  # bytes: where kernels may assume that buffers begin
HOST = "host memory"  # the one device there is

Array = np.ndarray[Any, Any]


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

    @property
    def device(self) -> Any:
        """Returns what all programs share: they work on the memory of the process."""
        return HOST

    def borrow(self, capsule: Any) -> Array:
        """Returns a buffer over a DLPack capsule's memory; raises ValueError where the tensor has gaps."""
        return dlpack.borrow(capsule)

    def lend(self, buffer: Array) -> Any:
        """Returns a DLPack capsule over a buffer's memory."""
        return dlpack.lend(buffer)

    def function(self, entry: str) -> Callable[[Sequence[Array]], list[Array]]:
        """Returns an entry point as a function."""
        return functools.partial(self.call, entry)

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
        for i, record in enumerate(plan["buffers"]):
            if record["role"] == "temporary":
                buffers[i] = _unwritten(record, [evaluate(s, shapes) for s in record["shape"]])
        for launch in plan["launches"]:
            if "library" in launch:
                operands = [buffers[a["buffer"]] for a in launch["arguments"]]
                library.multiply(launch, operands, lambda size: evaluate(size, shapes))
            else:
                self._launch(launch, buffers, shapes)
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
            buffers[a["buffer"]] if "buffer" in a else ctypes.c_int64(evaluate(a["value"], shapes))
            for a in launch["arguments"]
        ]
        self.kernels.launch(
            launch["kernel"], grid, (kernel["threads"], 1, 1), kernel["dynamic_bytes"], arguments
        )

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
    """Returns the array, contiguous and aligned, when it has the declared type and shape; raises CallError otherwise."""
    if not isinstance(array, np.ndarray):
        raise CallError(f"{what} is a {type(array).__name__}", hint="pass a numpy array")
    wanted = [size if isinstance(size, int) else "?" for size in record["shape"]]
    fits = len(wanted) == array.ndim and all(w in ("?", n) for w, n in zip(wanted, array.shape, strict=True))
    if not fits:
        raise CallError(f"{what} has shape {list(array.shape)}, declared {wanted}")
    if str(array.dtype) != record["dtype"] and array.dtype != _storage(record["dtype"]):
        raise CallError(f"{what} is {array.dtype}, declared {record['dtype']}")
    array = np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis
    return array if array.ctypes.data % ALIGNMENT == 0 else array.copy()


def _unwritten(record: Mapping[str, Any], shape: Sequence[int]) -> Array:
    """Returns a buffer that no kernel has written yet."""
    array = np.empty(shape, _storage(record["dtype"]))
    poison(array)
    return array
