"""Neurons that fire and reset, and recurrent cells: loops over time that are not linear."""

from __future__ import annotations

import math
from typing import Any

import torch
from surrogates import FastSigmoid
from torch import Tensor, nn
from written import SIZES, form

POINTWISE = "pointwise"


class Surrogate(torch.autograd.Function):
    """1 where the potential is over the threshold; the gradient is that of a steep sigmoid."""

    @staticmethod
    def forward(ctx: Any, over: Tensor) -> Tensor:
        ctx.save_for_backward(over)
        return (over >= 0).to(over.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (over,) = ctx.saved_tensors
        s = torch.sigmoid(4 * over)
        return gradient * 4 * s * (1 - s)


class Arctan(torch.autograd.Function):
    """1 where the potential is not under zero; the gradient is that of an arctangent, as in SpikingJelly."""

    @staticmethod
    def forward(ctx: Any, over: Tensor, alpha: float) -> Tensor:
        if over.requires_grad:
            ctx.save_for_backward(over)
            ctx.alpha = alpha
        return (over >= 0).to(over)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (over,) = ctx.saved_tensors
        return ctx.alpha / 2 / (1 + (math.pi / 2 * ctx.alpha * over).pow_(2)) * gradient, None


@form(
    "LIF",
    "soft reset, list and stack, time first",
    "x:TBD:drive",
    POINTWISE,
    quick=True,
)
def lif_soft(x: Tensor) -> tuple[Tensor, Tensor]:
    v = torch.zeros_like(x[0])
    spikes = []
    for t in range(x.shape[0]):
        v = 0.9 * v + x[t]
        s = (v >= 1.0).to(x.dtype)
        v = v - s * 1.0
        spikes.append(s)
    return torch.stack(spikes), v


@form("LIF", "hard reset, output preallocated", "x:TBD:drive", POINTWISE)
def lif_hard(x: Tensor) -> tuple[Tensor, Tensor]:
    v, out = torch.zeros(x.shape[1:]), torch.zeros_like(x)
    for t in range(x.size(0)):
        v = v + (x[t] - v) / 2.0
        s = (v > 0.6).float()
        v = v * (1 - s)
        out[t] = s
    return out, v


@form("LIF", "surrogate gradient, learned leak and threshold", "x:BTD:drive", POINTWISE)
class LifSurrogate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.leak, self.threshold = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(SIZES["D"]))

    def forward(self, x: Tensor) -> Tensor:
        v, spikes = torch.zeros_like(x[:, 0]), []
        for x_t in x.unbind(1):
            v = torch.sigmoid(self.leak) * v + x_t
            s = Surrogate.apply(v - self.threshold)
            v = v - s.detach() * self.threshold
            spikes.append(s)
        return torch.stack(spikes, dim=1)


@form("LIF", "surrogate of a fast sigmoid, the reset of the step before detached", "x:TBD:drive", POINTWISE)
def lif_fast_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    v = torch.zeros_like(x[0])
    spikes, potentials = [], []
    for t in range(x.shape[0]):
        reset = FastSigmoid.apply(v - 1.0, 25.0).clone().detach()
        v = 0.9 * v + x[t] - reset * 1.0
        spikes.append(FastSigmoid.apply(v - 1.0, 25.0))
        potentials.append(v)
    return torch.stack(spikes), torch.stack(potentials)


@form("LIF", "surrogate of an arctangent, hard reset detached, learned tau", "x:TBD:drive", POINTWISE)
class LifArctan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        v, spikes = torch.zeros_like(x[0]), []
        for x_t in x:
            v = v + (x_t - v) * self.w.sigmoid()
            s = Arctan.apply(v - 0.6, 2.0)
            v = (1.0 - s.detach()) * v
            spikes.append(s)
        return torch.stack(spikes)


@form("LIF", "the reset of the step before, straight-through spikes", "x:TBD:drive", POINTWISE)
def lif_reset_before(x: Tensor) -> Tensor:
    v = s = torch.zeros_like(x[0])
    spikes = []
    for x_t in x:
        v = 0.8 * v * (1.0 - s) + x_t
        soft = torch.sigmoid(5 * (v - 1))
        s = soft + ((v > 1).to(v) - soft).detach()
        spikes.append(s)
    return torch.stack(spikes)


@form("integer LIF", "round and clamp, straight-through", "x:TBD:drive", POINTWISE)
def integer_lif(x: Tensor) -> Tensor:
    v, counts = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v = 0.7 * v + x[t]
        clamped = v.clamp(0, 4)
        count = clamped + (clamped.round() - clamped).detach()
        v = v - count
        counts.append(count)
    return torch.stack(counts)


@form("integer LIF", "ternary spikes from signs", "x:BTD", POINTWISE)
def ternary_lif(x: Tensor) -> Tensor:
    v, out = torch.zeros_like(x[:, 0]), torch.zeros_like(x)
    for t in range(x.shape[1]):
        v = 0.9 * v + x[:, t]
        s = torch.sign(v) * (v.abs() >= 1).to(v.dtype)
        v = torch.where(s != 0, v - s, v)
        out[:, t] = s
    return out


@form(
    "adaptive threshold",
    "the threshold rises with every spike",
    "x:TBD:drive",
    POINTWISE,
)
def adaptive_threshold(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    v = torch.zeros_like(x[0])
    a = torch.zeros_like(x[0])
    spikes = []
    for t in range(x.shape[0]):
        threshold = 1.0 + 0.2 * a
        v = 0.9 * v + x[t]
        s = (v > threshold).to(v.dtype)
        v = v - s * threshold
        a = 0.95 * a + s
        spikes.append(s)
    return torch.stack(spikes), v, a


@form(
    "RWKV-4",
    "running maximum, numerator and denominator",
    "k:BTD v:BTD w:D:positive u:D",
    POINTWISE,
)
def rwkv4(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    numerator = denominator = torch.zeros_like(k[:, 0])
    highest = torch.full_like(k[:, 0], -1e38)
    out = torch.zeros_like(v)
    for t in range(k.shape[1]):
        k_t, v_t = k[:, t], v[:, t]
        top = torch.maximum(highest, k_t + u)
        e1, e2 = torch.exp(highest - top), torch.exp(k_t + u - top)
        out[:, t] = (e1 * numerator + e2 * v_t) / (e1 * denominator + e2)
        top = torch.maximum(highest - w, k_t)
        e1, e2 = torch.exp(highest - w - top), torch.exp(k_t - top)
        numerator, denominator, highest = e1 * numerator + e2 * v_t, e1 * denominator + e2, top
    return out


@form("leaky integrator", "tanh of the state", "x:BTD", POINTWISE)
def leaky_tanh(x: Tensor) -> Tensor:
    h, states = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.tanh(0.5 * h + x[:, t])
        states.append(h)
    return torch.stack(states, 1)


@form("spiking layer", "the spikes of the step before through a matrix", "x:TBD:drive", "loop")
class RecurrentLif(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.Linear(SIZES["D"], SIZES["D"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        v = s = torch.zeros_like(x[0])
        spikes = []
        for x_t in x:
            v = 0.9 * v + x_t + self.recurrent(s)
            s = Surrogate.apply(v - 1)
            v = v - s
            spikes.append(s)
        return torch.stack(spikes)


@form("spiking layer", "a linear layer for each step, then LIF", "x:TBD:drive", POINTWISE)
class LinearThenLif(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZES["D"], SIZES["M"])

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1], SIZES["M"])
        spikes = []
        for x_t in x:
            v = 0.9 * v + self.linear(x_t)
            s = Surrogate.apply(v - 0.5)
            v = v * (1 - s)
            spikes.append(s)
        return torch.stack(spikes)


@form("tanh cell", "h = tanh(W x + U h)", "x:BTD", "loop")
class TanhCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(SIZES["D"], SIZES["M"])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, outputs = x.new_zeros(x.shape[0], SIZES["M"]), []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            outputs.append(h)
        return torch.stack(outputs, dim=1), h


@form("GRU", "written out, gates split from one projection", "x:BTD", "loop")
class GruCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.hidden = (
            nn.Linear(SIZES["D"], 3 * SIZES["M"]),
            nn.Linear(SIZES["M"], 3 * SIZES["M"]),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], SIZES["M"])
        projected = self.inputs(x)
        outputs = torch.zeros(x.shape[0], x.shape[1], SIZES["M"])
        for t in range(x.shape[1]):
            xr, xz, xn = projected[:, t].chunk(3, dim=-1)
            hr, hz, hn = self.hidden(h).chunk(3, dim=-1)
            z = torch.sigmoid(xz + hz)
            n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
            h = (1 - z) * n + z * h
            outputs[:, t] = h
        return outputs


@form("LSTM", "written out, two states", "x:TBD", "loop")
class LstmCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(SIZES["D"] + SIZES["M"], 4 * SIZES["M"])

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h = c = x.new_zeros(x.shape[1], SIZES["M"])
        outputs = []
        for x_t in x:
            i, f, g, o = self.gates(torch.cat([x_t, h], dim=-1)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), (h, c)
