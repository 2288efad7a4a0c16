"""A gate for each key or value channel (GLA and kin), a bonus for the current token (RWKV), two recurrences in a row (GSA, ABC),
and mLSTM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from written import LINEAR, LINEAR_HEADS_FIRST, SIZES, form

RAISED = "linear_recurrence"
GLA = LINEAR + " g:BTHK:log"


@form("GLA", "output preallocated, exp inside the loop, float32", GLA, RAISED)
def gla_preallocated(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    dtype = q.dtype
    q, k, v, g = (x.transpose(1, 2).float() for x in (q, k, v, g))
    batch, heads, length, key = q.shape
    out = torch.zeros_like(v)
    state = q.new_zeros(batch, heads, key, v.shape[-1])
    scale = key**-0.5
    for i in range(length):
        q_i, k_i, v_i = q[:, :, i] * scale, k[:, :, i], v[:, :, i]
        decay = g[:, :, i].exp()
        state = state * decay[..., None] + k_i[..., None] * v_i[..., None, :]
        out[:, :, i] = (q_i[..., None] * state).sum(-2)
    return out.transpose(1, 2).to(dtype)


@form("GLA", "list and stack, exp outside the loop, matmul", GLA, RAISED)
def gla_list_matmul(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    decay = torch.exp(g)
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        state = decay[:, t, ..., None] * state + k[:, t].unsqueeze(-1) @ v[:, t].unsqueeze(-2)
        outputs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, dim=1)


@form("GLA", "initial and final state, state stored (V, K)", GLA + " state:BHVK", RAISED)
def gla_state_transposed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        update = torch.einsum("bhv,bhk->bhvk", v[:, t], k[:, t])
        state = torch.einsum("bhvk,bhk->bhvk", state, g[:, t].exp()) + update
        outputs.append(torch.einsum("bhvk,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1), state


@form("GLA", "gate for each value channel", LINEAR + " g:BTHV:log", RAISED)
def gla_value_gate(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    out = torch.zeros_like(v)
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None].exp() + k[:, t, :, :, None] * v[:, t, :, None]
        out[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], state)
    return out, state


@form("GLA", "backwards in time, lists turned round", GLA, RAISED)
def gla_reverse(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in reversed(range(q.shape[1])):
        state = g[:, t].exp().unsqueeze(-1) * state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs[::-1], dim=1), state


@form("GLA", "gates closed where a document begins", GLA + " starts:BT:starts", RAISED)
def gla_documents(q: Tensor, k: Tensor, v: Tensor, g: Tensor, starts: Tensor) -> Tensor:
    g = g.masked_fill(starts[..., None, None] > 0, -torch.inf)
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        state = state * torch.exp(g[:, t])[..., None] + k[:, t, ..., None] * v[:, t, :, None, :]
        outputs.append((q[:, t, ..., None] * state).sum(2))
    return torch.stack(outputs, dim=1)


@form("GLA", "bfloat16, computed in float32", GLA, RAISED, dtype=torch.bfloat16)
def gla_bfloat16(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    outputs = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t, g_t = (x[:, t].float() for x in (q, k, v, g))
        state = state * g_t.exp().unsqueeze(-1) + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, state).to(q.dtype))
    return torch.stack(outputs, dim=1), state


@form(
    "GLA",
    "a loop over chunks",
    LINEAR_HEADS_FIRST + " g:BHTK:log",
    "linear_scan",
    multiple=3,
)
def gla_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    size = 3
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    mask = torch.ones(size, size, dtype=torch.bool).tril()
    outputs = []
    for q_c, k_c, v_c, g_c in zip(*(x.split(size, dim=2) for x in (q, k, v, g)), strict=True):
        c = g_c.cumsum(2)
        pairs = (c[:, :, :, None] - c[:, :, None, :]).masked_fill(~mask[..., None], -torch.inf).exp()
        scores = torch.einsum("bhik,bhjk,bhijk->bhij", q_c, k_c, pairs)
        outputs.append(scores @ v_c + (q_c * c.exp()) @ state)
        last = c[:, :, -1:]
        state = state * last.transpose(-1, -2).exp() + (k_c * (last - c).exp()).transpose(-1, -2) @ v_c
    return torch.cat(outputs, dim=2)


@form(
    "GLA", "a layer of SpikingBrain: low-rank gate, grouped heads, norm per head", "x:BTD", RAISED, quick=True
)
class SpikingBrainGla(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.groups = SIZES["Q"], SIZES["Q"] // SIZES["H"]
        self.key, self.value, width = SIZES["K"], SIZES["V"], SIZES["D"]
        self.q = nn.Linear(width, self.heads * self.key)
        self.k = nn.Linear(width, SIZES["H"] * self.key)
        self.v = nn.Linear(width, SIZES["H"] * self.value)
        self.gate = nn.Sequential(nn.Linear(width, 2, bias=False), nn.Linear(2, SIZES["H"] * self.key))
        self.norm = nn.RMSNorm(self.value)
        self.out = nn.Linear(self.heads * self.value, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = F.relu(self.q(x)).view(batch, length, self.heads, self.key).transpose(1, 2)
        k = F.relu(self.k(x)).view(batch, length, -1, self.key).transpose(1, 2)
        v = self.v(x).view(batch, length, -1, self.value).transpose(1, 2)
        g = F.logsigmoid(self.gate(x)).view(batch, length, -1, self.key).transpose(1, 2) / 16
        k, v, g = (y.repeat_interleave(self.groups, dim=1) for y in (k, v, g))
        state = x.new_zeros(batch, self.heads, self.key, self.value)
        out = torch.zeros_like(v)
        for t in range(length):
            state = state * g[:, :, t].exp().unsqueeze(-1) + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(
                -2
            )
            out[:, :, t] = (q[:, :, t].unsqueeze(-1) * self.key**-0.5 * state).sum(-2)
        return self.out(self.norm(out.transpose(1, 2)).flatten(2))


@form("GLA", "two layers in a row", GLA, RAISED)
def gla_two_layers(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    for _ in range(2):
        state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        outputs = []
        for t in range(q.shape[1]):
            state = state * g[:, t].exp()[..., None] + k[:, t, ..., None] * v[:, t, :, None]
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        v = torch.tanh(torch.stack(outputs, dim=1))
    return v


@form("tied gates", "decay is 1 - k", "q:BTHK k:BTHK:factor v:BTHV", RAISED)
def tied_one_minus_k(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        k_t = k[:, t].unsqueeze(-1)
        state = (1 - k_t) * state + k_t * v[:, t].unsqueeze(-2)
        outputs.append((q[:, t].unsqueeze(-1) * state).sum(-2))
    return torch.stack(outputs, dim=1), state


@form("tied gates", "HGRN-2: k is 1 - forget gate", "q:BTHK f:BTHK v:BTHV", RAISED)
def tied_hgrn2(q: Tensor, f: Tensor, v: Tensor) -> Tensor:
    forget = 0.1 + 0.9 * torch.sigmoid(f)
    q = F.silu(q)
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        state = forget[:, t].unsqueeze(-1) * state + torch.einsum("bhk,bhv->bhkv", 1 - forget[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1)


@form("tied gates", "lerp between the state and v", "q:BTHK k:BTHK:factor v:BTHV", RAISED)
def tied_lerp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        state = torch.lerp(state, v[:, t, :, None], k[:, t, :, :, None])
        outputs.append((q[:, t, :, None] @ state).squeeze(2))
    return torch.stack(outputs, dim=1)


@form(
    "RWKV-6",
    "bonus added to the state before it is read",
    "r:BTHK k:BTHK v:BTHV w:BTHK:log u:HK",
    RAISED,
)
def rwkv6_bonus(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    state = r.new_zeros(r.shape[0], r.shape[2], r.shape[3], v.shape[3])
    out = torch.zeros_like(v)
    for t in range(r.shape[1]):
        kv = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        out[:, t] = ((state + u[None, :, :, None] * kv) * r[:, t].unsqueeze(-1)).sum(-2)
        state = state * w[:, t].exp().unsqueeze(-1) + kv
    return out


@form(
    "RWKV-6", "bonus apart, decay exp(-exp(w)), time first", "r:TBHK k:TBHK v:TBHV w:TBHK state:BHKV", RAISED
)
class Rwkv6TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bonus = nn.Parameter(torch.randn(SIZES["H"], SIZES["K"]))

    def forward(self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for r_t, k_t, v_t, w_t in zip(r, k, v, w, strict=True):
            now = (r_t * self.bonus * k_t).sum(-1, keepdim=True) * v_t
            outputs.append(torch.einsum("bhk,bhkv->bhv", r_t, state) + now)
            state = torch.exp(-torch.exp(w_t))[..., None] * state + k_t[..., None] * v_t[..., None, :]
        return torch.stack(outputs), state


@form(
    "RWKV-5",
    "constant decay of each channel, matmul",
    "r:BHTK k:BHTK v:BHTV",
    RAISED,
)
class Rwkv5(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.randn(SIZES["H"], SIZES["K"], 1))
        self.first = nn.Parameter(torch.randn(SIZES["H"], SIZES["K"], 1))

    def forward(self, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        decay = torch.exp(-torch.exp(self.decay))
        state = r.new_zeros(*r.shape[:2], r.shape[3], v.shape[3])
        out = torch.zeros_like(v)
        for t in range(r.shape[2]):
            attended = k[:, :, t : t + 1].transpose(-1, -2) @ v[:, :, t : t + 1]
            out[:, :, t] = (r[:, :, t : t + 1] @ (self.first * attended + state)).squeeze(2)
            state = attended + decay * state
        return out


@form("GSA", "two loops, softmax over slots between them", "q:BTHK k:BTHK v:BTHV s:BTHM g:BTHM:log", RAISED)
def gsa_two_loops(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor) -> Tensor:
    keys = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], s.shape[3])
    reads = []
    for t in range(q.shape[1]):
        keys = keys * g[:, t, :, None].exp() + k[:, t, :, :, None] * s[:, t, :, None]
        reads.append((q[:, t, ..., None] * keys).sum(-2))
    weights = torch.stack(reads, dim=1).softmax(-1)
    values = q.new_zeros(q.shape[0], q.shape[2], s.shape[3], v.shape[3])
    out = torch.zeros_like(v)
    for t in range(q.shape[1]):
        values = values * g[:, t, ..., None].exp() + s[:, t, ..., None] * v[:, t, :, None]
        out[:, t] = (weights[:, t, ..., None] * values).sum(-2)
    return out


@form("ABC", "one loop, softmax over slots inside it", "q:BTHK k:BTHK v:BTHV s:BTHM", RAISED)
def abc_one_loop(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    s = s.softmax(-1)
    keys = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], s.shape[3])
    values = q.new_zeros(q.shape[0], q.shape[2], s.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        keys = keys + torch.einsum("bhk,bhm->bhkm", k[:, t], s[:, t])
        values = values + torch.einsum("bhm,bhv->bhmv", s[:, t], v[:, t])
        weights = torch.einsum("bhk,bhkm->bhm", q[:, t], keys).softmax(-1)
        outputs.append(torch.einsum("bhm,bhmv->bhv", weights, values))
    return torch.stack(outputs, dim=1)


@form("mLSTM", "matrix and vector state, no stabiliser", LINEAR_HEADS_FIRST + " i:BHT f:BHT", RAISED)
def mlstm_plain(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    matrix = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    vector = q.new_zeros(*q.shape[:2], q.shape[3])
    outputs = []
    for t in range(q.shape[2]):
        forget, take = torch.sigmoid(f[:, :, t, None]), torch.exp(i[:, :, t, None])
        k_t = k[:, :, t] * q.shape[-1] ** -0.5
        matrix = forget[..., None] * matrix + take[..., None] * (k_t[..., :, None] @ v[:, :, t, None, :])
        vector = forget * vector + take * k_t
        read = (q[:, :, t, None, :] @ matrix).squeeze(-2)
        norm = (q[:, :, t] * vector).sum(-1, keepdim=True).abs()
        outputs.append(read / torch.clamp(norm, min=1.0))
    return torch.stack(outputs, dim=2)


@form("mLSTM", "stabilised by a running maximum", LINEAR_HEADS_FIRST + " i:BHT f:BHT", "loop")
def mlstm_stabilised(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    matrix = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    vector = q.new_zeros(*q.shape[:2], q.shape[3], 1)
    highest = q.new_zeros(*q.shape[:2], 1, 1)
    outputs = []
    for t in range(q.shape[2]):
        log_forget, log_take = F.logsigmoid(f[:, :, t, None, None]), i[:, :, t, None, None]
        new = torch.maximum(log_forget + highest, log_take)
        forget, take = torch.exp(log_forget + highest - new), torch.exp(log_take - new)
        highest = new
        k_t = k[:, :, t, :, None] * q.shape[-1] ** -0.5
        matrix = forget * matrix + take * (k_t @ v[:, :, t, None, :])
        vector = forget * vector + take * k_t
        q_t = q[:, :, t, None, :]
        norm = torch.maximum((q_t @ vector).abs(), torch.exp(-highest)) + 1e-6
        outputs.append((q_t @ matrix / norm).squeeze(-2))
    return torch.stack(outputs, dim=-2)
