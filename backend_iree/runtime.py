"""Running IREE modules: the one module that touches the IREE runtime's Python API (pinned version)."""

from __future__ import annotations

import atexit
import functools
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import iree.runtime as rt
import numpy as np

from spikingbrain.backend_iree import SCOPE
from spikingbrain.backend_iree.backend import IreeOptions
from spikingbrain.errors import CallError, CorruptArtifact

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
_live: weakref.WeakSet[IreeExecutable] = weakref.WeakSet()


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
        self._context = rt.VmContext(self._instance, modules=[*modules, compiled])
        self._functions = {
            name: compiled.lookup_function(name) for name in compiled.function_names if "$" not in name
        }
        self._lock = threading.Lock()
        _live.add(self)

    def call(self, entry: str, arguments: Sequence[Any]) -> list[Any]:
        function = self._functions.get(entry)
        if function is None:
            raise CallError(f"no entry point {entry!r}", hint=f"one of {', '.join(self._functions)}")
        inputs = rt.VmVariantList(len(arguments))
        for argument in arguments:
            if isinstance(argument, int):
                inputs.push_int(argument)
            else:
                inputs.push_ref(argument)
        outputs = rt.VmVariantList(8)
        with self._lock:
            self._context.invoke(function, inputs, outputs)
        return [outputs.get_as_object(i, rt.HalBufferView) for i in range(outputs.size)]

    def to_device(self, array: Array) -> Any:
        element = _ELEMENTS.get(array.dtype.name)
        if element is None:
            raise CallError(
                f"element type {array.dtype} cannot be passed", hint=f"one of {', '.join(_ELEMENTS)}"
            )
        array = np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis
        return self._device.allocator.allocate_buffer_copy(
            memory_type=rt.MemoryType.DEVICE_LOCAL,
            allowed_usage=rt.BufferUsage.DEFAULT | rt.BufferUsage.MAPPING,
            device=self._device,
            buffer=array.view({"bool": np.uint8, "bfloat16": np.uint16}.get(array.dtype.name, array.dtype)),
            element_type=element,
        )

    def to_host(self, buffer: Any) -> Array:
        return rt.DeviceArray(self._device, buffer, implicit_host_transfer=True).to_host()  # type: ignore[no-any-return]


@atexit.register
def _close() -> None:
    """Drops runtime objects before interpreter shutdown, where nanobind would report them as leaked."""
    for executable in list(_live):
        executable._functions.clear()
        executable._context = None
    _device.cache_clear()
