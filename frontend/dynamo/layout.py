"""Which order of axes makes a tensor contiguous: compiled regions read and write plain row-major memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true


def memory_order(value: torch.Tensor) -> tuple[int, ...] | None:
    """Returns the permutation of axes under which a (fake) tensor is contiguous, or None if there is none.

    The identity is returned as ``()``. None stands for overlapping or gappy memory, as of expanded or sliced tensors.
    """
    shape, stride = value.shape, value.stride()
    axes = [d for d in range(len(shape)) if not _is(shape[d], 1)]
    ones = [d for d in range(len(shape)) if _is(shape[d], 1)]
    if _is_contiguous(shape, stride, axes):
        return ()
    by_stride = sorted(axes, key=lambda d: _hint(stride[d]), reverse=True)
    if not _is_contiguous(shape, stride, by_stride):
        return None
    return (*ones, *by_stride)


def inverse(order: Sequence[int]) -> list[int]:
    """Returns the permutation that undoes ``order``."""
    undone = [0] * len(order)
    for position, axis in enumerate(order):
        undone[axis] = position
    return undone


def _is_contiguous(shape: Sequence[Any], stride: Sequence[Any], axes: Sequence[int]) -> bool:
    expected: Any = 1
    for d in reversed(axes):
        if not _is(stride[d], expected):
            return False
        expected = expected * shape[d]
    return True


def _is(a: Any, b: Any) -> bool:
    return bool(statically_known_true(a == b))


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return 0 if hint is None else int(hint)
