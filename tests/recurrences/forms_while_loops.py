"""torch's while_loop: a counter that steps through time, in the spellings that torch can trace, and loops that don't count.

Gradients of torch 2.13's own while_loop are wrong, so none are compared; see ``tests/unit/test_counted_loops.py``.
"""

from __future__ import annotations

import functools

import torch
import written
from torch import Tensor
from torch._higher_order_ops import while_loop
from written import LINEAR

form = functools.partial(written.form, gradients=False)
negative = functools.partial(written.negative, gradients=False)

RAISED = "linear_recurrence"
GATED = LINEAR + " g:BTHK:log"


def zero_state(q: Tensor, v: Tensor) -> Tensor:
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])


def token(x: Tensor, t: Tensor, dim: int = 1) -> Tensor:
    return x.index_select(dim, t.view(1)).squeeze(dim)


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k.unsqueeze(-1) * v.unsqueeze(-2)


@form("linear attention", "torch while_loop, all carried", "q:TBHK k:TBHK v:TBHV", RAISED)
def while_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[0]

    def goes_on(t: Tensor, *_: Tensor) -> Tensor:
        return t < length

    def step(t: Tensor, state: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        q_t, k_t, v_t = (token(x, t, 0) for x in (q, k, v))
        state = state + outer(k_t, v_t)
        read = (q_t.unsqueeze(-1) * state).sum(-2)
        out = out.index_copy(0, t.view(1), read[None])
        return t + 1, state, out, q.clone(), k.clone(), v.clone()

    start = (torch.tensor(0), q.new_zeros(*q.shape[1:], v.shape[-1]), torch.zeros_like(v), q, k, v)
    return while_loop(goes_on, step, start)[2]


@form("GLA", "torch while_loop, the output written where a mask is true", GATED, RAISED)
def while_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    steps = torch.arange(length)

    def step(t: Tensor, state: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        q_t, k_t, v_t, g_t = (token(x, t) for x in (q, k, v, g))
        state = state * g_t.exp().unsqueeze(-1) + outer(k_t, v_t)
        read = torch.einsum("bhk,bhkv->bhv", q_t, state)
        return t + 1, state, torch.where((steps == t)[:, None, None], read.unsqueeze(1), out)

    start = (torch.zeros((), dtype=torch.int64), zero_state(q, v), torch.zeros_like(v))
    _, state, out = while_loop(lambda t, *_: t < length, step, start)
    return out, state


@form("GLA", "torch while_loop, an integer that runs down, slices", GATED, RAISED)
def while_gla_reverse(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    def step(t: int, state: Tensor, out: Tensor) -> tuple[int, Tensor, Tensor]:
        q_t, k_t, v_t, g_t = (x.narrow(1, t, 1)[:, 0] for x in (q, k, v, g))
        state = state * g_t.exp().unsqueeze(-1) + outer(k_t, v_t)
        read = (q_t.unsqueeze(-2) @ state).squeeze(-2)
        return t - 1, state, out.slice_scatter(read.unsqueeze(1), 1, t, t + 1)

    start = (q.shape[1] - 1, zero_state(q, v), torch.empty_like(v))
    return while_loop(lambda t, *_: t >= 0, step, start)[2]


@form("Gated DeltaNet", "torch while_loop, index_put", LINEAR + " beta:BTH:factor g:BTH:log", RAISED)
def while_gated_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    length, rows = q.shape[1], torch.arange(q.shape[0]).unsqueeze(1)
    k = torch.nn.functional.normalize(k, dim=-1)

    def step(t: Tensor, state: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        q_t, k_t, v_t, b_t, g_t = (x[:, t.view(1)].squeeze(1) for x in (q, k, v, beta, g))
        state = state * g_t.exp()[..., None, None]
        error = (v_t - torch.einsum("bhk,bhkv->bhv", k_t, state)) * b_t[..., None]
        state = state + outer(k_t, error)
        read = torch.einsum("bhk,bhkv->bhv", q_t, state)
        return t + 1, state, out.index_put((rows, t.view(1)), read.unsqueeze(1))

    start = (torch.tensor(0), zero_state(q, v), torch.zeros_like(v))
    return while_loop(lambda t, *_: t < length, step, start)[2]


@form("HGRN", "torch while_loop, from the second step on", "x:TBD a:TBD:factor", "linear_scan")
def while_hgrn(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    length = x.shape[0]

    def step(t: Tensor, h: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        h = a.index_select(0, t)[0] * h + x.index_select(0, t)[0]
        out = out.clone()
        out[t] = h.unsqueeze(0)
        return t + 1, h, out

    t, h, out = while_loop(
        lambda t, *_: (t != length).squeeze(),
        step,
        (torch.ones(1, dtype=torch.int64), x[0].clone(), x.clone()),
    )
    return out, h + t


@form("leaky integrator", "torch while_loop, a leak that depends on the counter", "x:TBD", "linear_scan")
def while_leak(x: Tensor) -> Tensor:
    length = x.shape[0]

    def step(t: Tensor, h: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        index = t.expand(1, *x.shape[1:])
        h = h * torch.exp(-1 / (t + 1)) + x.gather(0, index)[0]
        return t + 1, h, out.scatter(0, index, h.unsqueeze(0))

    start = (torch.tensor(0), torch.zeros_like(x[0]), torch.zeros_like(x))
    return while_loop(lambda t, *_: t < length, step, start)[2]


@form("LIF", "torch while_loop, soft reset", "x:BTD:drive", "pointwise")
def while_lif(x: Tensor) -> tuple[Tensor, Tensor]:
    length = x.shape[1]

    def step(t: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        v = 0.9 * v + token(x, t)
        s = (v >= 1).to(v.dtype)
        return t + 1, v - s, out.index_copy(1, t.view(1), s.unsqueeze(1))

    start = (torch.tensor(0), torch.zeros_like(x[:, 0]), torch.zeros_like(x))
    _, v, spikes = while_loop(lambda t, *_: t < length, step, start)
    return spikes, v


class WhileCell(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]

        def step(t: Tensor, h: Tensor, out: Tensor) -> tuple[Tensor, ...]:
            h = torch.tanh(self.weight(h) + token(x, t))
            return t + 1, h, out.index_copy(1, t.view(1), h.unsqueeze(1))

        start = (torch.tensor(0), torch.zeros_like(x[:, 0]), torch.zeros_like(x))
        return while_loop(lambda t, *_: t < length, step, start)[2]


form("tanh cell", "torch while_loop", "x:BTD", "loop")(WhileCell)


@negative("leaky integrator", "torch while_loop that ends where the state is large", "x:TBD", dynamic=False)
def while_small(x: Tensor) -> Tensor:
    length = x.shape[0]

    def goes_on(t: Tensor, h: Tensor) -> Tensor:
        return (t < length) & (h.abs().max() < 4)

    def step(t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return t + 1, 0.9 * h + token(x, t, 0)

    return while_loop(goes_on, step, (torch.tensor(0), torch.zeros_like(x[0])))[1]


@negative("leaky integrator", "torch while_loop in steps that double", "x:TBD", dynamic=False)
def while_doubling(x: Tensor) -> Tensor:
    length = x.shape[0]

    def step(t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * t, 0.9 * h + token(x, t, 0)

    return while_loop(lambda t, _: t < length, step, (torch.tensor(1), torch.zeros_like(x[0])))[1]


@negative("running sum", "torch while_loop whose number of steps is data", "x:TBD n:B:index", dynamic=False)
def while_count_is_data(x: Tensor, n: Tensor) -> Tensor:
    def step(t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return t + 1, h + token(x, t, 0)

    return while_loop(lambda t, _: t < n.max(), step, (torch.tensor(0), torch.zeros_like(x[0])))[1]
