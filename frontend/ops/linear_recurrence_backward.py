"""`spikingbrain::linear_recurrence_backward`: all gradients of the recurrence by explicit formulas, block by block.

It serves the rank-one part where decays scale columns or the number of steps is a symbol, and decays given as factors where
that number is a symbol or where nothing is compiled. (Other gradients are written in the op itself, see `linear_recurrence`.)
Let every read be of the state before the step, as `models.recurrences.blockwise` explains, and let D_t be the gradient of S_t,
p_t = S_(t-1)^T w_t and r_t the gradient of p_t. Then

    D_(t-1) = a_t * D_t + w_t r_t^T + q_t do_t^T,    r_t = D_t^T u_t + (what the outputs add)

is the same recurrence run backwards, with predict and erase exchanged. Once p and r are known, S is a sum of k v^T and
u p^T, D a sum of q do^T and w r^T, with only the decay between; and dk = D v, dv = D^T k, dq = S do, du = D p, dw = S r,
da = rowsum(S_(t-1) * D_t). States are kept at the start of blocks: O(T D + T / block * K V) numbers in all.

Letters in shapes: those of `models.recurrences.blockwise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spikingbrain.frontend.ops.checks import once_only, up
from spikingbrain.models.recurrences.blockwise import (
    Products,
    all_pairs,
    combine,
    corner,
    halves,
    products,
    scores,
)
from spikingbrain.models.recurrences.linear_recurrence import SEGMENT, Blocks, block, cut, join, run

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("spikingbrain::linear_recurrence_backward", mutates_args=())
def linear_recurrence_backward(
    do: Tensor,
    dlast: Tensor,
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
) -> Grads:
    """Returns the gradients of q, k, v, decay, erase, predict, bonus and state; of what is absent, an empty tensor.

    ``do`` [B, T, H, V] and ``dlast`` [B, S, K, V] are the gradients of the results of `linear_recurrence`, to which the
    other arguments were given.
    """
    given = (q, k, v, decay, erase, predict)
    do_, q_, k_, v_, decay_, erase_, predict_ = (
        None if x is None else up(x.flip(1) if reverse else x) for x in (do, *given)
    )
    assert do_ is not None and q_ is not None and k_ is not None and v_ is not None
    factor = None if decay_ is None else decay_.exp() if log_decay else decay_
    if factor is not None and decay_axis == "head":
        factor = factor.unsqueeze(-1)
    problem = _Problem(
        torch.unflatten(q_, 2, (k.shape[2], -1)),
        k_,
        v_,
        factor,
        erase_,
        predict_,
        None if bonus is None else up(bonus),
        q_.new_zeros(dlast.shape) if state is None else state,
        decay_axis == "value",
        exclusive,
    )
    grads = (
        _by_segments(problem, torch.unflatten(do_, 2, (k.shape[2], -1)), dlast)
        if k.shape[1]
        else _nothing(problem, dlast)
    )
    *of_steps, of_bonus, of_state = grads
    of_q, of_k, of_v, of_decay, of_erase, of_predict = (
        q.new_empty(0) if x is None or g is None else _as_given(g, x, reverse)
        for g, x in zip(of_steps, given, strict=True)
    )
    if decay is not None and log_decay:
        of_decay = (up(of_decay) * up(decay).exp()).to(q.dtype)
    return (
        of_q,
        of_k,
        of_v,
        of_decay,
        of_erase,
        of_predict,
        q.new_empty(0) if of_bonus is None else of_bonus.to(q.dtype),
        dlast.new_empty(0) if state is None else of_state.contiguous(),
    )


def _as_given(gradient: Tensor, x: Tensor, reverse: bool) -> Tensor:
    gradient = gradient.reshape(x.shape)
    return (gradient.flip(1) if reverse else gradient).to(x.dtype).contiguous()


@linear_recurrence_backward.register_fake
def _(
    do: Tensor,
    dlast: Tensor,
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
) -> Grads:
    of_q, of_k, of_v, of_decay, of_erase, of_predict, of_bonus = (
        q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, decay, erase, predict, bonus)
    )
    of_state = dlast.new_empty(0) if state is None else dlast.new_empty(dlast.shape)
    return of_q, of_k, of_v, of_decay, of_erase, of_predict, of_bonus, of_state


linear_recurrence_backward.register_autograd(
    once_only(
        "linear_recurrence with a decay as factor, or erase and predict and a decay of values or a symbol for steps"
    )
)


@dataclass(frozen=True)
class _Problem:
    """The operands, forward in time and in the dtype of arithmetic; q [B, T, S, G, K], decay [B, T, S, D] a factor."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    erase: Tensor | None
    predict: Tensor | None
    bonus: Tensor | None
    state: Tensor
    on_values: bool
    exclusive: bool


_Parts = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor]


def _nothing(x: _Problem, dlast: Tensor) -> _Parts:
    zeros = torch.zeros_like
    of_decay, of_erase, of_predict, of_bonus = (
        None if t is None else zeros(t) for t in (x.decay, x.erase, x.predict, x.bonus)
    )
    return zeros(x.q), zeros(x.k), zeros(x.v), of_decay, of_erase, of_predict, of_bonus, up(dlast).clone()


def _by_segments(x: _Problem, do: Tensor, dlast: Tensor) -> _Parts:
    """The gradients, a stretch of time after the other from the end, so that little is held at a time."""
    state, segments = x.state, []
    for start in range(0, x.k.shape[1], SEGMENT):
        span = slice(start, start + SEGMENT)
        segment = replace(
            x,
            q=x.q[:, span],
            k=x.k[:, span],
            v=x.v[:, span],
            decay=None if x.decay is None else x.decay[:, span],
            erase=None if x.erase is None else x.erase[:, span],
            predict=None if x.predict is None else x.predict[:, span],
            state=state,
        )
        segments.append((segment, do[:, span]))
        if start + SEGMENT < x.k.shape[1]:
            blocks = cut(
                segment.q, segment.k, segment.v, segment.decay, x.on_values, segment.erase, segment.predict
            )
            state = run(blocks, state)[1]
    found: list[_Parts] = []
    for segment, of_outputs in reversed(segments):
        found.append(_gradients(segment, of_outputs, dlast))
        dlast = found[-1][-1]
    if len(found) == 1:
        return found[0]
    found.reverse()
    of_q, of_k, of_v, of_decay, of_erase, of_predict = (
        _joined([part[i] for part in found]) for i in range(6)
    )
    assert of_q is not None and of_k is not None and of_v is not None
    of_bonus = (
        None if x.bonus is None else torch.stack([part[6] for part in found if part[6] is not None]).sum(0)
    )
    return of_q, of_k, of_v, of_decay, of_erase, of_predict, of_bonus, dlast


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present, 1) if present else None


def _gradients(x: _Problem, do: Tensor, dlast: Tensor) -> _Parts:
    """Returns the gradients of the operands, for do [B, T, S, G, V] and dlast [B, S, K, V]."""
    steps = x.k.shape[1]
    inclusive, decay = not x.exclusive, None if x.decay is None else x.decay.unsqueeze(3)
    query, of_read = x.q, do  # o = read of the state before the step by `query`, and more
    if inclusive and decay is not None:
        if x.on_values:
            of_read = do * decay
        else:
            query = x.q * decay
    of_p = (
        None
        if x.erase is None or not inclusive
        else ((x.q * x.erase.unsqueeze(3)).sum(-1, True) * do).sum(3, True)
    )

    blocks = cut(query, x.k, x.v, x.decay, x.on_values, x.erase, x.predict)
    size = blocks.key.shape[-2]
    of_reads = block(of_read, size)
    starts, _, p = run(blocks, x.state)
    ends, of_state, r = run(
        _backwards(blocks, of_reads), dlast, None if of_p is None else block(of_p, size).flip(2, -2)
    )
    ends = ends.flip(2)

    # Slots of S: k v^T, u p^T. Slots of D: query of_read^T for each of G, w r^T.
    rows_D, columns_D, rows_S, columns_S = blocks.query, of_reads, blocks.key, blocks.value
    if blocks.erase is not None and blocks.predict is not None and p is not None and r is not None:
        r = r.flip(2, -2)
        rows_D, columns_D = torch.cat((rows_D, blocks.predict), 3), torch.cat((columns_D, r), 3)
        rows_S, columns_S = torch.cat((rows_S, blocks.erase), 3), torch.cat((columns_S, p), 3)
    if x.on_values:
        sides = _Sides(columns_D, rows_D, columns_S, rows_S, starts.mT, ends.mT)
        reads, of_rows_D, of_columns_S, of_rows_S, of_decay = _decayed(sides, blocks.products)
    else:
        sides = _Sides(rows_D, columns_D, rows_S, columns_S, starts, ends)
        of_rows_D, reads, of_rows_S, of_columns_S, of_decay = _decayed(sides, blocks.products)

    groups = x.q.shape[3]
    of_query, of_predict = torch.split(join(of_rows_D, steps), [groups, of_rows_D.shape[3] - groups], 3)
    of_k, of_erase = torch.split(join(of_rows_S, steps), [1, of_rows_S.shape[3] - 1], 3)
    of_v = join(of_columns_S, steps)[:, :, :, :1]
    if of_decay is not None:
        of_decay = join(of_decay.unsqueeze(3), steps).squeeze(3)

    of_q = of_query
    if inclusive and decay is not None and of_decay is not None:
        if x.on_values:
            of_decay = of_decay + (do * join(reads, steps)[:, :, :, :groups]).sum(3)
        else:
            more = (x.q * of_query).sum(3)
            of_decay = of_decay + (more if of_decay.shape[-1] == more.shape[-1] else more.sum(-1, True))
            of_q = of_query * decay
    if x.erase is not None and p is not None and inclusive:
        weight = (do * join(p, steps)).sum(-1, True)
        of_q = of_q + weight * x.erase.unsqueeze(3)
        of_erase = of_erase + (weight * x.q).sum(3, True)
    of_bonus = None
    if inclusive or x.bonus is not None:
        read_key = (x.k if x.bonus is None else x.k * x.bonus).unsqueeze(3)
        weight = (do * x.v.unsqueeze(3)).sum(-1, True)
        of_q = of_q + weight * read_key
        of_read_key = (weight * x.q).sum(3, True)
        of_v = of_v + ((x.q * read_key).sum(-1, True) * do).sum(3, True)
        if x.bonus is None:
            of_k = of_k + of_read_key
        else:
            of_k = of_k + of_read_key * x.bonus.unsqueeze(1)
            of_bonus = (of_read_key.squeeze(3) * x.k).sum((0, 1))
    return (
        of_q,
        of_k,
        of_v,
        of_decay,
        None if x.erase is None else of_erase,
        None if x.erase is None else of_predict,
        of_bonus,
        of_state,
    )


def _backwards(blocks: Blocks, of_reads: Tensor) -> Blocks:
    """Returns the recurrence of D: time reversed, updates query of_read^T, erase and predict exchanged."""

    def turned(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.flip(2, -2)

    decay = turned(blocks.decay)
    return replace(
        blocks,
        query=blocks.query[:, :, :, :0],
        key=blocks.query.flip(2, -2),
        value=of_reads.flip(2, -2),
        erase=turned(blocks.predict),
        predict=turned(blocks.erase),
        decay=decay,
        products=None if decay is None else products(decay),
    )


@dataclass(frozen=True)
class _Sides:
    """S as a sum of key value^T and D as a sum of query weight^T, the decay on the side of query and key.

    query [..., G, C, K], weight [..., G, C, V], key [..., M, C, K], value [..., M, C, V]; the states before each block
    ``starts`` and their gradients behind it ``ends`` [..., K, V].
    """

    query: Tensor
    weight: Tensor
    key: Tensor
    value: Tensor
    starts: Tensor
    ends: Tensor


def _decayed(x: _Sides, decay: Products | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Returns S weight, S^T query (S before the step), D value, D^T key (D behind it) and rowsum(S * D) [..., C, D]."""
    of_scores = all_pairs(x.weight, x.value)
    score = scores(x.query, x.key, decay)
    from_start, from_end = x.weight @ x.starts.unsqueeze(-3).mT, x.value @ x.ends.unsqueeze(-3).mT
    before = None if decay is None else decay.before.unsqueeze(-3)
    after = None if decay is None else decay.after.unsqueeze(-3)
    query = x.query if before is None else x.query * before
    key = x.key if after is None else x.key * after
    of_query, of_key, levels = _of_scores(of_scores, x.query, x.key, decay)
    s_query = combine(score, x.value) + query @ x.starts.unsqueeze(-3)
    d_key = combine(_transposed(score), x.weight) + key @ x.ends.unsqueeze(-3)
    of_query = of_query + (from_start if before is None else from_start * before)
    of_key = of_key + (from_end if after is None else from_end * after)
    if decay is None:
        return of_query, s_query, of_key, d_key, None
    of_before, of_after = (x.query * from_start).sum(-3), (x.key * from_end).sum(-3)
    of_total = (x.starts * x.ends).sum(-1)
    if decay.total.shape[-1] == 1:
        of_before, of_after, of_total = (g.sum(-1, True) for g in (of_before, of_after, of_total))
    return of_query, s_query, of_key, d_key, of_products(decay, levels, of_before, of_after, of_total)


def _transposed(score: Tensor) -> Tensor:
    """[..., G, C, M, C] -> [..., M, C, G, C]"""
    return score.movedim((-4, -3), (-2, -1))


def _of_scores(
    of_scores: Tensor, query: Tensor, key: Tensor, decay: Products | None
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Returns the gradients of ``scores(query, key, decay)``: of query, of key, and of each level's before and after."""
    if decay is None or decay.total.shape[-1] == 1 != query.shape[-1]:
        one = query.new_ones(*query.shape[:-3], 1, query.shape[-2], 1)
        of_decay = of_scores * scores(one, one, decay)
        of_query, of_key = combine(of_decay, key), combine(_transposed(of_decay), query)
        if decay is None:
            return of_query, of_key, []
        both = (of_scores * all_pairs(query, key)).sum((-4, -2)).unsqueeze(-2).unsqueeze(-4)
        return of_query, of_key, _of_scores(both, one, one, decay)[2]
    of_query, of_key, levels = torch.zeros_like(query), torch.zeros_like(key), []
    for level in decay.levels:
        steps = level.before.shape[-2]
        late, early = halves(query, steps)[1], halves(key, steps)[0]
        of_pairs = corner(of_scores, steps)
        from_early = combine(of_pairs, early * level.after.unsqueeze(-3))
        from_late = combine(_transposed(of_pairs), late * level.before.unsqueeze(-3))
        _half(of_query, steps, 1).add_(from_early * level.before.unsqueeze(-3))
        _half(of_key, steps, 0).add_(from_late * level.after.unsqueeze(-3))
        levels.append(((from_early * late).sum(-3), (from_late * early).sum(-3)))
    return of_query, of_key, levels


def _half(x: Tensor, steps: int, which: int) -> Tensor:
    return halves(x, steps)[which]


def of_products(
    decay: Products,
    levels: Sequence[tuple[Tensor, Tensor] | None],
    of_before: Tensor,
    of_after: Tensor,
    of_total: Tensor,
) -> Tensor:
    """Returns the gradient of the decay [..., C, D] from those of its `products`; ``levels`` has those of each before and after.

    Step by step, from the whole block down to single steps; None stands for gradients of 0.
    """
    before, after, total = of_before.unsqueeze(-3), of_after.unsqueeze(-3), of_total.unsqueeze(-2)
    for level, of_level in zip(reversed(decay.levels), reversed(levels), strict=True):
        steps = level.before.shape[-2]
        before_0, before_1 = torch.split(before, steps, -2)
        after_0, after_1 = torch.split(after, steps, -2)
        first = (before_1 * level.before).sum(-2) + total * level.second
        second = (after_0 * level.after).sum(-2) + total * level.first
        before_1, after_0 = before_1 * level.first.unsqueeze(-2), after_0 * level.second.unsqueeze(-2)
        if of_level is not None:
            before_1, after_0 = before_1 + of_level[0], after_0 + of_level[1]
        before, after = _interleaved(before_0, before_1), _interleaved(after_0, after_1)
        total = torch.stack((first, second), -2).flatten(-3, -2)
    return total


def _interleaved(first: Tensor, second: Tensor) -> Tensor:
    """Twice [..., P, s, D] -> [..., 2P, s, D]"""
    return torch.stack((first, second), -3).flatten(-4, -3)
