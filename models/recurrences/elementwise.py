"""Recurrences of single numbers: HGRN, RG-LRU and the selective scan of Mamba."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spikingbrain.models.recurrences import scan
from spikingbrain.models.recurrences.dtypes import common, wide

# The exponent of Griffin's gate: a_t = a ** (8 r_t).
_SHARPNESS = 8.0


def hgrn(
    x: Tensor, g: Tensor, initial_state: Tensor | None = None, output_final_state: bool = False
) -> tuple[Tensor, Tensor | None]:
    """HGRN: h_t = exp(g_t) h_(t-1) + x_t. x, g [B, T, D]; returns h [B, T, D] and, if wanted, the last [B, D]."""
    return _run(g, x, True, initial_state, output_final_state)


def rg_lru(
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    parameter: Tensor,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The real-gated linear recurrent unit of Griffin: h_t = a_t h_(t-1) + sqrt(1 - a_t^2) i_t x_t.

    log a_t = -8 softplus(parameter) r_t, with the gates i, r [B, T, D] between 0 and 1 and parameter [D]. Where ``reset``
    [B, T] is true a text begins: a_t = 0, and x_t enters unscaled. Returns h [B, T, D] and, if wanted, the last [B, D].
    """
    log_a = -_SHARPNESS * F.softplus(parameter) * recurrence_gate
    decay, multiplier = log_a.exp(), (-torch.expm1(2 * log_a)).sqrt()
    if reset is not None:
        decay = decay.masked_fill(reset.unsqueeze(-1), 0.0)
        multiplier = multiplier.masked_fill(reset.unsqueeze(-1), 1.0)
    h, last = _run(decay, multiplier * input_gate * x, False, initial_state, output_final_state)
    return h.to(x.dtype), last


def mamba(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Mamba: h_t = exp(dt_t a) h_(t-1) + dt_t x_t b_t^T, y_t = h_t c_t + d x_t, for each channel.

    x, dt [B, T, D]; a [D, N], negative; b, c [B, T, N]; d [D]. Returns y [B, T, D] and, if wanted, the state [B, D, N].
    """
    operands = [x, dt, a, b, c]
    dtype = common(*operands)
    x_, dt_, a_, b_, c_ = (operand.to(dtype) for operand in operands)
    y, last = scan.selective_scan(x_, dt_, a_, b_, c_, _state(initial_state, dtype))
    y = y if d is None else y + d * x
    return y.to(x.dtype), last if output_final_state else None


def _run(
    decay: Tensor, update: Tensor, log: bool, initial_state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    dtype = common(decay, update)
    h, last = scan.linear_scan(decay.to(dtype), update.to(dtype), _state(initial_state, dtype), log)
    return h.to(update.dtype), last if output_final_state else None


def _state(state: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if state is None else state.to(wide(dtype))
