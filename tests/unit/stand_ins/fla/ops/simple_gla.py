from __future__ import annotations

from typing import Any

from torch import Tensor

from fla.ops.naive import attend, check


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    head_first: bool = True,
) -> Any:
    """As in old versions: the time axis is the third unless ``head_first`` is False."""
    assert not head_first, "[B, H, T, .] was asked for"
    check(q, k, v, initial_state)
    assert g.shape == q.shape[:3]
    o, last = attend(q, k, v, initial_state, q.shape[-1] ** -0.5 if scale is None else scale, g.unsqueeze(-1))
    return o, last if output_final_state else None


def chunk_simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **named: Any) -> Any:
    assert g.isfinite().all(), "sums of gates are subtracted from each other"
    assert "head_first" not in named, "head_first has been removed"
    return fused_recurrent_simple_gla(q, k, v, g, **named, head_first=False)
