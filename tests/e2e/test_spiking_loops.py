"""Spiking neurons written as loops, with surrogate gradients: pointwise scans in inference, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from surrogates import FastSigmoid
from torch import Tensor, nn

import spikingbrain
from spikingbrain.frontend.dynamo import report

Spike = Callable[[Tensor], Tensor]


class Arctan(torch.autograd.Function):
    """Writes in place; torch-mlir asserts that what it divides by is not zero."""

    @staticmethod
    def forward(ctx: Any, over: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(over)
        ctx.alpha = alpha
        return (over >= 0).to(over)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (over,) = ctx.saved_tensors
        return ctx.alpha / 2 / (1 + (math.pi / 2 * ctx.alpha * over).pow_(2)) * gradient, None


class Triangle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, over: Tensor) -> Tensor:
        ctx.save_for_backward(over)
        return torch.where(over > 0, 1.0, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (over,) = ctx.saved_tensors
        return gradient * torch.clamp(1 - over.abs(), min=0)


class Lif(nn.Module):
    """The reset is subtracted, detached or not."""

    def __init__(self, spike: Spike, detach: bool) -> None:
        super().__init__()
        self.spike, self.detach = spike, detach

    def forward(self, x: Tensor) -> Tensor:
        v, spikes = torch.zeros_like(x[0]), []
        for now in x:
            v = 0.9 * v + now
            s = self.spike(v - 1.0)
            v = v - (s.detach() if self.detach else s)
            spikes.append(s)
        return torch.stack(spikes)


class Learned(nn.Module):
    """One leak for all neurons, a threshold for each, read twice in a step: their gradients are sums of two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.leak, self.threshold = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(24))

    def forward(self, x: Tensor) -> Tensor:
        v, spikes = torch.zeros_like(x[0]), []
        for now in x:
            v = torch.sigmoid(self.leak) * v + now
            s = Triangle.apply(v - self.threshold)
            v = v - s.detach() * self.threshold
            spikes.append(s)
        return torch.stack(spikes)


class LinearThenLif(nn.Module):
    """A linear layer for each step, which needs no state: one product before the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 20)

    def forward(self, x: Tensor) -> Tensor:
        v, spikes = torch.zeros(x.shape[1], 20), []
        for now in x:
            v = 0.9 * v + self.linear(now)
            s = Arctan.apply(v - 0.5, 2.0)
            v = v * (1 - s)
            spikes.append(s)
        return torch.stack(spikes)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "fast sigmoid": lambda: Lif(lambda v: FastSigmoid.apply(v, 25.0), detach=True),
    "arctan": lambda: Lif(lambda v: Arctan.apply(v, 2.0), detach=True),
    "not detached": lambda: Lif(Triangle.apply, detach=False),
    "learned": Learned,
    "linear": LinearThenLif,
}
QUICK = ("arctan", "learned")

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _drive() -> Tensor:
    return torch.randn(12, 3, 24, generator=torch.Generator().manual_seed(0)) * 1.2


def _loops(dumped: Path) -> list[tuple[int, int]]:
    """Returns how many pointwise scans and how many other loops each graph has."""
    texts = [p.read_text() for p in sorted(dumped.rglob("*raise-pointwise-scan.mlir"))]
    found = [(t.count("spikingbrain_control.pointwise_scan"), t.count("control.time_loop")) for t in texts]
    return [counts for counts in found if any(counts)]


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_training(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    compiled = torch.compile(model, backend="spikingbrain", options={"threads": 1, "dump": str(tmp_path)})

    def results(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        x = _drive().requires_grad_()
        spikes = run(x)
        weights = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(1))
        (spikes * weights).sum().backward()
        gradients = [x.grad, *(p.grad for p in model.parameters())]
        return [spikes.detach(), *(g.clone() for g in gradients if g is not None)]

    with report.collect() as graphs, report.collect_found() as found:
        got = results(compiled)
    assert [(r.status, r.op) for r in found.recurrences] == [("loop", "pointwise_scan")]
    scans = [r for graph in graphs for r in graph.regions if "scan" in r.ops]
    assert [r.status for r in scans] == ["compiled"] * 2, scans
    assert _loops(tmp_path) == [(1, 0)] * 2  # forward and backward
    for actual, wanted in zip(got, results(model), strict=True):
        assert wanted.abs().sum() > 0  # the derivative of a step would be 0
        torch.testing.assert_close(actual, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_inference(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    compiled = torch.compile(model, backend="spikingbrain", options={"threads": 1, "dump": str(tmp_path)})
    with torch.no_grad():
        torch.testing.assert_close(compiled(_drive()), model(_drive()), rtol=0, atol=0)
    assert _loops(tmp_path) == [(1, 0)]


def test_explain_says_so() -> None:
    explanation = spikingbrain.explain(MODELS["fast sigmoid"](), _drive().requires_grad_())
    (recurrence,) = explanation.to_dict()["recurrences"]
    assert (recurrence["op"], recurrence["steps"]) == ("pointwise_scan", 12)
    assert Path(__file__).name in recurrence["where"]


def test_a_function_that_a_linear_loop_reads_leaves_the_loop_as_it_is() -> None:
    """Such a function cannot be computed for all steps at once, which must not cost the graph its other loops."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        h = trace = torch.zeros_like(x[0])
        traces, outputs = [], []
        for now in x:
            h = 0.9 * h + Triangle.apply(now - 0.5)
            outputs.append(h)
        for now in x:
            trace = 0.5 * trace + now
            traces.append(trace)
        return torch.stack(outputs), torch.stack(traces)

    with report.collect_found() as found:
        got = torch.compile(function, backend="spikingbrain")(_drive().requires_grad_())
    assert [(r.status, r.op) for r in found.recurrences] == [("unrolled", ""), ("raised", "linear_scan")]
    for actual, wanted in zip(got, function(_drive()), strict=True):
        torch.testing.assert_close(actual, wanted)
