"""The runtimes of cards, called through ctypes: MetaX's, and NVIDIA's for the same kernels built by nvcc.

Both are C libraries whose functions return 0 or an error's number. MetaX's names are CUDA's with another prefix; NVIDIA's
driver has a few of other form. What differs is in the two classes below; what programs call is the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from spikingbrain.errors import CallError, MissingDependency, OutOfMemory, SpikingBrainError

# What a call takes: p pointer, s text, z size in bytes, i int, u unsigned.
_LETTERS: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "s": ctypes.c_char_p,
    "z": ctypes.c_size_t,
    "i": ctypes.c_int,
    "u": ctypes.c_uint,
}
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3  # as CUDA's; not confirmed for MetaX
_NON_BLOCKING = 1  # a stream that does not wait for the default one
_NO_TIMING = 2  # an event that only orders
_THREAD_LOCAL_CAPTURE = 1  # other threads, such as torch's, may ask for memory meanwhile
_END, _BUFFER, _SIZE = 0, 1, 2  # of packed arguments, as CUDA's
_OTHER_END = 3  # as HIP's
MOST_SHARED = 64 << 10  # bytes of shared memory that a launch may ask for
OLDEST = 8  # of NVIDIA's architectures: blocks of smaller cards have too little shared memory


class DeviceError(SpikingBrainError):
    """Raised when a call of a card's runtime fails, with the runtime's own text."""


class Driver:
    """The part of a card's runtime that programs need; one device, this thread's inside ``here``.

    Addresses, streams, events, modules, functions and graphs are numbers. Raises DeviceError, and OutOfMemory where
    the runtime says so.
    """

    name: ClassVar[str]
    device_type: ClassVar[int] = 2  # in DLPack: what the vendor's torch calls "cuda"
    functions: ClassVar[dict[str, tuple[str, str]]]  # what we call it -> the runtime's name, what it takes

    def __init__(self, library: str):
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise MissingDependency(f"the runtime {library} does not load", why=str(error)) from error
        self._path = library
        self.ordinal = 0
        # Held by whoever copies, allocates or launches: while launches are recorded, no other thread's may come between.
        self.lock = threading.RLock()
        self._unused: list[int] = []  # modules

    @functools.cache  # noqa: B019  (drivers live as long as the process)
    def _function(self, name: str) -> Any:
        symbol, takes = self.functions[name]
        try:
            function = getattr(self._library, symbol)
        except AttributeError:
            raise MissingDependency(
                f"{self._path} has no function {symbol}", hint="update the driver and the runtime of the card"
            ) from None
        function.restype, function.argtypes = ctypes.c_int, [_LETTERS[letter] for letter in takes]
        return function

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function of the runtime."""
        status = self._function(name)(*arguments)
        if status:
            raise self._error(self.functions[name][0], status)

    def _error(self, symbol: str, status: int) -> SpikingBrainError:
        word, text = self.describe(status)
        why = f"{word} ({status}): {text}"
        if "memory" in word.lower() and ("alloc" in word.lower() or "out_of" in word.lower()):
            return OutOfMemory(
                "the card has not enough memory",
                why=f"{symbol}: {why}",
                hint="fewer texts at a time, a smaller --capacity, or smaller weights",
            )
        return DeviceError(f"{symbol} failed on the card", why=why)

    def describe(self, status: int) -> tuple[str, str]:
        """Returns the runtime's name of an error and its text."""
        raise NotImplementedError

    def _made(self, name: str, *arguments: Any) -> int:
        """Calls a function whose first argument is where it writes a pointer; returns that."""
        place = ctypes.c_void_p()
        self.call(name, ctypes.byref(place), *arguments)
        return place.value or 0

    def count(self) -> int:
        """Returns how many devices there are."""
        self.call("init", 0)
        found = ctypes.c_int()
        self.call("count", ctypes.byref(found))
        return found.value

    def open(self, ordinal: int = 0) -> None:
        """Chooses the device of this object, which has to be there. Raises DeviceError if there is none of this number."""
        if not 0 <= ordinal < self.count():
            raise DeviceError(f"there is no device {ordinal}", why=f"{self._path} sees {self.count()}")
        self.ordinal = ordinal
        with self.here():
            pass

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Makes the device this thread's for a while, with ``lock`` held.

        The one that was before, such as torch's current one, is so again afterwards.
        """
        with self.lock:
            own, before = self._own(), self._current()
            if own != before:
                self.call("bind", own)
            try:
                yield
            finally:
                if before not in (own, None):
                    self.call("bind", before)

    def _own(self) -> int:
        """Returns what ``bind`` takes for the device of this object."""
        raise NotImplementedError

    def _current(self) -> int | None:
        """Returns what ``bind`` takes for the device that is this thread's now, None if none is."""
        raise NotImplementedError

    def device_name(self) -> str:
        text = ctypes.create_string_buffer(256)
        self.call("name", text, len(text), self.ordinal)
        return text.value.decode(errors="replace")

    def memory(self) -> tuple[int, int]:
        """Returns the free bytes and all bytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("memory", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> int:
        return self._made("allocate", size)

    def free(self, address: int) -> None:
        self.call("free", address)

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        """Copies from the host; ``source`` may be overwritten after it."""
        raise NotImplementedError

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        """Copies to the host, after what was put into the stream before."""
        raise NotImplementedError

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copies on the device, in the stream."""
        raise NotImplementedError

    def fill(self, target: int, byte: int, size: int, stream: int) -> None:
        self.call("fill", target, byte, size, stream)

    def new_stream(self) -> int:
        return self._made("new_stream", _NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        self.call("destroy_stream", stream)

    def synchronize(self, stream: int) -> None:
        """Waits for all that was put into the stream; errors of kernels come to light here."""
        self.call("synchronize", stream)

    def new_event(self, timed: bool = True) -> int:
        return self._made("new_event", 0 if timed else _NO_TIMING)

    def record(self, event: int, stream: int) -> None:
        self.call("record", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """Lets a stream wait for an event of another one."""
        self.call("wait", stream, event, 0)

    def milliseconds(self, start: int, end: int) -> float:
        """Returns the time between two recorded events, waiting for the second."""
        self.call("synchronize_event", end)
        found = ctypes.c_float()
        self.call("elapsed", ctypes.byref(found), start, end)
        return found.value

    def load(self, image: bytes) -> int:
        """Loads a compiled module; those that nobody uses any more are given back."""
        with self.here():
            if self._unused:
                self.call("synchronize_device")  # their kernels may still run
            while self._unused:
                self.unload(self._unused.pop())
            return self._made("load", ctypes.cast(ctypes.c_char_p(image), ctypes.c_void_p))

    def unload(self, module: int) -> None:
        """Gives a module back, of which no kernel runs."""
        self.call("unload", module)

    def unload_later(self, module: int) -> None:
        """Notes a module to give back; may be called at any time, such as while launches are recorded."""
        self._unused.append(module)

    def function(self, module: int, name: str) -> int:
        """Returns a kernel of a module."""
        return self._made("function", module, name.encode())

    def launch(
        self,
        function: int,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        stream: int,
        arguments: Sequence[int],
        packed_end: int | None,
        widths: Sequence[int] = (),
    ) -> None:
        """Puts a kernel into a stream; of each argument as many low bytes count as ``widths`` says, all 8 without it.

        ``packed_end`` None passes their addresses (``void**``); else they go in one buffer, each aligned to its width, in a
        list that ends with it.
        """
        values = (ctypes.c_int64 * max(1, len(arguments)))(*arguments)
        sizes = (*grid, *block, shared_bytes, stream)
        if packed_end is None:
            first = ctypes.addressof(values)
            addresses = (ctypes.c_void_p * len(values))(*(first + 8 * i for i in range(len(values))))
            self.call("launch", function, *sizes, addresses, None)
            return
        packed = bytearray()
        for value, width in zip(values, widths or [8] * len(arguments), strict=True):
            packed += bytes(-len(packed) % width) + (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        buffer, size = ctypes.create_string_buffer(bytes(packed), len(packed)), ctypes.c_size_t(len(packed))
        extra = (ctypes.c_void_p * 6)(
            _BUFFER, ctypes.addressof(buffer), _SIZE, ctypes.addressof(size), packed_end, _END
        )
        self.call("launch", function, *sizes, None, extra)

    def begin_capture(self, stream: int) -> None:
        """From here on, what is put into the stream is only noted."""
        self.call("begin_capture", stream, _THREAD_LOCAL_CAPTURE)

    def end_capture(self, stream: int) -> int:
        """Returns what was noted, ready to be launched."""
        place = ctypes.c_void_p()
        self.call("end_capture", stream, ctypes.byref(place))
        graph = place.value or 0
        try:
            return self._instantiate(graph)
        finally:
            self.call("destroy_graph", graph)

    def _instantiate(self, graph: int) -> int:
        raise NotImplementedError

    def launch_graph(self, graph: int, stream: int) -> None:
        self.call("launch_graph", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self.call("destroy_executable", graph)


# How packed arguments may end, and None for ``void**``: a probe takes the first that works.
CONVENTIONS = (None, _END, _OTHER_END)


class MacaDriver(Driver):
    """MetaX's runtime; ``prefix`` "hc" with its library is its twin of the HPCC stack."""

    name = "maca"
    names: ClassVar[dict[str, tuple[str, str]]] = {
        "init": ("Init", "u"),
        "count": ("GetDeviceCount", "p"),
        "bind": ("SetDevice", "i"),
        "current": ("GetDevice", "p"),
        "name": ("DeviceGetName", "pii"),
        "memory": ("MemGetInfo", "pp"),
        "allocate": ("Malloc", "pz"),
        "free": ("Free", "p"),
        "copy": ("MemcpyAsync", "ppzip"),
        "fill": ("MemsetAsync", "pizp"),
        "new_stream": ("StreamCreateWithFlags", "pu"),
        "synchronize": ("StreamSynchronize", "p"),
        "destroy_stream": ("StreamDestroy", "p"),
        "synchronize_device": ("DeviceSynchronize", ""),
        "wait": ("StreamWaitEvent", "ppu"),
        "new_event": ("EventCreateWithFlags", "pu"),
        "record": ("EventRecord", "pp"),
        "synchronize_event": ("EventSynchronize", "p"),
        "elapsed": ("EventElapsedTime", "ppp"),
        "load": ("ModuleLoadData", "pp"),
        "unload": ("ModuleUnload", "p"),
        "function": ("ModuleGetFunction", "pps"),
        "launch": ("ModuleLaunchKernel", "puuuuuuuppp"),
        "begin_capture": ("StreamBeginCapture", "pi"),
        "end_capture": ("StreamEndCapture", "pp"),
        "instantiate": ("GraphInstantiate", "ppppz"),
        "launch_graph": ("GraphLaunch", "pp"),
        "destroy_executable": ("GraphExecDestroy", "p"),
        "destroy_graph": ("GraphDestroy", "p"),
    }

    def __init__(self, library: str, prefix: str = "mc"):
        super().__init__(library)
        self.prefix = prefix
        self.functions = {n: (prefix + symbol, takes) for n, (symbol, takes) in self.names.items()}  # type: ignore[misc]

    def describe(self, status: int) -> tuple[str, str]:
        found = []
        for name in ("GetErrorName", "GetErrorString"):
            function = getattr(self._library, self.prefix + name, None)
            if function is not None:
                function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_int]
            found.append((function(status) or b"").decode(errors="replace") if function else "")
        return found[0] or "error", found[1] or "the runtime gives no text"

    def _own(self) -> int:
        return self.ordinal

    def _current(self) -> int | None:
        found = ctypes.c_int()
        self.call("current", ctypes.byref(found))
        return found.value

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        self.call("copy", target, source, size, _HOST_TO_DEVICE, stream)
        self.synchronize(stream)

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        self.call("copy", target, source, size, _DEVICE_TO_HOST, stream)
        self.synchronize(stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self.call("copy", target, source, size, _DEVICE_TO_DEVICE, stream)

    def _instantiate(self, graph: int) -> int:
        return self._made("instantiate", graph, None, None, 0)


class CudaDriver(Driver):
    """NVIDIA's driver, for kernels that nvcc built against the headers in ``compat_cuda``."""

    name = "maca-cuda"
    functions: ClassVar[dict[str, tuple[str, str]]] = {
        "init": ("cuInit", "u"),
        "count": ("cuDeviceGetCount", "p"),
        "attribute": ("cuDeviceGetAttribute", "pii"),
        "context": ("cuDevicePrimaryCtxRetain", "pi"),
        "bind": ("cuCtxSetCurrent", "p"),
        "current": ("cuCtxGetCurrent", "p"),
        "name": ("cuDeviceGetName", "pii"),
        "memory": ("cuMemGetInfo_v2", "pp"),
        "allocate": ("cuMemAlloc_v2", "pz"),
        "free": ("cuMemFree_v2", "p"),
        "upload": ("cuMemcpyHtoDAsync_v2", "ppzp"),
        "download": ("cuMemcpyDtoHAsync_v2", "ppzp"),
        "copy": ("cuMemcpyDtoDAsync_v2", "ppzp"),
        "fill": ("cuMemsetD8Async", "pizp"),
        "new_stream": ("cuStreamCreate", "pu"),
        "synchronize": ("cuStreamSynchronize", "p"),
        "destroy_stream": ("cuStreamDestroy_v2", "p"),
        "synchronize_device": ("cuCtxSynchronize", ""),
        "wait": ("cuStreamWaitEvent", "ppu"),
        "new_event": ("cuEventCreate", "pu"),
        "record": ("cuEventRecord", "pp"),
        "synchronize_event": ("cuEventSynchronize", "p"),
        "elapsed": ("cuEventElapsedTime", "ppp"),
        "load": ("cuModuleLoadData", "pp"),
        "unload": ("cuModuleUnload", "p"),
        "function": ("cuModuleGetFunction", "pps"),
        "function_attribute": ("cuFuncSetAttribute", "pii"),
        "launch": ("cuLaunchKernel", "puuuuuuuppp"),
        "begin_capture": ("cuStreamBeginCapture_v2", "pi"),
        "end_capture": ("cuStreamEndCapture", "pp"),
        "instantiate": ("cuGraphInstantiateWithFlags", "ppL"),
        "launch_graph": ("cuGraphLaunch", "pp"),
        "destroy_executable": ("cuGraphExecDestroy", "p"),
        "destroy_graph": ("cuGraphDestroy", "p"),
    }
    _MAJOR, _MINOR = 75, 76  # attributes
    _DYNAMIC_SHARED = 8

    def __init__(self, library: str = "libcuda.so.1"):
        super().__init__(library)
        self._context = 0

    def describe(self, status: int) -> tuple[str, str]:
        found = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            getattr(self._library, name)(status, ctypes.byref(text))
            found.append((text.value or b"").decode(errors="replace"))
        return found[0] or "error", found[1] or "the driver gives no text"

    def _own(self) -> int:
        if not self._context:
            self._context = self._made("context", self.ordinal)
        return self._context

    def _current(self) -> int | None:
        return self._made("current") or None

    def capability(self) -> str:
        """Returns the architecture as nvcc names it."""
        found = []
        for attribute in (self._MAJOR, self._MINOR):
            value = ctypes.c_int()
            self.call("attribute", ctypes.byref(value), attribute, self.ordinal)
            found.append(value.value)
        if found[0] < OLDEST:
            raise DeviceError(
                f"{self.device_name()} is too old for these kernels",
                why=f"it is of architecture sm_{found[0]}{found[1]}",
                hint=f"a card of sm_{OLDEST}0 or later, or --device maca-emulator",
            )
        return f"sm_{found[0]}{found[1]}"

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        self.call("upload", target, source, size, stream)
        self.synchronize(stream)

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        self.call("download", target, source, size, stream)
        self.synchronize(stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self.call("copy", target, source, size, stream)

    def function(self, module: int, name: str) -> int:
        """Returns a kernel that may ask for 64 KiB: without being asked, these cards give 48, static memory included."""
        function = super().function(module, name)
        self.call("function_attribute", function, self._DYNAMIC_SHARED, MOST_SHARED)
        return function

    def _instantiate(self, graph: int) -> int:
        return self._made("instantiate", graph, 0)


_LETTERS["L"] = ctypes.c_uint64
STACKS = {"maca": ("mc", "MACA_PATH", "/opt/maca"), "hpcc": ("hc", "HPCC_PATH", "/opt/hpcc")}


def maca_library() -> tuple[str, str]:
    """Returns the path of MetaX's runtime, and the prefix of its names.

    ``SPIKINGBRAIN_MACA_RUNTIME`` names another file; its prefix is ``hc`` if its name begins with ``libhc``.
    """
    if own := os.environ.get("SPIKINGBRAIN_MACA_RUNTIME"):
        return own, "hc" if Path(own).name.startswith("libhc") else "mc"
    for prefix, variable, root in STACKS.values():
        library = Path(os.environ.get(variable) or root) / "lib" / f"lib{prefix}runtime.so"
        if library.is_file():
            return str(library), prefix
    return "libmcruntime.so", "mc"


def blas_library(driver: Driver) -> tuple[str, str]:
    """Returns the path of the matrix library that belongs to a runtime, and the prefix of its names."""
    if isinstance(driver, CudaDriver):
        return _cublas(), "cublas"
    library, prefix = maca_library()
    return str(Path(library).with_name(f"lib{prefix}blas.so")), f"{prefix}blas"


def _cublas() -> str:
    """Returns NVIDIA's library: that of the packages which torch brings, else the system's."""
    found = importlib.util.find_spec("nvidia")
    for folder in (found.submodule_search_locations or ()) if found else ():
        for library in sorted(Path(folder).glob("*/lib/libcublas.so.*"), reverse=True):
            return str(library)
    return "libcublas.so"


@functools.cache
def open_driver(device: str, ordinal: int = 0) -> Driver:
    """Returns the driver of a device: ``"maca"`` or ``"maca-cuda"``. Raises MissingDependency or DeviceError."""
    if device not in ("maca", "maca-cuda"):
        raise CallError(f"no runtime for device {device!r}", hint="maca or maca-cuda")
    driver: Driver = MacaDriver(*maca_library()) if device == "maca" else CudaDriver()
    driver.open(ordinal)
    return driver
