"""A layer of gated linear attention through both doors: its recurrence computes what is around it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import spikingbrain
from spikingbrain import build
from spikingbrain.artifact import REPORT
from spikingbrain.frontend.dynamo import lowering
from spikingbrain.models.recurrences import gla

WIDTH, HEADS, SIZE = 32, 3, 16
FUSED = "computes q, k, decay; reads v where they are; computes the output with 1 row sum"


class Layer(nn.Module):
    """Gated linear attention with feature maps, a norm for each head and an output gate."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("query", "key", "value", "gate", "out_gate"):
            self.add_module(name, nn.Linear(WIDTH, HEADS * SIZE, bias=False))
        self.norm = nn.RMSNorm(SIZE, 1e-2)
        self.out = nn.Linear(HEADS * SIZE, WIDTH, bias=False)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        names = (self.query, self.key, self.value, self.gate, self.out_gate)
        q, k, v, g, u = (projection(x).unflatten(-1, (HEADS, SIZE)) for projection in names)
        o, last = gla(
            F.relu(q), F.elu(k) + 1, v, F.logsigmoid(g) / 16, initial_state=state, output_final_state=True
        )
        assert last is not None
        return self.out((self.norm(o) * F.silu(u)).flatten(2)), last


def empty(batch: int) -> Tensor:
    return torch.zeros(batch, HEADS, SIZE, SIZE)


@pytest.fixture(scope="module")
def layer() -> Layer:
    torch.manual_seed(0)
    return Layer().eval()


@pytest.fixture(scope="module")
def program(layer: Layer, tmp_path_factory: pytest.TempPathFactory) -> spikingbrain.Program:
    path = tmp_path_factory.mktemp("fused") / "m.sbrain"
    batch, time = Dim("B", min=1, max=16), Dim("T", min=1, max=512)
    shapes: Any = {"x": {0: batch}, "state": {0: batch}}
    entries = {
        "prefill": spikingbrain.Entry(
            (torch.randn(2, 5, WIDTH), empty(2)), dynamic_shapes=shapes | {"x": {0: batch, 1: time}}
        ),
        "step": spikingbrain.Entry((torch.randn(2, 1, WIDTH), empty(2)), dynamic_shapes=shapes),
    }
    spikingbrain.export(layer, entries, path, state="state")
    return spikingbrain.load(path)


@pytest.mark.parametrize("lengths", [[1], [37, 1, 1], [3, 16, 1]])
def test_split_anywhere(layer: Layer, program: spikingbrain.Program, lengths: list[int]) -> None:
    x = 2 * torch.randn(3, sum(lengths), WIDTH)
    with torch.no_grad():
        expected, last = layer(x, empty(3))
    state, parts = program.new_state(3), []
    for part in x.split(lengths, 1):
        entry = program.step if part.shape[1] == 1 else program.prefill
        parts.append(np.array(entry(part, state=state)))
    np.testing.assert_allclose(np.concatenate(parts, 1), expected.numpy(), atol=1e-5)
    (got,) = state.snapshot().values()
    np.testing.assert_allclose(got, last.numpy(), atol=2e-5)


def test_the_report_tells(program: spikingbrain.Program) -> None:
    assert program.artifact is not None
    records = json.loads(bytes(program.artifact.member(REPORT)))["records"]
    assert [r["reason"] for r in records if r["pass_name"] == "fuse-into-recurrence"] == [FUSED] * 2
    assert [r["reason"] for r in records if r["pass_name"] == "lower-recurrence"] == ["kernel"] * 2


def test_torch_compile(layer: Layer, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[dict[str, Any]] = []

    def compile_code(*args: Any, **kwargs: Any) -> build.Code:
        code = build.compile_code(*args, **kwargs)
        records.extend(code.report["records"])
        return code

    monkeypatch.setattr(lowering, "compile_code", compile_code)
    compiled = torch.compile(layer, backend="spikingbrain")
    for steps in (19, 33):
        x = torch.randn(2, steps, WIDTH)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, empty(2)), layer(x, empty(2)), atol=2e-5, rtol=0)
    found = {r["reason"] for r in records if r["pass_name"] == "fuse-into-recurrence"}
    assert {reason.split("; ")[0] for reason in found} == {"computes q, k, decay"}
    assert {reason.split("; ")[-1] for reason in found} == {"computes the output with 1 row sum"}


def test_training(layer: Layer, fresh_dynamo: None) -> None:
    """What the backward needs is kept in memory, and read there."""
    x = torch.randn(2, 19, WIDTH)

    def gradients(call: Any) -> tuple[Tensor, ...]:
        out, state = call(x, empty(2))
        loss = out.square().mean() + state.square().mean()
        return torch.autograd.grad(loss, list(layer.parameters()))

    got, want = gradients(torch.compile(layer, backend="spikingbrain")), gradients(layer)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
