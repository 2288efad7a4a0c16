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


def codes(arrays: list[Array], bits: int) -> list[Array]:
    """Rounds weights ``[N, K]`` to integers of their scales ``[N, G]`` or ``[N, G, 1]``, ties to even, K / G to a scale.

    Weights and scales take turns. The quotient is that of float32. Raises ValueError for a code that has more bits.
    """
    return [_codes(w, s, bits) for w, s in zip(arrays[::2], arrays[1::2], strict=True)]


def _codes(weight: Array, scale: Array, bits: int) -> Array:
    weight, scale = weight.astype(np.float32), scale.astype(np.float32)
    groups = weight.reshape(len(weight), scale[0].size, -1)
    rounded = np.rint(groups / scale.reshape(len(weight), -1, 1)).reshape(weight.shape)
    limits = np.iinfo(f"int{bits}")
    if rounded.size and not limits.min <= rounded.min() <= rounded.max() <= limits.max:
        raise ValueError(
            f"weight codes of {rounded.min():.0f} to {rounded.max():.0f} do not fit {bits} bits; compile the model anew"
        )
    integers: Array = rounded.astype(limits.dtype)
    return integers


def matrix(arrays: list[Array]) -> list[Array]:
    """Joins all axes but the first, of each tensor."""
    return [array.reshape(len(array), -1) for array in arrays]


def column(arrays: list[Array]) -> list[Array]:
    """Makes a column ``[N, 1]`` of N numbers in any shape, of each tensor."""
    return [array.reshape(-1, 1) for array in arrays]


def ones(arrays: list[Array]) -> list[Array]:
    """Makes a column of ones as long as a matrix, for each."""
    return [np.ones((len(array), 1), np.float32) for array in arrays]


def float32(arrays: list[Array]) -> list[Array]:
    """Widens half floats."""
    return [array.astype(np.float32) for array in arrays]


def transpose(arrays: list[Array]) -> list[Array]:
    """Swaps the last two axes."""
    (array,) = arrays
    return [np.ascontiguousarray(array.swapaxes(-1, -2))]


def stack(arrays: list[Array], block: int) -> list[Array]:
    """Puts matrices ``[E, N, K]`` below each other, each with zeros up to whole blocks: ``[E * ceil(N / block) * block, K]``."""
    (array,) = arrays
    e, n, k = array.shape
    padded = np.zeros((e, -(-n // block) * block, k), array.dtype)
    padded[:, :n] = array
    return [padded.reshape(-1, k)]


def lengthen(arrays: list[Array], to: int) -> list[Array]:
    """Puts -0.0 behind a bias ``[N]``, up to ``to`` of them: what every number stays the same with, 0.0 and -0.0 too."""
    (bias,) = arrays
    return [np.concatenate([bias, np.full(to - len(bias), -0.0, bias.dtype)])]


def pad_groups(arrays: list[Array], size: int, to: int) -> list[Array]:
    """Puts zeros behind every ``size`` channels of ``[N, K]``, up to ``to`` of them: ``[N, K / size * to]``."""
    (array,) = arrays
    padded = np.zeros((len(array), array.shape[1] // size, to), array.dtype)
    padded[:, :, :size] = array.reshape(len(array), -1, size)
    return [padded.reshape(len(array), -1)]


def pack_columns(arrays: list[Array], block: int) -> list[Array]:
    """Packs ``[..., N, K]`` as ``[..., ceil(N / block), K, block]``: one column block is read front to back by a kernel.

    Columns beyond N are zero.
    """
    (array,) = arrays
    *stack, n, k = array.shape
    blocks = -(-n // block)
    if n % block:
        array = np.concatenate([array, np.zeros((*stack, blocks * block - n, k), array.dtype)], axis=-2)
    return [np.ascontiguousarray(array.reshape(*stack, blocks, block, k).swapaxes(-1, -2))]


def pack_dot(
    arrays: list[Array], lanes: int, vectors: int, width: int, offset: int, multiple: int = 1
) -> list[Array]:
    """Packs codes ``[N, K]`` for dot products: ``[panels, steps, vectors, lanes * width]``.

    A panel is ``lanes * vectors`` columns, a step ``width`` neighbouring channels of each; there are a multiple of ``multiple``
    steps. Codes are stored with ``offset`` added and keep their type; columns and channels beyond the matrix hold the offset.
    """
    (codes,) = arrays
    plus = np.array(offset).astype(codes.dtype)
    return [_by_panels(codes, lanes, vectors, width, multiple, lambda steps: steps + plus)]


def pack_nibbles(
    arrays: list[Array], lanes: int, vectors: int, width: int, offset: int, multiple: int = 2
) -> list[Array]:
    """Packs codes of 4 bits as ``pack_dot`` does, the even steps in the low halves of bytes, the odd ones in the high halves.

    Raises ValueError for a code outside -8 .. 7.
    """
    (codes,) = arrays
    _check_nibbles(codes)

    def halves(steps: Array) -> Array:
        stored = steps.view(np.uint8) + np.uint8(offset)
        return (stored[:, ::2] & 15 | stored[:, 1::2] << 4).view(np.int8)

    return [_by_panels(codes, lanes, vectors, width, multiple, halves)]


def words(arrays: list[Array]) -> list[Array]:
    """Joins the last axes of packed codes ``[panels, steps, ...]`` and reads them as integers of 32 bits."""
    (array,) = arrays
    return [np.ascontiguousarray(array).reshape(*array.shape[:2], -1).view(np.int32)]


def pack_channels(
    arrays: list[Array], lanes: int, vectors: int, width: int, blocks: int, offset: int
) -> list[Array]:
    """Packs codes ``[N, K]`` channel by channel: ``[panels, channels, vectors / width, lanes * width]``.

    A panel is ``lanes * vectors`` columns. The last axis falls into ``blocks``; in each, the lanes of one vector lie together,
    then those of the next: interleaving ``width`` channels block by block makes vectors of ``width`` channels for each lane.
    Codes are stored with ``offset`` added; columns, and channels up to whole ``width``, beyond the matrix hold the offset.
    """
    (codes,) = arrays
    n, k = codes.shape
    panels, channels, registers = -(-n // (lanes * vectors)), -(-k // width) * width, vectors // width
    padded = np.zeros((panels * vectors * lanes, channels), codes.dtype)
    padded[:n, :k] = codes
    cut = padded.reshape(panels, registers, width, blocks, lanes // blocks, channels)
    stored = cut.transpose(0, 5, 1, 3, 2, 4).reshape(panels, channels, registers, lanes * width)
    return [np.ascontiguousarray(stored + np.array(offset).astype(codes.dtype))]


def pack_channel_nibbles(
    arrays: list[Array], lanes: int, vectors: int, width: int, blocks: int, offset: int
) -> list[Array]:
    """Packs codes of 4 bits as ``pack_channels`` does, even vectors in the low halves of bytes, odd ones in the high.

    Raises ValueError for a code outside -8 .. 7.
    """
    _check_nibbles(arrays[0])
    (packed,) = pack_channels([arrays[0].astype(np.uint8)], lanes, vectors, width, blocks, offset)
    return [np.ascontiguousarray(packed[:, :, ::2] & 15 | packed[:, :, 1::2] << 4).view(np.int8)]


def _check_nibbles(codes: Array) -> None:
    if codes.size and not -8 <= codes.min() <= codes.max() <= 7:
        raise ValueError(f"codes of 4 bits are -8 .. 7, got {codes.min()} .. {codes.max()}")


PIECE = 1 << 24  # codes packed at a time


def _by_panels(
    codes: Array, lanes: int, vectors: int, width: int, multiple: int, store: Callable[[Array], Array]
) -> Array:
    """Returns what ``store`` makes of ``[N, K]`` as ``[panels, steps, vectors, lanes * width]``, zeros beyond it.

    ``multiple`` divides the steps. A few panels at a time, so that packing takes little more memory than its result.
    """
    n, k = codes.shape
    block = lanes * vectors
    panels, steps = -(-n // block), -(-k // (width * multiple)) * multiple
    some = max(1, PIECE // max(1, block * steps * width))
    result: Array | None = None
    for first in range(0, max(panels, 1), some):
        rows = codes[first * block : (first + some) * block]
        padded = np.zeros((-(-len(rows) // block) * block, steps * width), codes.dtype)
        padded[: len(rows), :k] = rows
        cut = padded.reshape(-1, vectors, lanes, steps, width).transpose(0, 3, 1, 2, 4)
        piece = store(cut.reshape(-1, steps, vectors, lanes * width))
        if result is None:
            result = np.empty((panels, *piece.shape[1:]), piece.dtype)
        result[first : first + len(piece)] = piece
    assert result is not None  # one piece at least
    return result


STEPS: dict[str, Callable[..., list[Array]]] = {
    f.__name__: f
    for f in (
        concat,
        codes,
        matrix,
        column,
        ones,
        float32,
        transpose,
        stack,
        lengthen,
        pad_groups,
        pack_columns,
        pack_dot,
        pack_nibbles,
        words,
        pack_channels,
        pack_channel_nibbles,
    )
}


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
