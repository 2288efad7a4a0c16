"""`spikingbrain::linear_scan`, the elementwise recurrence: shape function, eager body and backward.

The backward is written in the op itself, run the other way, so that whatever compiles the op compiles its backward too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikingbrain.frontend.ops.checks import (
    needed,
    require_dtype,
    require_rank,
    require_shape,
    state_dtype,
    up,
)
from spikingbrain.models.recurrences.scan import linear_scan as blockwise

_NAME = "linear_scan"


@torch.library.custom_op("spikingbrain::linear_scan", mutates_args=())
def linear_scan(
    decay: Tensor,
    update: Tensor,
    state: Tensor | None = None,
    log_decay: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns h [B, T, C] and the last state [B, C] of h_t = a_t * h_(t-1) + update_t.

    decay, update [B, T, C]; state [B, C], zeros if None. a_t is ``decay``, or exp(decay) if ``log_decay``. ``reverse``: time
    runs from T - 1 to 0. States and arithmetic are float32 (float64 for float64); h has the dtype of update.

    Raises:
        ShapeError: a shape or dtype does not fit the others.
    """
    check(decay, update, state)
    h, last = blockwise(decay, update, state, log_decay, reverse)
    return h.contiguous(), last.contiguous()


@linear_scan.register_fake
def _(
    decay: Tensor,
    update: Tensor,
    state: Tensor | None = None,
    log_decay: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    check(decay, update, state)
    batch, steps, width = update.shape
    return update.new_empty(batch, steps, width), update.new_empty(batch, width, dtype=state_dtype(update))


def check(decay: Tensor, update: Tensor, state: Tensor | None) -> None:
    """Raises ShapeError unless the arguments fit together."""
    require_rank(_NAME, "update", update, "B, T, C")
    require_shape(_NAME, "decay", decay, "B, T, C", update.shape)
    if state is not None:
        require_shape(_NAME, "state", state, "B, C", (update.shape[0], update.shape[2]))
    require_dtype(_NAME, update, state, decay=decay)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    decay, _, state, ctx.log_decay, ctx.reverse = inputs
    ctx.save_for_backward(decay, state, output[0])


def _backward(ctx: Any, dh: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the gradients, from D_t = dh_t + a_(t+1) * D_(t+1): D of update, D_t * h_(t-1) of a_t, a_1 * D_1 of the state."""
    decay, state, h = ctx.saved_tensors
    of_a, _, of_s, _, _ = needed(ctx, 5)
    if decay.shape[1] == 0:
        return torch.zeros_like(decay), torch.zeros_like(decay), dlast if of_s else None, None, None
    # Behind the last step, where the gradient of the last state enters, stands one more factor: 1.
    one = torch.full_like(decay[:, :1], 0.0 if ctx.log_decay else 1.0)
    if ctx.reverse:
        following, first = torch.cat((one, decay[:, :-1]), 1), decay[:, -1]
    else:
        following, first = torch.cat((decay[:, 1:], one), 1), decay[:, 0]
    of_update, carried = torch.ops.spikingbrain.linear_scan(
        following, dh, dlast, ctx.log_decay, not ctx.reverse
    )
    of_decay = of_state = None
    if of_a:
        start = torch.zeros_like(h[:, :1]) if state is None else state.to(h.dtype).unsqueeze(1)
        previous = torch.cat((h[:, 1:], start) if ctx.reverse else (start, h[:, :-1]), 1)
        of_decay = previous * of_update
        of_decay = of_decay * decay.exp() if ctx.log_decay else of_decay
    if of_s:
        of_state = carried * up(first.exp() if ctx.log_decay else first)
    return of_decay, of_update, of_state, None, None


linear_scan.register_autograd(_backward, setup_context=_save)
