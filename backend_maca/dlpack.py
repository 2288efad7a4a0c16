"""DLPack capsules to numpy arrays and back, without copies; bfloat16 travels as its 16 bits, which numpy's own do not.

The layout of the structures is that of dlpack.h, version 0.8.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_NAME = b"dltensor"
_CPU = 1
_INT, _UINT, _FLOAT, _BFLOAT, _BOOL = 0, 1, 2, 4, 6
_KINDS = {_INT: "i", _UINT: "u", _FLOAT: "f", _BOOL: "b"}

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Memory:
    """What numpy reads an array from; it keeps the capsule, and so the memory, alive."""

    def __init__(self, capsule: Any, tensor: _Tensor):
        self.capsule = capsule
        code = _UINT if tensor.code == _BFLOAT else tensor.code
        if tensor.device_type != _CPU or code not in _KINDS or tensor.lanes != 1:
            raise ValueError("the memory of this tensor cannot be used here")
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(tensor.shape[: tensor.rank]),
            "typestr": f"{'|' if tensor.bits == 8 else '<'}{_KINDS[code]}{tensor.bits // 8}",
            "data": ((tensor.data or 0) + tensor.byte_offset, False),
        }


def borrow(capsule: Any) -> Array:
    """Returns an array over a capsule's memory; raises ValueError where the tensor has gaps or is on a device."""
    tensor = _Tensor.from_address(_pointer_of(capsule, _NAME))
    count = 1
    for size, stride in list(
        zip(
            tensor.shape[: tensor.rank], tensor.strides[: tensor.rank] if tensor.strides else (), strict=False
        )
    )[::-1]:
        if size > 1 and stride != count:
            raise ValueError("the memory of this tensor is not contiguous")
        count *= size
    return np.asarray(_Memory(capsule, tensor))


def lend(array: Array) -> Any:
    """Returns a capsule over an array's memory; 16 bits without a sign are a bfloat16."""
    capsule = array.__dlpack__()
    if array.dtype == np.uint16:
        _Tensor.from_address(_pointer_of(capsule, _NAME)).code = _BFLOAT
    return capsule
