"""The recurrence ops through both doors: torch.compile, and export with a state that is updated in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import spikingbrain
from spikingbrain.artifact import REPORT
from spikingbrain.frontend.ops import linear_recurrence

HIDDEN, HEADS, STATES, KEYS, VALUES = 24, 4, 2, 8, 12


class Mixer(nn.Module):
    """Gated linear attention, or a gated delta rule, between projections; two heads share a state."""

    def __init__(self, delta: bool):
        super().__init__()
        self.delta = delta
        self.query = nn.Linear(HIDDEN, HEADS * KEYS)
        self.key = nn.Linear(HIDDEN, STATES * KEYS)
        self.value = nn.Linear(HIDDEN, STATES * VALUES)
        self.gate = nn.Linear(HIDDEN, STATES * (1 if delta else KEYS))
        self.out = nn.Linear(HEADS * VALUES, HIDDEN)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.query(x).unflatten(-1, (HEADS, KEYS)) * KEYS**-0.5
        k = self.key(x).unflatten(-1, (STATES, KEYS))
        v = self.value(x).unflatten(-1, (STATES, VALUES))
        g = nn.functional.logsigmoid(self.gate(x))
        if self.delta:
            k = k / (k.square().sum(-1, keepdim=True) + 1).sqrt()
            erase, predict = -0.5 * k, g.exp()[..., None] * k
            o, state = linear_recurrence(q, k, v, g, erase, predict, None, state, "head", True)
        else:
            g = g.unflatten(-1, (STATES, KEYS))
            o, state = linear_recurrence(
                q, k, v, g, state=state, decay_axis="key", log_decay=True, exclusive=True
            )
        return self.out(o.flatten(2)), state


class Model(nn.Module):
    """Two mixers; forward returns the outputs and the new states."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList([Mixer(False), Mixer(True)])

    def forward(self, x: torch.Tensor, state: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        new = []
        for mixer, old in zip(self.mixers, state, strict=True):
            mixed, following = mixer(x, old)
            x = x + mixed
            new.append(following)
        return x, new


def empty(batch: int) -> list[torch.Tensor]:
    return [torch.zeros(batch, STATES, KEYS, VALUES) for _ in range(2)]


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def exported(model: Model, path: Path, target: str, longest: Any) -> spikingbrain.Program:
    batch = Dim("B", min=1, max=16)
    state = [{0: batch}] * 2
    time = {} if longest == 1 else {1: Dim("T", min=1, max=512)}
    entries = {
        "prefill": spikingbrain.Entry(
            (torch.randn(2, 5 if time else 1, HIDDEN), empty(2)),
            dynamic_shapes={"x": {0: batch, **time}, "state": state},
        ),
        "step": spikingbrain.Entry(
            (torch.randn(2, 1, HIDDEN), empty(2)), dynamic_shapes={"x": {0: batch}, "state": state}
        ),
    }
    spikingbrain.export(model, entries, path, state="state", target=target)
    return spikingbrain.load(path)


@pytest.fixture(scope="module")
def program(model: Model, tmp_path_factory: pytest.TempPathFactory) -> spikingbrain.Program:
    return exported(model, tmp_path_factory.mktemp("ops") / "m.sbrain", "cpu", None)


@pytest.mark.parametrize("lengths", [[1], [70, 1, 1], [3, 20, 1]])
def test_split_anywhere(model: Model, program: spikingbrain.Program, lengths: list[int]) -> None:
    x = torch.randn(3, sum(lengths), HIDDEN)
    with torch.no_grad():
        expected, last = model(x, empty(3))
    state, parts = program.new_state(3), []
    for part in x.split(lengths, 1):
        entry = program.step if part.shape[1] == 1 else program.prefill
        parts.append(np.array(entry(part, state=state)))
    np.testing.assert_allclose(np.concatenate(parts, 1), expected.numpy(), atol=2e-5)
    for got, want in zip(state.snapshot().values(), last, strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=2e-5)


def test_states_are_updated_in_place(program: spikingbrain.Program) -> None:
    state = program.new_state(2)

    def addresses() -> list[int]:
        buffers = state.take()
        state.give(buffers)
        return [program.executable.to_host(b).ctypes.data for b in buffers]

    before = addresses()
    program.prefill(torch.randn(2, 9, HIDDEN), state=state)
    program.step(torch.randn(2, 1, HIDDEN), state=state)
    assert addresses() == before


def test_the_report_tells(program: spikingbrain.Program) -> None:
    assert program.artifact is not None
    records = json.loads(bytes(program.artifact.member(REPORT)))["records"]
    raised = [r for r in records if r["pass_name"] == "raise-recurrence"]
    lowered = [r for r in records if r["pass_name"] == "lower-recurrence"]
    assert [r["status"] for r in raised] == ["raised"] * 4  # two mixers in two entries
    assert all("test_recurrence_ops.py" in r["where"] for r in raised)
    assert [r["reason"] for r in lowered] == ["kernel"] * 4


def test_steps_on_a_gpu_target(model: Model, tmp_path: Path) -> None:
    """On the emulator of MetaX GPUs, where every form of recurrence runs for one step."""
    program = exported(model, tmp_path / "m.sbrain", "maca-emulator", 1)
    x, state, parts = torch.randn(1, 3, HIDDEN), program.new_state(1), []
    for t in range(3):
        parts.append(np.array(program.step(x[:, t : t + 1], state=state)))
    with torch.no_grad():
        expected, _ = model(x, empty(1))
    np.testing.assert_allclose(np.concatenate(parts, 1), expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_compile(model: Model, dtype: torch.dtype, fresh_dynamo: None) -> None:
    half = Model().to(dtype).eval()
    half.load_state_dict(model.state_dict())
    compiled = torch.compile(half, backend="spikingbrain", options={"strict": True})
    x = torch.randn(2, 19, HIDDEN, dtype=dtype)
    with torch.no_grad():
        (got, states), (want, last) = compiled(x, empty(2)), half(x, empty(2))
    # of two sums in bfloat16 that are rounded in another order
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)
    torch.testing.assert_close(states, last, atol=tolerance, rtol=0)
    with torch.no_grad():
        found = spikingbrain.explain(half, x, empty(2)).to_dict()
    holding = [r for r in found["regions"] if "linear_recurrence" in json.dumps(r)]
    assert holding and {r["status"] for r in holding} == {"compiled"}


def test_training(model: Model, fresh_dynamo: None) -> None:
    """The gradients of gated linear attention and of the delta rule are recurrences too, and are compiled."""
    x = torch.randn(2, 19, HIDDEN)

    def gradients(call: Any) -> tuple[torch.Tensor, ...]:
        out, state = call(x, empty(2))
        loss = out.square().mean() + sum(s.square().mean() for s in state)
        return torch.autograd.grad(loss, list(model.parameters()))

    compiled = torch.compile(model, backend="spikingbrain")
    got, want = gradients(compiled), gradients(model)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    found = spikingbrain.explain(model, x, empty(2)).to_dict()["regions"]
    ops = [name for region in found if region["status"] == "compiled" for name in region["ops"]]
    assert ops.count("linear_recurrence") == 9  # two forward, three and four backward
    assert "linear_recurrence_backward" not in json.dumps(found)


class Forgetting(nn.Module):
    """A recurrence whose decays are factors that are learned, exactly 0 or negative among them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.decay = nn.Linear(6, 24), nn.Parameter((1.4 * torch.rand(7, 2, 4) - 0.4).relu())
        nn.init.constant_(self.decay[3, :, 1:3], -0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (2, 12)).chunk(3, -1)
        return linear_recurrence(q, k, v, self.decay.expand(len(x), 7, 2, 4), decay_axis="key")[0]


@pytest.mark.parametrize("library", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradients_of_factors_are_compiled(library: bool, fresh_dynamo: None) -> None:
    torch.manual_seed(0)
    model, x = Forgetting(), torch.randn(2, 7, 6)
    options = {"library": library}
    compiled = torch.compile(model, backend="spikingbrain", options=options)
    got, want = (
        torch.autograd.grad(m(x).square().sum(), list(model.parameters())) for m in (compiled, model)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    found = spikingbrain.explain(model, x, options=options).to_dict()
    assert found["counts"]["eager"] == 0
    assert "linear_recurrence" in json.dumps([r for r in found["regions"] if r["kind"] == "backward"])


class Shared(nn.Module):
    """Keys, values and decays repeated for two heads each, as models with grouped heads write it."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        k, v, g = (x.repeat_interleave(2, 2) for x in (k, v, g))
        return linear_recurrence(q, k, v, g, decay_axis="key", log_decay=True)[0]


def test_repeated_heads_share_states(tmp_path: Path) -> None:
    def arguments(time: int) -> list[torch.Tensor]:
        sizes = ((4, 8), (2, 8), (2, 6), (2, 8))
        *qkv, g = (torch.randn(1, time, *size) for size in sizes)
        return [*qkv, -g.abs()]

    time = {1: Dim("T", min=1, max=99)}
    entry = spikingbrain.Entry(tuple(arguments(5)), dynamic_shapes={n: time for n in "qkvg"})
    spikingbrain.export(Shared(), {"main": entry}, tmp_path / "m.sbrain")
    program = spikingbrain.load(tmp_path / "m.sbrain")
    for length in (1, 40):
        given = arguments(length)
        np.testing.assert_allclose(program.main(*given), Shared()(*given).numpy(), atol=1e-5)
    assert program.artifact is not None
    records = json.loads(bytes(program.artifact.member(REPORT)))["records"]
    assert [r["status"] for r in records if r["pass_name"] == "fuse-recurrence"] == ["fused"]
