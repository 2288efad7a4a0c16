"""The delta rule and kin: what the state predicts for a key is erased before the new value is written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from written import SIZES, form

RAISED = "linear_recurrence"
DELTA = "q:BTHK k:BTHK:unit v:BTHV beta:BTH:factor"
HEADS_FIRST = "q:BHTK k:BHTK:unit v:BHTV beta:BHT:factor"


@form("DeltaNet", "output preallocated, v minus the prediction", HEADS_FIRST, RAISED)
def delta_preallocated(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    q = q * q.shape[-1] ** -0.5
    out = torch.zeros_like(v)
    state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3])
    for i in range(q.shape[2]):
        k_i, v_i = k[:, :, i], v[:, :, i].clone()
        v_i = v_i - (state.clone() * k_i[..., None]).sum(-2)
        v_i = v_i * beta[:, :, i, None]
        state = state.clone() + k_i.unsqueeze(-1) * v_i.unsqueeze(-2)
        out[:, :, i] = torch.einsum("bhd,bhdm->bhm", q[:, :, i], state)
    return out, state


@form("DeltaNet", "(I - beta k k^T) S as a matrix product", DELTA, RAISED)
def delta_matrix(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    eye = torch.eye(q.shape[-1])
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        k_t, b_t = k[:, t].unsqueeze(-1), beta[:, t, :, None, None]
        state = (eye - b_t * k_t @ k_t.mT) @ state + b_t * k_t @ v[:, t].unsqueeze(-2)
        outputs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, dim=1)


@form("DeltaNet", "state stored (V, K), v_old and v_new", DELTA + " state:BHVK", RAISED)
def delta_transposed(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        old = torch.einsum("bhvk,bhk->bhv", state, k[:, t])
        new = beta[:, t, :, None] * v[:, t] + (1 - beta[:, t, :, None]) * old
        state = state + torch.einsum("bhv,bhk->bhvk", new - old, k[:, t])
        outputs.append(torch.einsum("bhvk,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1), state


@form("DeltaNet", "a beta for each value channel", "q:BTHK k:BTHK:unit v:BTHV beta:BTHV:factor", RAISED)
def delta_vector_beta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t] * error)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1)


@form("DeltaNet", "a layer: projections, silu, keys of unit length", "x:BTD", RAISED)
class DeltaNetLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, width = SIZES["H"], SIZES["D"]
        self.q = nn.Linear(width, self.heads * SIZES["K"], bias=False)
        self.k = nn.Linear(width, self.heads * SIZES["K"], bias=False)
        self.v = nn.Linear(width, self.heads * SIZES["V"], bias=False)
        self.beta = nn.Linear(width, self.heads)
        self.out = nn.Linear(self.heads * SIZES["V"], width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.q, self.k, self.v))
        q, k, v = F.normalize(F.silu(q), dim=-1), F.normalize(F.silu(k), dim=-1), F.silu(v)
        beta = self.beta(x).sigmoid()
        state = x.new_zeros(x.shape[0], self.heads, SIZES["K"], SIZES["V"])
        outputs = []
        for t in range(x.shape[1]):
            k_t = k[:, t, :, :, None]
            predicted = (k_t * state).sum(2)
            state = state + k_t * (beta[:, t, :, None] * (v[:, t] - predicted))[:, :, None]
            outputs.append((q[:, t, :, :, None] * state).sum(2))
        return self.out(torch.stack(outputs, dim=1).flatten(2))


@form(
    "DeltaNet",
    "chunks, the inverse by solve_triangular",
    HEADS_FIRST,
    "loop + unit_lower_inverse",
    multiple=3,
)
def delta_chunks(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    size = 3
    v, k_beta = v * beta[..., None], k * beta[..., None]
    q, k, v, k_beta = (x.unflatten(2, (-1, size)) for x in (q, k, v, k_beta))
    eye = torch.eye(size)
    lower = (k_beta @ k.mT).tril(-1)
    inverse = torch.linalg.solve_triangular(
        eye + lower, eye.expand_as(lower), upper=False, unitriangular=True
    )
    u, w = inverse @ v, inverse @ k_beta
    state = q.new_zeros(*q.shape[:2], q.shape[4], v.shape[4])
    outputs = []
    for i in range(q.shape[2]):
        new = u[:, :, i] - w[:, :, i] @ state
        scores = (q[:, :, i] @ k[:, :, i].mT).tril()
        outputs.append(q[:, :, i] @ state + scores @ new)
        state = state + k[:, :, i].mT @ new
    return torch.cat(outputs, dim=2)


@form("Gated DeltaNet", "decay first, then the prediction", DELTA + " g:BTH:log", RAISED, quick=True)
def gated_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, beta, g = (x.transpose(1, 2).contiguous().float() for x in (q, k, v, beta, g))
    q = q * q.shape[-1] ** -0.5
    state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3])
    out = torch.zeros_like(v)
    for i in range(q.shape[2]):
        state = state * g[:, :, i].exp().unsqueeze(-1).unsqueeze(-1)
        memory = (state * k[:, :, i].unsqueeze(-1)).sum(dim=-2)
        delta = (v[:, :, i] - memory) * beta[:, :, i].unsqueeze(-1)
        state = state + k[:, :, i].unsqueeze(-1) * delta.unsqueeze(-2)
        out[:, :, i] = (state * q[:, :, i].unsqueeze(-1)).sum(dim=-2)
    return out.transpose(1, 2), state


@form("Gated DeltaNet", "prediction from the state before its decay", DELTA + " a:BTH:factor", RAISED)
def gated_delta_undecayed(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, a: Tensor) -> Tensor:
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        update = torch.einsum("bhk,bhv->bhkv", k[:, t] * beta[:, t, :, None], error)
        state = a[:, t, :, None, None] * state + update
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1)


@form(
    "Gated DeltaNet",
    "grouped heads, keys normalised inside, bfloat16",
    "q:BTHK k:BTHK v:BTQV beta:BTQ:factor g:BTQ:log",
    RAISED,
    dtype=torch.bfloat16,
)
def gated_delta_grouped(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    dtype, groups = q.dtype, v.shape[2] // q.shape[2]
    q, k = (x.float() * torch.rsqrt((x.float() ** 2).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = q.repeat_interleave(groups, dim=2), k.repeat_interleave(groups, dim=2)
    q, k, v, beta, g = (x.transpose(1, 2).contiguous().to(torch.float32) for x in (q, k, v, beta, g))
    q = q * q.shape[-1] ** -0.5
    state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3])
    out = torch.zeros_like(v)
    for i in range(q.shape[2]):
        state = state * g[:, :, i].exp()[..., None, None]
        delta = (v[:, :, i] - (state * k[:, :, i].unsqueeze(-1)).sum(dim=-2)) * beta[:, :, i, None]
        state = state + k[:, :, i].unsqueeze(-1) * delta.unsqueeze(-2)
        out[:, :, i] = (state * q[:, :, i].unsqueeze(-1)).sum(dim=-2)
    return out.transpose(1, 2).contiguous().to(dtype)


@form("KDA", "a gate for each key channel, then the delta rule", DELTA + " g:BTHK:log", RAISED)
def kda(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    out = torch.zeros_like(v)
    for i in range(q.shape[1]):
        q_i, k_i, v_i, g_i, b_i = q[:, i], k[:, i], v[:, i], g[:, i], beta[:, i]
        state = state * g_i[..., None].exp()
        error = v_i - (k_i[..., None] * state).sum(-2)
        state = state + torch.einsum("bhk,bhv->bhkv", b_i[..., None] * k_i, error)
        out[:, i] = torch.einsum("bhk,bhkv->bhv", q_i, state)
    return out, state


@form("Comba", "erases with a key of its own", DELTA + " p:BTHK:unit g:BTH:log", RAISED)
def comba(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, p: Tensor, g: Tensor) -> Tensor:
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        error = v[:, t] - (state * p[:, t, ..., None]).sum(-2)
        state = state * g[:, t].exp()[..., None, None]
        state = state + k[:, t, ..., None] * (beta[:, t, :, None] * error)[..., None, :]
        outputs.append((state * q[:, t, ..., None]).sum(-2))
    return torch.stack(outputs, dim=1)


@form(
    "DeltaProduct",
    "two delta steps for each token",
    "q:BTHK k:BPHK:unit v:BPHV beta:BPH:factor g:BTH:log",
    "loop",
)
def delta_product(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        for j in range(2):
            k_j, v_j, b_j = k[:, 2 * t + j], v[:, 2 * t + j], beta[:, 2 * t + j]
            error = (v_j - torch.einsum("bhk,bhkv->bhv", k_j, state)) * b_j[..., None]
            state = state + torch.einsum("bhk,bhv->bhkv", k_j, error)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1)


@form(
    "RWKV-7",
    "free vectors of rank one beside a decay",
    "r:BTHK k:BTHK v:BTHV w:BTHK:log a:BTHK:unit b:BTHK:unit",
    RAISED,
)
def rwkv7(r: Tensor, k: Tensor, v: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    state = r.new_zeros(r.shape[0], r.shape[2], r.shape[3], v.shape[3])
    outputs = []
    for t in range(r.shape[1]):
        predicted = (state * a[:, t].unsqueeze(-1)).sum(-2, keepdim=True)
        state = state * w[:, t].exp().unsqueeze(-1) + b[:, t].unsqueeze(-1) * predicted
        state = state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append((state * r[:, t].unsqueeze(-1)).sum(-2))
    return torch.stack(outputs, dim=1), state
