"""Linear recurrences of single numbers: elementwise, and the selective scan of Mamba.

`linear_scan` cuts T steps into about sqrt(T) blocks and walks through all blocks at once, so that T steps take about
2 sqrt(T) operations on large tensors. Decays are factors and are only multiplied: zero and negative ones are exact.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from spikingbrain.models.recurrences.dtypes import wide

# Steps of the selective scan whose states [B, steps, C, N] are held at a time.
_CHUNK = 64


def linear_scan(
    decay: Tensor, update: Tensor, state: Tensor | None = None, log_decay: bool = False, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns h [B, T, C] and the last state [B, C] of h_t = a_t * h_(t-1) + update_t.

    decay, update [B, T, C]; state [B, C], zeros if None. a_t is ``decay``, or exp(decay) if ``log_decay``. ``reverse``: time
    runs from T - 1 to 0. States and arithmetic are float32 (float64 for float64); h has the dtype of update.
    """
    dtype = update.dtype
    decay, update = _wide(decay, reverse), _wide(update, reverse)
    decay = decay.exp() if log_decay else decay
    if state is None:
        state = update.new_zeros(update.shape[0], update.shape[2])
    steps = update.shape[1]
    if steps == 0:
        return torch.zeros_like(update, dtype=dtype), state.clone()
    size = math.isqrt(steps - 1) + 1
    padding = -steps % size
    a = torch.unflatten(F.pad(decay, (0, 0, 0, padding), value=1.0), 1, (-1, size))  # [B, blocks, size, C]
    b = torch.unflatten(F.pad(update, (0, 0, 0, padding)), 1, (-1, size))
    h, through = [b[:, :, 0]], [a[:, :, 0]]
    for i in range(1, size):
        h.append(torch.addcmul(b[:, :, i], a[:, :, i], h[-1]))
        through.append(a[:, :, i] * through[-1])
    starts = []
    for n in range(a.shape[1]):
        starts.append(state)
        state = torch.addcmul(h[-1][:, n], through[-1][:, n], state)
    carried = torch.stack(through, 2) * torch.stack(starts, 1).unsqueeze(2)
    out = (torch.stack(h, 2) + carried).flatten(1, 2)[:, :steps].to(dtype)
    return out.flip(1) if reverse else out, state


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns y [B, T, C] and the last state [B, C, N] of Mamba's recurrence: for each channel c and slot n,

        h_t = exp(dt_t[c] a[c, n]) h_(t-1) + dt_t[c] x_t[c] b_t[n],    y_t[c] = sum_n h_t[c, n] c_t[n]

    x, dt [B, T, C]; a [C, N]; b, c [B, T, N]; state [B, C, N], zeros if None. ``reverse``: time runs from T - 1 to 0. States
    and arithmetic are float32 (float64 for float64); y has the dtype of x.
    """
    dtype = x.dtype
    x, dt, b, c, a = *(_wide(t, reverse) for t in (x, dt, b, c)), _wide(a, False)
    if state is None:
        state = x.new_zeros(x.shape[0], *a.shape)
    if x.shape[1] == 0:
        return torch.zeros_like(x, dtype=dtype), state.clone()
    outputs = []
    for start in range(0, x.shape[1], _CHUNK):
        part = slice(start, start + _CHUNK)
        h, state = chunk_states(x[:, part], dt[:, part], a, b[:, part], state)
        outputs.append((h @ c[:, part].unsqueeze(-1)).squeeze(-1))
    y = torch.cat(outputs, 1).to(dtype)
    return y.flip(1) if reverse else y, state


def _wide(x: Tensor, reverse: bool) -> Tensor:
    """Returns ``x`` in the dtype of arithmetic, in the order of time."""
    x = x.to(wide(x.dtype))
    return x.flip(1) if reverse else x


def chunk_states(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the states [B, T, C, N] after each of a few steps of `selective_scan`, and the last."""
    factor = (dt.unsqueeze(-1) * a).exp()
    update = (dt * x).unsqueeze(-1) * b.unsqueeze(2)
    states = []
    for t in range(x.shape[1]):
        state = torch.addcmul(update[:, t], factor[:, t], state)
        states.append(state)
    return torch.stack(states, 1), state
