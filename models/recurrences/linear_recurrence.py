"""The linear recurrence with matrix states, block by block: see `blockwise` for the method and the letters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spikingbrain.models.recurrences.blockwise import BLOCK, Products, combine, products, scores, weighted
from spikingbrain.models.recurrences.dtypes import wide

# Steps whose intermediate results are held at a time: they stay in the cache (measured at 8 heads of 128 x 128: 1.2 to 1.8
# times as fast as all 2048 steps at once).
SEGMENT = 512


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
    """Returns the outputs [B, T, H, V] and the last state [B, S, K, V] of

        S_t = a_t * S_(t-1) + erase_t (predict_t^T S_(t-1)) + k_t v_t^T
        o_t = S_t^T q_t,    or if exclusive    S_(t-1)^T q_t + (q_t . (bonus * k_t)) v_t

    q [B, T, H, K]; k, erase, predict [B, T, S, K]; v [B, T, S, V]; bonus [S, K]; state [B, S, K, V], zeros if None. Head h
    reads state h // (H / S). a_t is ``decay``, or exp(decay) if ``log_decay``: [B, T, S] if ``decay_axis`` is "head",
    [B, T, S, K] if "key", [B, T, S, V] if "value"; no decay if "none". ``reverse``: time runs from T - 1 to 0. States and
    arithmetic are float32 (float64 for float64); the outputs have the dtype of q, which all operands share.
    """
    if state is None:
        state = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=wide(k.dtype))
    if k.shape[1] == 0:
        return v.new_zeros(v.shape[0], 0, q.shape[2], v.shape[3]), state.clone()
    starts = range(0, k.shape[1], SEGMENT)
    outputs = []
    for start in reversed(starts) if reverse else starts:

        def part(x: Tensor, start: int = start) -> Tensor:
            x = x[:, start : start + SEGMENT].to(wide(x.dtype))
            return x.flip(1) if reverse else x

        factor = None if decay is None else part(decay)
        if factor is not None and log_decay:
            factor = factor.exp()
        if factor is not None and decay_axis == "head":
            factor = factor.unsqueeze(-1)
        out, state = _segment(
            part(q),
            part(k),
            part(v),
            factor,
            decay_axis == "value",
            None if erase is None else part(erase),
            None if predict is None else part(predict),
            None if bonus is None else bonus.to(wide(bonus.dtype)),
            state,
            exclusive,
        )
        outputs.append((out.flip(1) if reverse else out).to(q.dtype))
    if reverse:
        outputs.reverse()
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], state


def _segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    on_values: bool,
    erase: Tensor | None,
    predict: Tensor | None,
    bonus: Tensor | None,
    state: Tensor,
    exclusive: bool,
) -> tuple[Tensor, Tensor]:
    """The same for some steps, forward in time, the decay [B, T, S, D] a factor."""
    steps, states = k.shape[1:3]
    q = torch.unflatten(q, 2, (states, q.shape[2] // states))
    query = q
    if decay is not None and not exclusive and not on_values:
        query = q * decay.unsqueeze(3)
    blocks = cut(query, k, v, decay, on_values, erase, predict)
    starts, last, predicted = run(blocks, state)
    out = join(read(blocks, starts, predicted), steps)
    if decay is not None and not exclusive and on_values:
        out = out * decay.unsqueeze(3)

    read_key = k if not exclusive else None if bonus is None else bonus * k
    if read_key is not None:
        out = out + _dot(q, read_key) * v.unsqueeze(3)
    if erase is not None and predicted is not None and not exclusive:
        out = out + _dot(q, erase) * join(predicted, steps)
    return out.flatten(2, 3), last


def _dot(q: Tensor, k: Tensor) -> Tensor:
    return (q * k.unsqueeze(3)).sum(-1, keepdim=True)


@dataclass(frozen=True)
class Blocks:
    """The operands of a recurrence that reads the state before each step, cut into blocks.

    query [B, S, N, G, C, K]; key [B, S, N, M, C, K], value [B, S, N, M, C, V]; erase, predict [B, S, N, 1, C, K]; decay
    [B, S, N, C, D] and its products, on the rows of the state or on its columns.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    erase: Tensor | None
    predict: Tensor | None
    decay: Tensor | None
    products: Products | None
    on_values: bool

    def before(self, x: Tensor, *, rows: bool) -> Tensor:
        """Returns x [..., C, K if rows else V], decayed from the start of its block."""
        return (
            x if self.products is None or rows == self.on_values else x * self.products.before.unsqueeze(-3)
        )

    def after(self, x: Tensor, *, rows: bool) -> Tensor:
        """Returns x [..., C, K if rows else V], decayed to the end of its block."""
        return x if self.products is None or rows == self.on_values else x * self.products.after.unsqueeze(-3)

    def through(self, state: Tensor, block: int) -> Tensor:
        """Returns a state [B, S, K, V], decayed by one whole block."""
        if self.products is None:
            return state
        return state * self.products.total[:, :, block].unsqueeze(-2 if self.on_values else -1)


def cut(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    on_values: bool,
    erase: Tensor | None,
    predict: Tensor | None,
) -> Blocks:
    """Returns the `Blocks` of query [B, T, S, G, K] and operands [B, T, S, D]; steps that fill the last block do nothing."""
    size = min(BLOCK, 1 << (k.shape[1] - 1).bit_length())

    def slot(x: Tensor | None) -> Tensor | None:
        return None if x is None else block(x.unsqueeze(3), size)

    decay = None if decay is None else block(decay, size, 1.0)
    return Blocks(
        block(query, size),
        block(k.unsqueeze(3), size),
        block(v.unsqueeze(3), size),
        slot(erase),
        slot(predict),
        decay,
        None if decay is None else products(decay),
        on_values,
    )


def block(x: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """[B, T, S, *, D] -> [B, S, N, *, C, D], where C is ``size`` and the last block is filled up."""
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % size), value=fill)
    return torch.unflatten(x, 1, (-1, size)).movedim(2, -2).movedim(2, 1)


def join(x: Tensor, steps: int) -> Tensor:
    """[B, S, N, G, C, V] -> [B, T, S, G, V]"""
    return x.movedim(1, 2).movedim(-2, 2).flatten(1, 2)[:, :steps]


def run(blocks: Blocks, state: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the states before each block [B, S, N, K, V], the last state, and p [B, S, N, 1, C, V].

    p_t = S_(t-1)^T predict_t, plus ``offset`` [B, S, N, 1, C, V]; None without predict.
    """
    if blocks.on_values and blocks.products is not None and blocks.erase is not None:
        return _run_by_steps(blocks, state, offset)
    key = blocks.after(blocks.key, rows=True).flatten(3, 4)
    update = key.mT @ blocks.after(blocks.value, rows=False).flatten(3, 4)
    constant = linear = erase = None
    if blocks.erase is not None:
        constant, linear = _predictions(blocks, offset)
        erase = blocks.after(blocks.erase, rows=True).squeeze(3).mT
    starts, predicted = [], []
    for n in range(update.shape[2]):
        starts.append(state)
        following = blocks.through(state, n) + update[:, :, n]
        if constant is not None and linear is not None and erase is not None:
            predicted.append(constant[:, :, n] + linear[:, :, n] @ state)
            following = following + erase[:, :, n] @ predicted[-1]
        state = following
    return torch.stack(starts, 2), state, torch.stack(predicted, 2).unsqueeze(3) if predicted else None


def _predictions(blocks: Blocks, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns c [B, S, N, C, V] and W [B, S, N, C, K] with p = c + W S for a block that starts with the state S.

    From p = A v + E p + predict S, where A and E hold the scores of predict against earlier k and erase:
    p = (1 - E)^-1 (A v + predict S), and 1 - E is unit lower triangular.
    """
    assert blocks.predict is not None and blocks.erase is not None
    score = scores(blocks.predict, torch.cat((blocks.key, blocks.erase), 3), blocks.products)
    known = combine(score[..., :-1, :], blocks.value)
    if offset is not None:
        known = known + offset
    known = torch.cat((known, blocks.before(blocks.predict, rows=True)), -1).squeeze(3)
    from_erase = score[..., -1, :].squeeze(3)
    solved = torch.linalg.solve_triangular(-from_erase, known, upper=False, unitriangular=True)
    constant, linear = torch.split(solved, [blocks.value.shape[-1], blocks.predict.shape[-1]], -1)
    return constant, linear


def _run_by_steps(blocks: Blocks, state: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same where decays scale columns: each column then has a triangular system of its own, so step by step."""
    assert blocks.predict is not None and blocks.erase is not None and blocks.decay is not None
    starts, predicted = [], []
    for n in range(blocks.key.shape[2]):
        starts.append(state)
        for i in range(blocks.key.shape[4]):
            key, value, erase, predict = (
                x[:, :, n, :, i] for x in (blocks.key, blocks.value, blocks.erase, blocks.predict)
            )  # [B, S, M, D]
            p = predict @ state
            predicted.append(p if offset is None else p + offset[:, :, n, :, i])
            state = state * blocks.decay[:, :, n, i].unsqueeze(-2) + erase.mT @ predicted[-1] + key.mT @ value
    p = torch.unflatten(torch.cat(predicted, 2), 2, (len(starts), -1)).unsqueeze(3)
    return torch.stack(starts, 2), state, p


def read(blocks: Blocks, starts: Tensor, predicted: Tensor | None) -> Tensor:
    """Returns S_(t-1)^T query_t [B, S, N, G, C, V]."""
    key, value = blocks.key, blocks.value
    if blocks.erase is not None and predicted is not None:
        key, value = torch.cat((key, blocks.erase), 3), torch.cat((value, predicted), 3)
    carried = blocks.before(blocks.before(blocks.query, rows=True) @ starts.unsqueeze(3), rows=False)
    if blocks.on_values:
        return carried + weighted(scores(blocks.query, key, None), value, blocks.products)
    return carried + combine(scores(blocks.query, key, blocks.products), value)
