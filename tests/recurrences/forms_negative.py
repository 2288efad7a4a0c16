"""What resembles a linear recurrence and is none: each must be right, and must not be raised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from written import LINEAR, LINEAR_HEADS_FIRST, negative

GLA = LINEAR + " g:BTHK:log"


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def read(q: Tensor, state: Tensor) -> Tensor:
    return torch.einsum("bhk,bhkv->bhv", q, state)


def zero_state(q: Tensor, v: Tensor) -> Tensor:
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])


@negative("linear attention", "the state clamped", LINEAR, "loop")
def state_clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = zero_state(q, v), []
    for t in range(q.shape[1]):
        state = (state + outer(k[:, t], v[:, t])).clamp(-1, 1)
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, 1)


@negative("linear attention", "the state normalised", LINEAR, "loop")
def state_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = zero_state(q, v), []
    for t in range(q.shape[1]):
        state = F.normalize(state + outer(k[:, t], v[:, t]), dim=-1)
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, 1)


@negative("GLA", "tanh of the state", GLA, "loop")
def state_tanh(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    state, out = zero_state(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        state = torch.tanh(state * g[:, t].exp()[..., None] + outer(k[:, t], v[:, t]))
        out[:, t] = read(q[:, t], state)
    return out, state


@negative("GLA", "the gate depends on the state", LINEAR, "loop")
def decay_from_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = zero_state(q, v), []
    for t in range(q.shape[1]):
        decay = torch.sigmoid(state.mean(-1, keepdim=True))
        state = decay * state + outer(k[:, t], v[:, t])
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, 1)


@negative("GLA", "the key depends on what was read", LINEAR, "loop")
def key_from_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = zero_state(q, v), []
    o = torch.zeros_like(v[:, 0])
    for t in range(q.shape[1]):
        state = 0.9 * state + outer(k[:, t], v[:, t] * torch.sigmoid(o))
        o = read(q[:, t], state)
        outputs.append(o)
    return torch.stack(outputs, 1)


@negative("linear attention", "the product of the state with itself", "q:BTHK k:BTHK v:BTHK", "loop")
def state_squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = zero_state(q, v), []
    for t in range(q.shape[1]):
        state = 0.5 * state + 0.1 * state @ state + 0.1 * outer(k[:, t], v[:, t])
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, 1)


@negative("linear attention", "float32 state rounded to bfloat16 at each step", LINEAR, "loop", longest=64)
def state_rounded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state, outputs = zero_state(q, v), []
    for t in range(q.shape[1]):
        state = (0.9 * state + outer(k[:, t], v[:, t])).to(torch.bfloat16).float()
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, 1), state


@negative("linear attention", "truncated backpropagation: detached every four steps", LINEAR, "unrolled")
def state_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = zero_state(q, v), []
    for t in range(q.shape[1]):
        if t % 4 == 0:
            state = state.detach()
        state = state + outer(k[:, t], v[:, t])
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, 1)


@negative("GLA", "the old state detached at each step", GLA, "loop")
def state_detached_always(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, outputs = zero_state(q, v), []
    for t in range(q.shape[1]):
        state = state.detach() * g[:, t].exp()[..., None] + outer(k[:, t], v[:, t])
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, 1)


@negative(
    "linear attention", "one state in the middle is returned", LINEAR, "unrolled", quick=True, dynamic=False
)
def state_in_the_middle(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state, outputs, kept = zero_state(q, v), [], None
    for t in range(q.shape[1]):
        state = state + outer(k[:, t], v[:, t])
        if t == 5:
            kept = state
        outputs.append(read(q[:, t], state))
    assert kept is not None
    return torch.stack(outputs, 1), kept


@negative("linear attention", "tokens in shuffled order", LINEAR, "unrolled", dynamic=False)
def tokens_shuffled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = zero_state(q, v), []
    order = [3, 0, 7, 1, 9, 4, 2, 10, 6, 8, 5]
    for t in order:
        state = 0.9 * state + outer(k[:, t], v[:, t])
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, 1)


@negative("RetNet", "keys in shuffled order, queries in time", LINEAR, "unrolled", dynamic=False)
def keys_shuffled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = zero_state(q, v), []
    for t, s in enumerate([3, 0, 7, 1, 9, 4, 2, 10, 6, 8, 5]):
        state = 0.9 * state + outer(k[:, s], v[:, s])
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, 1)


@negative("RetNet", "every third step of another kind", LINEAR, "loop", dynamic=False)
def every_third_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = zero_state(q, v), []
    for t in range(q.shape[1]):
        state = 0.9 * state + outer(k[:, t], v[:, t])
        outputs.append(read(q[:, t], state if t % 3 else state.relu()))
    return torch.stack(outputs, 1)


@negative("linear attention", "the state updated twice, tanh between", LINEAR, "loop")
def state_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = zero_state(q, v), []
    for t in range(q.shape[1]):
        state = state + outer(k[:, t], v[:, t])
        state = 0.5 * torch.tanh(state) + 0.5 * outer(q[:, t], v[:, t])
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, 1)


@negative("linear attention", "a branch that looks at the data", LINEAR, "unrolled", dynamic=False)
def branch_on_data(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = zero_state(q, v), []
    for t in range(q.shape[1]):
        if t == 6 and k[:, t].sum() > 0:
            state = torch.zeros_like(state)
        state = state + outer(k[:, t], v[:, t])
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, 1)


@negative("linear attention", "the slot that is written is chosen by data", "v:BTV i:BT:index q:BTM", "loop")
def index_by_data(v: Tensor, i: Tensor, q: Tensor) -> Tensor:
    state, outputs = v.new_zeros(v.shape[0], q.shape[2], v.shape[2]), []
    batch = torch.arange(v.shape[0])
    for t in range(v.shape[1]):
        state = state.index_put((batch, i[:, t]), v[:, t], accumulate=True)
        outputs.append(torch.einsum("bm,bmv->bv", q[:, t], state))
    return torch.stack(outputs, 1)


@negative(
    "linear attention",
    "the order of the axes of the state changes",
    "q:BTHK k:BTHK v:BTHK",
    "loop",
)
def state_turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = zero_state(q, v), []
    for t in range(q.shape[1]):
        state = state.transpose(-1, -2) + outer(k[:, t], v[:, t])
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, 1)


@negative("linear attention", "channels of the state moved on by one", LINEAR, "loop")
def state_rolled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = zero_state(q, v), []
    for t in range(q.shape[1]):
        state = state.roll(1, dims=-1) + outer(k[:, t], v[:, t])
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, 1)


@negative("linear attention", "divided by a norm of the state", LINEAR, "loop")
def read_by_norm_fed_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = zero_state(q, v), []
    for t in range(q.shape[1]):
        state = state / (1 + state.norm(dim=(-2, -1), keepdim=True)) + outer(k[:, t], v[:, t])
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, 1)


@negative("linear attention", "a running penalty on the state leaves the loop", LINEAR, "loop")
def state_penalty(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state, outputs, penalty = zero_state(q, v), [], q.new_zeros(())
    for t in range(q.shape[1]):
        state = 0.9 * state + outer(k[:, t], v[:, t])
        penalty = penalty + state.pow(2).mean()
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, 1), penalty


@negative("linear attention", "quadratic: the mask is upper triangular", LINEAR_HEADS_FIRST)
def mask_upper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * torch.ones(q.shape[2], q.shape[2]).triu(-1)) @ v


@negative("linear attention", "quadratic: the mask is a band", LINEAR_HEADS_FIRST, quick=True)
def mask_band(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril().triu(-3) @ v


@negative("linear attention", "quadratic: one more key is seen", LINEAR_HEADS_FIRST)
def mask_one_too_many(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril(1) @ v


@negative("linear attention", "quadratic: relu of the scores", LINEAR_HEADS_FIRST)
def scores_relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).relu().tril() @ v


@negative("linear attention", "quadratic: softmax", LINEAR_HEADS_FIRST)
def scores_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(future, -torch.inf).softmax(-1) @ v


@negative("RetNet", "quadratic: decay by the square of the distance", LINEAR_HEADS_FIRST)
def decay_squared_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = torch.arange(q.shape[2], dtype=q.dtype)
    return (q @ k.mT * torch.exp(-0.1 * (n[:, None] - n) ** 2).tril()) @ v


@negative("simple GLA", "quadratic: the decay matrix is an argument", LINEAR_HEADS_FIRST + " d:HTT:factor")
def decay_given(q: Tensor, k: Tensor, v: Tensor, d: Tensor) -> Tensor:
    return (q @ k.mT * d.tril()) @ v


@negative(
    "simple GLA", "quadratic: sums of the gates over heads, not time", LINEAR_HEADS_FIRST + " g:BHT:log"
)
def gates_over_heads(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    c = g.cumsum(1)
    return (q @ k.mT * (c.unsqueeze(-1) - c.unsqueeze(-2)).tril().exp().tril()) @ v


@negative("linear attention", "cumulative sum over heads, not time", LINEAR)
def cumsum_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = torch.cumsum(k[..., :, None] * v[..., None, :], dim=2)
    return torch.einsum("bthk,bthkv->bthv", q, states)


@negative(
    "linear attention",
    "cumulative maximum of outer products",
    LINEAR,
    export="no lowering for torch.aten.cummax",
)
def cummax_outer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = torch.cummax(k[..., :, None] * v[..., None, :], dim=1).values
    return torch.einsum("bthk,bthkv->bthv", q, states)
