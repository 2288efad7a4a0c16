from __future__ import annotations

from typing import Any

from torch import Tensor

from fla.ops.naive import attend, check


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Any:
    check(q, k, v, initial_state)
    assert g.shape == k.shape and g.isfinite().all(), "sums of gates are subtracted from each other"
    o, last = attend(q, k, v, initial_state, q.shape[-1] ** -0.5 if scale is None else scale, g)
    return o, last if output_final_state else None


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    check(q, k, v, initial_state)
    assert gk is None or gk.shape == k.shape
    assert gv is None or gv.shape == v.shape
    o, last = attend(q, k, v, initial_state, q.shape[-1] ** -0.5 if scale is None else scale, gk, gv)
    return o, last if output_final_state else None
