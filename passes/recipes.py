"""How a stored weight is made from the model's tensors.

A recipe is a list of steps written as text (``"concat axis=0"``), so that it can stand in IR, in a manifest and in a
cache key. Passes append steps without ever holding weights; ``apply`` runs them with numpy when an artifact is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def concat(arrays: list[Array], axis: int) -> list[Array]:
    """Joins the source tensors along an axis."""
    return [np.concatenate(arrays, axis=axis)] if len(arrays) > 1 else arrays


def pack_columns(arrays: list[Array], block: int) -> list[Array]:
    """Packs ``[N, K]`` as ``[ceil(N / block), K, block]``: one column block is read front to back by a kernel.

    Columns beyond N are zero.
    """
    (matrix,) = arrays
    n, k = matrix.shape
    blocks = -(-n // block)
    if n % block:
        matrix = np.concatenate([matrix, np.zeros((blocks * block - n, k), matrix.dtype)])
    return [np.ascontiguousarray(matrix.reshape(blocks, block, k).transpose(0, 2, 1))]


STEPS: dict[str, Callable[..., list[Array]]] = {f.__name__: f for f in (concat, pack_columns)}


def apply(recipe: Sequence[str], sources: Sequence[Array]) -> Array:
    """Returns the stored tensor. Raises ValueError for an unknown step or a recipe that leaves several tensors."""
    arrays = list(sources)
    for text in recipe:
        name, *arguments = text.split()
        if name not in STEPS:
            raise ValueError(f"unknown recipe step {name!r}; known: {', '.join(STEPS)}")
        arrays = STEPS[name](arrays, **{k: int(v) for k, v in (a.split("=") for a in arguments)})
    if len(arrays) != 1:
        raise ValueError(f"recipe {list(recipe)} leaves {len(arrays)} tensors")
    return arrays[0]


def key(sources: Sequence[str], recipe: Sequence[str]) -> str:
    """Returns the name of a stored tensor: equal for equal content, readable in a listing."""
    return "+".join(sources) + "".join(f"|{step}" for step in recipe)
