"""The recurrence with a rank-one part (delta rules and their kin) on a GPU, forward.

S_t = a_t * S_(t-1) + erase_t p_t^T + k_t v_t^T with p_t = S_(t-1)^T predict_t. Inside a block of steps that starts with the
state S the p are a triangular system, p = A v + E p + (predict * e^(g before)) S with A and E the scores of predict against
earlier k and erase; torch solves it for all blocks at once, p = constant + linear S, and a kernel carries S from block to block.
The backward is written in calls of the op (`frontend.ops.linear_recurrence_rank_one`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from spikingbrain.backend_maca.triton import recurrence_kernels as kernels
from spikingbrain.backend_maca.triton.dots import tile
from spikingbrain.backend_maca.triton.recurrence import Plan

KEYS = 256  # at most: a kernel holds the rows of all keys


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    erase: Tensor,
    predict: Tensor,
    state: Tensor | None,
    axis: str,
    exclusive: bool,
) -> tuple[Tensor, Tensor]:
    """Returns o [B, T, H, V] and the last state [B, S, K, V], in order of time; a log decay of heads or keys, or none."""
    plan = Plan.of(q, v, axis, exclusive)
    if plan.steps == 0:
        zeros = q.new_zeros(plan.batch, plan.states, plan.key_size, plan.value_size, dtype=torch.float32)
        return q.new_empty(*q.shape[:3], plan.value_size), zeros if state is None else state.clone()
    q, k, v, erase, predict = (x.contiguous() for x in (q, k, v, erase, predict))
    gates = q if decay is None else decay.contiguous()
    constant, linear = _predictions(plan, k, v, decay, gates, erase, predict)

    sizes = (plan.key_size, plan.value_size)
    states = q.new_empty(plan.batch * plan.states, plan.blocks, *sizes, dtype=torch.float32)
    last = q.new_empty(plan.batch, plan.states, *sizes, dtype=torch.float32)
    predicted = q.new_empty(v.shape, dtype=torch.float32)
    keys = tile(plan.key_size, KEYS)
    values = min(plan.value_tile, max(16, plan.tuning.delta_numbers // keys))
    kernels.carry_delta[plan.batch * plan.states, -(-plan.value_size // values)](
        k, v, erase, constant, linear, gates, last if state is None else state.contiguous(), states, last, predicted,
        plan.steps, plan.blocks, plan.states, *sizes,
        DECAY=plan.axis, HAS_FIRST=state is not None, DOT=plan.dot, C=plan.block, BK=keys, BV=values,
        **plan.options,
    )  # fmt: skip
    o = q.new_empty(*q.shape[:3], plan.value_size)
    plan.read(q, k, v, gates, states, o, erase, predicted)
    return o, last


def _predictions(
    plan: Plan, k: Tensor, v: Tensor, decay: Tensor | None, gates: Tensor, erase: Tensor, predict: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns constant [B, S, N, C, V] and linear [B, S, N, C, K], float32: p = constant + linear S in each block."""
    before = replace(plan, groups=1, exclusive=True)
    from_k, from_erase = (
        _blocks(before.scores(predict, x, gates, plan.axis).transpose(1, 2), plan) for x in (k, erase)
    )
    reads = _blocks(predict, plan)
    if decay is not None:
        g = _blocks(decay if plan.axis == 2 else decay.unsqueeze(-1), plan)
        reads = reads * torch.cat((torch.zeros_like(g[..., :1, :]), g[..., :-1, :]), -2).cumsum(-2).exp()
    known = torch.cat((from_k @ _blocks(v, plan), reads), -1)
    solved = torch.linalg.solve_triangular(-from_erase, known, upper=False, unitriangular=True)
    constant, linear = torch.split(solved, [plan.value_size, plan.key_size], -1)
    return constant.contiguous(), linear.contiguous()


def _blocks(x: Tensor, plan: Plan) -> Tensor:
    """[B, T, S, D] -> float32 [B, S, N, C, D], the last block filled up with zeros."""
    x = pad(x.float(), (0, 0, 0, 0, 0, plan.blocks * plan.block - plan.steps))
    return torch.unflatten(x.transpose(1, 2), 2, (plan.blocks, plan.block))
