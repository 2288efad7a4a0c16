"""Loops that torch knows as such: scan; associative_scan and while_loop have files of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops import scan
from written import LINEAR, form

RAISED = "linear_recurrence"


@form("linear attention", "torch scan", LINEAR, RAISED)
def scan_linear(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    def step(state: Tensor, token: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        q_t, k_t, v_t = token
        state = state + torch.einsum("bhk,bhv->bhkv", k_t, v_t)
        return state.clone(), torch.einsum("bhk,bhkv->bhv", q_t, state)

    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    state, out = scan(step, state, tuple(x.transpose(0, 1) for x in (q, k, v)))
    return out.transpose(0, 1), state


@form("GLA", "torch scan, initial state", "q:TBHK k:TBHK v:TBHV g:TBHK:log state:BHKV", RAISED)
def scan_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    def step(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        q_t, k_t, v_t, g_t = token
        state = state * g_t.exp().unsqueeze(-1) + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        return state.clone(), (q_t.unsqueeze(-2) @ state).squeeze(-2)

    state, out = scan(step, state, (q, k, v, g))
    return out, state


@form("HGRN", "torch scan, backwards", "x:TBD a:TBD:factor", "linear_scan")
def scan_hgrn_reverse(x: Tensor, a: Tensor) -> Tensor:
    def step(h: Tensor, token: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x_t, a_t = token
        h = a_t * h + x_t
        return h.clone(), h.clone()

    return scan(step, torch.zeros_like(x[0]), (x, a), reverse=True)[1]


@form("Gated DeltaNet", "torch scan", "q:TBHK k:TBHK:unit v:TBHV beta:TBH:factor g:TBH:log", RAISED)
def scan_gated_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    def step(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        q_t, k_t, v_t, b_t, g_t = token
        state = state * g_t.exp()[..., None, None]
        error = (v_t - torch.einsum("bhk,bhkv->bhv", k_t, state)) * b_t[..., None]
        state = state + torch.einsum("bhk,bhv->bhkv", k_t, error)
        return state.clone(), torch.einsum("bhk,bhkv->bhv", q_t, state)

    return scan(step, q.new_zeros(*q.shape[1:], v.shape[-1]), (q, k, v, beta, g))[1]


@form("LIF", "torch scan, soft reset", "x:TBD:drive", "pointwise")
def scan_lif(x: Tensor) -> tuple[Tensor, Tensor]:
    def step(v: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        v = 0.9 * v + x_t
        s = (v >= 1).to(v.dtype)
        return v - s, s

    v, spikes = scan(step, torch.zeros_like(x[0]), x)
    return spikes, v
