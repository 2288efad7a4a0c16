"""``torch.scan``: imported as a time loop, compiled, and equal to eager at every length."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import scan

import spikingbrain
from spikingbrain.frontend.capture import Entry, capture

WIDTH = 4


class Scans(nn.Module):
    """Three recurrences; ``kind`` chooses one, so that one artifact holds them all."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.decay = nn.Parameter(torch.randn(WIDTH, generator=generator))
        self.mix = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.mix.weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator))

    def forward(self, x: Tensor, kind: str) -> tuple[Tensor, ...]:
        return getattr(self, kind)(x)

    def one_carried(self, x: Tensor) -> tuple[Tensor, ...]:
        """A leaky integrator, nothing closed over."""

        def step(state: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
            state = 0.5 * state + now
            return state, state * 2

        return scan(step, torch.zeros(x.shape[1:]), x)

    def several_carried(self, x: Tensor) -> tuple[Tensor, ...]:
        """Two states, two scanned tensors, two results; the body closes over weights."""

        def step(states: Any, now: Any) -> Any:
            state, count = states
            first, second = now
            state = torch.tanh(state * torch.sigmoid(self.decay) + self.mix(first))
            return (state, count + second), (state * count, first - state)

        last = x.sum(-1)
        (state, count), (a, b) = scan(
            step, (torch.ones(x.shape[1:]), torch.zeros(x.shape[1], 1)), (x, last[..., None])
        )
        return state, count, a, b

    def backwards(self, x: Tensor) -> tuple[Tensor, ...]:
        """From the last step to the first."""

        def step(state: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
            state = self.decay * state - now
            return state, state.clone()

        return scan(step, torch.zeros(x.shape[1:]), x, reverse=True)


KINDS = ("one_carried", "several_carried", "backwards")


@pytest.fixture(scope="module")
def model() -> Scans:
    return Scans()


@pytest.fixture(scope="module")
def program(model: Scans, tmp_path_factory: pytest.TempPathFactory) -> spikingbrain.Program:
    time, batch = torch.export.Dim("time", min=1, max=512), torch.export.Dim("batch", min=1, max=8)
    entries = {
        kind: Entry((torch.zeros(5, 3, WIDTH), kind), dynamic_shapes={"x": {0: time, 1: batch}})
        for kind in KINDS
    }
    path = tmp_path_factory.mktemp("scan") / "scans.sb"
    return spikingbrain.load(spikingbrain.export(model, entries, path, target="cpu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (1, 3), (2, 1), (7, 2), (130, 3)])
def test_equal_to_eager(
    model: Scans, program: spikingbrain.Program, kind: str, steps: int, batch: int
) -> None:
    x = torch.randn(steps, batch, WIDTH)
    with torch.no_grad():
        expected = model(x, kind)
    results = program.call(kind, x.numpy())
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_length_zero_returns_the_carried_values(program: spikingbrain.Program) -> None:
    """Eager torch refuses length 0; the loop that replaces it runs no step."""
    executable = program.executable
    x = executable.to_device(np.zeros((0, 2, WIDTH), np.float32))
    state, count, *stacks = [executable.to_host(r) for r in executable.call("several_carried", [x])]
    np.testing.assert_array_equal(state, np.ones((2, WIDTH), np.float32))
    np.testing.assert_array_equal(count, np.zeros((2, 1), np.float32))
    assert [s.shape for s in stacks] == [(0, 2, WIDTH), (0, 2, WIDTH)]


def test_becomes_one_time_loop(model: Scans) -> None:
    """The body stands in the loop and names the weights that it closes over."""
    time = torch.export.Dim("time", min=1, max=512)
    entry = Entry((torch.zeros(5, 3, WIDTH), "several_carried"), dynamic_shapes={"x": {0: time}})
    text = capture(model, {"main": entry}).module
    (loop,) = re.findall(r'"spikingbrain_control.time_loop".*?^    }\)', text, re.M | re.S)
    assert "torch.aten.linear" in loop and "torch.aten.sigmoid" in loop
    assert "carried = 2" in text
    assert "func.call" not in text


def test_a_stack_of_other_sizes(tmp_path: Path) -> None:
    """The size of a stacked result follows from the body, wherever its axes come from."""

    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            def step(state: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
                state = torch.tanh(state + now.sum(0))
                return state, state.transpose(0, 1) * 2

            return scan(step, torch.zeros(x.shape[2:]), x)[1]

    model, batch = Turned(), torch.export.Dim("batch", min=2, max=8)
    entry = Entry((torch.zeros(5, 3, 2, WIDTH),), dynamic_shapes={"x": {2: batch}})
    program = spikingbrain.load(spikingbrain.export(model, {"main": entry}, tmp_path / "turned.sb"))
    x = torch.randn(5, 3, 6, WIDTH)
    np.testing.assert_allclose(program.call("main", x.numpy())[0], model(x).numpy(), rtol=1e-5, atol=1e-5)


def test_two_entries_keep_their_own_bodies(tmp_path: Path) -> None:
    """Subgraphs of different entries have the same name in torch; the right one must be taken."""

    class Two(nn.Module):
        def forward(self, x: Tensor, factor: float) -> Tensor:
            return scan(lambda s, now: (torch.tanh(s * factor) + now, s + 0), torch.zeros(x.shape[1:]), x)[0]

    entries = {name: Entry((torch.zeros(3, 2), f)) for name, f in (("half", 0.5), ("triple", 3.0))}
    text = capture(Two(), entries).module
    for name, factor in (("half", "5.000000e-01"), ("triple", "3.000000e+00")):
        body = text[text.index(f"@{name}") :]
        loop = body[body.index("time_loop") :]
        number = re.search(r"torch.constant.float (\S+)", loop)
        assert number is not None and number.group(1) == factor
