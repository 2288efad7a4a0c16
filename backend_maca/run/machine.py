"""What a launch plan runs on: memory and launches. Here the emulator; ``device.py`` has the cards."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, Protocol

import numpy as np

from spikingbrain.backend_maca.plan.steps import Product, Steps
from spikingbrain.backend_maca.run import dlpack, library
from spikingbrain.backend_maca.run.emulate import Kernels, build, poison
from spikingbrain.errors import OutOfMemory

_CHOICES: dict[str, Callable[[Sequence[int]], int]] = {  # of the steps that may run next
    "forward": min,
    "reverse": max,
    "shuffled": Random(0).choice,
}
ALIGNMENT = 16  # bytes: where kernels may assume that buffers begin
Array = np.ndarray[Any, Any]
Buffer = Any  # memory of a machine with ``shape``, ``dtype`` and ``reshape``, as a numpy array has them


class Machine(Protocol):
    """Runs the steps of a plan."""

    hint: str  # what to pass as an argument
    spread: int  # how far apart buffers of one workspace lie, in their own sizes

    @property
    def buffer_type(self) -> type:
        """Returns the class of this machine's buffers."""
        ...

    @property
    def device(self) -> Any:
        """Returns what programs that may share buffers have in common."""
        ...

    def to_device(self, array: Array) -> Buffer:
        """Copies a host array into a new buffer."""
        ...

    def to_host(self, buffer: Buffer) -> Array:
        """Copies a buffer to the host."""
        ...

    def borrow(self, capsule: Any) -> Buffer:
        """Returns a buffer over a DLPack capsule's memory; raises ValueError where it cannot be used."""
        ...

    def lend(self, buffer: Buffer) -> Any:
        """Returns a DLPack capsule over a buffer's memory."""
        ...

    def keep(self, array: Array) -> Buffer:
        """Returns a buffer with what no call changes; memory that the machine can read is not copied."""
        ...

    def argument(self, buffer: Buffer) -> Buffer:
        """Returns an argument as kernels need it: contiguous and aligned."""
        ...

    def unwritten(self, dtype: np.dtype[Any], shape: Sequence[int]) -> Buffer:
        """Returns memory that no kernel has written yet."""
        ...

    def part(self, buffer: Buffer, offset: int, dtype: np.dtype[Any], shape: Sequence[int]) -> Buffer:
        """Returns a part of a buffer, from a byte on, as an array; the memory lives as long as the part."""
        ...

    def span(self, buffer: Buffer) -> tuple[int, int]:
        """Returns where a contiguous buffer begins and ends in memory."""
        ...

    def run(self, steps: Steps, buffers: Mapping[int, Buffer]) -> None:
        """Runs the steps as their streams say, after all that was run before."""
        ...


class Emulator:
    """The checking emulator: buffers are numpy arrays in the memory of the process.

    The order of threads is that of streams, too: among the steps that may run next, ``forward`` takes the first,
    ``reverse`` the last, ``shuffled`` any.
    """

    buffer_type = np.ndarray
    hint = "pass a numpy array"
    spread = 2  # behind each buffer lies as much memory that is nobody's: what runs into it is caught
    device = "host memory"

    def __init__(self, source: str, kernels: Sequence[str], order: str):
        self.kernels = Kernels(build(source, kernels), order)

    def to_device(self, array: Array) -> Array:
        return np.array(array, order="C", copy=True)

    def to_host(self, buffer: Array) -> Array:
        return np.array(buffer, copy=True)

    def borrow(self, capsule: Any) -> Array:
        return dlpack.borrow(capsule)

    def lend(self, buffer: Array) -> Any:
        return dlpack.lend(buffer)

    def keep(self, array: Array) -> Array:
        return self.argument(array)

    def argument(self, buffer: Array) -> Array:
        array = np.asarray(buffer, order="C")  # ascontiguousarray would give a scalar an axis
        return array if array.ctypes.data % ALIGNMENT == 0 else array.copy()

    def unwritten(self, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
        try:
            array = np.empty(shape, dtype)
        except MemoryError as error:
            raise OutOfMemory("this machine has not enough memory", why=str(error)) from error
        poison(array)
        return array

    def part(self, buffer: Array, offset: int, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return buffer.reshape(-1).view(np.uint8)[offset : offset + size].view(dtype).reshape(shape)

    def span(self, buffer: Array) -> tuple[int, int]:
        start = buffer.ctypes.data
        return start, start + buffer.nbytes

    def run(self, steps: Steps, buffers: Mapping[int, Array]) -> None:
        numbers = steps.order.run(_CHOICES[self.kernels.order]) if steps.order else range(len(steps.steps))
        for number in numbers:
            step = steps.steps[number]
            for i in steps.born.get(number, ()):
                poison(buffers[i])  # another buffer may have lain here
            if isinstance(step, Product):
                library.multiply(step.step, [buffers[i] for i in step.buffers], int)
                continue
            arguments = [ctypes.c_int64(v or 0) if i is None else buffers[i] for i, v in step.arguments]
            self.kernels.launch(step.kernel, step.grid, (step.threads, 1, 1), step.shared_bytes, arguments)
