"""Elementwise recurrences h_t = a_t h_(t-1) + b_t (HGRN, RG-LRU, leaky integrators, minGRU) and Mamba's selective scan."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from written import SIZES, form

RAISED = "linear_scan"


@form("HGRN", "output preallocated, gate in log form", "x:BTD g:BTD:log", RAISED)
def hgrn_preallocated(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    dtype = x.dtype
    x, g = x.float(), g.float()
    h = torch.zeros(x.shape[0], x.shape[2], dtype=torch.float32)
    out = torch.zeros_like(x)
    for i in range(x.shape[1]):
        h = g[:, i].exp() * h + x[:, i]
        out[:, i] = h
    return out.to(dtype), h


@form("HGRN", "list and stack, input times 1 - forget gate", "x:BTD f:BTD state:BD", RAISED)
def hgrn_list(x: Tensor, f: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    forget = torch.sigmoid(f)
    states = []
    for x_t, f_t in zip(x.unbind(dim=1), forget.unbind(dim=1), strict=True):
        state = f_t * state + (1 - f_t) * F.silu(x_t)
        states.append(state)
    return torch.stack(states, dim=1), state


@form("RG-LRU", "reset by position, multiplier sqrt(1 - a^2)", "x:BTD i:BTD r:BTD starts:BT:starts", RAISED)
class RgLru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.Parameter(torch.randn(SIZES["D"]))

    def forward(self, x: Tensor, i: Tensor, r: Tensor, starts: Tensor) -> Tensor:
        log_a = -8.0 * torch.sigmoid(r) * F.softplus(self.recurrent)
        a = torch.exp(log_a)
        reset = starts.bool().unsqueeze(-1)
        multiplier = torch.where(reset, 1.0, torch.sqrt(1 - torch.exp(2 * log_a)))
        x = x * torch.sigmoid(i) * multiplier
        a = a * ~reset
        h, outputs = torch.zeros_like(x[:, 0]), torch.zeros_like(x)
        for t in range(x.shape[1]):
            h = a[:, t] * h + x[:, t]
            outputs[:, t] = h
        return outputs


@form(
    "RG-LRU",
    "bfloat16, state in float32, cast at each step",
    "x:BTD a:BTD:factor",
    RAISED,
    dtype=torch.bfloat16,
)
def rglru_casts(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.zeros(x.shape[0], x.shape[2], dtype=torch.float32)
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        h = a[:, t].to(h.dtype) * h + x[:, t].to(h.dtype)
        out[:, t] = h.to(x.dtype)
    return out, h


@form("leaky integrator", "a constant leak, time first", "x:TBD", RAISED)
def leaky_constant(x: Tensor) -> Tensor:
    v = torch.zeros_like(x[0])
    trace = []
    for t in range(x.shape[0]):
        v = 0.9 * v + x[t]
        trace.append(v)
    return torch.stack(trace)


@form("leaky integrator", "v += (x - v) / tau, with a learned tau", "x:TBD", RAISED)
class LeakyTau(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1:])
        trace = torch.empty_like(x)
        for t in range(len(x)):
            v = v + (x[t] - v) * torch.sigmoid(self.w)
            trace[t] = v
        return trace


@form("leaky integrator", "a synapse that feeds a membrane", "x:BTD", RAISED)
def leaky_two_stages(x: Tensor) -> tuple[Tensor, Tensor]:
    current = voltage = torch.zeros_like(x[:, 0])
    trace = []
    for t in range(x.shape[1]):
        current = 0.8 * current + x[:, t]
        voltage = 0.95 * voltage + 0.05 * current
        trace.append(voltage)
    return torch.stack(trace, 1), current


@form("leaky integrator", "reads the token before as well (token shift)", "x:BTD", RAISED)
class LeakyShift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(SIZES["D"]))

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, -1))
        h, outputs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            mixed = x[:, t] * self.mix + before[:, t] * (1 - self.mix)
            h = torch.sigmoid(mixed) * h + mixed
            outputs.append(h)
        return torch.stack(outputs, dim=1)


@form("leaky integrator", "last state alone, as a readout", "x:TBD", RAISED)
def leaky_readout(x: Tensor) -> Tensor:
    v = torch.zeros_like(x[0])
    for x_t in x:
        v = v * 0.5 + x_t
    return v


@form("running sum", "x += in a loop", "x:BTD", RAISED)
def running_sum(x: Tensor) -> Tensor:
    total, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        total = total + x[:, t]
        outputs.append(total)
    return torch.stack(outputs, 1)


@form("minGRU", "a loop", "z:BTD h:BTD", RAISED)
def mingru_loop(z: Tensor, h: Tensor) -> Tensor:
    z, new = torch.sigmoid(z), torch.where(h >= 0, h + 0.5, torch.sigmoid(h))
    state, outputs = torch.full_like(new[:, 0], 0.5), []
    for t in range(z.shape[1]):
        state = torch.lerp(state, new[:, t], z[:, t])
        outputs.append(state)
    return torch.stack(outputs, dim=1)


@form("minGRU", "cumprod(a) * cumsum(b / cumprod(a))", "z:BTD h:BTD", RAISED, longest=64)
def mingru_cumprod(z: Tensor, h: Tensor) -> Tensor:
    z = torch.sigmoid(z)
    product = torch.cumprod(1 - z, dim=1)
    return product * torch.cumsum(z * torch.tanh(h) / product, dim=1)


@form("minGRU", "cumsum of logs: exp(c) * cumsum(b * exp(-c))", "g:BTD:log x:BTD", RAISED, longest=64)
def mingru_log_cumsum(g: Tensor, x: Tensor) -> Tensor:
    c = g.cumsum(1)
    return c.exp() * (x * torch.exp(-c)).cumsum(1)


@form("minGRU", "logcumsumexp", "z:BTD h:BTD", "unrolled", export="no exact lowering")
def mingru_logcumsumexp(z: Tensor, h: Tensor) -> Tensor:
    log_keep, log_take = -F.softplus(z), -F.softplus(-z)
    c = log_keep.cumsum(1)
    return torch.exp(c + torch.logcumsumexp(log_take + F.logsigmoid(h) - c, dim=1))


MAMBA = "x:BTD dt:BTD:positive b:BTN c:BTN"


@form(
    "Mamba",
    "list and stack, decays of all steps before the loop, (B, D, T)",
    "x:BDT dt:BDT b:BTN c:BTN z:BDT",
    "selective_scan",
)
class MambaChannelsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a_log = nn.Parameter(torch.arange(1.0, SIZES["N"] + 1).log().repeat(SIZES["D"], 1))
        self.d = nn.Parameter(torch.ones(SIZES["D"]))

    def forward(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, z: Tensor) -> Tensor:
        dt = F.softplus(dt)
        a = -torch.exp(self.a_log.float())
        discrete_a = torch.exp(a[None, :, None, :] * dt[:, :, :, None])
        discrete_b = dt[:, :, :, None] * b[:, None, :, :].float()
        update = discrete_b * x[:, :, :, None].float()
        state = torch.zeros(x.shape[0], x.shape[1], b.shape[2])
        outputs = []
        for i in range(x.shape[2]):
            state = discrete_a[:, :, i, :] * state + update[:, :, i, :]
            outputs.append(torch.matmul(state, c[:, i, :].unsqueeze(-1))[:, :, 0])
        out = torch.stack(outputs, dim=-1)
        return (out + x * self.d[None, :, None]) * F.silu(z)


@form("Mamba", "states stacked, read after the loop", MAMBA, RAISED)
class MambaStatesStacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a_log = nn.Parameter(torch.rand(SIZES["D"], SIZES["N"]))

    def forward(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        a = -self.a_log.exp()
        delta_a = torch.exp(dt.unsqueeze(-1) * a)
        delta_bx = dt.unsqueeze(-1) * b.unsqueeze(2) * x.unsqueeze(-1)
        h = torch.zeros_like(delta_a[:, 0])
        hs = []
        for t in range(x.shape[1]):
            h = delta_a[:, t] * h + delta_bx[:, t]
            hs.append(h)
        return (torch.stack(hs, dim=1) @ c.unsqueeze(-1)).squeeze(3)


@form(
    "Mamba",
    "discretised inside the loop, einsum, initial and final state",
    MAMBA + " a:DN:rate state:BDN",
    "selective_scan",
    quick=True,
)
def mamba_inside(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x)
    for t in range(x.shape[1]):
        decay = torch.exp(torch.einsum("bd,dn->bdn", dt[:, t], a))
        state = decay * state + torch.einsum("bd,bn,bd->bdn", dt[:, t], b[:, t], x[:, t])
        out[:, t] = torch.einsum("bdn,bn->bd", state, c[:, t])
    return out, state


@form("Mamba", "a layer: projections, step size of low rank", "x:BTD", "selective_scan")
class MambaLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rank, self.states, width = 2, SIZES["N"], SIZES["D"]
        self.split = nn.Linear(width, 2 * width, bias=False)
        self.parameters_of = nn.Linear(width, self.rank + 2 * self.states, bias=False)
        self.step = nn.Linear(self.rank, width)
        self.a_log = nn.Parameter(torch.rand(width, self.states))
        self.d = nn.Parameter(torch.ones(width))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.split(x).chunk(2, dim=-1)
        x = F.silu(x)
        dt, b, c = self.parameters_of(x).split([self.rank, self.states, self.states], dim=-1)
        dt = F.softplus(self.step(dt))
        a = -torch.exp(self.a_log)
        h = x.new_zeros(x.shape[0], x.shape[2], self.states)
        ys = []
        for t in range(x.shape[1]):
            h = torch.exp(dt[:, t, :, None] * a) * h + (dt[:, t] * x[:, t])[:, :, None] * b[:, t, None, :]
            ys.append((h * c[:, t, None, :]).sum(-1))
        y = torch.stack(ys, dim=1) + x * self.d
        return self.out(y * F.silu(z))
