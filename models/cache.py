"""What softmax attention keeps of keys and values: as they are, in 16 bits, or as codes of 8 bits.

New tokens are rounded before they are attended to, as they will be when they are read from the cache: however a text is split
into calls, the numbers are the same.

Letters in tensor names
  B  batch     R  slots of a cache      S  key heads
  T  tokens    N  R + T                 D  head size
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

LARGEST = 127


@dataclass
class Codes:
    """Keys or values ``codes * scales``: a scale for each token and head, so that a value is off by half a scale at most."""

    codes: Tensor  # [B, R, S, D] int8, -127 to 127
    scales: Tensor  # [B, R, S] float32: the largest magnitude divided by 127


pytree.register_dataclass(Codes)

Kept = Tensor | Codes  # [B, R, S, D]


def empty(like: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype | None) -> Kept:
    """Returns a cache of zeros on the device of ``like``; ``dtype`` is a float type or int8, None that of ``like``.

    Raises ValueError for other types.
    """
    if dtype == torch.int8:
        return Codes(like.new_zeros(shape, dtype=dtype), like.new_zeros(shape[:3], dtype=torch.float32))
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"a cache of {dtype}: keys and values are kept as floats or as int8")
    return like.new_zeros(shape, dtype=dtype)


def slots(kept: Kept) -> int:
    return (kept.codes if isinstance(kept, Codes) else kept).shape[1]


def rounded(new_BTSD: Tensor, kept: Kept) -> Kept:
    """Returns tokens in the form in which a cache keeps them. NaN or infinity makes NaN of its token and head in codes."""
    if not isinstance(kept, Codes):
        return new_BTSD.to(kept.dtype)
    new_BTSD = new_BTSD.float()
    largest_BTS = new_BTSD.abs().amax(-1)
    scales_BTS = largest_BTS.clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    finite_BTS = largest_BTS < torch.inf
    codes = torch.where(finite_BTS.unsqueeze(-1), new_BTSD / scales_BTS.unsqueeze(-1), 0.0).round()
    return Codes(codes.to(torch.int8), torch.where(finite_BTS, scales_BTS, torch.nan))


def beside(kept: Kept, new: Kept, dtype: torch.dtype) -> Tensor:
    """Returns cached and new tokens as numbers, [B, N, S, D], in ``dtype`` if they are kept so, else in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    if isinstance(kept, Codes) and isinstance(new, Codes):
        return torch.cat([_numbers(kept), _numbers(new)], dim=1).to(wide)
    assert isinstance(kept, Tensor) and isinstance(new, Tensor)
    both = torch.cat([kept, new], dim=1)
    return both if kept.dtype == dtype else both.to(wide)


def put(kept: Kept, new: Kept, slots_BT: Tensor) -> Kept:
    """Returns the cache with new tokens in their slots."""
    if isinstance(kept, Codes) and isinstance(new, Codes):
        return Codes(_put(kept.codes, new.codes, slots_BT), _put(kept.scales, new.scales, slots_BT))
    assert isinstance(kept, Tensor) and isinstance(new, Tensor)
    return _put(kept, new, slots_BT)


def _numbers(kept: Codes) -> Tensor:
    return kept.codes.float() * kept.scales.unsqueeze(-1)


def _put(rows: Tensor, new: Tensor, slots_BT: Tensor) -> Tensor:
    places = slots_BT[(..., *[None] * (new.ndim - 2))].expand_as(new)
    return rows.scatter(1, places, new)
