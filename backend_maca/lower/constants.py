"""Elements of constant tensors, in a form that the plan can read: dense, and bf16 as its 16 bits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch_mlir import ir

_BLOB = re.compile(r'^\s*([\w.$-]+|"[^"]*"): "0x([0-9A-Fa-f]*)"', re.MULTILINE)
_HEADER = 4  # bytes of a blob that tell its alignment
_TYPES = {
    "f64": "f8",
    "f32": "f4",
    "f16": "f2",
    "bf16": "i2",
    "i64": "i8",
    "i32": "i4",
    "i16": "i2",
    "i8": "i1",
    "i1": "?",
}


def blobs(text: str) -> dict[str, str]:
    """Returns the resources of a module's text by name, in hexadecimal."""
    _, found, resources = text.rpartition("dialect_resources:")
    return {name.strip('"'): data for name, data in _BLOB.findall(resources)} if found else {}


def dense(note: ir.Attribute, resources: Mapping[str, str]) -> ir.DenseElementsAttr | None:
    """Returns the elements of a constant, None where they cannot be read."""
    kind = ir.RankedTensorType(note.type)
    element = str(kind.element_type)
    named = re.match(r'dense_resource<"?([^">]+)"?>', str(note))
    if named:
        if named[1] not in resources or element not in _TYPES:
            return None
        values = np.frombuffer(bytes.fromhex(resources[named[1]])[_HEADER:], _TYPES[element])
        return _made(values.reshape(kind.shape), kind.element_type)
    if not isinstance(note, ir.DenseElementsAttr):
        return None
    if element != "bf16":
        return note
    if not note.is_splat:
        return None
    bits = np.float32(note.get_splat_value().value).view(np.uint32) >> 16  # nothing to round: it is one
    return _made(np.full(kind.shape, bits, np.uint32).astype(np.uint16).view(np.int16), kind.element_type)


def _made(values: np.ndarray[Any, Any], element: ir.Type) -> ir.DenseElementsAttr:
    shape = list(values.shape)
    if str(element) == "bf16":
        element = ir.IntegerType.get_signless(16)
    if str(element) == "i1":  # how bits lie in a buffer is MLIR's affair
        flags = [ir.IntegerAttr.get(element, int(v)) for v in values.reshape(-1)]
        return ir.DenseElementsAttr.get(
            flags, ir.RankedTensorType.get(shape, element, loc=ir.Location.unknown())
        )
    return ir.DenseElementsAttr.get(np.ascontiguousarray(values), type=element, shape=shape)
