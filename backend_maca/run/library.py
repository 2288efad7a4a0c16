"""The library's matrix products on the emulated machine, by numpy, with the columns and leading dimensions of the call.

Floats are summed in double and rounded once to f32, then to what is stored: closer to the exact sum than a card is.
Integers are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def multiply(step: Mapping[str, Any], buffers: Sequence[Array], evaluate: Callable[[Any], int]) -> None:
    """Runs a step of the plan: C = op(X) op(Y), or C + it, all column-major; ``buffers`` are X, Y and C."""
    m, n, k = (evaluate(size) for size in step["sizes"])
    ld_x, ld_y, ld_c = (evaluate(size) for size in step["leading"])
    strides, batch = [evaluate(size) for size in step["strides"]], evaluate(step["batch"])
    if not m or not n:
        return
    x, y, c = (_bits(buffer.reshape(-1)) for buffer in buffers)
    for i in range(batch):
        from_x, from_y, from_c = (stride * i for stride in strides)
        # A column-major matrix is the transpose of the row-major one in the same memory.
        xt = _rows(x[from_x:], (k, m), ld_x, step["operations"][0] == "T", step["types"][0])
        yt = _rows(y[from_y:], (n, k), ld_y, step["operations"][1] == "T", step["types"][1])
        target = c[from_c : from_c + n * ld_c].reshape(n, ld_c)[:, :m]
        total = yt @ xt
        if step["adds"]:
            total = total + _widened(target, step["types"][2])
        target[:] = _stored(total, step["types"][2])


def _rows(memory: Array, shape: tuple[int, int], leading: int, transposed: bool, dtype: str) -> Array:
    """Returns the row-major matrix of a shape in memory, which holds its transpose if ``transposed``."""
    rows, columns = shape[::-1] if transposed else shape
    matrix = _widened(memory[: rows * leading].reshape(rows, leading)[:, :columns], dtype)
    return matrix.T if transposed else matrix


def _bits(memory: Array) -> Array:
    """Returns bfloat16 of ml_dtypes, which weights may come in, as its 16 bits."""
    return memory.view(np.uint16) if memory.dtype.name == "bfloat16" else memory


def _widened(values: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)  # holds the sums of products of bytes exactly, too


def _stored(values: Array, dtype: str) -> Array:
    if dtype == "int32":
        return values.astype(np.int64).astype(np.int32)
    single = values.astype(np.float32)
    if dtype == "bfloat16":
        bits = single.view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(single), 0x7FFF, rounded).astype(np.uint16)
    return single.astype(dtype)
