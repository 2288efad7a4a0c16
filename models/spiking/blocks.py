"""Weight blocks that need not be read: a silent channel's weights are multiplied by nothing.

Weights of one byte lie row by row, a row for each output and the C channels in it, each row at the start of a block. For one
token (decode), a block of B bytes is B neighbouring channels of a row, and is skipped if all of them are silent; the last block
of a row may be shorter. What holds for one row holds for all, so that the share of blocks skipped is that of a row's blocks.

Channels can be put in any order before compiling (weights are permuted, outputs stay). Here they are ordered by how often they
fired in the first half of the tokens, and the shares, in both orders, are those of the second half: an order has to hold for
tokens that it has not seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spikingbrain.models.spiking.errors import SpikingError
from spikingbrain.models.spiking.observe import LayerCounts

BLOCKS = (32, 64, 128)  # bytes: half a cache line of a CPU, one, and the read of a GPU's warp


@dataclass(frozen=True)
class Skipped:
    """Blocks of so many bytes of all rows of layers that share an input, over the tokens looked at.

    Attributes:
        size: bytes of a block.
        blocks: blocks in all, rows x blocks of a row x tokens.
        as_is: those skipped with channels in the model's order.
        ordered: those skipped with channels ordered by activity.
    """

    size: int
    blocks: int
    as_is: int
    ordered: int


def skipped(seen: LayerCounts, size: int) -> Skipped:
    """Returns how many blocks are skipped. Raises SpikingError for fewer than two tokens."""
    active = seen.counts != 0
    if active.shape[0] < 2:
        raise SpikingError("an order of channels from one token", where=seen.name, hint="two tokens or more")
    half = active.shape[0] // 2
    first, second = active[:half], active[half:]
    order = first.sum(0).argsort(descending=True, stable=True)
    as_is, blocks = silent_blocks(second, size)
    ordered, _ = silent_blocks(second[:, order], size)
    return Skipped(size, blocks * seen.outputs, as_is * seen.outputs, ordered * seen.outputs)


def skipped_in_all(inputs: Iterable[LayerCounts], sizes: Sequence[int] = BLOCKS) -> list[Skipped]:
    """Returns the sums over all inputs, one for each size of a block."""
    inputs = list(inputs)
    sums = []
    for size in sizes:
        parts = [skipped(seen, size) for seen in inputs]
        sums.append(
            Skipped(
                size,
                sum(p.blocks for p in parts),
                sum(p.as_is for p in parts),
                sum(p.ordered for p in parts),
            )
        )
    return sums


def silent_blocks(active: Tensor, size: int) -> tuple[int, int]:
    """Returns the silent blocks of ``active`` [tokens, C], and all blocks."""
    tokens, channels = active.shape
    padded = torch.nn.functional.pad(active, (0, -channels % size))
    blocks = padded.view(tokens, -1, size).any(-1)
    return int((~blocks).sum()), blocks.numel()
