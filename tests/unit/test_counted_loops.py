"""``while_loop`` over a counter becomes a scan: every spelling that torch traces, and the reasons of what stays a loop."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops import scan, while_loop

from spikingbrain.frontend.before_autograd import raise_in_dynamo_graph
from spikingbrain.frontend.recurrences.report import RecurrenceReport

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

B, T, D = 2, 7, 3


def raised(
    function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False
) -> tuple[Any, list[RecurrenceReport]]:
    """Returns what the function gives with its recurrences raised, run by torch, and what became of them."""
    reports: list[RecurrenceReport] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        found, told = raise_in_dynamo_graph(module)
        reports.extend(told.recurrences)
        left = found.graph.find_nodes(op="call_function", target=torch.ops.higher_order.while_loop)
        assert bool(left) == any(r.status == "unrolled" for r in told.recurrences)
        return found.forward

    return torch.compile(function, backend=backend, dynamic=dynamic)(*inputs), reports


def integrator(
    read: Callable[[Tensor, Any], Tensor],
    write: Callable[[Tensor, Any, Tensor], Tensor],
    start: Callable[[], Any] = lambda: torch.tensor(0),
    goes_on: Callable[[Any], Any] = lambda t: t < T,
    stride: int = 1,
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Returns h = h / 2 + x[:, t] as a while_loop, with all h at the places where they are written."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        def step(t: Any, h: Tensor, out: Tensor) -> tuple[Any, Tensor, Tensor]:
            h = 0.5 * h + read(x, t)
            return t + stride, h.clone(), write(out, t, h)

        _, h, out = while_loop(lambda t, *_: goes_on(t), step, (start(), x[:, 0] * 0, torch.ones_like(x)))
        return h, out

    return function


def expected(x: Tensor, positions: range) -> tuple[Tensor, Tensor]:
    h, out = torch.zeros_like(x[:, 0]), torch.ones_like(x)
    for t in positions:
        h = 0.5 * h + x[:, t]
        out = torch.cat([out[:, :t], h[:, None], out[:, t + 1 :]], 1)
    return h, out


def full(t: int) -> Tensor:
    return torch.full((1,), t)


def set_item(out: Tensor, t: Tensor, h: Tensor) -> Tensor:
    out = out.clone()
    out[:, t.view(1)] = h[:, None]
    return out


READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index_select": lambda x, t: x.index_select(1, t.view(1)).squeeze(1),
    "index": lambda x, t: x[:, t[None]][:, 0],
    "index, a row of positions": lambda x, t: x[torch.arange(B)[:, None], t.view(1)][:, 0],
    "gather": lambda x, t: x.gather(1, t.expand(B, 1, D))[:, 0],
}
WRITES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "index_copy": lambda out, t, h: out.index_copy(1, t.view(1), h[:, None]),
    "where": lambda out, t, h: torch.where((torch.arange(T) == t)[:, None], h[:, None], out),
    "where, the other way round": lambda out, t, h: torch.where(
        (t == torch.arange(T))[None, :, None], h[:, None], out
    ),
    "index_put": lambda out, t, h: out.index_put((torch.arange(B)[:, None], t.view(1)), h[:, None]),
    "scatter": lambda out, t, h: out.scatter(1, t.expand(B, 1, D), h[:, None]),
    "an item of a clone": set_item,
}
INTEGER_READS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "narrow": lambda x, t: x.narrow(1, t, 1)[:, 0],
    "slice": lambda x, t: x[:, t : t + 1][:, 0],
    "index_select": lambda x, t: x.index_select(1, full(t))[:, 0],
}
READ, WRITE = READS["index_select"], WRITES["index_copy"]


@pytest.mark.parametrize("read", READS)
def test_reads(read: str) -> None:
    x = torch.randn(B, T, D)
    found, (report,) = raised(integrator(READS[read], WRITE), x)
    torch.testing.assert_close(found, expected(x, range(T)))
    assert (report.status, report.op, report.steps) == ("raised", "linear_scan", T)


@pytest.mark.parametrize("write", WRITES)
def test_writes(write: str) -> None:
    x = torch.randn(B, T, D)
    found, (report,) = raised(integrator(READ, WRITES[write]), x)
    torch.testing.assert_close(found, expected(x, range(T)))
    assert (report.status, report.op) == ("raised", "linear_scan")


@pytest.mark.parametrize("read", INTEGER_READS)
def test_integers(read: str) -> None:
    def write(out: Tensor, t: int, h: Tensor) -> Tensor:
        return out.slice_scatter(h[:, None], 1, t, t + 1)

    x = torch.randn(B, T, D)
    found, (report,) = raised(integrator(INTEGER_READS[read], write, lambda: 0), x)
    torch.testing.assert_close(found, expected(x, range(T)))
    assert (report.status, report.op) == ("raised", "linear_scan")


@pytest.mark.parametrize(
    "start, stride, compare, bound",
    [
        (0, 1, operator.le, 4),
        (2, 1, operator.ne, 6),
        (6, -1, operator.ge, 0),
        (5, -1, operator.gt, 1),
        (0, 2, operator.lt, 7),
        (1, 2, operator.lt, 6),
        (6, -3, operator.ge, 0),
        (6, -2, operator.ne, 0),
        (3, 1, operator.lt, 4),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_ranges(start: int, stride: int, compare: Callable[..., Any], bound: int, turned: bool) -> None:
    """Counters that start anywhere, move by any number, and are compared in any way."""
    x, positions, t = torch.randn(B, T, D), [], start
    while compare(t, bound):
        positions.append(t)
        t += stride
    goes_on = (lambda t: compare(t - bound, 0)) if turned else (lambda t: compare(t, bound))
    function = integrator(READ, WRITE, lambda: torch.tensor(start), goes_on, stride)
    found, (report,) = raised(function, x)
    torch.testing.assert_close(found, expected(x, range(start, t, stride)))
    assert (report.op, report.steps) == ("linear_scan", len(positions))


def test_windows_and_two_counters() -> None:
    """Chunks of four by one counter, a row of an output by another that runs down."""

    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def step(i: int, j: Tensor, h: Tensor, rows: Tensor, all_: Tensor) -> tuple[Any, ...]:
            chunk = x.narrow(1, 4 * i, 4)
            h = 0.5 * h + chunk.sum(1)
            rows = rows.index_copy(0, j.view(1), h[None])
            return i + 1, j - 1, h.clone(), rows, all_.slice_scatter(chunk * h[:, None], 1, 4 * i, 4 * i + 4)

        start = (0, torch.tensor(2), x[:, 0] * 0, x.new_zeros(3, B, D), torch.zeros_like(x))
        return while_loop(lambda i, *_: i < 3, step, start)[2:]

    x = torch.randn(B, 12, D)
    h, rows, pieces = torch.zeros(B, D), [], []
    for chunk in x.split(4, 1):
        h = 0.5 * h + chunk.sum(1)
        rows.insert(0, h)
        pieces.append(chunk * h[:, None])
    found, (report,) = raised(function, x)
    torch.testing.assert_close(found, (h, torch.stack(rows), torch.cat(pieces, 1)))
    assert (report.status, report.op) == ("raised", "linear_scan")


def test_gradients_are_those_of_a_loop() -> None:
    """torch 2.13's own while_loop gives a gradient to the last step alone."""
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(B, T, D, dtype=torch.float64)

    def loss(h: Tensor, out: Tensor) -> Tensor:
        return (out * weights).sum() + h.sum()

    found, _ = raised(integrator(READ, WRITE), x)
    gradients = [torch.autograd.grad(loss(*y), x)[0] for y in (found, expected(x, range(T)))]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_sizes_that_are_symbols() -> None:
    def function(x: Tensor) -> Tensor:
        length = x.shape[0]

        def step(t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return t + 1, 0.5 * h + x.index_select(0, t.view(1))[0]

        return while_loop(lambda t, _: t < length, step, (torch.tensor(0), torch.zeros_like(x[0])))[1]

    for length in (9, 14):
        x = torch.randn(length, D)
        found, reports = raised(function, x, dynamic=True)
        h = torch.zeros(D)
        for row in x:
            h = 0.5 * h + row
        torch.testing.assert_close(found, h)
        assert [(r.status, r.op) for r in reports] in ([], [("raised", "linear_scan")])


def ends_by_its_state(x: Tensor) -> Tensor:
    def step(t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return t + 1, 0.5 * h + READ(x, t)

    start = (torch.tensor(0), torch.zeros_like(x[:, 0]))
    return while_loop(lambda t, h: (t < T) & (h.abs().max() < 2), step, start)[1]


def doubles(x: Tensor) -> Tensor:
    def step(t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * t, 0.5 * h + READ(x, t)

    return while_loop(lambda t, h: t < T, step, (torch.tensor(1), torch.zeros_like(x[:, 0])))[1]


def starts_somewhere(x: Tensor) -> Tensor:
    def step(t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return t + 1, 0.5 * h + READ(x, t)

    first = (x[0, 0, 0] > 0).long()
    return while_loop(lambda t, h: t < T, step, (first, torch.zeros_like(x[:, 0])))[1]


def wraps_around(x: Tensor) -> Tensor:
    def step(t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return t + 1, 0.5 * h + x[:, (t - 2).view(1)][:, 0]

    return while_loop(lambda t, h: t < T, step, (torch.tensor(0), torch.zeros_like(x[:, 0])))[1]


def only_counts(x: Tensor) -> Tensor:
    def step(t: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        return t + 1, WRITE(out, t, READ(x, t))

    return while_loop(lambda t, _: t < T, step, (torch.tensor(0), torch.zeros_like(x)))[1]


def draws(x: Tensor) -> Tensor:
    def step(t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return t + 1, 0.5 * h + READ(x, t) * (torch.rand_like(h) * 0 + 1)

    return while_loop(lambda t, _: t < T, step, (torch.tensor(0), torch.zeros_like(x[:, 0])))[1]


@pytest.mark.parametrize(
    "function, reason",
    [
        (ends_by_its_state, "its condition is more than a counter held against a number"),
        (doubles, "its condition is more than a counter held against a number"),
        (starts_somewhere, "its condition is more than a counter held against a number"),
        (wraps_around, f"it reads positions -2 to {T - 3} of an axis of {T}"),
        (only_counts, "it carries no state"),
        (draws, "its step writes into what it closes over, or draws random numbers"),
    ],
)
def test_what_stays_a_loop(function: Callable[[Tensor], Tensor], reason: str) -> None:
    x = torch.rand(B, T, D)
    found, (report,) = raised(function, x)
    torch.testing.assert_close(found, function(x))
    assert (report.status, report.reason) == ("unrolled", f"a while_loop; {reason}")


@pytest.mark.parametrize("loop", ["scan", "while_loop"])
def test_autocast_around_a_loop(loop: str) -> None:
    """Products inside are of bfloat16: a body that is traced without autocast would compute others."""
    matrix = torch.randn(D, D)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = (h @ matrix + x).float()
        return h.clone(), h.clone()

    def function(x: Tensor) -> Tensor:
        rows, start = x.transpose(0, 1), torch.zeros_like(x[:, 0])
        with torch.autocast("cpu", torch.bfloat16):
            if loop == "scan":
                return scan(step, start, rows)[0]
            counted = lambda t, h: (t + 1, step(h, rows.index_select(0, t.view(1))[0])[0])  # noqa: E731
            return while_loop(lambda t, _: t < T, counted, (torch.tensor(0), start))[1]

    x = torch.randn(B, T, D)
    found, (report,) = raised(function, x)
    torch.testing.assert_close(found, function(x), rtol=0, atol=0)
    assert "inside autocast" in report.reason


def test_an_output_that_is_read_is_a_state() -> None:
    """Fibonacci: each entry is the sum of the two before, which the loop itself wrote."""

    def function(x: Tensor) -> Tensor:
        def step(t: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
            before = READ(out, t - 1) + READ(out, t - 2)
            return t + 1, out.index_copy(1, t.view(1), before[:, None])

        return while_loop(lambda t, _: t < T, step, (torch.tensor(2), x.clone()))[1]

    x = torch.ones(B, T, D)
    found, reports = raised(function, x)
    assert found[0, :, 0].tolist() == [1, 1, 2, 3, 5, 8, 13]
    assert {r.status for r in reports} <= {"loop", "unrolled"}
