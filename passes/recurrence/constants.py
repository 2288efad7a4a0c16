"""Computes values that depend on no input, such as causal masks and tables of decays, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikingbrain.passes.recurrence.graph import Slot, Value, argument

Array = NDArray[Any]
LARGEST = 1 << 25  # elements

_UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": np.negative,
    "abs": np.abs,
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log2": np.log2,
    "sqrt": np.sqrt,
    "square": np.square,
    "reciprocal": lambda x: 1.0 / x,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "floor": np.floor,
    "ceil": np.ceil,
    "sign": np.sign,
    "logical_not": np.logical_not,
    "bitwise_not": lambda x: np.logical_not(x) if x.dtype == bool else np.invert(x),
    "nan_to_num": np.nan_to_num,
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "mul": np.multiply,
    "add": np.add,
    "sub": np.subtract,
    "rsub": lambda x, y: np.subtract(y, x),
    "div": np.true_divide,
    "pow": lambda x, y: np.power(np.asarray(x, dtype=float) if np.min(y) < 0 else x, y),
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "eq": np.equal,
    "ne": np.not_equal,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "remainder": np.remainder,
}


class Constants:
    """Evaluates values; results are kept."""

    def __init__(self) -> None:
        self.known: dict[Value, Array | None] = {}

    def __call__(self, v: Value) -> Array | None:
        """Returns the numbers of a value (floats as float64), None when it depends on an input or on an op not known here."""
        todo = [v]
        while todo:
            x = todo[-1]
            missing = [i for i in x.inputs if i not in self.known]
            if missing and not any(self.known.get(i, True) is None for i in x.inputs):
                todo += missing
                continue
            todo.pop()
            if x not in self.known:
                self.known[x] = self._compute(x)
        return self.known[v]

    def _compute(self, v: Value) -> Array | None:
        if v.shape is None or not all(isinstance(s, int) for s in v.shape) or math.prod(v.shape) > LARGEST:
            return None
        inputs = [self.known.get(x) for x in v.inputs]
        held = [x for x in inputs if x is not None]
        if len(held) < len(inputs):
            return None
        with np.errstate(all="ignore"):
            found = _evaluate(v, held)
        if found is None or found.shape != v.shape:
            return None
        return found.astype(float) if "float" in v.dtype else found


def _evaluate(v: Value, x: list[Array]) -> Array | None:
    op, shape = v.op, v.shape
    assert shape is not None
    if op == "constant":
        numbers = v.literals[0] if v.literals else None
        return np.asarray(numbers) if isinstance(numbers, (np.ndarray, tuple)) else None
    if op == "full":
        return np.full(shape, v.literals[1], dtype=_numpy_type(v.dtype))
    if op == "eye":
        return np.eye(shape[0], shape[1]) if len(shape) == 2 else None
    if op == "arange":
        bounds = [n for n in v.literals if isinstance(n, (int, float))]
        return np.arange(*bounds) if 1 <= len(bounds) <= 3 else None
    if op in _UNARY and len(x) == 1:
        return np.asarray(_UNARY[op](x[0]))
    if op in _BINARY and _plain(v):
        operands = [x[n.index] if isinstance(n, Slot) else n for n in v.literals[:2]]
        return np.asarray(_BINARY[op](*operands))
    if op in ("clamp", "clamp_min", "clamp_max") and len(x) == 1:
        low = argument(v, 1, "min", None) if op != "clamp_max" else None
        high = (
            argument(v, 2, "max", None)
            if op == "clamp"
            else (argument(v, 1, "max", None) if op == "clamp_max" else None)
        )
        return np.clip(x[0], low, high) if low is not None or high is not None else None
    if op in ("tril", "triu"):
        diagonal = int(argument(v, 1, "diagonal", 0))
        return np.tril(x[0], diagonal) if op == "tril" else np.triu(x[0], diagonal)
    if op == "where" and len(v.literals) >= 3:
        a, b = (x[n.index] if isinstance(n, Slot) else n for n in v.literals[1:3])
        return np.where(x[0], a, b)
    if op == "masked_fill" and len(x) == 2:
        return np.where(x[1], v.literals[2], x[0])
    if op == "cumsum":
        return np.cumsum(x[0], axis=argument(v, 1, "dim", 0))
    return _rearranged(v, x)


def _rearranged(v: Value, x: list[Array]) -> Array | None:
    op, shape = v.op, v.shape
    assert shape is not None
    if op == "view":
        return x[0].reshape(shape)
    if op == "expand":
        return np.broadcast_to(x[0], shape)
    if op == "cast":
        return x[0].astype(_numpy_type(v.dtype))
    if op == "detach":
        return x[0]
    if op == "unsqueeze":
        return np.expand_dims(x[0], v.literals[1])
    if op == "squeeze":
        return x[0].reshape(shape)
    if op == "permute":
        return np.transpose(x[0], v.literals[1])
    if op == "select":
        return np.asarray(np.take(x[0], v.literals[2], axis=v.literals[1]))
    if op == "slice":
        _, dim, start, end, *step = v.literals
        place = [slice(None)] * x[0].ndim
        place[dim] = slice(start, end, *step)
        return np.asarray(x[0][tuple(place)])
    return None


def _plain(v: Value) -> bool:
    """Whether a binary op has no argument that changes its meaning."""
    if argument(v, 2, "alpha", 1) != 1 or argument(v, 2, "rounding_mode", None) is not None:
        return False
    return len(v.literals) >= 2 and all(isinstance(n, (Slot, bool, int, float)) for n in v.literals[:2])


def _numpy_type(dtype: str) -> type:
    if "float" in dtype:
        return float
    return bool if dtype == "bool" else int
