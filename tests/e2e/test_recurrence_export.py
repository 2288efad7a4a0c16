"""Loops over time leave ``export`` as one program for every length; where they cannot, the reason is told."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import spikingbrain
from spikingbrain.errors import CompileError

B, T = Dim("B", max=64), Dim("T", max=1 << 20)
H, K, V = 3, 8, 4


class Gla(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.g = (nn.Linear(16, H * K) for _ in range(3))
        self.v = nn.Linear(16, H * V)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (H, -1)) for f in (self.q, self.k, self.v))
        g = nn.functional.logsigmoid(self.g(x)).unflatten(-1, (H, -1)) / 16
        state = x.new_zeros(x.shape[0], H, K, V)
        outputs = []
        for t in range(x.shape[1]):
            state = state * g[:, t].exp()[..., None] + k[:, t, ..., None] * v[:, t, :, None]
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        return torch.stack(outputs, 1).flatten(2), state


class Changes(Gla):
    """Another computation for long texts."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        o, state = super().forward(x)
        return (o * 2 if x.shape[1] > 30 else o), state


class Oscillates(nn.Module):
    """A number in the program does not grow evenly with the length."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = 0.5 * h + x[:, t]
        return h * (x.shape[1] % 4)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(16 + 5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 5)
        out = []
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(torch.cat([x[:, t], h], -1)))
            out.append(h)
        return torch.stack(out, 1)


class Scanned(nn.Module):
    """torch's own scan, over any length."""

    def forward(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        def step(h: Tensor, now: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            h = now[1].sigmoid() * h + now[0]
            return h, h * 2

        from torch._higher_order_ops import scan

        return scan(step, torch.zeros_like(x[0]), (x, a), dim=0)  # type: ignore[no-any-return]


def exported(
    model: nn.Module, args: Sequence[Tensor], dims: dict[int, Any], folder: Path
) -> tuple[Any, dict[str, Any]]:
    names = inspect.signature(model.forward).parameters
    entry = spikingbrain.Entry(args=tuple(args), dynamic_shapes=dict.fromkeys(names, dims))
    artifact = spikingbrain.export(model.eval(), {"main": entry}, folder / "a.sbrain")
    return spikingbrain.load(folder / "a.sbrain"), artifact.manifest["entries"]["main"]


def check(program: Any, model: nn.Module, *inputs: Tensor) -> None:
    results = program.main(*inputs)
    with torch.no_grad():
        expected = model(*inputs)
    if isinstance(expected, Tensor):
        results, expected = [results], [expected]
    for r, e in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(r), e, rtol=1e-4, atol=1e-5)


def test_a_loop_of_any_length_and_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Gla()
    program, entry = exported(model, [torch.randn(2, 300, 16)], {0: B, 1: T}, tmp_path)
    for batch, length in [(1, 1), (2, 300), (3, 17), (5, 2), (1, 64)]:
        check(program, model, torch.randn(batch, length, 16))
    assert [(r["status"], r["op"]) for r in entry["recurrences"]] == [("raised", "linear_recurrence")]
    assert 300 in entry["verified_lengths"]["T"] and len(entry["verified_lengths"]["T"]) == 4
    assert "test_recurrence_export.py" in entry["recurrences"][0]["where"]


def test_a_loop_that_is_not_linear(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Cell()
    program, entry = exported(model, [torch.randn(2, 70, 16)], {1: T}, tmp_path)
    for length in (1, 5, 70, 130):
        check(program, model, torch.randn(2, length, 16))
    assert [(r["status"], r["op"]) for r in entry["recurrences"]] == [("loop", "time_loop")]


def test_scan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program, entry = exported(Scanned(), [torch.randn(9, 2, 5), torch.randn(9, 2, 5)], {0: T}, tmp_path)
    for length in (1, 6, 33):
        check(program, Scanned(), torch.randn(length, 2, 5), torch.randn(length, 2, 5))
    assert [(r["status"], r["op"]) for r in entry["recurrences"]] == [("raised", "linear_scan")]


@pytest.mark.parametrize(
    "model, length, why",
    [
        (Changes(), 40, "computes other numbers than the program of short lengths"),
        (Oscillates(), 13, "does not grow evenly with the sizes"),
    ],
)
def test_fixed_where_lengths_differ(
    model: nn.Module, length: int, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "spikingbrain.compile"):
        program, entry = exported(model, [torch.randn(2, length, 16)], {1: T}, tmp_path)
    assert why in caplog.text and why in json.dumps(entry["fixed_lengths"])
    check(program, model, torch.randn(2, length, 16))
    with pytest.raises(spikingbrain.errors.SpikingBrainError, match="axis 1"):
        program.main(torch.randn(2, length + 1, 16))


def test_a_long_loop_that_must_stay_fixed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="5000") as stop:
        exported(Oscillates(), [torch.randn(1, 5000, 4)], {1: T}, tmp_path)
    assert "does not grow evenly" in stop.value.why
