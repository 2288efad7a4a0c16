"""The state before the first call, as an artifact keeps it: one number for each tensor, and a block where it holds others.

Most states begin empty. What a model has seen before the first token, such as learned sinks, fills whole memories and the
first slots of caches; only these are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spikingbrain.errors import CompileError


def initial_values(
    fields: Sequence[dict[str, Any]], values: Sequence[Tensor]
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Returns the fields with how they begin, and the blocks to store by field name.

    A field gets ``fill``, the value everywhere but in its block, and if it has one ``block``, the index where it begins.
    Blocks have size 1 along dynamic dimensions: they hold for each entry. Raises CompileError if the entries differ.
    """
    described, blocks = [], {}
    for field, value in zip(fields, values, strict=True):
        value = value.detach()
        # a cache fills from the front
        fill = value.reshape(-1)[-1] if value.numel() else value.new_zeros(())
        beginning: dict[str, Any] = {"fill": fill.item()}
        if not bool((value == fill).all()):
            for axis, size in enumerate(field["shape"]):
                if isinstance(size, str):
                    value = _the_entry(value, axis, field["name"])
            beginning["block"], blocks[field["name"]] = _block(value, fill)
        described.append({**field, **beginning})
    return described, blocks


def _the_entry(value: Tensor, axis: int, name: str) -> Tensor:
    """Returns the first of entries that are all alike, size 1 along the axis."""
    first = value.narrow(axis, 0, 1)
    if value.is_floating_point():  # a model's product of several rows may round each differently
        largest = float(value.abs().nan_to_num(0, 0).max())
        rounding = torch.finfo(value.dtype).eps ** 0.5 * largest
        alike = torch.allclose(value, first.expand_as(value), rtol=0, atol=rounding, equal_nan=True)
    else:
        alike = torch.equal(value, first.expand_as(value))
    if not alike:
        raise CompileError(
            f"state tensor {name} begins with other values in each entry of axis {axis}",
            why="the size of that axis is dynamic, so a fresh state of another size would have nothing to begin with",
            hint="pass the state as it is before the first token, or give the axis a fixed size",
        )
    return first


def _block(value: Tensor, fill: Tensor) -> tuple[list[int], Tensor]:
    """Returns the smallest block that holds all values other than ``fill``, and where it begins."""
    others, starts = value != fill, []
    for axis in range(value.ndim):
        places = others.movedim(axis, 0).reshape(others.shape[axis], -1).any(1).nonzero()
        first, last = int(places[0]), int(places[-1])
        starts.append(first)
        value = value.narrow(axis, first, last - first + 1)
    return starts, value
