"""The recurrences of `fla.ops` as loops in float32, differentiated by a `torch.autograd.Function` as the package does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Loop(torch.autograd.Function):
    """A function whose gradients torch's engine asks for once."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *given: Tensor | None) -> Any:
        ctx.function = function
        ctx.save_for_backward(*given)
        return function(*given)

    @staticmethod
    def backward(ctx: Any, *of_results: Tensor) -> Any:
        with torch.enable_grad():
            leaves = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
            found = iter(
                torch.autograd.grad(
                    ctx.function(*leaves),
                    [x for x in leaves if x is not None],
                    of_results,
                    materialize_grads=True,
                )
            )
        return None, *(None if x is None else next(found) for x in leaves)


def check(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> None:
    assert q.shape == k.shape and v.shape[:3] == q.shape[:3], "q, k and v have the same heads"
    assert q.dtype == k.dtype == v.dtype, "q, k and v have one dtype"
    assert all(x.is_contiguous() for x in (q, k, v)), "kernels read contiguous memory"
    if state is not None:
        assert state.dtype == torch.float32, "initial_state must be in float32"
        assert state.shape == (q.shape[0], q.shape[2], q.shape[3], v.shape[3])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    scale: float,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(gk_t) S_(t-1) exp(gv_t) + k_t v_t^T, o_t = scale S_t^T q_t; gk [B, T, H, K or 1], gv [B, T, H, V]."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, gk: Tensor | None, gv: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, steps, heads, keys = q.shape
        s = q.new_zeros(batch, heads, keys, v.shape[3], dtype=torch.float32) if state is None else state
        o = []
        for t in range(steps):
            if gk is not None:
                s = s * gk[:, t].float().exp().unsqueeze(-1)
            if gv is not None:
                s = s * gv[:, t].float().exp().unsqueeze(-2)
            s = s + k[:, t].float().unsqueeze(-1) * v[:, t].float().unsqueeze(-2)
            o.append((s * (q[:, t].float() * scale).unsqueeze(-1)).sum(-2))
        return torch.stack(o, 1).to(q.dtype), s

    return Loop.apply(run, q, k, v, state, gk, gv)  # type: ignore[no-any-return,no-untyped-call]
