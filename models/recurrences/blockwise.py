"""Linear recurrences block by block: the arithmetic that the functions of this package share.

The state S [K, V] of one head follows

    S_t = a_t * S_(t-1) + u_t (w_t^T S_(t-1)) + k_t v_t^T

Time is cut into blocks of `BLOCK` steps. Inside a block everything is matrix products; from block to block only the state
is carried.

**The safe rule.** Decays enter as factors, and only *products of neighbouring factors* are ever formed, by doubling: the
products over blocks of 2s steps come from those over blocks of s steps. Nothing is divided and no logarithm is taken, so
a factor may be zero or negative, and exp(-inf) = 0 is a factor like any other. Factors of magnitude up to one cannot
overflow, in the derivatives neither; larger ones do where their product over one block does.

**Every read is of the state before the step.** With p_t = S_(t-1)^T w_t, what is read after the step is

    S_t^T q_t = S_(t-1)^T (a_t * q_t) + (q_t . u_t) p_t + (q_t . k_t) v_t

(if a_t scales columns, it multiplies the first term instead of the query).

Letters in shapes
  B  batch       G  queries per state     C  steps of a block    K  key size
  T  steps       H  heads: S * G          N  blocks              V  value size
  S  states      M  updates per step      D  K or V, or 1 where one factor serves a whole state
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
# Up to this many steps products over pairs are summed by hand: a batch of tiny matrix products costs more.
_TINY = 2


@dataclass(frozen=True)
class Level:
    """Products of decays in two neighbouring blocks of s steps, for all such pairs, [..., pairs, s, D].

    ``before[i]`` runs from the start of the later block up to but without step i, ``after[j]`` from behind step j to the
    end of the earlier block, ``first`` and ``second`` [..., pairs, D] over the whole of each.
    """

    before: Tensor
    after: Tensor
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Products:
    """All products of decays that a block of C steps needs.

    The decay from step j to a read before step i > j is ``before[i] * after[j]`` of the level at which i and j lie in
    neighbouring blocks. ``before`` and ``after`` [..., C, D] and ``total`` [..., D] are those of the whole block.
    """

    levels: tuple[Level, ...]
    before: Tensor
    after: Tensor
    total: Tensor


def products(decay: Tensor) -> Products:
    """Returns the `Products` of ``decay`` [..., C, D]; C is a power of two."""
    before = after = torch.ones_like(decay).unsqueeze(-2)
    total, levels = decay, []
    while total.shape[-2] > 1:
        (before_0, before_1), (after_0, after_1) = pairs(before), pairs(after)
        first, second = torch.unflatten(total, -2, (-1, 2)).unbind(-2)
        levels.append(Level(before_1, after_0, first, second))
        before = torch.cat((before_0, before_1 * first.unsqueeze(-2)), -2)
        after = torch.cat((after_0 * second.unsqueeze(-2), after_1), -2)
        total = first * second
    return Products(tuple(levels), before.squeeze(-3), after.squeeze(-3), total.squeeze(-2))


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the earlier and the later of each two neighbouring blocks: [..., 2P, s, D] -> twice [..., P, s, D]."""
    first, second = torch.unflatten(x, -3, (-1, 2)).unbind(-3)
    return first, second


def halves(x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Returns the blocks of ``steps`` steps, earlier and later: [..., M, C, D] -> twice [..., C/2/steps, M, steps, D]."""
    first, second = torch.unflatten(x, -2, (-1, 2, steps)).movedim(-5, -4).unbind(-3)
    return first, second


def scores(query: Tensor, key: Tensor, decay: Products | None) -> Tensor:
    """Returns A[g, i, m, j] = sum_d query[g, i, d] key[m, j, d] decay(j -> i)[d] for j < i, else 0.

    query [..., G, C, K], key [..., M, C, K]; the decay's D is K, or 1; [..., G, C, M, C].
    """
    if decay is None:
        return all_pairs(query, key) * _earlier(query)
    if decay.total.shape[-1] == 1:
        one = torch.ones_like(decay.before).unsqueeze(-3)
        return all_pairs(query, key) * _by_doubling(one, one, decay)
    return _by_doubling(query, key, decay)


def _by_doubling(query: Tensor, key: Tensor, decay: Products) -> Tensor:
    out = query.new_zeros(*query.shape[:-3], query.shape[-2], query.shape[-3], 1, key.shape[-3], 1)
    for level in decay.levels:
        steps = level.before.shape[-2]
        late, early = halves(query, steps)[1], halves(key, steps)[0]
        late, early = late * level.before.unsqueeze(-3), early * level.after.unsqueeze(-3)
        if steps <= _TINY:
            cross = (late[..., :, :, None, None, :] * early[..., None, None, :, :, :]).sum(-1)
        else:
            cross = all_pairs(late, early)
        first, second = torch.unflatten(out, -5, (-1, 2)).unbind(-5)
        above = torch.cat((first, torch.zeros_like(cross)), -1)
        out = torch.cat((above, torch.cat((cross, second), -1)), -3)
    return out.squeeze(-5)


def all_pairs(query: Tensor, key: Tensor) -> Tensor:
    """Returns query[g, i] . key[m, j] for all pairs: [..., G, C, M, C]."""
    product = query.flatten(-3, -2) @ key.flatten(-3, -2).mT
    return torch.unflatten(torch.unflatten(product, -1, key.shape[-3:-1]), -3, query.shape[-3:-1])


def _earlier(like: Tensor) -> Tensor:
    """Returns 1 where j < i, [C, 1, C]."""
    size = like.shape[-2]
    return torch.ones(size, size, dtype=like.dtype, device=like.device).tril(-1).unsqueeze(-2)


def weighted(weight: Tensor, value: Tensor, decay: Products | None) -> Tensor:
    """Returns y[g, i] = sum over m and j < i of weight[g, i, m, j] * decay(j -> i) * value[m, j].

    weight [..., G, C, M, C], value [..., M, C, V], the decay's D is V, or 1; [..., G, C, V].
    """
    if decay is None:
        return combine(weight * _earlier(value), value)
    if decay.total.shape[-1] == 1:
        one = torch.ones_like(decay.before).unsqueeze(-3)
        return combine(weight * _by_doubling(one, one, decay), value)
    total = torch.zeros_like(combine(weight, value))
    for level in decay.levels:
        steps = level.before.shape[-2]
        early = halves(value, steps)[0] * level.after.unsqueeze(-3)
        cross = corner(weight, steps)
        part = (combine(cross, early) * level.before.unsqueeze(-3)).unsqueeze(-3)
        part = torch.cat((torch.zeros_like(part), part), -3)  # [..., pairs, G, 2, s, V]
        total = total + part.movedim(-5, -4).flatten(-4, -2)
    return total


def corner(weight: Tensor, steps: int) -> Tensor:
    """Returns the blocks of later rows and earlier columns: [..., G, C, M, C] -> [..., C/2/steps, G, steps, M, steps]."""
    blocks = torch.unflatten(
        torch.unflatten(weight, -1, (-1, 2, steps)), -5, (-1, 2, steps)
    )  # G P 2 s M P 2 s
    blocks = blocks[..., 1, :, :, :, 0, :]  # G P s M P s
    return blocks.diagonal(dim1=-5, dim2=-2).movedim(-1, -5)


def combine(weight: Tensor, value: Tensor) -> Tensor:
    """Returns y[g, i] = sum over m and j of weight[g, i, m, j] value[m, j]: [..., G, C, V]."""
    product = weight.flatten(-4, -3).flatten(-2) @ value.flatten(-3, -2)
    return torch.unflatten(product, -2, weight.shape[-4:-2])
