"""`spikingbrain::linear_recurrence`, the recurrence with matrix states: shape function, eager body and backward.

Without the rank-one part the backward is written in the op itself, so that whatever compiles the op compiles its backward
too. D_t, the gradient of S_t, is the recurrence D_t = q_t do_t^T + a_(t+1) * D_(t+1), run the other way; dv_t = D_t^T k_t is
its read, dk_t = D_t v_t the read of its transpose and dq_t = S_t do_t that of the transpose of S. The gradient of a decay is
a running sum where it is a logarithm (`of_log_decay`); of a factor, in a compiled graph with a known number of steps, see
`linear_recurrence_factors`. With the rank-one part it is written in the op too (`linear_recurrence_rank_one`), unless decays
scale columns or the number of steps is a symbol. The rest is `linear_recurrence_backward`, and all of it where a backend has a
kernel for that (`on_device`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from spikingbrain.errors import OptionError, ShapeError
from spikingbrain.frontend.ops.checks import (
    needed,
    require_axis,
    require_dtype,
    require_rank,
    require_shape,
    state_dtype,
    up,
)
from spikingbrain.frontend.ops.linear_recurrence_factors import exclusive_reads, of_factors
from spikingbrain.frontend.ops.linear_recurrence_rank_one import (
    by_recurrences,
    of_log_decay,
    per_query,
    summed,
)
from spikingbrain.frontend.ops.on_device import takes
from spikingbrain.models.recurrences.linear_recurrence import linear_recurrence as blockwise

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
    o, last = blockwise(
        q, k, v, decay, erase, predict, bonus, state, decay_axis, log_decay, exclusive, reverse
    )
    return o.contiguous(), last.contiguous()


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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.decay_axis, ctx.log_decay, ctx.exclusive, ctx.reverse = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, do: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, last = ctx.saved_tensors
    options = (ctx.decay_axis, ctx.log_decay, ctx.exclusive, ctx.reverse)
    wanted = needed(ctx, len(tensors))
    of_rank_one = tensors[4] is not None
    steps, device = tensors[1].shape[1], tensors[1].device.type
    known = isinstance(steps, int) and steps > 0
    on_kernel = takes("linear_recurrence_backward", device, do, dlast, *tensors, *options)
    # Op by op, outside of a graph, the explicit backward takes three fifths of the time of what is written here.
    of_factor = tensors[3] is not None and wanted[3] and not ctx.log_decay and not (known and _is_traced(do))
    if on_kernel or of_factor or (of_rank_one and (ctx.decay_axis == "value" or not known)):
        gradients = torch.ops.spikingbrain.linear_recurrence_backward(do, dlast, *tensors, *options)
    elif of_rank_one:
        q, k, v, decay, erase, predict, bonus, state = tensors
        gradients = by_recurrences(
            do, dlast, last, q, k, v, decay, erase, predict, bonus, state, *options, wanted[3]
        )
    else:
        q, k, v, decay, _, _, bonus, state = tensors
        gradients = _by_recurrences(do, dlast, last, q, k, v, decay, bonus, state, *options, wanted)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None, None, None


def _is_traced(x: Tensor) -> bool:
    """Returns whether a graph is made of what happens to ``x``, rather than numbers."""
    return type(x) is not Tensor


def _by_recurrences(
    do: Tensor,
    dlast: Tensor,
    last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    state: Tensor | None,
    axis: str,
    log: bool,
    exclusive: bool,
    reverse: bool,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of the op's eight tensors; that of a decay only if it is wanted."""
    dtype, of_decay_wanted = q.dtype, decay is not None and wanted[3]
    if of_decay_wanted:  # sums of many differences follow: dq and dk are wanted unrounded
        do, q, k, v = up(do), up(q), up(k), up(v)
        decay = None if decay is None else up(decay)
    groups = q.shape[2] // k.shape[2]
    turned = {"key": "value", "value": "key"}.get(axis, axis)

    def recur(
        q: Tensor, k: Tensor, v: Tensor, a: Tensor | None, s: Tensor | None, axis: str, back: bool
    ) -> Any:
        return torch.ops.spikingbrain.linear_recurrence(
            q, k, v, a, None, None, None, s, axis, log, exclusive, back
        )

    # D is a sum over queries: each gets a recurrence of its own.
    following = decay if decay is None or exclusive else _shifted(decay, 0.0 if log else 1.0, reverse)
    following = None if following is None else per_query(following, groups)
    end = dlast if groups == 1 else pad(dlast.unsqueeze(2), (0, 0, 0, 0, 0, groups - 1)).flatten(1, 2)
    dv, carried = recur(per_query(k, groups), q, do, following, end, axis, not reverse)
    dk, _ = recur(per_query(v, groups), do, q, following, end.mT.contiguous(), turned, not reverse)
    dv, dk = summed(dv, groups), summed(dk, groups)
    dq, _ = recur(do, v, k, decay, None if state is None else state.mT.contiguous(), turned, reverse)

    of_decay = of_state = of_bonus = None
    if of_decay_wanted and decay is not None and not log:
        s, d = (k.unsqueeze(3), v.unsqueeze(3)), (_by_state(q, groups), _by_state(do, groups))
        initial, final = torch.zeros_like(last) if state is None else state, dlast
        if not exclusive:
            d, final = exclusive_reads(d, final, reverse)
        if axis == "value":
            s, d, initial, final = s[::-1], d[::-1], initial.mT, final.mT
        a = decay.unsqueeze(-1) if axis == "head" else decay
        of_decay = torch.reshape(of_factors(a, s, d, initial, final, reverse), decay.shape)
    elif of_decay_wanted and decay is not None:
        if axis == "value":
            read, _ = recur(q, k, v, decay, state, axis, reverse)
            towards, away, at_end = summed(do * read, groups), v * dv, (last * dlast).sum(2)
        else:
            towards, away, at_end = summed(q * dq, groups), k * dk, (last * dlast).sum(3)
        if axis == "head":
            towards, away, at_end = towards.sum(-1), away.sum(-1), at_end.sum(-1)
        of_decay = of_log_decay(decay, towards, away, at_end, exclusive, reverse)
    if wanted[7]:
        if groups > 1:
            carried = torch.unflatten(carried, 1, (-1, groups)).sum(2)
        of_state = carried if exclusive or decay is None else _by_first(carried, decay, axis, log, reverse)
    if bonus is not None:
        weight = (do * per_query(v, groups)).sum(-1, keepdim=True)
        read_key = per_query(k * bonus, groups)
        dv = dv + summed((q * read_key).sum(-1, keepdim=True) * do, groups)
        dq = dq + weight * read_key
        of_read_key = summed(weight * q, groups)
        dk = dk + of_read_key * bonus
        of_bonus = (up(of_read_key) * up(k)).sum((0, 1)).to(bonus.dtype)
    dq, dk, dv = dq.to(dtype), dk.to(dtype), dv.to(dtype)
    return dq, dk, dv, None if of_decay is None else of_decay.to(dtype), None, None, of_bonus, of_state


def _by_state(x: Tensor, groups: int) -> Tensor:
    """[B, T, H, D] -> [B, T, S, G, D]"""
    return torch.unflatten(x, 2, (-1, groups))


def _shifted(decay: Tensor, one: float, reverse: bool) -> Tensor:
    """Returns the decay of the following step at each step, and none at the last."""
    end = torch.full_like(decay[:, :1], one)
    return torch.cat((end, decay[:, :-1]) if reverse else (decay[:, 1:], end), 1)


def _by_first(carried: Tensor, decay: Tensor, axis: str, log: bool, reverse: bool) -> Tensor:
    """Returns the gradient of the state from that of the first step's: [B, S, K, V]."""
    if decay.shape[1] == 0:
        return carried
    first = up(decay[:, -1] if reverse else decay[:, 0])
    first = first.exp() if log else first
    wide = {"head": (..., None, None), "key": (..., None), "value": (..., None, slice(None))}
    return carried * first[wide[axis]]


linear_recurrence.register_autograd(_backward, setup_context=_save)
