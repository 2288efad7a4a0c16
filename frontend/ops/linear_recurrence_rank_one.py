"""The backward of `spikingbrain::linear_recurrence` with a rank-one part, in calls of the op itself.

Let every read be of the state before the step: an inclusive one is S_t^T q_t = S_(t-1)^T q'_t + (q_t . k_t) v_t with
q'_t = a_t * q_t + (q_t . erase_t) predict_t. Let D_t be the gradient of S_t, p_t = S_(t-1)^T predict_t and r_t = D_t^T erase_t.
Then

    S_t     = a_t * S_(t-1) + erase_t p_t^T   + k_t v_t^T
    D_(t-1) = a_t * D_t     + predict_t r_t^T + q_t do_t^T

A call with the rank-one part finds p, another r and dv = D^T k. Once they are known, S and D are recurrences of two updates
a step without that part, whose transposes are read: dq = S do, d predict = S r; dk = D v, d erase = D p. Each is a call of
twice as many steps.

In such a sum updates cancel, and rounding grows with its length. So these two calls run over segments of at most `SEGMENT`
steps, all in one batch, from states that the calls with the rank-one part leave there: O(T D + T / SEGMENT * K V) numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from spikingbrain.frontend.ops.checks import up
from spikingbrain.frontend.ops.linear_recurrence_factors import of_factors

# Steps of a segment at most.
SEGMENT = 256
_MULTIPLE = 64  # of so many steps: blocks of the op are full
_TURNED = {"key": "value", "value": "key"}


def by_recurrences(
    do: Tensor,
    dlast: Tensor,
    last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    erase: Tensor,
    predict: Tensor,
    bonus: Tensor | None,
    state: Tensor | None,
    axis: str,
    log: bool,
    exclusive: bool,
    reverse: bool,
    of_decay_wanted: bool,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of the op's eight tensors; that of a decay only if it is wanted. Not for decays of values.

    The number of steps is known and not 0.
    """
    dtype, steps, states = q.dtype, k.shape[1], k.shape[2]
    groups = q.shape[2] // states
    do, q, k, v, erase, predict = (up(x) for x in (do, q, k, v, erase, predict))
    decay = None if decay is None else up(decay)
    initial = torch.zeros_like(last) if state is None else state

    query, a = q, None
    if not exclusive:
        a = decay.exp() if log and decay is not None else decay
        a = None if a is None else per_query(a.unsqueeze(-1) if axis == "head" else a, groups)
        by_erase = (q * per_query(erase, groups)).sum(-1, keepdim=True)
        query = (q if a is None else q * a) + by_erase * per_query(predict, groups)

    time = _Segments.of(steps, axis, log)
    p, starts, _ = time.run(predict, k, v, decay, erase, predict, initial, reverse)
    # D is a sum over queries: each gets a recurrence of its own.
    wide_decay = None if decay is None else per_query(decay, groups)
    wide_erase, wide_predict = per_query(erase, groups), per_query(predict, groups)
    both = _interleaved(wide_erase, per_query(k, groups), 3)
    end = dlast if groups == 1 else pad(dlast.unsqueeze(2), (0, 0, 0, 0, 0, groups - 1)).flatten(1, 2)
    reads, ends, of_state = time.run(both, query, do, wide_decay, wide_predict, wide_erase, end, not reverse)
    r, dv = torch.unflatten(reads, 2, (-1, 2)).unbind(3)

    of_query, of_predict = time.read_transposed(
        do, summed(r, groups), (erase, p), (k, v), decay, starts, reverse
    )
    dk, of_erase = time.read_transposed(
        per_query(v, groups),
        per_query(p, groups),
        (wide_predict, r),
        (query, do),
        wide_decay,
        ends,
        not reverse,
    )
    dk, of_erase, dv = summed(dk, groups), summed(of_erase, groups), summed(dv, groups)

    of_decay = of_bonus = None
    if of_decay_wanted and decay is not None and not log:
        wide = decay.unsqueeze(-1) if axis == "head" else decay
        by_state = [torch.unflatten(x, 2, (-1, groups)) for x in (query, do)]
        s = torch.stack((k, erase), 3), torch.stack((v, p), 3)
        d = (
            torch.cat((by_state[0], predict.unsqueeze(3)), 3),
            torch.cat((by_state[1], summed(r, groups).unsqueeze(3)), 3),
        )
        of_decay = of_factors(
            time.cut(wide, 1.0),
            (time.cut(s[0]), time.cut(s[1])),
            (time.cut(d[0]), time.cut(d[1])),
            starts.flatten(0, 1),
            summed(ends, groups).flatten(0, 1),
            reverse,
        )
        of_decay = torch.reshape(time.join(of_decay), decay.shape)
    elif of_decay_wanted and decay is not None:
        towards = summed(query * of_query, groups) + predict * of_predict
        away = k * dk + erase * of_erase
        following = torch.cat(
            (last.unsqueeze(1), starts[:, :-1]) if reverse else (starts[:, 1:], last.unsqueeze(1)), 1
        )
        at_end = (following * summed(ends, groups)).sum(4).flatten(0, 1)
        if axis == "head":
            towards, away, at_end = towards.sum(-1), away.sum(-1), at_end.sum(-1)
        of_decay = of_log_decay(time.cut(decay), time.cut(towards), time.cut(away), at_end, True, reverse)
        of_decay = time.join(of_decay)
    dq = of_query
    if not exclusive:
        by_predict = (of_query * wide_predict).sum(-1, keepdim=True)
        dq = (of_query if a is None else of_query * a) + by_predict * wide_erase
        of_predict = of_predict + summed(by_erase * of_query, groups)
        of_erase = of_erase + summed(by_predict * q, groups)
        if of_decay is not None and a is not None:
            more = summed((q * a if log else q) * of_query, groups)
            of_decay = of_decay + (more.sum(-1) if axis == "head" else more)
    if bonus is not None or not exclusive:
        weight = (do * per_query(v, groups)).sum(-1, keepdim=True)
        read_key = per_query(k if bonus is None else k * bonus, groups)
        dv = dv + summed((q * read_key).sum(-1, keepdim=True) * do, groups)
        dq = dq + weight * read_key
        of_read_key = summed(weight * q, groups)
        dk = dk + (of_read_key if bonus is None else of_read_key * bonus)
        of_bonus = None if bonus is None else (of_read_key * k).sum((0, 1)).to(dtype)
    if groups > 1:
        of_state = torch.unflatten(of_state, 1, (-1, groups)).sum(2)
    dq, dk, dv, of_erase, of_predict = (x.to(dtype) for x in (dq, dk, dv, of_erase, of_predict))
    of_decay = None if of_decay is None else of_decay.to(dtype)
    return dq, dk, dv, of_decay, of_erase, of_predict, of_bonus, of_state


def per_query(x: Tensor, groups: int) -> Tensor:
    """[B, T, S, ...] -> [B, T, H, ...]"""
    return x if groups == 1 else x.repeat_interleave(groups, 2)


def summed(x: Tensor, groups: int) -> Tensor:
    """[B, T, H, ...] -> [B, T, S, ...]"""
    return x if groups == 1 else torch.unflatten(x, 2, (-1, groups)).sum(3)


def of_log_decay(
    decay: Tensor, towards: Tensor, away: Tensor, at_end: Tensor, exclusive: bool, reverse: bool
) -> Tensor:
    """Returns the gradient e_t = rowsum(a_t S_(t-1) * D_t) of log a_t without any state but the last.

    As S_t = a_t S_(t-1) + k_t v_t^T, e_t = rowsum(S_t * D_t) - k_t * dk_t; as D_t = q_t do_t^T + a_(t+1) D_(t+1),
    rowsum(S_t * D_t) = q_t * dq_t + e_(t+1). So e is a sum from the end, where rowsum(S_T * dS_T) stands. With exclusive
    reads D_t = q_(t+1) do_(t+1)^T + ..., so that q_t * dq_t counts from the step before on. Where a_t = 0, e_t is 0.
    (A rank-one part is one more key and one more query.)
    """
    steps = (towards - away).flatten(2)
    sums, _ = torch.ops.spikingbrain.linear_scan(
        torch.zeros_like(steps), steps, at_end.flatten(1), True, not reverse
    )
    sums = torch.reshape(sums, towards.shape)
    return (sums - towards if exclusive else sums).masked_fill(decay == -torch.inf, 0.0)


@dataclass(frozen=True)
class _Segments:
    """Time, cut into ``count`` segments of ``size`` steps, the last of which may be shorter."""

    steps: int
    count: int
    size: int
    axis: str
    log: bool

    @classmethod
    def of(cls, steps: int, axis: str, log: bool) -> _Segments:
        count = -(-steps // SEGMENT)
        multiple = min(_MULTIPLE, SEGMENT)
        size = steps if count == 1 else -(-steps // (count * multiple)) * multiple
        return cls(steps, -(-steps // size), size, axis, log)

    def run(
        self,
        query: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        erase: Tensor,
        predict: Tensor,
        state: Tensor,
        back: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the reads, the states before each segment [B, count, S, K, V] and the last state."""
        found: list[Tensor] = []
        starts: list[Tensor] = []
        order = list(range(self.count))
        for n in reversed(order) if back else order:
            starts.append(state)
            span = slice(n * self.size, (n + 1) * self.size)
            q_, k_, v_, erase_, predict_ = (x[:, span] for x in (query, k, v, erase, predict))
            decay_ = None if decay is None else decay[:, span]
            out, state = torch.ops.spikingbrain.linear_recurrence(
                q_, k_, v_, decay_, erase_, predict_, None, state, self.axis, self.log, True, back
            )
            found.append(out)
        if back:
            found.reverse()
            starts.reverse()
        return torch.cat(found, 1) if len(found) > 1 else found[0], torch.stack(starts, 1), state

    def read_transposed(
        self,
        first: Tensor,
        second: Tensor,
        update: tuple[Tensor, Tensor],
        also: tuple[Tensor, Tensor],
        decay: Tensor | None,
        starts: Tensor,
        back: bool,
    ) -> tuple[Tensor, Tensor]:
        """Returns S first_t [B, T, H, K] and S second_t [B, T, S, K] of the states S before each step of

            S' = a * S + update[0] update[1]^T,    S'' = S' + also[0] also[1]^T

        Either update is a step of one call, which reads `first` before the former and the `second` of the step that follows
        before the latter; what is missing then is also[0] (also[1] . second).
        """
        states = starts.shape[2]
        groups = first.shape[2] // states
        following = _following(second, back)
        queries = following
        if groups > 1:
            queries = pad(following.unsqueeze(3), (0, 0, 0, groups - 1)).flatten(2, 3)

        def both(x: Tensor, y: Tensor, fill: float = 0.0) -> Tensor:
            x, y = self.cut(x, fill), self.cut(y, fill)
            return _interleaved(y, x, 2) if back else _interleaved(x, y, 2)

        one = 0.0 if self.log else 1.0
        out, _ = torch.ops.spikingbrain.linear_recurrence(
            both(first, queries),
            both(update[1], also[1]),
            both(update[0], also[0]),
            None if decay is None else both(decay, torch.full_like(decay, one), one),
            None,
            None,
            None,
            starts.mT.flatten(0, 1).contiguous(),
            _TURNED.get(self.axis, self.axis),
            self.log,
            True,
            back,
        )
        of_first, of_following = torch.unflatten(out, 1, (-1, 2)).unbind(2)[:: -1 if back else 1]
        of_first, of_following = self.join(of_first), self.join(of_following)
        if groups > 1:
            of_following = torch.unflatten(of_following, 2, (-1, groups)).select(3, 0)
        of_following = of_following + (also[1] * following).sum(-1, keepdim=True) * also[0]
        begin = (
            (starts[:, -1] * second[:, -1].unsqueeze(2))
            if back
            else (starts[:, 0] * second[:, 0].unsqueeze(2))
        )
        edge = begin.sum(-1).unsqueeze(1)
        if back:
            return of_first, torch.cat((of_following[:, 1:], edge), 1)
        return of_first, torch.cat((edge, of_following[:, :-1]), 1)

    def cut(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T, ...] -> [B * count, size, ...], where the last segment is filled up."""
        more = self.count * self.size - self.steps
        if more:
            x = pad(x, (0, 0) * (x.ndim - 2) + (0, more), value=fill)
        return x if self.count == 1 else torch.unflatten(x, 1, (self.count, self.size)).flatten(0, 1)

    def join(self, x: Tensor) -> Tensor:
        """[B * count, size, ...] -> [B, T, ...]"""
        if self.count == 1:
            return x
        return torch.unflatten(x, 0, (-1, self.count)).flatten(1, 2)[:, : self.steps]


def _interleaved(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Returns x and y in turn along the dimension before ``dim``. (A choice compiles to one pass, a stack to several.)"""
    is_x = torch.arange(2, device=x.device).view(2, *(1,) * (x.ndim - dim)) == 0
    return torch.where(is_x, x.unsqueeze(dim), y.unsqueeze(dim)).flatten(dim - 1, dim)


def _following(x: Tensor, back: bool) -> Tensor:
    """Returns what stands at the following step, and zeros at the last; time runs from the end if ``back``."""
    none = torch.zeros_like(x[:, :1])
    return torch.cat((none, x[:, :-1]) if back else (x[:, 1:], none), 1)
