"""Where a step of a counted loop reads and writes: accesses at positions that move evenly from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from spikingbrain.frontend.recurrences.positions import (
    Known,
    Position,
    Ramp,
    Spot,
    count,
    number,
    tensor_of,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Access:
    """A place that one step reads or writes: ``width`` entries of axis ``dim`` of ``tensor``, from a position on.

    ``source``, of a write: what is written, once it is expanded to ``expanded``; in the order of the place's elements.
    """

    tensor: fx.Node
    dim: int
    position: Position
    width: int = 1
    source: fx.Node | None = None
    expanded: tuple[int, ...] = ()

    def shape(self) -> list[int]:
        """Returns the shape of the place, without ``dim`` if that is one entry wide."""
        sizes = list(tensor_of(self.tensor).shape)
        sizes[self.dim : self.dim + 1] = [self.width] if self.width > 1 else []
        return sizes


def read(node: fx.Node, known: Mapping[fx.Node, Known]) -> Access | None:
    """Returns what a node reads at a position that moves, None where it is no such read."""
    reader = _READS.get(node.target)
    found = reader(node, known) if reader else None
    return found if found and found.position.stride else None


def write(node: fx.Node, known: Mapping[fx.Node, Known]) -> Access | None:
    """Returns where and what a node writes at a position that moves, None where it is no such write."""
    writer = _WRITES.get(node.target)
    found = writer(node, known) if writer else None
    return found if found and found.position.stride else None


def _index_select(node: fx.Node, known: Mapping[fx.Node, Known]) -> Access | None:
    tensor, dim, index = node.args
    at = number(index, known)
    return Access(tensor, _axis(tensor, dim), at) if at and count(index) == 1 else None


def _select(node: fx.Node, known: Mapping[fx.Node, Known]) -> Access | None:
    tensor, dim, index = node.args
    at = number(index, known)
    return Access(tensor, _axis(tensor, dim), at) if at else None


def _slice(node: fx.Node, known: Mapping[fx.Node, Known]) -> Access | None:
    tensor, *window = node.args
    found = _window(window, known)
    return Access(tensor, _axis(tensor, window[0]), *found) if found else None


def _narrow(node: fx.Node, known: Mapping[fx.Node, Known]) -> Access | None:
    tensor, dim, start, width = node.args
    at = number(start, known)
    return Access(tensor, _axis(tensor, dim), at, width) if at and type(width) is int else None


def _gather(node: fx.Node, known: Mapping[fx.Node, Known]) -> Access | None:
    tensor, dim, index, *_ = node.args
    at = number(index, known)
    axis = _axis(tensor, dim)
    if at is None or not _is_row(tensor_of(index).shape, tensor_of(tensor).shape, axis):
        return None
    return Access(tensor, axis, at)


def _index(node: fx.Node, known: Mapping[fx.Node, Known]) -> Access | None:
    tensor, indices = node.args
    found = _indexed(tensor, indices, known)
    return Access(tensor, *found[:2]) if found else None


def _index_copy(node: fx.Node, known: Mapping[fx.Node, Known]) -> Access | None:
    tensor, dim, index, source = node.args
    at = number(index, known)
    if at is None or count(index) != 1:
        return None
    return Access(tensor, _axis(tensor, dim), at, 1, source, tuple(tensor_of(source).shape))


def _index_put(node: fx.Node, known: Mapping[fx.Node, Known]) -> Access | None:
    tensor, indices, source, *accumulate = node.args
    found = _indexed(tensor, indices, known)
    return Access(tensor, *found[:2], 1, source, found[2]) if found and not any(accumulate) else None


def _scatter(node: fx.Node, known: Mapping[fx.Node, Known]) -> Access | None:
    tensor, dim, index, source = node.args
    at, axis = number(index, known), _axis(tensor, dim)
    shape = tensor_of(index).shape
    if at is None or not _is_row(shape, tensor_of(tensor).shape, axis) or tensor_of(source).shape != shape:
        return None
    return Access(tensor, axis, at, 1, source, tuple(shape))


def _select_scatter(node: fx.Node, known: Mapping[fx.Node, Known]) -> Access | None:
    tensor, source, dim, index = node.args
    at = number(index, known)
    return Access(tensor, _axis(tensor, dim), at, 1, source, tuple(tensor_of(source).shape)) if at else None


def _slice_scatter(node: fx.Node, known: Mapping[fx.Node, Known]) -> Access | None:
    tensor, source, *window = node.args
    found = _window(window, known)
    if found is None:
        return None
    return Access(tensor, _axis(tensor, window[0]), *found, source, tuple(tensor_of(source).shape))


def _where(node: fx.Node, known: Mapping[fx.Node, Known]) -> Access | None:
    mask, source, tensor = node.args
    spot = known.get(mask)
    if not isinstance(spot, Spot) or not isinstance(tensor, fx.Node) or not isinstance(source, fx.Node):
        return None
    shape, masked = list(tensor_of(tensor).shape), list(tensor_of(mask).shape)
    masked = [1] * (len(shape) - len(masked)) + masked
    axes = [i for i, size in enumerate(masked) if size > 1]
    if len(masked) != len(shape) or len(axes) != 1 or masked[axes[0]] != shape[axes[0]]:
        return None
    expanded = [*shape]
    expanded[axes[0]] = 1
    given = [1] * (len(shape) - tensor_of(source).dim()) + list(tensor_of(source).shape)
    if len(given) != len(shape) or given[axes[0]] != 1:
        return None
    return Access(tensor, axes[0], spot.position, 1, source, tuple(expanded))


def _window(window: Sequence[Any], known: Mapping[fx.Node, Known]) -> tuple[Position, int] | None:
    """Returns where a slice of a fixed width begins, and the width."""
    if len(window) < 3:
        return None
    _, start, stop, *step = window
    first, end = number(start, known), number(stop, known)
    if first is None or end is None or first.stride != end.stride or step not in ([], [1]):
        return None
    width = end.offset - first.offset
    return (first, width) if width > 0 else None


def _indexed(
    tensor: fx.Node, indices: Sequence[Any], known: Mapping[fx.Node, Known]
) -> tuple[int, Position, tuple[int, ...]] | None:
    """Returns axis and position of ``tensor[indices]``, and the shape of what is read there.

    One index is a position; others may count through all of their axes.
    """
    sizes = list(tensor_of(tensor).shape)
    axes = [i for i, index in enumerate(indices) if index is not None]
    kinds = {axis: known.get(indices[axis]) for axis in axes}
    moving = [axis for axis, kind in kinds.items() if isinstance(kind, Position)]
    if len(moving) != 1 or axes != list(range(axes[0], axes[-1] + 1)) or count(indices[moving[0]]) != 1:
        return None
    shapes = [tensor_of(indices[axis]).shape for axis in axes]
    joined: list[int] = list(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    last = -1
    for axis, shape in zip(axes, shapes, strict=True):
        kind = kinds[axis]
        if axis == moving[0]:
            continue
        if not isinstance(kind, Ramp) or kind.start != 0 or shape.numel() != sizes[axis]:
            return None
        if shape.numel() > 1:
            place = next(i for i, size in enumerate(shape) if size > 1) + len(joined) - len(shape)
            if place <= last:
                return None
            last = place
    position = kinds[moving[0]]
    assert isinstance(position, Position)
    return moving[0], position, (*sizes[: axes[0]], *joined, *sizes[axes[-1] + 1 :])


def _is_row(index: Sequence[int], sizes: Sequence[int], axis: int) -> bool:
    return list(index) == [1 if i == axis else size for i, size in enumerate(sizes)]


def _axis(tensor: fx.Node, dim: int) -> int:
    return dim % tensor_of(tensor).dim()


_Finder = Callable[[fx.Node, Mapping[fx.Node, Known]], Access | None]
_READS: Mapping[Any, _Finder] = {
    aten.index_select.default: _index_select,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.gather.default: _gather,
    aten.index.Tensor: _index,
}
_WRITES: Mapping[Any, _Finder] = {
    aten.index_copy.default: _index_copy,
    aten.index_put.default: _index_put,
    aten.scatter.src: _scatter,
    aten.select_scatter.default: _select_scatter,
    aten.slice_scatter.default: _slice_scatter,
    aten.where.self: _where,
}
