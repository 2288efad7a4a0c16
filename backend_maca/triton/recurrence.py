"""The chunked linear recurrence on a GPU, forward and backward: launches of `recurrence_kernels`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton.language as tl
from torch import Tensor

from spikingbrain.backend_maca.triton import recurrence_kernels as kernels
from spikingbrain.backend_maca.triton import settings
from spikingbrain.backend_maca.triton.dots import DOTS, tile

AXES = {"none": 0, "head": 1, "key": 2}
STEP_KEYS = 256  # of a tile of the state where there is one step, at most
ROWS = 16  # rows that share a reference point where each key has a gate; the least that a dot takes


@dataclass(frozen=True)
class Plan:
    """Sizes of one problem, q [B, T, H, K] and v [B, T, S, V], and the blocks that are chosen for them."""

    batch: int
    steps: int
    states: int
    groups: int
    key_size: int
    value_size: int
    axis: int
    exclusive: bool
    dtype: torch.dtype
    tuning: settings.TritonTuning = field(default_factory=settings.current)

    @classmethod
    def of(cls, q: Tensor, v: Tensor, axis: str, exclusive: bool) -> Plan:
        batch, steps, heads, key_size = q.shape
        states, value_size = v.shape[2:]
        return cls(
            batch, steps, states, heads // states, key_size, value_size, AXES[axis], exclusive, q.dtype
        )

    @property
    def dot(self) -> tl.dtype:
        return DOTS[self.dtype]

    @property
    def options(self) -> dict[str, int]:
        return self.tuning.options("recurrence")

    @property
    def channels(self) -> int:
        """Returns how many keys or values a tile has at most."""
        exact = self.dtype == torch.float32
        return self.tuning.float_block_channels if exact else self.tuning.block_channels

    @property
    def block(self) -> int:
        exact = self.dtype == torch.float32
        return tile(self.steps, self.tuning.float_block_steps if exact else self.tuning.block_steps)

    @property
    def blocks(self) -> int:
        return -(-self.steps // self.block)

    @property
    def rows(self) -> int:
        return ROWS if self.axis == 2 else self.block

    @property
    def key_tile(self) -> int:
        return tile(self.key_size, self.channels)

    @property
    def value_tile(self) -> int:
        return tile(self.value_size, self.channels)

    @property
    def heads(self) -> int:
        return self.states * self.groups

    def carry(
        self, key: Tensor, value: Tensor, decay: Tensor, first: Tensor | None, backward: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns the states as they enter each block [B * S, blocks, K, V], and the last one [B, S, K, V]."""
        sizes = (self.key_size, self.value_size)
        states = key.new_empty(self.batch * self.states, self.blocks, *sizes, dtype=torch.float32)
        last = key.new_empty(self.batch, self.states, *sizes, dtype=torch.float32)
        grid = (
            self.batch * self.states,
            -(-self.key_size // self.key_tile),
            -(-self.value_size // self.value_tile),
        )
        kernels.carry_states[grid](
            key, value, decay, last if first is None else first, states, last,
            self.steps, self.blocks, self.states, self.groups if backward else 1, self.key_size, self.value_size,
            DECAY=self.axis, BACKWARD=backward, EXCLUSIVE=self.exclusive, HAS_FIRST=first is not None,
            DOT=self.dot, C=self.block, BK=self.key_tile, BV=self.value_tile, **self.options,
        )  # fmt: skip
        return states, last

    def scores(self, query: Tensor, key: Tensor, decay: Tensor, axis: int) -> Tensor:
        """Returns the weights of pairs inside blocks [B, H, T, C]; ``axis`` says which gates lie between them."""
        width = key.shape[-1]
        rows = ROWS if axis == 2 else self.block
        made = query.new_empty(self.batch, self.heads, self.steps, self.block, dtype=torch.float32)
        kernels.pair_scores[(-(-self.steps // rows) * self.batch * self.heads,)](
            query, key, decay, made, self.steps, self.states, self.groups, width,
            DECAY=axis, EXCLUSIVE=self.exclusive, DOT=self.dot, C=self.block, R=rows,
            BK=tile(width, self.channels), **self.options,
        )  # fmt: skip
        return made

    def read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        states: Tensor,
        o: Tensor,
        erase: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> None:
        """Writes the outputs into ``o``, from the states at the start of blocks."""
        scores = self.scores(q, k, decay, self.axis)
        of_erase = scores if erase is None else self.scores(q, erase, decay, self.axis)
        grid = (self.blocks * self.batch * self.heads, -(-self.value_size // self.value_tile))
        kernels.read_states[grid](
            q, v, decay, states, scores, of_erase, scores if predicted is None else predicted, o,
            self.steps, self.blocks, self.states, self.groups, self.key_size, self.value_size,
            DECAY=self.axis, EXCLUSIVE=self.exclusive, DELTA=erase is not None,
            DOT=self.dot, C=self.block, BK=self.key_tile, BV=self.value_tile, **self.options,
        )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, axis: str, exclusive: bool
) -> tuple[Tensor, Tensor]:
    """Returns o [B, T, H, V] and the last state [B, S, K, V]: `linear_recurrence` with a log decay or none, in order of time.

    Operands of dots have the dtype of q; sums and states are float32.
    """
    plan = Plan.of(q, v, axis, exclusive)
    if plan.steps == 0:
        zeros = q.new_zeros(plan.batch, plan.states, plan.key_size, plan.value_size, dtype=torch.float32)
        return q.new_empty(*q.shape[:3], plan.value_size), zeros if state is None else state.clone()
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    gates = q if decay is None else decay.contiguous()
    state = None if state is None else state.contiguous()
    o = q.new_empty(*q.shape[:3], plan.value_size)
    if plan.steps == 1 and plan.key_size <= STEP_KEYS:
        last = q.new_empty(plan.batch, plan.states, plan.key_size, plan.value_size, dtype=torch.float32)
        values = plan.tuning.step_values
        kernels.one_step[plan.batch * plan.states, -(-plan.value_size // values)](
            q, k, v, gates, last if state is None else state, o, last,
            plan.states, plan.groups, plan.key_size, plan.value_size,
            DECAY=plan.axis, EXCLUSIVE=exclusive, HAS_FIRST=state is not None,
            BK=tile(plan.key_size, STEP_KEYS), BV=values, **plan.options,
        )  # fmt: skip
        return o, last
    states, last = plan.carry(k, v, gates, state, backward=False)
    plan.read(q, k, v, gates, states, o)
    return o, last


def backward(
    do: Tensor,
    dlast: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    axis: str,
    exclusive: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Returns the gradients of q, k, v, decay and state, from those of o and of the last state.

    States are computed again, one for each block of time. That of the decay is a sum over time of differences, as
    log a_t has the gradient rowsum(a_t S_(t-1) * D_t) = rowsum(S_t * D_t) - k_t * dk_t and
    rowsum(S_t * D_t) = q_t * dq_t + (that of the step after), D_t being the gradient of S_t.
    """
    plan = Plan.of(q, v, axis, exclusive)
    if plan.steps == 0:
        of_decay = None if decay is None else torch.zeros_like(decay)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), of_decay, dlast.clone()
    do, q, k, v = (x.contiguous() for x in (do, q, k, v))
    gates = q if decay is None else decay.contiguous()
    states, last = plan.carry(k, v, gates, None if state is None else state.contiguous(), backward=False)
    of_states, of_state = plan.carry(q, do, gates, dlast.contiguous(), backward=True)

    scores = plan.scores(q, k, gates, plan.axis)
    sizes = (plan.steps, plan.blocks, plan.states, plan.groups, plan.key_size, plan.value_size)
    tiles = dict(DOT=plan.dot, C=plan.block, BK=plan.key_tile, BV=plan.value_tile, **plan.options)
    of_v = torch.empty_like(v)
    kernels.value_gradients[plan.blocks * plan.batch * plan.states, -(-plan.value_size // plan.value_tile)](
        k, do, gates, of_states, scores, of_v, *sizes, DECAY=plan.axis, **tiles
    )

    # Between rows and columns of gradients stand the gates of a whole state; those of keys follow in the kernels.
    of_scores = plan.scores(do, v, gates, 1 if plan.axis == 1 else 0)
    exact = (
        torch.float32 if decay is not None else q.dtype
    )  # what is summed up for the decay is not rounded before
    of_q, of_k = torch.empty_like(q, dtype=exact), torch.empty_like(k, dtype=exact)
    row_tiles, key_tiles = -(-plan.steps // plan.rows), -(-plan.key_size // plan.key_tile)
    rows = dict(DECAY=plan.axis, EXCLUSIVE=exclusive, R=plan.rows, **tiles)
    kernels.query_gradients[row_tiles * plan.batch * plan.heads, key_tiles](
        k, do, gates, states, of_scores, of_q, *sizes, **rows
    )
    kernels.key_gradients[row_tiles * plan.batch * plan.states, key_tiles](
        q, v, gates, of_states, of_scores, of_k, *sizes, **rows
    )
    if decay is None:
        return of_q, of_k, of_v, None, of_state
    towards, away = q * of_q, k * of_k
    if plan.groups > 1:
        towards = torch.unflatten(towards, 2, (plan.states, plan.groups)).sum(3)
    at_end = (last * dlast).sum(3)
    if plan.axis == 1:
        towards, away, at_end = towards.sum(3), away.sum(3), at_end.sum(2)
    sums = (towards - away).flip(1).cumsum(1).flip(1) + at_end.unsqueeze(1)
    of_decay = (sums - towards if exclusive else sums).masked_fill(decay == -torch.inf, 0.0)
    return of_q.to(q.dtype), of_k.to(k.dtype), of_v, of_decay.to(decay.dtype), of_state
