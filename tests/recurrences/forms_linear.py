"""Linear attention in Python loops over time: S_t = S_(t-1) + k_t v_t^T, o_t = S_t^T q_t, with and without a normaliser."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from written import LINEAR, LINEAR_HEADS_FIRST, SIZES, form

RAISED = "linear_recurrence"


@form("linear attention", "list and stack, einsum", LINEAR, RAISED, quick=True)
def linear_list_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, length, heads, key = q.shape
    state = q.new_zeros(batch, heads, key, v.shape[-1])
    outputs = []
    for t in range(length):
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1)


@form(
    "linear attention",
    "output preallocated, multiply and sum, final state",
    LINEAR_HEADS_FIRST,
    RAISED,
)
def linear_preallocated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q = q * q.shape[-1] ** -0.5
    batch, heads, length, key = q.shape
    out = torch.zeros_like(v)
    state = torch.zeros(batch, heads, key, v.shape[-1], dtype=q.dtype, device=q.device)
    for i in range(length):
        key_i, value_i = k[:, :, i], v[:, :, i]
        state = state.clone() + key_i.unsqueeze(-1) * value_i.unsqueeze(-2)
        out[:, :, i] = (q[:, :, i, :, None] * state).sum(-2)
    return out, state


@form("linear attention", "state is None before the first step", LINEAR, RAISED)
def linear_state_none(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = None, []
    for t in range(q.size(1)):
        update = k[:, t, :, :, None] * v[:, t, :, None, :]
        state = update if state is None else state + update
        outputs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 1)


@form("linear attention", "state is 0.0 before the first step", LINEAR, RAISED)
def linear_state_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = 0.0, []
    for t in range(q.size(1)):
        state = state + torch.einsum("bhi,bhj->bhij", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhij,bhi->bhj", state, q[:, t]))
    return torch.stack(outputs, dim=1)


@form(
    "linear attention",
    "slices of one token, matmul, cat",
    LINEAR_HEADS_FIRST,
    RAISED,
)
def linear_slices_cat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1]).to(k)
    outputs = []
    for i in range(q.shape[2]):
        state = state + torch.matmul(k[:, :, i : i + 1].transpose(-1, -2), v[:, :, i : i + 1])
        outputs.append(torch.matmul(q[:, :, i : i + 1], state))
    return torch.cat(outputs, dim=-2), state


@form("linear attention", "unbind and zip", LINEAR, RAISED)
def linear_unbind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):
        state = torch.addcmul(state, k_t[..., None], v_t[..., None, :])
        outputs.append(torch.einsum("...kv,...k->...v", state, q_t))
    return torch.stack(outputs, dim=1)


@form("linear attention", "time first, iterating over the tensors", "q:TBHK k:TBHK v:TBHV", RAISED)
def linear_time_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.zeros(*q.shape[1:], v.shape[-1])
    outputs = []
    for q_t, k_t, v_t in zip(q, k, v, strict=True):
        state = state + k_t.unsqueeze(3) * v_t.unsqueeze(2)
        outputs.append((state * q_t.unsqueeze(3)).sum(dim=2))
    return torch.stack(outputs)


@form("linear attention", "chunk into single tokens, step function with a tuple", LINEAR, RAISED)
def linear_step_function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    def step(
        carry: tuple[Tensor, int], token: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[tuple[Tensor, int], Tensor]:
        (state, count), (q_t, k_t, v_t) = carry, token
        state = state + k_t.mT @ v_t
        return (state, count + 1), q_t @ state

    carry = (q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), 0)
    outputs = []
    for t in range(q.shape[1]):
        token = tuple(x[:, t].unsqueeze(-2) for x in (q, k, v))
        carry, output = step(carry, token)
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2), carry[0]


@form("linear attention", "bmm with heads in the batch, baddbmm", "q:BTK k:BTK v:BTV", RAISED)
def linear_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = q.new_zeros(q.shape[0], q.shape[2], v.shape[2])
    out = torch.empty_like(v)
    for t in range(q.shape[1]):
        state = torch.baddbmm(state, k[:, t, :, None], v[:, t, None, :])
        out[:, t] = torch.bmm(q[:, t, None, :], state)[:, 0]
    return out


@form("linear attention", "a Python loop over heads around the loop over time", LINEAR, RAISED)
def linear_heads_in_python(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = []
    for h in range(q.shape[2]):
        state = torch.zeros(q.shape[0], q.shape[3], v.shape[3])
        outputs = []
        for t in range(q.shape[1]):
            state = state + k[:, t, h, :, None] * v[:, t, h, None, :]
            outputs.append(torch.einsum("bk,bkv->bv", q[:, t, h], state))
        heads.append(torch.stack(outputs, dim=1))
    return torch.stack(heads, dim=2)


@form("linear attention", "initial state given, final state returned", LINEAR + " state:BHKV", RAISED)
def linear_initial_state(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state


@form("linear attention", "state stored (V, K)", LINEAR, RAISED)
def linear_state_transposed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state = q.new_zeros(q.shape[0], q.shape[2], v.shape[3], q.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        state = state + torch.einsum("bhv,bhk->bhvk", v[:, t], k[:, t])
        outputs.append(torch.einsum("bhvk,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1), state


@form(
    "linear attention", "several query heads to a key head, repeat_interleave", "q:BTQK k:BTHK v:BTHV", RAISED
)
def linear_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        state = state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append((q[:, t].unsqueeze(-1) * state).sum(-2))
    return torch.stack(outputs, dim=1)


@form("linear attention", "bfloat16, computed in float32", LINEAR, RAISED, dtype=torch.bfloat16)
def linear_bfloat16(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    q, k, v = (x.transpose(1, 2).contiguous().to(torch.float32) for x in (q, k, v))
    q = q / q.shape[-1] ** 0.5
    state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=torch.float32)
    out = torch.zeros_like(v)
    for t in range(q.shape[2]):
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out[:, :, t] = (state * q[:, :, t, :, None]).sum(dim=-2)
    return out.transpose(1, 2).contiguous().to(dtype), state


@form("linear attention", "read before the update", LINEAR, RAISED)
def linear_exclusive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
    return torch.stack(outputs, dim=1)


@form("linear attention", "backwards in time", LINEAR, RAISED)
def linear_reverse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    out = torch.zeros_like(v)
    for t in range(q.shape[1] - 1, -1, -1):
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        out[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], state)
    return out, state


@form("linear attention", "both directions, flip around the loop", LINEAR, RAISED)
def linear_both_directions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        outputs = []
        for t in range(q.shape[1]):
            state = state + k[:, t, :, :, None] * v[:, t, :, None]
            outputs.append((q[:, t, :, None] @ state)[:, :, 0])
        return torch.stack(outputs, dim=1)

    return run(q, k, v) + run(q.flip(1), k.flip(1), v.flip(1)).flip(1)


@form("linear attention", "squared feature map inside the loop", LINEAR, RAISED)
def linear_squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        feature_q, feature_k = q[:, t].relu() ** 2, k[:, t].relu().square()
        state = state + feature_k[..., None] * v[:, t][..., None, :]
        outputs.append((feature_q[..., None] * state).sum(-2))
    return torch.stack(outputs, dim=1)


@form("linear attention", "softmax feature map inside the loop", LINEAR, RAISED)
def linear_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    out = v.new_empty(v.shape)
    for t in range(q.shape[1]):
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t].softmax(-1), v[:, t])
        out[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t].softmax(-1), state)
    return out


@form("linear attention, normalised", "two states, elu + 1", LINEAR, RAISED)
def normalised_two_states(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    total = q.new_zeros(q.shape[0], q.shape[2], q.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        total = total + k[:, t]
        numerator = torch.einsum("bhk,bhkv->bhv", q[:, t], state)
        denominator = torch.einsum("bhk,bhk->bh", q[:, t], total)
        outputs.append(numerator / (denominator.unsqueeze(-1) + 1e-6))
    return torch.stack(outputs, dim=1)


@form("linear attention, normalised", "sums of the keys outside the loop", LINEAR, RAISED)
def normalised_cumsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    out = torch.zeros_like(v)
    for t in range(q.shape[1]):
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        out[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], state)
    return out / ((q * k.cumsum(1)).sum(-1, keepdim=True) + 1e-6)


@form("linear attention, normalised", "a column of ones beside v", LINEAR, RAISED)
def normalised_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.exp(), k.exp()
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        state = state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    out = torch.stack(outputs, dim=1)
    return out[..., :-1] / out[..., -1:]


@form(
    "linear attention",
    "a loop over chunks",
    LINEAR_HEADS_FIRST,
    "linear_scan",
    multiple=3,
)
def linear_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    size = 3
    mask = torch.triu(torch.ones(size, size, dtype=torch.bool), diagonal=1)
    state = q.new_zeros(q.shape[0], q.shape[1], q.shape[3], v.shape[3])
    out = torch.zeros_like(v)
    for i in range(0, q.shape[2], size):
        q_i, k_i, v_i = (x[:, :, i : i + size] for x in (q, k, v))
        scores = (q_i @ k_i.transpose(-1, -2)).masked_fill(mask, 0)
        out[:, :, i : i + size] = q_i @ state + scores @ v_i
        state = state + k_i.transpose(-1, -2) @ v_i
    return out


@form(
    "linear attention",
    "chunks without a loop, sums of states over chunks",
    LINEAR_HEADS_FIRST,
    RAISED,
    multiple=3,
)
def linear_chunks_cumsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(2, (-1, 3)) for x in (q, k, v))
    states = (k.transpose(-1, -2) @ v).cumsum(2)
    states = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], dim=2)
    out = q @ states + (q @ k.transpose(-1, -2)).tril() @ v
    return out.flatten(2, 3)


@form("linear attention", "a module with projections, relu and a norm per head", "x:BTD", RAISED)
class LinearAttentionLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.key, self.value = SIZES["H"], SIZES["K"], SIZES["V"]
        width = SIZES["D"]
        self.query_key = nn.Linear(width, 2 * self.heads * self.key, bias=False)
        self.values = nn.Linear(width, self.heads * self.value)
        self.norm = nn.LayerNorm(self.value)
        self.out = nn.Linear(self.heads * self.value, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k = self.query_key(x).view(batch, length, 2, self.heads, self.key).unbind(2)
        q, k, v = F.relu(q) * self.key**-0.5, F.relu(k), self.values(x).view(batch, length, self.heads, -1)
        state = x.new_zeros(batch, self.heads, self.key, self.value)
        outputs = []
        for t in range(length):
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            outputs.append(self.norm(torch.einsum("bhk,bhkv->bhv", q[:, t], state)))
        return x + self.out(torch.stack(outputs, dim=1).flatten(2))
