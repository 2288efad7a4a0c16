"""Texts of different lengths, one after another in one tensor: what `cu_seqlens` means in fla and flash-attn.

``cu_seqlens`` [N + 1] holds where each text begins and, last, where all end. Here they are taken apart into rows of one length,
zeros behind the shorter ones, and put together again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def lengths_of(cu_seqlens: Tensor) -> Tensor:
    """Returns the length of each text [N]."""
    return cu_seqlens[1:] - cu_seqlens[:-1]


def longest_of(cu_seqlens: Tensor) -> int:
    """Returns the greatest length, a number that depends on values: a compiled graph ends here."""
    return int(lengths_of(cu_seqlens).max())


def positions_of(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Returns for each token which text it is in and its place there, both [total]."""
    token = torch.arange(total, device=cu_seqlens.device)
    text = torch.bucketize(token, cu_seqlens[1:], right=True).clamp(max=cu_seqlens.shape[0] - 2)
    return text, token - cu_seqlens[text]


def apart(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Takes x [total, ...] apart into [N, longest, ...]."""
    step = torch.arange(longest, device=x.device)
    token = (cu_seqlens[:-1, None] + step).clamp(max=max(x.shape[0] - 1, 0))
    live = step < lengths_of(cu_seqlens)[:, None]
    return x[token].masked_fill(~live.view(*live.shape, *[1] * (x.ndim - 1)), 0)


def together(x: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """The inverse: [N, longest, ...] becomes [total, ...]."""
    text, place = positions_of(cu_seqlens, total)
    return x[text, place]


def each_text(
    run: Callable[..., tuple[Tensor, Any]], cu_seqlens: Tensor | None, *operands: Tensor | None
) -> tuple[Tensor, Any]:
    """Returns ``run(*operands)``, whose first result has a row for each text if the operands [1, total, ...] are packed.

    ``run`` must not mind zeros behind a text: for a recurrence, zeros as key, value and log decay change nothing.
    """
    if cu_seqlens is None:
        return run(*operands)
    longest = longest_of(cu_seqlens)
    rows = (None if x is None else apart(x.squeeze(0), cu_seqlens, longest) for x in operands)
    result, rest = run(*rows)
    total = next(x.shape[1] for x in operands if x is not None)
    return together(result, cu_seqlens, total).unsqueeze(0), rest


def unpacking(attention_mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Returns where the ones of a mask [B, T] are in the flat text, the ``cu_seqlens`` of its rows, and the greatest length."""
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = torch.nonzero(attention_mask.flatten()).flatten()
    return indices, cu_seqlens_of(lengths), int(lengths.max())


def cu_seqlens_of(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def lengths_from_mask(mask: Tensor) -> Tensor:
    """Returns how many ones each row of a mask [B, T] has."""
    return mask.sum(-1, dtype=torch.int32)


def cu_seqlens_from_mask(mask: Tensor) -> Tensor:
    return cu_seqlens_of(lengths_from_mask(mask))


def position_ids(cu_seqlens: Tensor) -> Tensor:
    """Returns each token's place in its text [total]."""
    return positions_of(cu_seqlens, int(cu_seqlens[-1]))[1]


def sequence_ids(cu_seqlens: Tensor) -> Tensor:
    """Returns the number of each token's text [total]."""
    return positions_of(cu_seqlens, int(cu_seqlens[-1]))[0]
