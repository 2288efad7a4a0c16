"""DLPack capsules to numpy arrays, or to memory of a card, and back, without copies.

bfloat16 travels as its 16 bits, as numpy has no such type.

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
    _require_contiguous(tensor)
    return np.asarray(_Memory(capsule, tensor))


def _require_contiguous(tensor: _Tensor) -> None:
    if 0 in tensor.shape[: tensor.rank]:
        return  # there is nothing between which a gap could be
    count = 1
    for size, stride in list(
        zip(
            tensor.shape[: tensor.rank], tensor.strides[: tensor.rank] if tensor.strides else (), strict=False
        )
    )[::-1]:
        if size > 1 and stride != count:
            raise ValueError("the memory of this tensor is not contiguous")
        count *= size


def lend(array: Array) -> Any:
    """Returns a capsule over an array's memory; 16 bits without a sign are a bfloat16."""
    capsule = array.__dlpack__()
    if array.dtype == np.uint16:
        _Tensor.from_address(_pointer_of(capsule, _NAME)).code = _BFLOAT
    return capsule


def memory(capsule: Any, device_type: int, device_id: int) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """Returns the address, shape and type of a contiguous tensor on one device; raises ValueError for others.

    Whoever uses the address must keep the capsule.
    """
    tensor = _Tensor.from_address(_pointer_of(capsule, _NAME))
    code = _UINT if tensor.code == _BFLOAT else tensor.code
    if tensor.device_type != device_type or code not in _KINDS or tensor.lanes != 1:
        raise ValueError("the memory of this tensor cannot be used here")
    if tensor.device_id != device_id:
        raise ValueError(f"this tensor is on device {tensor.device_id}, the program on device {device_id}")
    _require_contiguous(tensor)
    dtype = np.dtype(f"{_KINDS[code]}{tensor.bits // 8}" if code != _BOOL else "bool")
    return (tensor.data or 0) + tensor.byte_offset, tuple(tensor.shape[: tensor.rank]), dtype


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_lent: dict[int, Any] = {}  # address of a _Managed -> what it needs


def _give_back(managed: int) -> None:
    """Is called when the tensor that took a capsule dies."""
    _lent.pop(managed, None)


def _drop(capsule: int) -> None:
    """Is called when a capsule dies: one that nobody took still owns its memory."""
    if _is_valid(capsule, _NAME):
        _lent.pop(_pointer_at(capsule, _NAME), None)


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_callbacks = [_CALLBACK(_give_back), _CALLBACK(_drop)]
_DELETER, _DESTRUCTOR = (ctypes.cast(c, ctypes.c_void_p) for c in _callbacks)
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_pointer_at = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


def lend_memory(
    owner: Any,
    address: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    device_type: int,
    device_id: int,
) -> Any:
    """Returns a capsule over memory of a device; ``owner`` lives as long as the tensor that is made of it."""
    sizes = (ctypes.c_int64 * max(1, len(shape)))(*shape)
    code = _BFLOAT if dtype == np.uint16 else next(c for c, kind in _KINDS.items() if kind == dtype.kind)
    tensor = _Tensor(address, device_type, device_id, len(shape), code, dtype.itemsize * 8, 1, sizes, None, 0)
    managed = _Managed(tensor, None, _DELETER)
    place = ctypes.addressof(managed)
    _lent[place] = (managed, sizes, owner)
    return _new_capsule(place, _NAME, _DESTRUCTOR)
