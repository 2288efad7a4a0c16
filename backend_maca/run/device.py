"""A card as the machine of a launch plan: memory, launches, recorded sequences, and what it shares with torch."""

from __future__ import annotations

import heapq
import logging
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from spikingbrain.backend_maca.plan.plan import every_step
from spikingbrain.backend_maca.plan.steps import Launch, Product, Steps
from spikingbrain.backend_maca.run import dlpack
from spikingbrain.backend_maca.run.blas import Blas
from spikingbrain.backend_maca.run.driver import DeviceError, Driver, blas_library, open_driver
from spikingbrain.backend_maca.run.images import convention, image_of
from spikingbrain.backend_maca.run.machine import ALIGNMENT
from spikingbrain.backend_maca.run.streams import streams_of
from spikingbrain.errors import CallError, OutOfMemory, SpikingBrainError

log = logging.getLogger(__name__)
GRANULE = 512  # bytes: sizes of blocks are multiples of it, and blocks begin at multiples of 256 or more
KEPT_GRAPHS = 8  # recorded sequences of one entry point and shape

Array = np.ndarray[Any, Any]


class Memory(Protocol):
    """Where blocks come from, and the stream in whose order they are used."""

    def stream(self) -> int: ...

    def allocate(self, size: int) -> int: ...

    def free(self, address: int, size: int) -> None: ...


class Pool:
    """Memory of our own: what was freed is given out again, in the order of one stream, so that nothing waits.

    The lowest address goes first: calls that ask for the same then soon get the same (see ``Card``).
    """

    def __init__(self, driver: Driver):
        self._driver, self._stream = driver, driver.new_stream()
        self._free: dict[int, list[int]] = {}
        self._is_open = True
        self._lock = threading.RLock()  # a garbage collection inside may free a block

    def stream(self) -> int:
        return self._stream

    def allocate(self, size: int) -> int:
        with self._lock:
            if found := self._free.get(size):
                return heapq.heappop(found)
        try:
            return self._driver.allocate(size)
        except OutOfMemory:
            if not self._release():
                raise
            return self._driver.allocate(size)

    def free(self, address: int, size: int) -> None:
        with self._lock:
            if self._is_open:
                heapq.heappush(self._free.setdefault(size, []), address)
                return
        self._driver.free(address)

    def close(self) -> None:
        """Waits for what was put into the stream, and gives all memory back that is free, now or later."""
        self._driver.synchronize(self._stream)
        with self._lock:
            self._is_open = False
        self._release()

    def _release(self) -> bool:
        """Gives all free blocks back to the card; returns whether there were any."""
        with self._lock:
            free, self._free = self._free, {}
        blocks = [address for addresses in free.values() for address in addresses]
        if blocks:
            self._driver.synchronize(self._stream)  # kernels may still use them
        for address in blocks:
            self._driver.free(address)
        return bool(blocks)


class TorchMemory:
    """The allocator and the current stream of the torch in this process, which calls this card "cuda"."""

    def __init__(self, torch: Any, ordinal: int):
        self._cuda, self._ordinal = torch.cuda, ordinal

    def stream(self) -> int:
        return int(self._cuda.current_stream(self._ordinal).cuda_stream)

    def allocate(self, size: int) -> int:
        try:
            return int(self._cuda.caching_allocator_alloc(size, self._ordinal))
        except self._cuda.OutOfMemoryError as error:
            raise OutOfMemory("the card has not enough memory", why=str(error)) from error

    def free(self, address: int, size: int) -> None:
        self._cuda.caching_allocator_delete(address)


# One for each card: what a program computes another may take, in the order of one stream.
_memories: dict[Driver, Memory] = {}


def memory_of(driver: Driver) -> Memory:
    """Returns torch's memory where the process has imported a torch that drives the card, else our own.

    torch may come after the first programs: then what they have put into their stream is waited for once.
    """
    known = _memories.get(driver)
    if isinstance(known, TorchMemory):
        return known
    with driver.here():
        known = _memories.get(driver)
        if not isinstance(known, TorchMemory):
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_available():
                _memories[driver] = TorchMemory(torch, driver.ordinal)
                if isinstance(known, Pool):
                    known.close()
            elif known is None:
                _memories[driver] = Pool(driver)
        return _memories[driver]


class _Block:
    """Owns memory until the last array in it is gone."""

    def __init__(self, memory: Memory, size: int):
        self._memory, self._size = memory, max(GRANULE, -(-size // GRANULE) * GRANULE)
        self.address = memory.allocate(self._size)

    def __del__(self) -> None:
        if hasattr(self, "address") and not sys.is_finalizing():
            self._memory.free(self.address, self._size)


class DeviceArray:
    """A contiguous array in a card's memory; ``owner`` keeps that."""

    __slots__ = ("address", "dtype", "owner", "shape")

    def __init__(self, owner: Any, address: int, shape: Sequence[int], dtype: np.dtype[Any]):
        self.owner, self.address, self.shape, self.dtype = owner, address, tuple(shape), dtype

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def reshape(self, shape: Sequence[int] | int) -> DeviceArray:
        """Returns the same memory under another shape of as many elements; -1 is one axis of all."""
        sizes = (self.size,) if shape == -1 else tuple(cast("Sequence[int]", shape))
        return DeviceArray(self.owner, self.address, sizes, self.dtype)

    def __getitem__(self, part: slice) -> DeviceArray:
        """Returns the first elements of an array of one axis."""
        return DeviceArray(self.owner, self.address, (len(range(*part.indices(self.size))),), self.dtype)


class _Module:
    """Kernels on a card, until the last program that has them is gone."""

    def __init__(self, driver: Driver, image: bytes):
        self._driver, self.handle = driver, driver.load(image)

    def __del__(self) -> None:
        if hasattr(self, "handle") and not sys.is_finalizing():
            self._driver.unload_later(self.handle)


class _Graph:
    """A recorded sequence of launches."""

    def __init__(self, driver: Driver, handle: int):
        self._driver, self.handle = driver, handle

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._driver.destroy_graph(self.handle)


class Card:
    """Runs plans on a card.

    Launches go into the caller's stream and return at once; copies to the host wait for them. Where a plan has further
    streams, they begin and end in that one. A sequence that comes again with
    the same memory is recorded and then launched as one graph: its arguments are addresses, so the addresses are its
    key. That is so for a decode step, whose state stays where it is and whose other memory comes back from the pool.
    """

    buffer_type = DeviceArray
    hint = "to_device(array) makes a buffer on the card"
    spread = 1

    def __init__(
        self,
        driver: Driver,
        image: bytes,
        convention: int | None,
        blas: Blas | None = None,
    ):
        memory_of(driver)
        self.driver, self._convention = driver, convention
        self._blas, self._module = blas, _Module(driver, image)
        self._functions: dict[str, int] = {}
        self.records = True  # whether the runtime has been able to record so far

    @property
    def device(self) -> Any:
        return self.driver

    @property
    def memory(self) -> Memory:
        """Returns where blocks come from now."""
        return _memories[self.driver]

    def to_device(self, array: Array) -> DeviceArray:
        array = np.asarray(array, order="C")
        dtype = np.dtype(np.uint16) if array.dtype.name == "bfloat16" else array.dtype
        with self.driver.here():
            buffer = self.unwritten(dtype, array.shape)
            if array.nbytes:
                self.driver.upload(buffer.address, array.ctypes.data, array.nbytes, self.memory.stream())
        return buffer

    keep = to_device

    def to_host(self, buffer: DeviceArray) -> Array:
        array = np.empty(buffer.shape, buffer.dtype)
        if array.nbytes:
            with self.driver.here():
                self.driver.download(array.ctypes.data, buffer.address, array.nbytes, self.memory.stream())
        return array

    def borrow(self, capsule: Any) -> DeviceArray:
        driver = self.driver
        address, shape, dtype = dlpack.memory(capsule, driver.device_type, driver.ordinal)
        memory_of(driver)  # torch may be new here
        return DeviceArray(capsule, address, shape, dtype)

    def lend(self, buffer: DeviceArray) -> Any:
        driver = self.driver
        memory_of(driver)
        return dlpack.lend_memory(
            buffer.owner, buffer.address, buffer.shape, buffer.dtype, driver.device_type, driver.ordinal
        )

    def argument(self, buffer: DeviceArray) -> DeviceArray:
        if buffer.address % ALIGNMENT == 0:
            return buffer
        with self.driver.here():
            copy = self.unwritten(buffer.dtype, buffer.shape)
            if buffer.nbytes:
                self.driver.copy(copy.address, buffer.address, buffer.nbytes, self.memory.stream())
        return copy

    def unwritten(self, dtype: np.dtype[Any], shape: Sequence[int]) -> DeviceArray:
        with self.driver.here():
            block = _Block(self.memory, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        return DeviceArray(block, block.address, shape, dtype)

    def part(
        self, buffer: DeviceArray, offset: int, dtype: np.dtype[Any], shape: Sequence[int]
    ) -> DeviceArray:
        return DeviceArray(buffer.owner, buffer.address + offset, shape, dtype)

    def span(self, buffer: DeviceArray) -> tuple[int, int]:
        return buffer.address, buffer.address + buffer.nbytes

    def run(self, steps: Steps, buffers: Mapping[int, DeviceArray]) -> None:
        with self.driver.here():
            stream = self.memory.stream()
            # the default stream of CUDA and its relatives, number 0, cannot be recorded
            if not (self.records and stream and len(steps.steps) > 1):
                self._launch_all(steps, buffers, stream)
                return
            key = (stream, *(buffers[i].address for i in sorted(buffers)))
            if key not in steps.graphs:
                while len(steps.graphs) >= KEPT_GRAPHS:
                    steps.graphs.pop(next(iter(steps.graphs)))
                steps.graphs[key] = None
                self._launch_all(steps, buffers, stream)
                return
            graph = steps.graphs.pop(key) or self._record(steps, buffers, stream)
            if graph is None:
                self._launch_all(steps, buffers, stream)
                return
            steps.graphs[key] = graph  # now the one used last
            self.driver.launch_graph(graph.handle, stream)

    def _record(self, steps: Steps, buffers: Mapping[int, DeviceArray], stream: int) -> _Graph | None:
        """Returns the steps as a graph, or None where the runtime cannot record them: a thing to know, not an error."""
        try:
            self.driver.begin_capture(stream)
            try:
                self._launch_all(steps, buffers, stream)
            except BaseException:
                self._abandon(stream)
                raise
            return _Graph(self.driver, self.driver.end_capture(stream))
        except SpikingBrainError as error:
            log.warning("launches of '%s' are not recorded: %s", steps.entry, error)
            self.records = False
            return None

    def _abandon(self, stream: int) -> None:
        try:
            self.driver.destroy_graph(self.driver.end_capture(stream))
        except SpikingBrainError as error:
            log.debug("after a failed recording: %s", error)

    def _launch_all(self, steps: Steps, buffers: Mapping[int, DeviceArray], stream: int) -> None:
        def launch(number: int, stream: int) -> None:
            step = steps.steps[number]
            if isinstance(step, Product):
                self._multiply(step, buffers, stream)
            else:
                self._launch(step, buffers, stream)

        if steps.order:
            streams_of(self.driver).run(steps.order, stream, launch)
            return
        for number in range(len(steps.steps)):
            launch(number, stream)

    def _launch(self, step: Launch, buffers: Mapping[int, DeviceArray], stream: int) -> None:
        arguments = [(v or 0) if i is None else buffers[i].address for i, v in step.arguments]
        function = self._functions.get(step.kernel) or self._function(step)
        try:
            self.driver.launch(
                function,
                step.grid,
                (step.threads, 1, 1),
                step.shared_bytes,
                stream,
                arguments,
                self._convention,
                step.widths,
            )
        except DeviceError as error:
            raise DeviceError(
                f"kernel '{step.kernel}' cannot be launched",
                where=f"grid {list(step.grid)}, {step.threads} threads, {step.shared_bytes} dynamic shared bytes",
                why=error.why,
                hint="the device maca-emulator runs the same kernels and checks each access",
            ) from error

    def _function(self, step: Launch) -> int:
        function = self.driver.function(self._module.handle, step.kernel)
        self._functions[step.kernel] = function
        return function

    def _multiply(self, step: Product, buffers: Mapping[int, DeviceArray], stream: int) -> None:
        if self._blas is None:
            raise CallError("the plan calls the matrix library, which was not opened")
        self._blas.multiply(step.step, [buffers[i].address for i in step.buffers], int, stream)


def open_card(device: str, code: Mapping[str, memoryview], plan: Mapping[str, Any]) -> Card:
    """Returns the card of a kind with an artifact's kernels loaded, and the matrix library if the plan calls it."""
    driver = open_driver(device)
    calls = any(
        "library" in step for entry in plan["entries"].values() for step in every_step(entry["launches"])
    )
    with driver.here():
        blas = Blas(*blas_library(driver)) if calls else None
        return Card(driver, image_of(driver, code), convention(driver, code), blas=blas)
