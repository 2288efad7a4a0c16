"""Linear recurrences of single numbers: elementwise, and the selective scan of Mamba.

`linear_scan` cuts T steps into about sqrt(T) blocks and walks through all blocks at once, so that T steps take about
2 sqrt(T) operations on large tensors. Decays are factors and are only multiplied: zero and negative ones are exact.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Steps of the selective scan whose states [B, steps, C, N] are held at a time.
_CHUNK = 64


def linear_scan(decay: Tensor, update: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns h [B, T, C] and the last state [B, C] of h_t = decay_t * h_(t-1) + update_t.

    decay, update [B, T, C]; state [B, C], zeros if None. float32 or float64.
    """
    if state is None:
        state = torch.zeros_like(update[:, :0].sum(1))
    steps = update.shape[1]
    if steps == 0:
        return torch.zeros_like(update), state.clone()
    size = math.isqrt(steps - 1) + 1
    padding = -steps % size
    a = F.pad(decay, (0, 0, 0, padding), value=1.0).unflatten(1, (-1, size))  # [B, blocks, size, C]
    b = F.pad(update, (0, 0, 0, padding)).unflatten(1, (-1, size))
    h, through = [b[:, :, 0]], [a[:, :, 0]]
    for i in range(1, size):
        h.append(torch.addcmul(b[:, :, i], a[:, :, i], h[-1]))
        through.append(a[:, :, i] * through[-1])
    starts = []
    for n in range(a.shape[1]):
        starts.append(state)
        state = torch.addcmul(h[-1][:, n], through[-1][:, n], state)
    carried = torch.stack(through, 2) * torch.stack(starts, 1).unsqueeze(2)
    return (torch.stack(h, 2) + carried).flatten(1, 2)[:, :steps], state


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns y [B, T, C] and the last state [B, C, N] of Mamba's recurrence for each channel c and slot n,

        h_t = exp(dt_t[c] a[c, n]) h_(t-1) + dt_t[c] x_t[c] b_t[n],    y_t[c] = sum_n h_t[c, n] c_t[n]

    x, dt [B, T, C]; a [C, N]; b, c [B, T, N]; state [B, C, N], zeros if None. float32 or float64.
    """
    if state is None:
        state = x.new_zeros(x.shape[0], *a.shape)
    outputs = [x[:, :0]]
    for start in range(0, x.shape[1], _CHUNK):
        part = slice(start, start + _CHUNK)
        h, state = chunk_states(x[:, part], dt[:, part], a, b[:, part], state)
        outputs.append((h @ c[:, part].unsqueeze(-1)).squeeze(-1))
    return torch.cat(outputs, 1), state.clone() if x.shape[1] == 0 else state


def chunk_states(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the states [B, T, C, N] after each of a few steps of `selective_scan`, and the last."""
    factor = (dt.unsqueeze(-1) * a).exp()
    update = (dt * x).unsqueeze(-1) * b.unsqueeze(2)
    states = []
    for t in range(x.shape[1]):
        state = torch.addcmul(update[:, t], factor[:, t], state)
        states.append(state)
    return torch.stack(states, 1), state
