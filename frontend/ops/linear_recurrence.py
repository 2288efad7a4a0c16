"""`spikingbrain::linear_recurrence`, the recurrence with matrix states: shape function and eager body."""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain.errors import OptionError, ShapeError
from spikingbrain.frontend.ops.checks import (
    require_axis,
    require_dtype,
    require_rank,
    require_shape,
    state_dtype,
    up,
)
from spikingbrain.models.recurrences import linear_recurrence as blockwise

_NAME = "linear_recurrence"


@torch.library.custom_op("spikingbrain::linear_recurrence", mutates_args=())
def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    erase: Tensor | None = None,
    predict: Tensor | None = None,
    bonus: Tensor | None = None,
    state: Tensor | None = None,
    decay_axis: str = "none",
    log_decay: bool = False,
    exclusive: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns o [B, T, H, V] and the last state [B, S, K, V] of

        S_t = a_t * S_(t-1) + erase_t (predict_t^T S_(t-1)) + k_t v_t^T
        o_t = S_t^T q_t,    or if exclusive    S_(t-1)^T q_t + (q_t . (bonus * k_t)) v_t

    q [B, T, H, K]; k, erase, predict [B, T, S, K]; v [B, T, S, V]; bonus [S, K]; state [B, S, K, V]. Head h reads state
    h // (H / S). a_t is ``decay``, or exp(decay) if ``log_decay``: [B, T, S] if ``decay_axis`` is "head", [B, T, S, K] if
    "key", [B, T, S, V] if "value"; no decay if "none". ``reverse``: time runs from T - 1 to 0. States and arithmetic are
    float32 (float64 for float64); o has the dtype of q.

    Raises:
        ShapeError: a shape or dtype does not fit the others.
        OptionError: an unknown axis, or options that do not go together.
    """
    check(q, k, v, decay, erase, predict, bonus, state, decay_axis, exclusive)
    return compute(q, k, v, decay, erase, predict, bonus, state, decay_axis, log_decay, exclusive, reverse)


def compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    erase: Tensor | None,
    predict: Tensor | None,
    bonus: Tensor | None,
    state: Tensor | None,
    decay_axis: str,
    log_decay: bool,
    exclusive: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Returns what the op does, block by block, in plain PyTorch that can be differentiated."""
    if decay is not None:
        decay = up(decay).exp() if log_decay else up(decay)

    def time(x: Tensor | None) -> Tensor | None:
        return x if x is None or not reverse else x.flip(1)

    o, last = blockwise.linear_recurrence(
        *(up(x.flip(1) if reverse else x) for x in (q, k, v)),
        decay=time(decay),
        decay_axis=decay_axis,
        erase=None if erase is None else time(up(erase)),
        predict=None if predict is None else time(up(predict)),
        bonus=None if bonus is None else up(bonus),
        state=state,
        exclusive=exclusive,
    )
    return (o.flip(1) if reverse else o).to(q.dtype).contiguous(), last.contiguous()


@linear_recurrence.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    erase: Tensor | None = None,
    predict: Tensor | None = None,
    bonus: Tensor | None = None,
    state: Tensor | None = None,
    decay_axis: str = "none",
    log_decay: bool = False,
    exclusive: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    check(q, k, v, decay, erase, predict, bonus, state, decay_axis, exclusive)
    batch, steps, heads, key_size = q.shape
    states, value_size = v.shape[2:]
    last = q.new_empty(batch, states, key_size, value_size, dtype=state_dtype(q))
    return q.new_empty(batch, steps, heads, value_size), last


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    erase: Tensor | None,
    predict: Tensor | None,
    bonus: Tensor | None,
    state: Tensor | None,
    decay_axis: str,
    exclusive: bool,
) -> None:
    """Raises ShapeError or OptionError unless the arguments fit together."""
    require_rank(_NAME, "k", k, "B, T, S, K")
    require_rank(_NAME, "v", v, "B, T, S, V")
    require_rank(_NAME, "q", q, "B, T, H, K")
    batch, steps, states, key_size = k.shape
    value_size = v.shape[3]
    require_shape(_NAME, "v", v, "B, T, S, V", (batch, steps, states, value_size))
    require_shape(_NAME, "q", q, "B, T, H, K", (batch, steps, q.shape[2], key_size))
    if states < 1 or q.shape[2] % states:
        raise ShapeError(
            f"{_NAME}: {q.shape[2]} heads read {states} states",
            why="each state serves the same number of heads",
            hint="q [B, T, H, K] and k [B, T, S, K] with S a divisor of H",
        )
    require_axis(_NAME, decay_axis, decay)
    if decay is not None:
        wide: dict[str, tuple[int, ...]] = {"head": (), "key": (key_size,), "value": (value_size,)}
        letters = {"head": "B, T, S", "key": "B, T, S, K", "value": "B, T, S, V"}[decay_axis]
        require_shape(_NAME, "decay", decay, letters, (batch, steps, states, *wide[decay_axis]))
    if (erase is None) != (predict is None):
        raise OptionError(f"{_NAME}: only one of erase and predict", hint="both, or neither")
    for name, tensor in (("erase", erase), ("predict", predict)):
        if tensor is not None:
            require_shape(_NAME, name, tensor, "B, T, S, K", (batch, steps, states, key_size))
    if bonus is not None:
        require_shape(_NAME, "bonus", bonus, "S, K", (states, key_size))
        if not exclusive:
            raise OptionError(f"{_NAME}: a bonus with an inclusive read", hint="exclusive=True")
    if state is not None:
        require_shape(_NAME, "state", state, "B, S, K, V", (batch, states, key_size, value_size))
    require_dtype(_NAME, q, state, k=k, v=v, decay=decay, erase=erase, predict=predict, bonus=bonus)
