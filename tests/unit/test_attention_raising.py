"""Attention is raised to `window_attention` however its mask is spelled, and stays where it is no window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from spikingbrain.frontend.attention import AttentionReport
from spikingbrain.frontend.before_autograd import raise_in_dynamo_graph

T, N, W, SINKS = 7, 11, 4, 2


def raised(
    call: Callable[..., Any], *given: Tensor, refuse: Callable[..., str | None] = lambda *_: None, **how: Any
) -> tuple[Any, list[AttentionReport]]:
    """Returns what a function gives after raising, and the reports."""
    found: list[AttentionReport] = []

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        made, told = raise_in_dynamo_graph(module, inputs, attention=refuse)
        found.extend(told.attention)
        return made

    torch._dynamo.reset()
    return torch.compile(call, backend=backend, fullgraph=True, **how)(*given), found


def heads(steps: int = T, keys: int = N, of_keys: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, n, t, 8) for n, t in ((4, steps), (of_keys, keys), (of_keys, keys))]


def positions() -> tuple[Tensor, Tensor]:
    return torch.arange(N - T, N)[:, None], torch.arange(N)[None, :]


def boolean() -> Tensor:
    i, j = positions()
    return (j <= i) & ((i - j < W) | (j < SINKS))


def by_distance() -> Tensor:
    i, j = positions()
    distance = (i - j)[None, None]
    return torch.logical_not((distance < 0) | ((distance >= W) & ~(j < SINKS)))


def by_triangles() -> Tensor:
    square = torch.ones(N, N, dtype=torch.bool)
    near = square.tril() & torch.triu(square, -(W - 1))
    return near[-T:] | (square.tril() & (torch.arange(N) < SINKS))[N - T :]


def added() -> Tensor:
    return torch.zeros(T, N).masked_fill(~boolean(), -torch.inf)


def chosen() -> Tensor:
    return torch.where(boolean()[None], 0.0, torch.finfo(torch.float32).min)


def of_ones() -> Tensor:
    return (1.0 - boolean().float()) * -1e9


MASKS = [boolean, by_distance, by_triangles, added, chosen, of_ones]


@pytest.mark.parametrize("mask", MASKS, ids=lambda f: f.__name__)
def test_spellings_of_a_mask(mask: Callable[[], Tensor]) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(), enable_gqa=True)

    given = heads()
    found, [report] = raised(call, *given)
    assert (report.status, report.reason) == ("raised", "a window of 4 and 2 sinks"), report
    torch.testing.assert_close(found, call(*given))


def with_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, 4, N, 8) for x in (k, v))
    scores = q @ k.transpose(-2, -1) / 8**0.5
    weights = F.softmax(scores + added(), dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, 0.1, training=False) @ v


def with_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(2, 1).transpose(1, 2) for x in (k, v))
    scores = torch.einsum("bhqd,bkhd->bhqk", q, k) * 0.3
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~boolean(), -torch.inf).softmax(-1), v)


def with_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for x in (k, v))
    scores = torch.where(boolean(), q @ k.mT * 8**-0.5, torch.finfo(q.dtype).min)
    scores = torch.where(~by_distance(), -torch.inf, scores)
    return torch.softmax(scores, 3) @ v


@pytest.mark.parametrize("call", [with_matmul, with_einsum, with_where])
def test_written_by_hand_with_repeated_heads(call: Callable[..., Tensor]) -> None:
    taken: list[tuple[int, ...]] = []
    given = heads()
    found, [report] = raised(call, *given, refuse=lambda q, k, *_: taken.append(tuple(k.shape)))
    assert report.reason == "a window of 4 and 2 sinks" and taken == [(2, N, 2, 8)]  # two heads, not four
    torch.testing.assert_close(found, call(*given))


def test_causal_attention_and_one_query() -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)

    square = heads(T, T, 4)
    found, [report] = raised(causal, *square)
    assert report.reason == "all positions before"
    torch.testing.assert_close(found, causal(*square))

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.arange(N) > N - 1 - W
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None], enable_gqa=True)

    found, [report] = raised(one, *heads(1))
    assert report.reason == "a window of 4"
    torch.testing.assert_close(found, one(*heads(1)))


def test_a_window_longer_than_the_text_is_kept_where_the_length_may_change() -> None:
    def call(x: Tensor) -> Tensor:
        at = torch.arange(x.shape[2])
        seen = (at <= at[:, None]) & (at > at[:, None] - 40)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=seen)

    x = torch.randn(1, 2, 64, 8)
    torch._dynamo.mark_dynamic(x, 2)
    found, [report] = raised(call, x)
    assert report.reason == "a window of 40"
    torch.testing.assert_close(found, call(x))


def test_gradients_are_those_of_torch() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=boolean(), enable_gqa=True)

    given = [x.double().requires_grad_() for x in heads()]
    found, [report] = raised(call, *given)
    assert report.status == "raised"
    weight = torch.randn_like(found)
    wanted = torch.autograd.grad((call(*given) * weight).sum(), given)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), given), wanted, strict=True):
        torch.testing.assert_close(a, b)


def shifted(i: Tensor, j: Tensor) -> Tensor:
    return j <= i + 1


def from_the_first_key(i: Tensor, j: Tensor) -> Tensor:
    return j <= i - (N - T)


def behind(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (j < i - 2)


def two_windows(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (j > i - 3) & ((j > i - 2) | (j < 1))


def every_second(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (2 * j > i)


@pytest.mark.parametrize("rule", [shifted, from_the_first_key, behind, two_windows, every_second])
def test_other_masks_stay(rule: Callable[[Tensor, Tensor], Tensor]) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=rule(*positions()), enable_gqa=True)

    _, [report] = raised(call, *heads())
    assert report.status == "torch's" and ("window" in report.reason or "position" in report.reason), report


def test_what_stays_says_why() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)

    given = heads()
    bias = torch.randn(T, N)
    reasons = {
        "queries see later positions": lambda *x: attend(*x),
        "is_causal counts from the first key": lambda *x: attend(*x, is_causal=True),
        "the mask depends on data": lambda *x: attend(*x, attn_mask=x[0][0, 0, :, :1] > 0),
        "dropout": lambda *x: attend(*x, attn_mask=boolean(), dropout_p=0.5),
        "neither 0 nor far below": lambda *x: attend(
            *x, attn_mask=torch.zeros(T, N).masked_fill(~boolean(), -3.0)
        ),
    }
    for reason, call in reasons.items():
        _, [report] = raised(call, *given)
        assert report.status == "torch's" and reason in report.reason, report
    assert bias.shape  # a tensor from outside is an argument of the graph
    _, [report] = raised(lambda *x: attend(*x, attn_mask=bias), *given)
    assert report.reason == "the mask depends on data"
    _, [report] = raised(lambda *x: attend(*x, attn_mask=boolean()), *given, refuse=lambda *_: "too wide")
    assert report.reason == "too wide"


@pytest.mark.parametrize(
    ("written", "dynamic"), [pytest.param("eager", False, marks=pytest.mark.slow), ("sdpa", True)]
)
def test_a_model_of_transformers_with_a_window(written: str, dynamic: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        attn_implementation=written,
    )
    model, tokens = transformers.MistralModel(config).eval(), torch.randint(0, 50, (2, 13))

    def call(tokens: Tensor) -> Tensor:
        hidden: Tensor = model(tokens, use_cache=False).last_hidden_state
        return hidden

    if dynamic:
        torch._dynamo.mark_dynamic(tokens, 1)
    with torch.no_grad():
        found, [report] = raised(call, tokens)
        assert (report.status, report.reason) == ("raised", "a window of 5")
        torch.testing.assert_close(found, call(tokens))


def test_shapes_that_only_torch_takes_stay() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at, before = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        return (q @ k.mT).masked_fill(before > at + k.shape[2] - q.shape[2], -torch.inf).softmax(-1) @ v

    q, k, v = heads(of_keys=4)
    for given, reason in (
        ((q, k, v[:, :1]), "4 heads read 4 of keys and 1 of values"),
        ((q, k[:1], v[:1]), "keys of one batch serve several"),
        ((q, k[:, :, :5], v[:, :, :5]), "there are more queries than keys"),
    ):
        found, [report] = raised(call, *given)
        assert (report.status, report.reason) == ("torch's", reason)
        torch.testing.assert_close(found, call(*given), equal_nan=True)
    found, [report] = raised(call, q, k[:, :1], v[:, :1])  # one head of keys for all
    assert report.status == "raised"
    torch.testing.assert_close(found, call(q, k[:, :1], v[:, :1]))


def test_positions_that_are_data() -> None:
    """As in a cache that is a ring: slots hold keys in any order, some none."""

    def call(q: Tensor, k: Tensor, v: Tensor, start: Tensor, held: Tensor) -> Tensor:
        query = start[:, None] + torch.arange(T)
        key = torch.cat([held, query], 1)[:, None, None, :]
        query = query[:, None, :, None]
        seen = (key >= 0) & (key <= query) & ((key > query - W) | (key < SINKS))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    given = heads()
    start, held = torch.tensor([3, 9]), torch.tensor([[0, -1, 2, 1], [8, 0, 7, 1]])
    found, [report] = raised(call, *given, start, held)
    assert report.reason == "a window of 4 and 2 sinks, positions as data"
    torch.testing.assert_close(found, call(*given, start, held))

    def static(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        hidden = torch.arange(N) > at.reshape(-1, 1)
        mask = torch.zeros(T, N).masked_fill(hidden, -torch.inf)[None, None].expand(2, -1, -1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    at = torch.tensor([2, 3, 4, 5, 6, 7, 8])
    found, [report] = raised(static, *given, at)
    assert report.reason == "all positions before, positions as data"
    torch.testing.assert_close(found, static(*given, at))


def hidden_keys(key: Tensor, query: Tensor) -> Tensor:
    return key <= query  # also where nothing is held


def other_queries(key: Tensor, query: Tensor) -> Tensor:
    return (key >= 0) & (key <= query) & (key > query.flip(2) - 4)


def of_doubled_keys(key: Tensor, query: Tensor) -> Tensor:
    return (key >= 0) & (key * 2 <= query)


def ahead(key: Tensor, query: Tensor) -> Tensor:
    return (key >= 0) & (key > query - 4)


@pytest.mark.parametrize("rule", [hidden_keys, other_queries, of_doubled_keys, ahead])
def test_other_masks_of_data_stay(rule: Callable[[Tensor, Tensor], Tensor]) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, at: Tensor, held: Tensor) -> Tensor:
        seen = rule(held[:, None, None, :], at[:, None, :, None])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    at, held = torch.arange(T).expand(2, -1).contiguous(), torch.arange(-1, N - 1).expand(2, -1).contiguous()
    _, [report] = raised(call, *heads(), at, held)
    assert report.status == "torch's", report


@pytest.mark.parametrize("steps", [1, T])
def test_positions_are_not_read_after_they_were_written_in_place(steps: int) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
        query = start[:, None, None, None]
        if steps > 1:
            query = query + torch.arange(T)[:, None]  # another tensor, which stays what it is
        seen = torch.arange(N) <= query
        start.add_(steps)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    given = heads(steps)
    found, [report] = raised(call, *given, torch.tensor([2, 3]))
    assert steps > 1 or report.reason == "the mask depends on data that may be written in place"
    torch.testing.assert_close(found, call(*given, torch.tensor([2, 3])))


def test_a_copy_is_read_and_not_what_was_written_since() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> Tensor:
        held = k.repeat_interleave(2, 1) if grouped else k.clone()
        values = v.repeat_interleave(2, 1) if grouped else v
        k.mul_(2.0)
        return F.scaled_dot_product_attention(q, held, values, attn_mask=boolean(), enable_gqa=True)

    for grouped in (False, True):
        q, k, v = heads()
        found, [report] = raised(call, q, k.clone(), v, grouped)
        assert report.status == "raised"
        torch.testing.assert_close(found, call(q, k.clone(), v, grouped))
