"""A decay for each head, constant (RetNet, Lightning attention) or by token (simple GLA, Mamba-2):
S_t = a_t S_(t-1) + k_t v_t^T."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from written import LINEAR, LINEAR_HEADS_FIRST, SIZES, form

RAISED = "linear_recurrence"


@form("RetNet", "decay of each head in a buffer, output preallocated", LINEAR_HEADS_FIRST, RAISED)
class RetNetLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gamma", 1 - torch.exp2(-5.0 - torch.arange(SIZES["H"])))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
        out = torch.zeros_like(v)
        for t in range(q.shape[2]):
            update = k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
            state = self.gamma[None, :, None, None] * state + update
            out[:, :, t] = (q[:, :, t].unsqueeze(-1) * state).sum(-2)
        return out


@form("RetNet", "one decay as a Python number", "q:BTK k:BTK v:BTV", RAISED)
def retnet_number(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state, outputs = torch.zeros(q.shape[0], q.shape[2], v.shape[2]), []
    for t in range(q.shape[1]):
        state = 0.9 * state + torch.einsum("bk,bv->bkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bkv,bk->bv", state, q[:, t]))
    return torch.stack(outputs, 1), state


@form("RetNet", "another read from the middle on: raised up to there", LINEAR, RAISED, dynamic=False)
def retnet_read_changes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        state = 0.9 * state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state if t < 6 else state.relu()))
    return torch.stack(outputs, 1)


@form(
    "Lightning attention",
    "slices of one token, slopes, cat",
    LINEAR_HEADS_FIRST + " state:BHKV",
    RAISED,
)
class LightningDecode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        slopes = 2.0 ** (-8 * torch.arange(1, SIZES["H"] + 1) / SIZES["H"])
        self.register_buffer("slope", slopes[:, None, None])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        ratio = torch.exp(-self.slope)
        outputs = []
        for i in range(q.shape[2]):
            token = k[:, :, i : i + 1].transpose(-1, -2) @ v[:, :, i : i + 1]
            state = ratio * state + token
            outputs.append(torch.matmul(q[:, :, i : i + 1], state))
        return torch.cat(outputs, dim=-2), state


@form(
    "Lightning attention",
    "a loop over blocks, the last one shorter",
    LINEAR_HEADS_FIRST,
    "linear_scan",
    export="has size 64 along axis 2, expected 11",
)
class LightningBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.size = 2
        slopes = 2.0 ** (-8 * torch.arange(1, SIZES["H"] + 1) / SIZES["H"])
        steps = torch.arange(1, self.size + 1)
        apart = torch.exp(-slopes[:, None, None] * (steps[:, None] - steps).clamp(min=0)).tril()
        self.register_buffer("slope", slopes[:, None, None])
        self.register_buffer("apart", apart)
        self.register_buffer("since", torch.exp(-slopes[:, None] * steps)[..., None])
        self.register_buffer("until", torch.exp(-slopes[:, None] * (self.size - steps))[..., None])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        length = q.shape[2]
        state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3])
        outputs = []
        for start in range(0, length, self.size):
            n = min(self.size, length - start)
            q_i, k_i, v_i = (x[:, :, start : start + n] for x in (q, k, v))
            inner = (q_i @ k_i.transpose(-1, -2) * self.apart[:, :n, :n]) @ v_i
            outputs.append(inner + (q_i * self.since[:, :n]) @ state)
            update = (k_i * self.until[:, -n:]).transpose(-1, -2) @ v_i
            state = state * torch.exp(-self.slope * n) + update
        return torch.cat(outputs, dim=-2), state


@form("simple GLA", "gate in log form, exp inside the loop", LINEAR + " g:BTH:log", RAISED)
def simple_gla_exp_inside(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    dtype = v.dtype
    q, k, v, g = (x.transpose(1, 2).float() for x in (q, k, v, g))
    batch, heads, length, key = q.shape
    state = torch.zeros(batch, heads, key, v.shape[-1], dtype=torch.float32)
    out = torch.zeros(batch, heads, length, v.shape[-1])
    for i in range(length):
        decay = g[:, :, i].exp()
        state = state * decay[..., None, None] + k[:, :, i][..., None] * v[:, :, i][..., None, :]
        out[:, :, i, :] = (q[:, :, i][..., None] * key**-0.5 * state).sum(-2)
    return out.transpose(1, 2).to(dtype), state


@form(
    "simple GLA",
    "gate as a factor, state changed in place",
    LINEAR + " a:BTH:factor",
    RAISED,
    gradients=False,
)
def simple_gla_in_place(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        state.mul_(a[:, t, :, None, None]).add_(torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t]))
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1)


@form("simple GLA", "state copied into a buffer", LINEAR + " a:BTH:factor", RAISED, gradients=False)
def simple_gla_copy(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    out = torch.empty_like(v)
    for t in range(q.shape[1]):
        new = a[:, t].view(*a.shape[::2], 1, 1) * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        state[:] = new
        out[:, t] = (q[:, t, :, None] @ new)[:, :, 0]
    return out


@form("Mamba-2", "B and C shared by all heads, skip", "x:BTHV dt:BTH:positive b:BTK c:BTK", RAISED)
class Mamba2Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a_log = nn.Parameter(torch.arange(1, SIZES["H"] + 1).float().log())
        self.d = nn.Parameter(torch.ones(SIZES["H"]))

    def forward(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        a = -torch.exp(self.a_log.float())
        decay = torch.exp(dt * a)
        state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], b.shape[2])
        outputs = []
        for t in range(x.shape[1]):
            update = torch.einsum("bh,bn,bhp->bhpn", dt[:, t], b[:, t], x[:, t])
            state = state * decay[:, t, :, None, None] + update
            outputs.append(torch.einsum("bhpn,bn->bhp", state, c[:, t]))
        return torch.stack(outputs, dim=1) + x * self.d[:, None]


@form("Mamba-2", "a decoding step called for each token", "x:BTHV dt:BTH b:BTHK c:BTHK state:BHVK", RAISED)
def mamba2_step(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    def step(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        dt = F.softplus(dt)
        da = torch.exp(-0.5 * dt)
        state = state * da[:, :, None, None] + (dt[:, :, None] * x)[..., None] * b[:, :, None, :]
        return (state * c[:, :, None, :]).sum(-1), state

    outputs = []
    for t in range(x.shape[1]):
        y, state = step(x[:, t], dt[:, t], b[:, t], c[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


@form("simple GLA", "a loop over chunks", LINEAR_HEADS_FIRST + " g:BHT:log", "linear_scan", multiple=3)
def simple_gla_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    size = 3
    q, k, v, g = (x.unflatten(2, (-1, size)) for x in (q, k, v, g))
    g = g.cumsum(-1)
    mask = torch.tril((g.unsqueeze(-1) - g.unsqueeze(-2)).tril().exp())
    state = q.new_zeros(*q.shape[:2], q.shape[4], v.shape[4])
    outputs = []
    for i in range(q.shape[2]):
        inner = (q[:, :, i] @ k[:, :, i].mT * mask[:, :, i]) @ v[:, :, i]
        outer = (q[:, :, i] * g[:, :, i, :, None].exp()) @ state
        outputs.append(inner + outer)
        last = g[:, :, i, -1, None]
        state = (
            state * last[..., None].exp()
            + (k[:, :, i] * (last - g[:, :, i])[..., None].exp()).transpose(-1, -2) @ v[:, :, i]
        )
    return torch.cat(outputs, dim=2), state


def segment_sums(x: Tensor) -> Tensor:
    """Returns [..., i, j] = x[j + 1] + ... + x[i], -inf above the diagonal."""
    size = x.shape[-1]
    x = x[..., None].expand(*x.shape, size)
    x = x.masked_fill(~torch.ones(size, size, dtype=torch.bool).tril(-1), 0)
    return x.cumsum(-2).masked_fill(~torch.ones(size, size, dtype=torch.bool).tril(), -torch.inf)


@form("Mamba-2", "chunks without a loop", "x:BTHV g:BTH:log b:BTHK c:BTHK", RAISED, multiple=3)
def mamba2_chunks(x: Tensor, g: Tensor, b: Tensor, c: Tensor) -> Tensor:
    x, g, b, c = (y.unflatten(1, (-1, 3)) for y in (x, g, b, c))
    g = g.permute(0, 3, 1, 2)
    sums = g.cumsum(-1)
    inner = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", c, b, segment_sums(g).exp(), x)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", b, torch.exp(sums[..., -1:] - sums), x)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    between = segment_sums(F.pad(sums[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    outer = torch.einsum("bclhn,bchpn,bhcl->bclhp", c, states, sums.exp())
    return (inner + outer).flatten(1, 2)
