"""Values and gradients of ``spikingbrain::linear_recurrence`` against the plain loop, every variant."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from spikingbrain.frontend.ops import linear_recurrence, linear_scan, selective_scan
from spikingbrain.models.reference import recurrences as reference

op = torch.ops.spikingbrain.linear_recurrence.default
B, S, K, V = 2, 2, 3, 4
LAST = {"head": (), "key": (K,), "value": (V,)}


def variants() -> Iterator[tuple[Any, ...]]:
    kinds = [("none", False), *itertools.product(("head", "key", "value"), (True, False))]
    yield from itertools.product(kinds, (False, True), (False, True), (False, True))


def inputs(
    steps: int, axis: str, log: bool, exclusive: bool, rank_one: bool, groups: int, given: bool
) -> list[Tensor | None]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    decay = None
    if axis != "none":
        drawn = torch.randn(B, steps, S, *LAST[axis], dtype=torch.float64)
        decay = (-drawn.abs() if log else drawn).requires_grad_()
    erase, predict = (draw(B, steps, S, K), draw(B, steps, S, K)) if rank_one else (None, None)
    bonus = draw(S, K) if exclusive and not rank_one else None
    state = draw(B, S, K, V) if given else None
    qkv = [draw(B, steps, S * groups, K), draw(B, steps, S, K), draw(B, steps, S, V)]
    return [*qkv, decay, erase, predict, bonus, state]


def gradients(
    results: tuple[Tensor, Tensor], weights: list[Tensor], tensors: list[Tensor | None]
) -> list[Tensor]:
    total = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
    leaves = [t for t in tensors if t is not None]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]


@pytest.mark.parametrize("kind, exclusive, reverse, rank_one", list(variants()))
def test_gradients(kind: tuple[str, bool], exclusive: bool, reverse: bool, rank_one: bool) -> None:
    torch.manual_seed(0)
    axis, log = kind
    for steps, groups, given in [(1, 3, False), (5, 2, True)]:
        tensors = inputs(steps, axis, log, exclusive, rank_one, groups, given)
        results = op(*tensors, axis, log, exclusive, reverse)
        expected = reference.linear_recurrence(*tensors, axis, log, exclusive, reverse)
        for a, e in zip(results, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
        weights = [torch.randn_like(r) for r in results]
        actual, wanted = gradients(results, weights, tensors), gradients(expected, weights, tensors)
        for a, e in zip(actual, wanted, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("axis", ["head", "key", "value"])
@pytest.mark.parametrize("exclusive", [False, True])
def test_a_gate_that_forgets_everything(axis: str, exclusive: bool) -> None:
    torch.manual_seed(0)
    tensors = inputs(9, axis, True, exclusive, False, 2, True)
    decay = tensors[3]
    assert decay is not None
    with torch.no_grad():
        decay[:, 3] = -torch.inf
        decay[:, 5] = -200.0
    results = op(*tensors, axis, True, exclusive, False)
    found = gradients(results, [torch.ones_like(r) for r in results], tensors)
    assert all(g.isfinite().all() for g in found)
    assert not found[3][:, 3].any()
    factors = [t.detach().clone().requires_grad_() if t is not None else None for t in tensors]
    assert factors[3] is not None
    factors[3] = decay.detach().exp().requires_grad_()
    expected = reference.linear_recurrence(*factors, axis, False, exclusive, False)
    wanted = gradients(expected, [torch.ones_like(r) for r in expected], factors)
    for i in (0, 1, 2, -1):
        torch.testing.assert_close(found[i], wanted[i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank_one", [False, True])
def test_gradcheck(rank_one: bool) -> None:
    torch.manual_seed(0)
    tensors = inputs(4, "key", True, False, rank_one, 2, True)
    there = [t for t in tensors if t is not None]

    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        rest = iter(given)
        return op(*[t if t is None else next(rest) for t in tensors], "key", True, False, False)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(run, there)


@pytest.mark.parametrize("rank_one", [False, True])
def test_opcheck(rank_one: bool) -> None:
    tensors = inputs(4, "head", True, False, rank_one, 2, True)
    torch.library.opcheck(linear_recurrence, (*tensors, "head", True, False, False))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 7, 70])
@pytest.mark.parametrize("given", [False, True])
def test_linear_scan(log: bool, reverse: bool, steps: int, given: bool) -> None:
    torch.manual_seed(0)
    decay, update = (torch.randn(2, steps, 3, dtype=torch.float64) for _ in range(2))
    if log:
        decay = -decay.abs()
    elif steps > 3:
        decay[:, 3] = 0
    state = torch.randn(2, 3, dtype=torch.float64) if given else None
    tensors = [decay, update, state]
    for t in tensors:
        if t is not None:
            t.requires_grad_()
    results = torch.ops.spikingbrain.linear_scan(*tensors, log, reverse)
    h = torch.zeros(2, 3, dtype=torch.float64) if state is None else state
    outputs: dict[int, Tensor] = {}
    for t in reversed(range(steps)) if reverse else range(steps):
        h = (decay[:, t].exp() if log else decay[:, t]) * h + update[:, t]
        outputs[t] = h
    stacked = torch.stack([outputs[t] for t in range(steps)], 1) if steps else update + 0
    _same(results, (stacked, h), tensors)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 9, 70])
@pytest.mark.parametrize("given", [False, True])
def test_selective_scan(reverse: bool, steps: int, given: bool) -> None:
    torch.manual_seed(0)
    c, n = 3, 4
    x, dt = torch.randn(2, steps, c, dtype=torch.float64), torch.rand(2, steps, c, dtype=torch.float64)
    a = -torch.rand(c, n, dtype=torch.float64)
    b, read = (torch.randn(2, steps, n, dtype=torch.float64) for _ in range(2))
    state = torch.randn(2, c, n, dtype=torch.float64) if given else None
    tensors = [x, dt, a, b, read, state]
    for t in tensors:
        if t is not None:
            t.requires_grad_()
    results = torch.ops.spikingbrain.selective_scan(*tensors, reverse)
    h = torch.zeros(2, c, n, dtype=torch.float64) if state is None else state
    outputs: dict[int, Tensor] = {}
    for t in reversed(range(steps)) if reverse else range(steps):
        h = (dt[:, t, :, None] * a).exp() * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        outputs[t] = (h * read[:, t, None]).sum(-1)
    stacked = torch.stack([outputs[t] for t in range(steps)], 1) if steps else x * 0
    _same(results, (stacked, h), tensors)


def _same(results: Any, expected: Any, tensors: list[Tensor | None]) -> None:
    for a, e in zip(results, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    weights = [torch.randn_like(r) for r in results]
    if not any(e.requires_grad for e in expected):
        return
    actual, wanted = gradients(results, weights, tensors), gradients(expected, weights, tensors)
    for a, e in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_opcheck_of_scans() -> None:
    t = [torch.randn(2, 5, 3, requires_grad=True) for _ in range(2)]
    state = torch.randn(2, 3, requires_grad=True)
    torch.library.opcheck(linear_scan, (*t, state, False, True))
    a, b, c = torch.randn(3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    torch.library.opcheck(selective_scan, (*t, a, b, c, None, False))
