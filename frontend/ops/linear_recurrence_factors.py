"""The gradient of decays of `spikingbrain::linear_recurrence` that are given as factors, in products that any backend compiles.

Let every read be of the state before the step. With D_t the gradient of S_t,

    S_t = a_t * S_(t-1) + k_t v_t^T,    D_(t-1) = a_t * D_t + q_t do_t^T,    da_t = rowsum(S_(t-1) * D_t)

so da_t sums (v_i . do_j) k_i * q_j * (the decays from i to j without t) over i < t < j. Where a_t is 0 it is not 0, and no
read of S or D tells it: e_t = a_t * da_t, a running sum (`of_log_decay`), would have to be divided by a_t.

So time is cut into blocks. The states before each block and their gradients behind it are linear scans over blocks. Inside
a block decays enter as products of neighbours, by doubling (`blockwise`): the gradients of those products are matrix products,
and that of a decay follows from them from the whole block down to single steps. Nothing is divided.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain.frontend.ops.linear_recurrence_backward import of_products
from spikingbrain.models.recurrences.blockwise import Level, Products, all_pairs, combine, halves, products
from spikingbrain.models.recurrences.linear_recurrence import block, join

# Steps of a block: fewer make more states, more make more levels. (64 take a tenth longer in PyTorch.)
BLOCK = 32

Update = tuple[Tensor, Tensor]


def of_factors(decay: Tensor, s: Update, d: Update, state: Tensor, dlast: Tensor, reverse: bool) -> Tensor:
    """Returns rowsum(S_(t-1) * D_t) [B, T, S, D] for each step t; D is K, or 1, for which all rows are summed.

    decay [B, T, S, D]; S_t = a_t * S_(t-1) + the sum over m of s[0]_m s[1]_m^T, D_(t-1) = a_t * D_t + that of d[0]_g d[1]_g^T,
    where s and d are [B, T, S, M, K] and [B, T, S, M, V], M of their own; state, the S before the first step, and dlast, the D
    behind the last one [B, S, K, V]. ``reverse``: time runs from T - 1 to 0.
    The number of steps is known and not 0.
    """
    steps = decay.shape[1]
    size = min(BLOCK, 1 << (steps - 1).bit_length())
    backwards = [x.flip(1) if reverse else x for x in (decay, *s, *d)]
    fill = (1.0, 0.0, 0.0, 0.0, 0.0)
    factor, key, value, query, weight = (block(x, size, f) for x, f in zip(backwards, fill, strict=True))
    found = products(factor)
    starts = _carried(found, key * found.after.unsqueeze(-3), value, state, False)
    ends = _carried(found, query * found.before.unsqueeze(-3), weight, dlast, True)
    of_decay = _of_decay(found, key, value, query, weight, starts, ends)
    of_decay = join(of_decay.unsqueeze(3), steps).squeeze(3)
    return of_decay.flip(1) if reverse else of_decay


def exclusive_reads(d: Update, dlast: Tensor, reverse: bool) -> tuple[Update, Tensor]:
    """Returns reads after each step as reads before the one that follows: their queries and gradients, and the D behind the last.

    d [B, T, S, G, K] and [B, T, S, G, V]; dlast [B, S, K, V].
    """
    end = 0 if reverse else -1

    def later(x: Tensor) -> Tensor:
        none = torch.zeros_like(x[:, :1])
        return torch.cat((x[:, 1:], none) if reverse else (none, x[:, :-1]), 1)

    return (later(d[0]), later(d[1])), dlast + d[0][:, end].mT @ d[1][:, end]


def _carried(decay: Products, key: Tensor, value: Tensor, first: Tensor, back: bool) -> Tensor:
    """Returns the states [B, S, N, K, V] on entering each block, of which key [B, S, N, M, C, K] and value add their product."""
    update = key.flatten(3, 4).mT @ value.flatten(3, 4)
    total = decay.total.unsqueeze(-1).expand_as(update)
    after, _ = torch.ops.spikingbrain.linear_scan(
        total.flatten(3).flatten(0, 1),
        update.flatten(3).flatten(0, 1),
        first.flatten(2).flatten(0, 1),
        False,
        back,
    )
    after = torch.reshape(after, update.shape)
    start = first.unsqueeze(2)
    return torch.cat((after[:, :, 1:], start) if back else (start, after[:, :, :-1]), 2)


def _of_decay(
    decay: Products, key: Tensor, value: Tensor, query: Tensor, weight: Tensor, starts: Tensor, ends: Tensor
) -> Tensor:
    """Returns the gradient of the decay [..., C, D] of key [..., M, C, K], value, query [..., G, C, K] and weight."""
    whole = decay.total.shape[-1] == 1 != key.shape[-1]

    def rows(x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True) if whole else x

    before = rows((query * (weight @ starts.unsqueeze(-3).mT)).sum(-3))
    after = rows((key * (value @ ends.unsqueeze(-3).mT)).sum(-3))
    total = rows((starts * ends).sum(-1))
    levels = []
    for level in decay.levels:
        steps = level.before.shape[-2]
        late = halves(query, steps)[1], halves(weight, steps)[1]
        early = halves(key, steps)[0], halves(value, steps)[0]
        found = _of_pairs(level, *late, *early, whole) if steps > 1 else None
        levels.append(found)  # between two neighbours lies no decay
    return of_products(decay, levels, before, after, total)


def _of_pairs(
    level: Level, query: Tensor, weight: Tensor, key: Tensor, value: Tensor, whole: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of a level's before and after, by which later queries [..., G, s, K] read earlier keys."""
    of_scores = all_pairs(weight, value)
    if whole:
        both = (of_scores * all_pairs(query, key)).sum((-4, -2))
        return both @ level.after, both.mT @ level.before
    from_early = combine(of_scores, key * level.after.unsqueeze(-3))
    from_late = combine(of_scores.movedim((-4, -3), (-2, -1)), query * level.before.unsqueeze(-3))
    return (query * from_early).sum(-3), (key * from_late).sum(-3)
