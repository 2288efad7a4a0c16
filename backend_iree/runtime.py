"""Running IREE modules: the one module that touches the IREE runtime's Python API (pinned version)."""

from __future__ import annotations

import atexit
import ctypes
import functools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import iree.runtime as rt
import numpy as np

from spikingbrain.backend_iree import SCOPE
from spikingbrain.backend_iree.backend import IreeOptions
from spikingbrain.errors import CallError, CorruptArtifact, SpikingBrainError, TargetError

Array = np.ndarray[Any, Any]
_ELEMENTS = {
    "float32": rt.HalElementType.FLOAT_32,
    "float64": rt.HalElementType.FLOAT_64,
    "float16": rt.HalElementType.FLOAT_16,
    "bfloat16": rt.HalElementType.BFLOAT_16,
    "int64": rt.HalElementType.SINT_64,
    "int32": rt.HalElementType.SINT_32,
    "int16": rt.HalElementType.SINT_16,
    "int8": rt.HalElementType.SINT_8,
    "uint8": rt.HalElementType.UINT_8,
    "bool": rt.HalElementType.BOOL_8,
}
# What the buffer protocol takes in their place.
_BITS: dict[str, np.dtype[Any]] = {"bool": np.dtype(np.uint8), "bfloat16": np.dtype(np.uint16)}
_List, _View = rt.VmVariantList, rt.HalBufferView
# Numbers, as the binding takes them; going through the enums costs more than the call.
_RESIDENT = int(rt.MemoryType.DEVICE_LOCAL)
_USES = int(rt.BufferUsage.DEFAULT | rt.BufferUsage.MAPPING)
_STAGED = int(rt.MemoryType.HOST_LOCAL | rt.MemoryType.DEVICE_VISIBLE)
_DOWNLOAD = int(rt.BufferUsage.TRANSFER_TARGET | rt.BufferUsage.MAPPING)
_live: weakref.WeakSet[IreeExecutable] = weakref.WeakSet()


@functools.cache
def _element(dtype: np.dtype[Any]) -> tuple[int, np.dtype[Any]]:
    """Returns IREE's number of an element type and the numpy type to pass its memory as."""
    if dtype.name not in _ELEMENTS:
        raise CallError(f"element type {dtype} cannot be passed", hint=f"one of {', '.join(_ELEMENTS)}")
    return int(_ELEMENTS[dtype.name]), _BITS.get(dtype.name, dtype)


@functools.cache
def _numpy_type(element: int) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(rt.HalElementType.map_to_dtype(rt.HalElementType(element)))
    return found


@functools.cache
def _device(driver: str, threads: int) -> rt.HalDevice:
    if driver == "local-sync" and threads > 1:
        rt.flags.parse_flags(f"--task_topology_group_count={threads}")
        driver = "local-task"
    return rt.get_driver(driver).create_default_device()


class IreeExecutable:
    """A loaded module with its weights. Buffers are ``HalBufferView``; calls from several threads take turns."""

    def __init__(self, module: memoryview, driver: str, weights: Mapping[str, Array], options: IreeOptions):
        self._device = _device(driver, options.threads)
        self._allocator = self._device.allocator
        self._local = driver.startswith("local")
        self._instance = rt.VmInstance()
        self._weights = weights  # the mapped memory must outlive the module
        index = rt.ParameterIndex()
        for key, array in weights.items():
            index.add_buffer(
                key, array.view(np.uint8).reshape(-1) if array.ndim else array.reshape(1).view(np.uint8)
            )
        modules = [rt.create_hal_module(self._instance, self._device)]
        if weights:
            modules.append(rt.create_io_parameters_module(self._instance, index.create_provider(scope=SCOPE)))
        try:
            compiled = rt.VmModule.copy_buffer(self._instance, module)
        except (ValueError, RuntimeError) as error:
            raise CorruptArtifact(
                "the code of the artifact does not load", why=str(error).splitlines()[0]
            ) from error
        try:
            self._context = rt.VmContext(self._instance, modules=[*modules, compiled])
        except (ValueError, RuntimeError) as error:
            raise TargetError(
                f"the {driver} device does not take the artifact's code", why=_reason(error)
            ) from error
        self._functions = {
            name: compiled.lookup_function(name) for name in compiled.function_names if "$" not in name
        }
        self._bound: dict[str, Callable[[Sequence[Any]], list[Any]]] = {}
        self._lock = threading.Lock()
        _live.add(self)

    @property
    def device(self) -> Any:
        """Returns the device that buffers belong to; executables of one driver and thread count share it."""
        return self._device

    def call(self, entry: str, arguments: Sequence[Any]) -> list[Any]:
        return self.function(entry)(arguments)

    def function(self, entry: str) -> Callable[[Sequence[Any]], list[Any]]:
        found = self._bound.get(entry)
        if found is None:
            if entry not in self._functions:
                raise CallError(f"no entry point {entry!r}", hint=f"one of {', '.join(self._functions)}")
            found = self._bound[entry] = self._bind(entry)
        return found

    def _bind(self, entry: str) -> Callable[[Sequence[Any]], list[Any]]:
        def invoke(arguments: Sequence[Any]) -> list[Any]:
            inputs, outputs = _List(len(arguments)), _List(8)
            push = inputs.push_ref
            for argument in arguments:
                if argument.__class__ is int:
                    inputs.push_int(argument)
                elif argument.__class__ is float:
                    inputs.push_float(argument)
                else:
                    push(argument)
            try:
                with self._lock:
                    self._context.invoke(self._functions[entry], inputs, outputs)
            except RuntimeError as error:
                if self._local:  # what the program itself asserts
                    raise
                raise _failed(entry, error) from error
            get = outputs.get_as_object
            count = outputs.size
            return [get(0, _View)] if count == 1 else [get(i, _View) for i in range(count)]

        return invoke

    def borrow(self, capsule: Any) -> Any:
        """Returns a buffer over the memory of a DLPack capsule; raises ValueError where that memory cannot be used as it is."""
        return self._device.from_dlpack_capsule(capsule)

    def lend(self, buffer: Any) -> Any:
        """Returns a DLPack capsule over a buffer's memory, which lives as long as the tensor made from it."""
        return self._device.create_dlpack_capsule(buffer, 1, 0)

    def to_device(self, array: Array) -> Any:
        element, bits = _element(array.dtype)
        array = np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis
        if bits is not array.dtype:
            array = array.view(bits)
        return self._allocator.allocate_buffer_copy(_RESIDENT, _USES, self._device, array, element)

    def to_host(self, buffer: Any) -> Array:
        """Returns a buffer's content: the buffer's own memory on a CPU, which then lives as long as the array."""
        memory = buffer if self._local else self._download(buffer.get_buffer())
        array: Array = memory.map().asarray(buffer.shape, _numpy_type(buffer.element_type))
        return array

    def buffers(self) -> tuple[int, int]:
        """Returns the bytes in buffers of the device now, and the most there ever were; mapped weights do not count."""
        counts = self._allocator.statistics
        return counts["device_bytes_allocated"] - counts["device_bytes_freed"], counts["device_bytes_peak"]

    def _download(self, source: Any) -> Any:
        """Copies a device's memory to where it can be mapped; drivers differ in what else they offer."""
        staging = self._allocator.allocate_buffer(_STAGED, _DOWNLOAD, source.byte_length())
        semaphore = self._device.create_semaphore(0)
        done = rt.HalFence.create_at(semaphore, 1)
        self._device.queue_copy(source, staging, rt.HalFence.create_at(semaphore, 0), done)
        done.wait()
        return staging


# What IREE 3.13 says on Vulkan of a tensor without elements, and of a loop that makes no turn.
_NOTHING = ("resolved to an empty buffer range", "has already been queued for deallocation")


def _failed(entry: str, error: RuntimeError) -> SpikingBrainError:
    hint = "IREE runs no empty tensors and no loops of no step there: give it more steps, or another target"
    nothing = any(text in str(error) for text in _NOTHING)
    return CallError(
        f"entry {entry!r} failed on the device", why=_reason(error), hint=hint if nothing else ""
    )


def _reason(error: Exception) -> str:
    """Returns what an IREE status says, without the native stack."""
    return str(error).split("; while invoking", 1)[0].splitlines()[0]


def _keep_for_results(device: Any) -> None:
    """Lets a device outlive its Python object: tensors that the program still holds give their memory back to it.

    IREE 3.13's buffers do not keep their device; the interpreter frees them after everything here, and crashed. The binding has
    no way to retain a device without an object that it then reports as leaked, so the count of references, the first
    field of what the object points to, is raised here. It can go when buffers retain their device
    (test_results_outlive_the_interpreter fails without it).
    """
    if device is None:
        return
    place = ctypes.c_int32.from_address(
        id(device) + 16
    ).value  # nanobind's instance: where the C++ object lies
    pointer = ctypes.c_void_p.from_address(id(device) + place).value
    count = ctypes.c_int32.from_address(pointer) if place == 24 and pointer else None
    if count is not None and 0 < count.value < 1 << 16:
        count.value += 1


@atexit.register
def _close() -> None:
    """Drops runtime objects before interpreter shutdown, where nanobind would report them as leaked."""
    for executable in list(_live):
        _keep_for_results(executable._device)
        executable._functions.clear()
        executable._bound.clear()
        executable._context = executable._allocator = executable._device = executable._instance = None
    _device.cache_clear()
