"""Loops over time as tracing unrolls them: rolled up where every step is the same, otherwise left alone with a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recurrence_graphs import Evaluation, Traced, close
from torch import Tensor, nn

from spikingbrain.passes.recurrence.classify import classify
from spikingbrain.passes.recurrence.form import Loop, Verdict
from spikingbrain.passes.recurrence.graph import Graph, Slot, Value
from spikingbrain.passes.recurrence.normalise import normalise
from spikingbrain.passes.recurrence.reroll import find_loops


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


@dataclass
class Found:
    loops: list[Loop]
    refused: list[Verdict]

    def steps(self) -> list[tuple[int, int, int]]:
        """Returns first step, number of steps and period of each loop."""
        return [(loop.first, loop.steps, loop.period) for loop in self.loops]


def roll(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Found:
    """Returns the loops of a traced function; run in place of what was traced, they give the same results."""
    generator = torch.Generator().manual_seed(0)
    traced = Traced(Function(function), [torch.randn(s, generator=generator) for s in shapes])
    found = find_loops(traced.graph)
    loops = [f for f in found if isinstance(f, Loop)]
    with torch.no_grad():
        results = Evaluation(traced, loops, [classify(loop) for loop in loops]).outputs()
        for result, expected in zip(results, traced.expected, strict=True):
            close(result, expected, function.__name__)
    return Found(loops, [f for f in found if isinstance(f, Verdict)])


def cell(h: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(h) + x


def start(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], x.shape[-1])


def plain(x: Tensor) -> Tensor:
    h, out = start(x), []
    for t in range(x.shape[1]):
        h = cell(h, x[:, t])
        out.append(h)
    return torch.stack(out, 1)


@pytest.mark.parametrize("length", [4, 5, 13])
def test_a_plain_loop(length: int) -> None:
    found = roll(plain, (2, length, 3))
    assert found.steps() == [(0, length, 1)]
    (loop,) = found.loops
    assert [v.op for v in loop.body] == ["token", "tanh", "add"]
    assert loop.carried[0].final is None
    assert loop.stacked[0].leading == loop.stacked[0].trailing == []


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_short_loop_stays(length: int) -> None:
    assert roll(plain, (2, length, 3)) == Found([], [])


def test_the_time_of_a_reversed_loop_runs_down() -> None:
    def backward(x: Tensor) -> tuple[Tensor, Tensor]:
        h, out = start(x), []
        for t in reversed(range(x.shape[1])):
            h = cell(h, x[:, t])
            out.append(h)
        return torch.stack(out[::-1], 1), torch.stack(out, 1)

    (loop,) = roll(backward, (2, 7, 3)).loops
    assert loop.reverse
    assert [s.reversed for s in loop.stacked] == [False, True]


def test_steps_that_alternate_are_one_step_of_period_two() -> None:
    def alternating(x: Tensor) -> Tensor:
        h, out = start(x), []
        for t in range(x.shape[1]):
            h = 0.5 * h + x[:, t] if t % 2 else cell(h, x[:, t])
            out.append(h)
        return torch.stack(out, 1)

    found = roll(alternating, (2, 12, 3))
    assert found.steps() == [(0, 6, 2)]
    assert found.loops[0].stacked[0].keeps_dim


def test_a_value_of_two_steps_ago_is_a_second_carried_value() -> None:
    def delayed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, older, out = start(x), start(x), []
        for t in range(x.shape[1]):
            h, older = torch.tanh(0.5 * h + 0.25 * older + x[:, t]), h
            out.append(h)
        return torch.stack(out, 1), h, older

    (loop,) = roll(delayed, (2, 9, 3)).loops
    first, second = loop.carried
    assert second.after is first.before


@pytest.mark.parametrize("factor", [lambda t: 1 / (t + 1), lambda t: t + 2, lambda t: 0.5 if t == 3 else 2.0])
def test_numbers_that_change_with_time_become_a_sequence(factor: Callable[[int], float]) -> None:
    def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
        h, out = start(x), [x[:, 0]] * x.shape[1]
        for t in reversed(range(x.shape[1])):
            h = cell(h, x[:, t] * factor(t))
            out[t] = h
        return torch.stack(out, 1), h

    (loop,) = roll(scaled, (2, 9, 3)).loops
    (source,) = {t.source for t in loop.tokens.values() if t.source.op == "constant"}
    assert source.literals[0] == tuple(factor(t) for t in range(9))


def test_a_shifted_sequence_is_a_token_with_an_offset() -> None:
    def shifted(x: Tensor) -> Tensor:
        h, before, out = start(x), start(x), []
        for t in range(x.shape[1]):
            h = cell(h, 0.3 * before + 0.7 * x[:, t])
            before = x[:, t]
            out.append(h)
        return torch.stack(out, 1)

    found = roll(shifted, (2, 9, 3))
    assert found.steps() == [(1, 8, 1)]
    assert sorted(t.offset for t in found.loops[0].tokens.values()) == [-1, 0]


def test_a_token_that_all_steps_read_is_the_same_for_all() -> None:
    def against_the_first(x: Tensor) -> Tensor:
        h, out = start(x), []
        for t in range(x.shape[1]):
            h = torch.tanh(h) * x[:, 0] + x[:, t]
            out.append(h)
        return torch.stack(out, 1)

    found = roll(against_the_first, (2, 21, 3))
    assert found.steps() == [(0, 21, 1)]
    assert [v.op for v in found.loops[0].invariants] == ["select"]


def test_a_sequence_may_be_twice_as_long() -> None:
    def twice(x: Tensor, y: Tensor) -> Tensor:
        h, out = start(x), []
        for t in range(x.shape[1]):
            for j in range(2):
                h = cell(h, y[:, 2 * t + j])
            out.append(h * x[:, t])
        return torch.stack(out, 1)

    (loop,) = roll(twice, (2, 9, 3), (2, 18, 3)).loops
    assert sorted((t.stride, t.offset) for t in loop.tokens.values()) == [(1, 0), (2, 0), (2, 1)]


def test_chunks_are_windows() -> None:
    def chunked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        state, out = torch.zeros(q.shape[0], q.shape[2], v.shape[2]), torch.zeros_like(v)
        for i in range(q.shape[1] // 3):
            chunk = slice(3 * i, 3 * i + 3)
            out[:, chunk] = q[:, chunk] @ state + (q[:, chunk] @ k[:, chunk].mT).tril() @ v[:, chunk]
            state = state + k[:, chunk].mT @ v[:, chunk]
        return out, state

    found = roll(chunked, (2, 15, 4), (2, 15, 4), (2, 15, 5))
    assert found.steps() == [(0, 5, 1)]
    assert {t.width for t in found.loops[0].tokens.values()} == {3}


def test_a_loop_that_begins_where_another_ends() -> None:
    def chained(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h, first, second = start(x), [], []
        for t in range(x.shape[1]):
            h = cell(h, x[:, t])
            first.append(h)
        for t in range(x.shape[1]):
            h = torch.tanh(h) * y[:, t]
            second.append(h)
        return torch.stack(first, 1), torch.stack(second, 1)

    assert roll(chained, (2, 9, 3), (2, 9, 3)).steps() == [(0, 9, 1), (0, 9, 1)]


def test_loops_over_heads_are_loops_over_time() -> None:
    def heads(x: Tensor) -> Tensor:
        return torch.stack([plain(x[:, :, i]) for i in range(x.shape[2])], 2)

    assert roll(heads, (2, 9, 5, 3)).steps() == [(0, 9, 1)] * 5


def test_parts_of_a_fused_projection_are_no_time() -> None:
    def fused(x: Tensor) -> Tensor:
        q, k, v, g = x.chunk(4, -1)
        state, out = torch.zeros(x.shape[0], q.shape[2], v.shape[2]), []
        for t in range(x.shape[1]):
            state = state * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][:, None]
            out.append((q[:, t][..., None] * state).sum(1))
        return torch.stack(out, 1)

    assert roll(fused, (2, 9, 16)).steps() == [(0, 9, 1)]


def test_a_sum_of_parts_is_no_loop() -> None:
    def parts(x: Tensor) -> Tensor:
        a, b, c, d, e = x.chunk(5, -1)
        return torch.relu(a) + b * c + torch.tanh(d) * a + e

    assert roll(parts, (2, 3, 20)) == Found([], [])


# Left alone


def refusal(function: Callable[..., Any], *shapes: tuple[int, ...]) -> str:
    found = roll(function, *shapes)
    assert not found.loops
    (verdict,) = found.refused
    assert verdict.status == "unrolled"
    return verdict.reason


def test_a_state_read_in_the_middle() -> None:
    def peeked(x: Tensor) -> tuple[Tensor, Tensor]:
        h, out, kept = start(x), [], start(x)
        for t in range(x.shape[1]):
            h = cell(h, x[:, t])
            out.append(h)
            kept = h if t == 7 else kept
        return torch.stack(out, 1), kept

    assert refusal(peeked, (2, 16, 3)) == "a value of one step is returned"


def test_a_loop_that_reads_what_it_makes() -> None:
    def reads_itself(q: Tensor, k: Tensor) -> Tensor:
        h, states = start(q), []
        for t in range(q.shape[1]):
            h = cell(h, k[:, t])
            states.append(h)
        once = torch.stack([q[:, t] * states[t] for t in range(len(states))], 1)
        return torch.stack([once[:, t].flip(-1) * states[t] for t in range(len(states))], 1)

    assert refusal(reads_itself, (2, 9, 4), (2, 9, 4)) == "a sequence that it reads is made of its own steps"


def test_tokens_in_no_order() -> None:
    def shuffled(x: Tensor) -> Tensor:
        h = start(x)
        for t in (0, 3, 1, 4, 2, 6, 5, 8, 7):
            h = cell(h, x[:, t])
        return h

    assert "steps" in refusal(shuffled, (2, 9, 3))


def test_noise_is_not_repeated() -> None:
    x = Value("input", [], ("x",), (2, 9, 3), "float32")
    graph = Graph()
    graph.add(x)
    h = graph.add(Value("full", [], ((2, 3), 0.0), (2, 3), "float32"))
    for t in range(9):
        now = graph.add(Value("select", [x], (Slot(0), 1, t), (2, 3), "float32"))
        noise = graph.add(Value("rand_like", [now], (Slot(0),), (2, 3), "float32"))
        h = graph.add(Value("tanh", [h], (Slot(0),), (2, 3), "float32"))
        h = graph.add(Value("addcmul", [h, now, noise], (Slot(0), Slot(1), Slot(2)), (2, 3), "float32"))
    graph.outputs = [h]
    (verdict,) = find_loops(normalise(graph))
    assert isinstance(verdict, Verdict)


def test_a_reset_at_a_fixed_step_ends_the_loop() -> None:
    def reset(x: Tensor) -> Tensor:
        h, out = start(x), []
        for t in range(x.shape[1]):
            h = cell(start(x) if t == 6 else h, x[:, t])
            out.append(h)
        return torch.stack(out, 1)

    found = roll(reset, (2, 13, 3))
    assert found.steps() == [(0, 6, 1)]
    assert [v.reason for v in found.refused] == ["its values are joined with those of another loop"]


def test_detach_at_one_step_is_no_step_like_the_others() -> None:
    def truncated(x: Tensor) -> Tensor:
        h, out = start(x), []
        for t in range(x.shape[1]):
            h = cell(h.detach() if t == 4 else h, F.relu(x[:, t]))
            out.append(h)
        return torch.stack(out, 1)

    found = roll(truncated, (2, 9, 3))
    assert all(loop.steps <= 5 for loop in found.loops)


def gla_graph(length: int) -> Graph:
    """A GLA loop as an adapter gives it, without torch."""
    graph, batch = Graph(), (1, 2)

    def add(op: str, inputs: list[Value], literals: tuple[Any, ...], *shape: int) -> Value:
        return graph.add(Value(op, inputs, literals, (*batch, *shape), "float32"))

    q, k, v, g = (graph.add(Value("input", [], (n,), (*batch, length, 4), "float32")) for n in "qkvg")
    out = add("full", [], ((*batch, length, 4), 0.0), length, 4)
    state = add("full", [], ((*batch, 4, 4), 0.0), 4, 4)
    for t in range(length):
        now = {x: add("select", [x], (Slot(0), 2, t), 4) for x in (q, k, v, g)}
        gate = add("unsqueeze", [add("exp", [now[g]], (Slot(0),), 4)], (Slot(0), -1), 4, 1)
        state = add("mul", [state, gate], (Slot(0), Slot(1)), 4, 4)
        key = add("unsqueeze", [now[k]], (Slot(0), -1), 4, 1)
        value = add("unsqueeze", [now[v]], (Slot(0), -2), 1, 4)
        update = add("mul", [key, value], (Slot(0), Slot(1)), 4, 4)
        state = add("add", [state, update], (Slot(0), Slot(1)), 4, 4)
        query = add("unsqueeze", [now[q]], (Slot(0), -1), 4, 1)
        read = add("sum", [add("mul", [query, state], (Slot(0), Slot(1)), 4, 4)], (Slot(0), (-2,)), 4)
        out = add("select_scatter", [out, read], (Slot(0), Slot(1), 2, t), length, 4)
    graph.outputs = [out, state]
    return graph


@pytest.mark.parametrize("length", [400, pytest.param(4096, marks=pytest.mark.slow)])
def test_a_long_loop(length: int) -> None:
    """70,000 values: every part of this must be near linear, or the test takes minutes."""
    (loop,) = find_loops(normalise(gla_graph(length)))
    assert isinstance(loop, Loop)
    assert (loop.first, loop.steps, len(loop.stacked)) == (0, length, 1)
    assert classify(loop).reason == "linear_recurrence"
