"""Loops over time written with torch's ``scan``: compiled forward and backward, equal to a float64 loop in Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import scan, while_loop

import spikingbrain
from spikingbrain.frontend.capture import Entry
from spikingbrain.frontend.dynamo import report

Step = Callable[[Any, Any], tuple[Any, Any]]
Scan = Callable[..., tuple[Any, Any]]


class Spike(torch.autograd.Function):
    """A step forward, a triangle backward."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v >= 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return gradient * torch.clamp(1 - v.abs(), min=0)


def python_scan(step: Step, init: Any, xs: Any, reverse: bool = False) -> tuple[Any, Any]:
    """What ``scan`` means."""
    flat = xs if isinstance(xs, tuple) else (xs,)
    states, pieces = init, []
    order = range(len(flat[0]))
    for t in reversed(order) if reverse else order:
        now = tuple(x[t] for x in flat)
        states, piece = step(states, now if isinstance(xs, tuple) else now[0])
        pieces.append(piece)
    if reverse:
        pieces.reverse()
    if isinstance(pieces[0], tuple):
        return states, tuple(torch.stack(p) for p in zip(*pieces, strict=True))
    return states, torch.stack(pieces)


def lif_soft(run: Scan, x: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
    """The reset takes the threshold off; the decay of each neuron is learned, its gradient a sum over the batch."""

    def step(v: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        v = v * decay + now
        spike = Spike.apply(v - 1.0)
        return v - spike, spike

    return run(step, v, x)


def lif_hard(run: Scan, x: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
    """The reset is to zero, and not differentiated."""

    def step(v: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        v = v + (now - v) * torch.sigmoid(decay)
        spike = Spike.apply(v - 0.5)
        return v * (1 - spike.detach()), spike

    return run(step, v, x)


def adaptive(run: Scan, x: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
    """The threshold rises with every spike; states leave the loop as well, batch first."""

    def step(states: Any, now: Tensor) -> Any:
        v, threshold = states
        v = v * 0.9 + now
        spike = Spike.apply(v - threshold)
        threshold = threshold * decay + spike * 0.2 + 0.05
        return (v - spike * threshold, threshold.clone()), (spike.clone(), v.clone())

    (last, threshold), (spikes, potentials) = run(step, (v, torch.ones_like(v)), x.transpose(0, 1))
    return last, threshold, spikes.transpose(0, 1), potentials.transpose(0, 1)


def integer(run: Scan, x: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
    """Several spikes at once, counted; from the last step to the first."""

    def step(v: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        v = v * decay + now
        count = torch.round(v.clamp(0, 4))
        return v - count.detach(), v * 0.5 + (count - v).detach()

    return run(step, v, x, reverse=True)


def gru(run: Scan, x: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
    """Products within the step: a general loop."""
    numbers = torch.linspace(-1, 1, len(decay), dtype=decay.dtype)
    first, second = decay[:, None] * numbers, numbers[:, None] * decay

    def step(h: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(now + h @ first)
        h = gate * h + (1 - gate) * torch.tanh(now + (h * gate) @ second)
        return h, h * 2

    return run(step, v, x)


def normalised(run: Scan, x: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
    """A sum along the space within the step: a general loop, with results of two sizes."""

    def step(h: Tensor, now: Tensor) -> Any:
        h = torch.tanh(h * decay + now)
        return h / (1 + h.abs().sum(-1, keepdim=True)), (h * 1.0, h.sum(-1))

    last, (all_, sums) = run(step, v, x)
    return last, all_, sums


POINTWISE = [lif_soft, lif_hard, adaptive, integer]
GENERAL = [gru, normalised]


def _inputs(model: Callable[..., Any], steps: int, batch: int, width: int = 13) -> list[Tensor]:
    generator = torch.Generator().manual_seed(steps)
    shape = (batch, steps, width) if model is adaptive else (steps, batch, width)
    x = torch.randn(shape, generator=generator)
    return [x, torch.rand(batch, width, generator=generator), torch.rand(width, generator=generator)]


def _with_gradients(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    results = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    loss = sum((r * torch.randn(r.shape, generator=generator).to(r.dtype)).sum() for r in results)
    loss.backward()
    return [*(r.detach() for r in results), *(t.grad for t in leaves)]


def _check(function: Callable[..., Any], model: Callable[..., Any], steps: int, batch: int) -> None:
    inputs = _inputs(model, steps, batch)
    found = _with_gradients(function, inputs)
    expected = _with_gradients(lambda *a: model(python_scan, *a), [t.double() for t in inputs])
    for result, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(result, wanted.float(), rtol=2e-4, atol=2e-5)


def _quick(model: Callable[..., Any]) -> Any:
    return model if model in (lif_soft, gru) else pytest.param(model, marks=pytest.mark.slow)


@pytest.mark.parametrize("model", map(_quick, [*POINTWISE, *GENERAL]), ids=lambda f: f.__name__)
def test_gradients(model: Callable[..., Any], fresh_dynamo: None, tmp_path: Path) -> None:
    options = {"dump": str(tmp_path), "threads": 1}
    compiled = torch.compile(
        lambda *a: model(scan, *a), backend="spikingbrain", fullgraph=True, options=options
    )
    with report.collect() as reports:
        _check(compiled, model, 21, 3)
    loops = [r for entry in reports for r in entry.regions if "scan" in r.ops]
    assert len(loops) == 2 and all(r.status == "compiled" for r in loops), loops
    dumped = [p.read_text() for p in tmp_path.rglob("*") if p.is_file() and p.suffix == ".mlir"]
    raised = [text for text in dumped if '"spikingbrain_control.pointwise_scan"' in text]
    assert bool(raised) == (model in POINTWISE)


@pytest.mark.slow
@pytest.mark.parametrize("model", [*POINTWISE, *GENERAL], ids=lambda f: f.__name__)
def test_gradients_at_any_length(model: Callable[..., Any], fresh_dynamo: None) -> None:
    compiled = torch.compile(lambda *a: model(scan, *a), backend="spikingbrain", fullgraph=True, dynamic=True)
    for steps, batch in ((5, 3), (2, 4), (40, 2), (1, 3)):
        _check(compiled, model, steps, batch)


@pytest.mark.parametrize(
    "model", [lif_soft, pytest.param(gru, marks=pytest.mark.slow)], ids=lambda f: f.__name__
)
def test_export_at_any_length(model: Callable[..., Any], tmp_path: Path) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
            return model(scan, x, v, decay)

    time, batch = torch.export.Dim("time", min=1, max=512), torch.export.Dim("batch", min=1, max=16)
    shapes = {"x": {0: time, 1: batch}, "v": {0: batch}, "decay": None}
    entry = Entry(tuple(_inputs(model, 5, 3)), dynamic_shapes=shapes)
    program = spikingbrain.load(spikingbrain.export(Model(), {"main": entry}, tmp_path / "model.sb"))
    for steps, batches in ((1, 1), (2, 3), (35, 2), (130, 1)):
        inputs = _inputs(model, steps, batches)
        expected = model(python_scan, *[t.double() for t in inputs])
        found = program.call("main", *[t.numpy() for t in inputs])
        for result, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(result, wanted.numpy(), rtol=2e-4, atol=2e-5)


def test_what_cannot_be_compiled_says_why(fresh_dynamo: None) -> None:
    def function(x: Tensor) -> Tensor:
        return scan(lambda s, now: (torch.tanh(s + now), torch.sort(s).values), x[0].clone(), x)[1]

    x = torch.randn(4, 8)
    with report.collect() as reports, torch.no_grad():
        found = torch.compile(function, backend="spikingbrain")(x)
    torch.testing.assert_close(found, function(x))
    (loop,) = [r for entry in reports for r in entry.regions if "scan" in r.ops]
    assert loop.status == "eager" and "sort in the body of a scan" in loop.reason


def test_training_through_a_counting_while_loop(fresh_dynamo: None) -> None:
    """From the second step on; the backward hands over a tensor that does not lie at a multiple of 64 bytes."""

    def counted(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        def step(t: Tensor, h: Tensor, out: Tensor) -> tuple[Tensor, ...]:
            h = a.index_select(0, t)[0] * h + x.index_select(0, t)[0]
            return t + 1, h, out.index_copy(0, t, h.unsqueeze(0))

        start = (torch.ones(1, dtype=torch.int64), x[0].clone(), x.clone())
        return while_loop(lambda t, *_: (t != len(x)).squeeze(), step, start)[1:]

    def written_out(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        h, states = x[0], [x[0]]
        for x_t, a_t in zip(x[1:], a[1:], strict=True):
            h = a_t * h + x_t
            states.append(h)
        return h, torch.stack(states)

    inputs = torch.randn(11, 2, 10), torch.rand(11, 2, 10)
    found = []
    for function in (torch.compile(counted, backend="spikingbrain"), written_out):
        x, a = (t.clone().requires_grad_() for t in inputs)
        h, states = function(x, a)
        (h.sum() + states.square().sum()).backward()
        found.append((h, states, x.grad, a.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
