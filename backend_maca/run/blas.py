"""Matrix products on a card: the plan's calls of mcblas through ctypes, or of NVIDIA's cublas, which has the same form.

The numbers of types and modes are CUDA's. Public bindings of mcblas use the same ones on a C500 for bf16, for the
compute type and the algorithm; those of f16, f32 and integers follow the same list and are not confirmed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spikingbrain.errors import MissingDependency, SpikingBrainError

OPERATIONS = {"N": 0, "T": 1}
TYPES = {"float32": 0, "float16": 2, "int8": 3, "int32": 10, "bfloat16": 14}
FLOAT32, EXACT_FLOAT32, INT32 = 68, 69, 72  # compute types; the second keeps TF32 out
DEFAULT_ALGORITHM = -1
MOST = (1 << 31) - 1  # of what the library takes as an int: sizes, batches and leading dimensions
SUFFIXES = {"mcblas": "", "cublas": "_v2"}  # of the functions that exist in two forms

_HANDLE, _POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong


class BlasError(SpikingBrainError):
    """Raised when a call of the matrix library fails, with the number that it returned."""


class Blas:
    """The library of a card, opened for the device that is current. Not for two threads at a time."""

    def __init__(self, path: str, prefix: str = "mcblas"):
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise MissingDependency(
                f"the matrix library {path} does not load",
                why=str(error),
                hint="providers='linear=own,matmul=own'",
            ) from error
        self._prefix, self._suffix = prefix, SUFFIXES[prefix]
        self._handle = ctypes.c_void_p()
        self._call("Create" + self._suffix, [_POINTER], ctypes.byref(self._handle))

    def close(self) -> None:
        """Gives back what the library holds."""
        self._call("Destroy" + self._suffix, [_HANDLE], self._handle)

    def multiply(
        self,
        step: Mapping[str, Any],
        addresses: Sequence[int],
        evaluate: Callable[[Any], int],
        stream: int = 0,
    ) -> None:
        """Puts a step of the plan into a stream; ``addresses`` of device memory are those of its three arguments."""
        m, n, k = (evaluate(size) for size in step["sizes"])
        batch = evaluate(step["batch"])
        if not (m and n and batch):
            return
        counts = (m, n, k, batch, *map(evaluate, step["leading"]))
        if max(counts) > MOST:
            raise BlasError(
                f"a matrix product of {m} x {k} by {k} x {n} cannot be asked for",
                why=f"the matrix library counts to {MOST}",
                hint="fewer rows at a time, or providers='linear=own,matmul=own'",
            )
        self._call("SetStream" + self._suffix, [_HANDLE, _POINTER], self._handle, stream)
        number = ctypes.c_int32 if step["compute"] == "int32" else ctypes.c_float
        one, before = number(1), number(1 if step["adds"] else 0)
        operands = []
        for address, dtype, leading, stride in zip(
            addresses, step["types"], step["leading"], step["strides"], strict=True
        ):
            # a library wants a leading dimension of at least 1 even where there is nothing to read
            operands.append([address, TYPES[dtype], max(1, evaluate(leading)), evaluate(stride)])
        x, y, c = (operand if batch > 1 else operand[:3] for operand in operands)
        takes = [_POINTER, _INT, _INT, _LONG] if batch > 1 else [_POINTER, _INT, _INT]
        compute = {"int32": INT32, "float32": EXACT_FLOAT32 if step["types"][0] == "float32" else FLOAT32}
        self._call(
            "GemmStridedBatchedEx" if batch > 1 else "GemmEx",
            [_HANDLE, *[_INT] * 5, _POINTER, *takes, *takes, _POINTER, *takes]
            + [_INT] * (3 if batch > 1 else 2),
            *(self._handle, *(OPERATIONS[o] for o in step["operations"]), m, n, k, ctypes.byref(one)),
            *(*x, *y, ctypes.byref(before), *c),
            *([batch] if batch > 1 else []),
            compute[step["compute"]],
            DEFAULT_ALGORITHM,
        )

    def _call(self, name: str, takes: Sequence[Any], *arguments: Any) -> None:
        try:
            function = getattr(self._library, self._prefix + name)
        except AttributeError:
            raise BlasError(f"the matrix library has no function {self._prefix}{name}") from None
        function.restype, function.argtypes = ctypes.c_int, list(takes)
        if status := function(*arguments):
            raise BlasError(f"{self._prefix}{name} failed", why=f"it returned {status}")
