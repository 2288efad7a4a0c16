"""The same recurrences without a loop: masked T x T products, and cumulative sums of outer products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from written import LINEAR, LINEAR_HEADS_FIRST, SIZES, form

RAISED = "linear_recurrence"
DECAYED = LINEAR_HEADS_FIRST + " g:BHT:log"


@form("linear attention", "quadratic: tril of the scores", LINEAR_HEADS_FIRST, RAISED)
def quadratic_tril(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tril(q @ k.transpose(-1, -2)) @ v


@form("linear attention", "quadratic: a mask of ones, einsum, scale", LINEAR, RAISED)
def quadratic_ones_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[1]
    scores = torch.einsum("bihk,bjhk->bhij", q * q.shape[-1] ** -0.5, k)
    scores = scores * torch.tril(torch.ones(length, length, dtype=q.dtype))
    return torch.einsum("bhij,bjhv->bihv", scores, v)


@form("linear attention", "quadratic: a token doesn't see itself", LINEAR_HEADS_FIRST, RAISED)
def mask_strict(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril(-1) @ v


@form(
    "linear attention, normalised",
    "quadratic: masked_fill, divided by the sums of rows",
    LINEAR_HEADS_FIRST,
    RAISED,
)
def quadratic_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = torch.matmul(q, k.mT).masked_fill(future, 0.0)
    return (scores @ v) / (scores.sum(-1, keepdim=True) + 1e-6)


@form(
    "linear attention, normalised", "quadratic: scores divided before they meet v", LINEAR_HEADS_FIRST, RAISED
)
def quadratic_scores_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.softmax(-1), k.softmax(-1)
    position = torch.arange(q.shape[2])
    scores = torch.where(position[:, None] >= position[None, :], q @ k.mT, 0.0)
    return (scores / scores.sum(-1, keepdim=True)) @ v


@form("RetNet", "quadratic: powers of distances", LINEAR_HEADS_FIRST, RAISED)
def quadratic_powers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gamma = 1 - torch.exp2(-5 - torch.arange(q.shape[1], dtype=q.dtype))
    n = torch.arange(q.shape[2])
    distance = n[:, None] - n[None, :]
    decay = torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0.0)
    return (q @ k.transpose(-1, -2) * decay) @ v


@form("RetNet", "quadratic: exp of log decays, one einsum of three", LINEAR_HEADS_FIRST, RAISED)
def quadratic_exp_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slope = torch.log(1 - torch.exp2(-5.0 - torch.arange(q.shape[1])))
    n = torch.arange(q.shape[2], dtype=q.dtype)
    decay = torch.exp2((n[:, None] - n) * slope.view(-1, 1, 1) / 0.6931471805599453) * (n[:, None] >= n)
    scores = torch.einsum("bhqd,bhkd,hqk->bhqk", q * q.shape[-1] ** -0.5, k, decay)
    return torch.einsum("bhqk,bhkd->bhqd", scores, v)


@form("RetNet", "quadratic: rows divided by their detached sums", LINEAR_HEADS_FIRST, "unrolled")
class RetNetParallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_decay", torch.log(1 - 2 ** (-5.0 - torch.arange(SIZES["H"]))))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        index = torch.arange(length).to(self.log_decay)
        mask = torch.tril(torch.ones(length, length))
        mask = torch.masked_fill(index[:, None] - index[None, :], ~mask.bool(), torch.inf)
        mask = torch.nan_to_num(torch.exp(mask * self.log_decay[:, None, None]))
        mask = mask / mask.sum(dim=-1, keepdim=True).sqrt()
        scores = q @ k.transpose(-1, -2) * mask
        scores = scores / scores.detach().abs().sum(dim=-1, keepdim=True).clamp(min=1, max=5e4)
        return scores @ v


@form("simple GLA", "quadratic: exp of differences of sums, tril twice", DECAYED, RAISED, quick=True)
def quadratic_gate_tril(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    c = g.cumsum(-1)
    decay = (c.unsqueeze(-1) - c.unsqueeze(-2)).tril().exp().tril()
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 * decay) @ v


@form("simple GLA", "quadratic: -inf above the diagonal, then exp", DECAYED, RAISED)
def quadratic_gate_masked_fill(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    c = torch.cumsum(g, dim=-1)
    difference = c[..., :, None] - c[..., None, :]
    keep = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool).tril(0)
    decay = torch.exp(difference.masked_fill(~keep, -torch.inf))
    return torch.einsum("bhij,bhjv->bhiv", torch.einsum("bhik,bhjk->bhij", q, k) * decay, v)


@form("simple GLA", "quadratic: where, (B, T, H, D)", LINEAR + " g:BTH:log", RAISED)
def quadratic_gate_where(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    c = g.cumsum(1).transpose(1, 2)
    n = torch.arange(q.shape[1])
    causal = n[None, :] <= n[:, None]
    decay = torch.where(causal, torch.exp(c[:, :, :, None] - c[:, :, None, :]), torch.zeros(()))
    scores = torch.einsum("bthk,bshk->bhts", q, k)
    return torch.einsum("bhts,bshv->bthv", scores * decay, v)


@form("GLA", "quadratic: gates moved onto q and k", LINEAR_HEADS_FIRST + " g:BHTK:log", RAISED, longest=64)
def quadratic_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    c = g.cumsum(2)
    return ((q * c.exp()) @ (k * (-c).exp()).transpose(-1, -2)).tril() @ v


@form("linear attention", "cumulative sum of outer products", LINEAR, RAISED)
def cumsum_outer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = torch.cumsum(k[..., :, None] * v[..., None, :], dim=1)
    return torch.einsum("bthk,bthkv->bthv", q, states)


@form("linear attention, normalised", "cumulative sums, elu + 1", LINEAR_HEADS_FIRST, RAISED)
def cumsum_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    states = torch.einsum("bhtk,bhtv->bhtkv", k, v).cumsum(dim=2)
    norm = (q * k.cumsum(dim=2)).sum(-1, keepdim=True) + 1e-6
    return (q.unsqueeze(-2) @ states).squeeze(-2) / norm
