"""What a step is said to do to its state: the factors and their axes, the reads, and the reasons where it is not affine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from recurrence_graphs import Evaluation, Traced, close
from test_recurrence_reroll import Function
from torch import Tensor

from spikingbrain.passes.recurrence.analysis import find_forms
from spikingbrain.passes.recurrence.classify import classify
from spikingbrain.passes.recurrence.form import Form, Loop, Product, Recurrence, Verdict
from spikingbrain.passes.recurrence.masks import NotCausal, decays_of, slope_of
from spikingbrain.passes.recurrence.reroll import find_loops

B, T, H, K, V = 2, 9, 3, 4, 5
QKV = [(B, T, H, K), (B, T, H, K), (B, T, H, V)]


def verdict(step: Callable[..., tuple[Any, Any]], start: Any, *shapes: tuple[int, ...]) -> Verdict:
    """Returns what becomes of a loop over ``state, read = step(state, *tokens)``; its normal form is run."""

    def loop(*sequences: Tensor) -> tuple[Any, Tensor]:
        state, reads = start(), []
        for t in range(T):
            state, o = step(state, *(x[:, t] for x in sequences))
            reads.append(o)
        return state, torch.stack(reads, 1)

    generator = torch.Generator().manual_seed(0)
    traced = Traced(Function(loop), [torch.rand(s, generator=generator) for s in shapes])
    (found,) = find_loops(traced.graph)
    assert isinstance(found, Loop)
    result = classify(found)
    with torch.no_grad():
        for value, expected in zip(
            Evaluation(traced, [found], [result]).outputs(), traced.expected, strict=True
        ):
            close(value, expected, "results")
    return result


def matrix() -> Tensor:
    return torch.zeros(B, H, K, V)


def vector() -> Tensor:
    return torch.zeros(B, H, K)


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def read(q: Tensor, state: Tensor) -> Tensor:
    return torch.einsum("bhk,bhkv->bhv", q, state)


def axes(product: Product | None) -> set[str]:
    assert product is not None
    return {a for f in product.factors for a in f.axes if a is not None}


def only(found: Verdict) -> Recurrence:
    assert found.status == "raised", found.reason
    (recurrence,) = found.recurrences
    return recurrence


GATES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor], set[str]]] = {
    "head": ((B, T, H), lambda g: g[..., None, None], {"b0", "b1"}),
    "key": ((B, T, H, K), lambda g: g[..., None], {"b0", "b1", "k"}),
    "value": ((B, T, H, V), lambda g: g[..., None, :], {"b0", "b1", "v"}),
}


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("side", GATES)
def test_decays_by_axis(side: str, log: bool) -> None:
    shape, spread, held = GATES[side]

    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        state = state * spread(g.exp() if log else g) + outer(k, v)
        return state, read(q, state)

    r = only(verdict(step, matrix, *QKV, shape))
    assert (r.kind, r.axes) == ("linear_recurrence", ("b0", "b1", "k", "v"))
    assert axes(r.decay_log if log else r.decay) == held
    assert (r.decay if log else r.decay_log) is None
    assert (axes(r.key), axes(r.value)) == ({"b0", "b1", "k"}, {"b0", "b1", "v"})
    assert [x.exclusive for x in r.reads] == [False]


def test_a_bonus_is_extra_to_a_read_before_the_step() -> None:
    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        o = read(q, state + 0.5 * outer(k, v))
        return 0.9 * state + outer(k, v), o

    r = only(verdict(step, matrix, *QKV))
    assert r.decay == Product(0.9)
    (x,) = r.reads
    assert x.exclusive and len(x.extra) == 1


def test_prediction_from_the_decayed_state() -> None:
    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        state = state * g.exp()[..., None]
        state = state + outer(k, 0.5 * (v - read(k, state)))
        return state, read(q, state)

    r = only(verdict(step, matrix, *QKV, (B, T, H, K)))
    assert r.erase is not None and r.predict is not None
    assert r.erase.scalar == -0.5
    assert len(r.predict.factors) == 2  # the key and the decay


def test_a_normaliser_has_no_value_axis() -> None:
    def step(states: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor]:
        state, norm = states[0] + outer(k, v), states[1] + k
        return (state, norm), read(q, state) / ((q * norm).sum(-1, keepdim=True) + 1e-6)

    found = verdict(step, lambda: (matrix(), vector()), *QKV)
    assert sorted(r.axes for r in found.recurrences) == [("b0", "b1", "k"), ("b0", "b1", "k", "v")]
    assert {r.kind for r in found.recurrences} == {"linear_recurrence"}


def test_several_queries_of_one_state() -> None:
    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        state = state + outer(k, v)
        return state, torch.einsum("bhgk,bhkv->bhgv", q, state)

    (x,) = only(verdict(step, matrix, (B, T, H, 2, K), *QKV[1:])).reads
    assert x.axes == ("b0", "b1", "g0", "v")


def test_a_state_that_feeds_another_is_solved_first() -> None:
    def step(states: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor]:
        first = states[0] + outer(k, v)
        second = 0.5 * states[1] + torch.tanh(read(q, first))
        return (first, second), second

    found = verdict(step, lambda: (matrix(), torch.zeros(B, H, V)), *QKV)
    assert [r.kind for r in found.recurrences] == ["linear_recurrence", "linear_scan"]


def test_an_elementwise_state_may_be_asked_for_whole() -> None:
    def step(h: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.sigmoid(q) * h + k
        return h, torch.tanh(h)

    r = only(verdict(step, vector, *QKV[:2]))
    assert (r.kind, r.axes, r.reads) == ("linear_scan", ("b0", "b1", "b2"), [])


def test_a_mask_without_state_is_a_factor() -> None:
    def step(h: Tensor, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.where(keep > 0.5, h, 0.0) + x.masked_fill(keep > 0.9, 0.0)
        return h, h

    assert only(verdict(step, vector, *QKV[:2])).kind == "linear_scan"


NOT_AFFINE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str, str]] = {
    "tanh": (lambda s, x: torch.tanh(s) + x, "pointwise", "tanh: not a linear operation"),
    "gate": (lambda s, x: torch.sigmoid(s + x) * s, "pointwise", "sigmoid: not a linear operation"),
    "clamp": (lambda s, x: (s + x).clamp(-1, 1), "pointwise", "clamp: not a linear operation"),
    "square": (lambda s, x: s * s + x, "pointwise", "mul: a product of the state with itself"),
    "division": (lambda s, x: x / (s + 1), "pointwise", "div: divides by a value of the state"),
    "condition": (
        lambda s, x: torch.where(s > x, s, x),
        "pointwise",
        "where: the condition depends on the state",
    ),
    "rounding": (
        lambda s, x: (0.5 * s + x).bfloat16().float(),
        "pointwise",
        "cast: rounds float32 to bfloat16",
    ),
    "detach": (lambda s, x: 0.5 * s.detach() + x, "pointwise", "detach: the gradient is cut here"),
    "softmax": (lambda s, x: (s + x).softmax(-1), "loop", "softmax: not a linear operation"),
    "norm": (
        lambda s, x: s / s.norm(dim=-1, keepdim=True).clamp(min=1) + x,
        "loop",
        "div: divides by a value of the state",
    ),
    "turned": (lambda s, x: s.flip(-1) + x, "loop", "flip: not a linear operation"),
    "two sides": (lambda s, x: s.cumsum(-1) + x, "loop", "cumsum: not a linear operation"),
}


@pytest.mark.parametrize("name", NOT_AFFINE)
def test_what_is_not_affine(name: str) -> None:
    step, status, reason = NOT_AFFINE[name]
    found = verdict(lambda s, x: (step(s, x),) * 2, vector, QKV[0])
    assert (found.status, found.reason) == (status, reason)


def test_coupled_states() -> None:
    def step(states: tuple[Tensor, Tensor], x: Tensor) -> tuple[Any, Tensor]:
        p, v = states[0] + 0.1 * states[1], states[1] - 0.1 * states[0] + x
        return (p, v), p

    found = verdict(step, lambda: (vector(), vector()), QKV[0])
    assert found.status == "pointwise"
    assert found.reason.endswith("carried values depend on each other")


def test_a_matrix_state_that_is_read_whole() -> None:
    def step(state: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        state = 0.9 * state + outer(k, v)
        return state, state.tanh().sum((-1, -2))

    found = verdict(step, matrix, *QKV[1:])
    assert (found.status, found.reason) == ("loop", "the state: is read whole at every step")


# Forms without a loop


def forms(function: Callable[..., Any], *shapes: tuple[int, ...]) -> list[Verdict]:
    traced = Traced(Function(function), [torch.rand(s) for s in shapes])
    found = find_forms(traced.graph)
    with torch.no_grad():
        for v in found:
            if v.form is not None:
                Evaluation(traced).check_form(v.form)
    return found


def test_a_mask_without_the_diagonal_reads_before_the_step() -> None:
    (found,) = forms(lambda q, k, v: (q @ k.mT).tril(-1) @ v, (2, 9, 3), (2, 9, 3), (2, 9, 4))
    assert isinstance(found.form, Form) and found.form.exclusive


def test_keys_as_long_as_the_sequence() -> None:
    """Every axis is as long as every other: roles come from where an axis is, not from its size."""
    (found,) = forms(lambda q, k, v: (q @ k.mT).tril() @ v, *[(9, 9, 9)] * 3)
    assert found.form is not None
    assert found.form.axes == ("b0", "t", "v")


def test_scores_in_both_directions_are_nothing() -> None:
    assert forms(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, *[(2, 9, 4)] * 3) == []
    assert forms(lambda x, w: (x @ w).tanh() @ w, (2, 9, 9), (9, 9)) == []


def test_sums_of_scores() -> None:
    (found,) = forms(lambda q, k, v: (1 + q @ k.mT).tril() @ v, *[(2, 9, 4)] * 3)
    assert (found.status, found.reason) == ("unrolled", "the scores are a sum of products")


def test_short_sequences_keep_their_scores() -> None:
    assert forms(lambda q, k, v: (q @ k.mT).tril() @ v, *[(2, 7, 4)] * 3) == []


def test_tables() -> None:
    powers = np.tril(0.5 ** (np.arange(6)[:, None] - np.arange(6)))
    decay = decays_of(powers).decay
    assert decay is not None and decay.tolist() == [0.5]
    assert decays_of(np.tril(np.ones((6, 6)))).decay is None
    assert decays_of(np.tril(np.ones((6, 6)), -1)).exclusive
    weighted = decays_of(powers * np.arange(1, 7))
    assert weighted.weight is not None and weighted.weight.tolist() == [1, 2, 3, 4, 5, 6]
    assert slope_of(3.0 * (np.arange(6)[:, None] - np.arange(6))) == 3
    assert slope_of((np.arange(6)[:, None] - np.arange(6)) ** 2.0) is None


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (np.ones((6, 6)), "the mask lets a step see later ones"),
        (np.tril(np.ones((6, 6)), -2), "the mask leaves out more than the future and the step itself"),
        (np.triu(np.tril(np.ones((6, 6))), -2), "the mask is no product of decays from step to step"),
        (np.tril(np.ones((6, 6))) * (np.arange(6) != 2), "the mask leaves out some steps themselves"),
        (np.full((6, 6), np.nan), "the mask holds infinities"),
    ],
)
def test_tables_that_are_no_recurrence(table: Any, reason: str) -> None:
    with pytest.raises(NotCausal, match=reason):
        decays_of(table)
