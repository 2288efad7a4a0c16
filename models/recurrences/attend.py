"""What the recurrences with queries, keys and values have in common: scale, dtypes, which states come and go."""

from __future__ import annotations

from torch import Tensor

from spikingbrain.models.recurrences import linear_recurrence
from spikingbrain.models.recurrences.dtypes import common, wide


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    decay_axis: str = "none",
    *,
    erase: Tensor | None = None,
    predict: Tensor | None = None,
    bonus: Tensor | None = None,
    exclusive: bool = False,
    reverse: bool = False,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns the outputs [B, T, H, V] in the dtype of v, and the last state if wanted, else None.

    ``decay`` is a logarithm. ``scale`` multiplies the queries; K ** -0.5 if None. Operands of different dtypes meet in the
    widest of them: a float32 gate beside bfloat16 keys is not rounded.
    """
    dtype, narrow = common(q, k, v, decay, erase, predict, bonus), v.dtype
    q = q.to(dtype) * (k.shape[-1] ** -0.5 if scale is None else scale)
    k, v = k.to(dtype), v.to(dtype)
    decay, erase, predict, bonus = (
        None if x is None else x.to(dtype) for x in (decay, erase, predict, bonus)
    )
    state = None if initial_state is None else initial_state.to(wide(dtype))
    o, last = linear_recurrence.linear_recurrence(
        q, k, v, decay, erase, predict, bonus, state, decay_axis, True, exclusive, reverse
    )
    return o.to(narrow), last if output_final_state else None
