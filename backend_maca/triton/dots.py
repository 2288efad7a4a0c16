"""The type in which dots take their operands, and how many of them at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spikingbrain.backend_maca.triton.device import INTERPRETED

DOTS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    # the interpreter keeps bfloat16 as bits, and would multiply those
    torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16,
}


def tile(size: int, most: int) -> int:
    """Returns the columns of a block: the least power of two that holds ``size``, 16 at least and ``most`` at most."""
    power: int = triton.next_power_of_2(size)
    return min(most, max(16, power))
