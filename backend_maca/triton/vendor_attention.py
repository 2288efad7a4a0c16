"""Attention over a window by mcFlashAttn: the function `flash_attn.flash_attn_func` of the vendor's package.

Its window (left, right) is what a query sees beside its own position, and with ``causal`` the last query is at the last key, as
in our op, since version 2.1; windows came later, so that a version with them counts so.
"""

from __future__ import annotations

import importlib
import inspect
import math
from typing import Any

import torch
from torch import Tensor

from spikingbrain.backend_maca.triton.vendor import differentiated
from spikingbrain.errors import MissingDependency

LARGEST_HEAD = 256


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    sinks: int,
    scale: float | None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> str | None:
    """Returns why mcFlashAttn does not take a call of `window_attention`, or None."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{str(q.dtype).removeprefix('torch.')}; mcFlashAttn computes on float16 and bfloat16"
    if key_positions is not None:
        return "keys with positions of their own; mcFlashAttn counts them"
    if sinks and window:
        return f"{sinks} sinks; mcFlashAttn has none"
    size, values = q.shape[3], v.shape[3]
    if isinstance(size, int) and isinstance(values, int):
        if size != values:
            return f"keys of {size} and values of {values} channels; mcFlashAttn has one size"
        if size > LARGEST_HEAD:
            return f"heads of {size}; mcFlashAttn holds {LARGEST_HEAD}"
    if any(isinstance(n, int) and n == 0 for n in (*q.shape, k.shape[1])):
        return "a tensor without elements"
    return None


def backward_refusal(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    sums: Tensor,
    window: int,
    sinks: int,
    scale: float | None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> str | None:
    """Returns why mcFlashAttn does not take a call of `window_attention_backward`, or None."""
    return refusal(q, k, v, window, sinks, scale, query_positions, key_positions)


def forward(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float | None, *_: None
) -> tuple[Tensor, Tensor]:
    """Returns what the op `window_attention` does."""
    o, log, *_ = _attend(q, k, v, window, scale, return_attn_probs=True)
    return o.contiguous(), (log.float() / math.log(2)).contiguous()


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    sums: Tensor,
    window: int,
    sinks: int,
    scale: float | None,
    *_: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what the op `window_attention_backward` does, by the library's backward behind another run of its forward."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made: Tensor = _attend(q, k, v, window, scale)
        return made

    dq, dk, dv = differentiated(run, [q, k, v], [do])
    assert dq is not None and dk is not None and dv is not None
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, **more: Any) -> Any:
    flash_attn_func = importlib.import_module("flash_attn").flash_attn_func
    if "window_size" not in inspect.signature(flash_attn_func).parameters:
        raise MissingDependency(
            "flash_attn_func of the package flash_attn has no window_size",
            hint="version 2.3 or later, or providers='attention=triton'",
        )
    seen = (window - 1, 0) if window else (-1, -1)
    return flash_attn_func(
        *(x.contiguous() for x in (q, k, v)), softmax_scale=scale, causal=True, window_size=seen, **more
    )
