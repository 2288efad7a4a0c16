"""spikingbrain compare: says "the same" of what is, and finds the op, its line and the pass that was made faulty here."""

from __future__ import annotations

import json
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch_mlir import ir

from spikingbrain.frontend.dynamo import compare
from spikingbrain.passes import pipeline, torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.tools import cli

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)

    def forward(self, x):
        hidden = self.norm(self.inner(x))
        gate = torch.tanh(hidden) * 0.5  # line 12
        return (gate + hidden).exp() * hidden.sigmoid()

def make():
    torch.manual_seed(0)
    return Net(), (torch.randn(3, 6),)
"""


def swap(wrong: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds a faulty pass that puts other ops in the place of some."""

    @dataclass(frozen=True)
    class Swap:
        name: ClassVar[str] = "swap"

        def run(self, module: ir.Module, context: PassContext) -> None:
            for op in list(torch_ir.walk(module)):
                if op.name in wrong:
                    with ir.InsertionPoint(op), op.location:
                        types = [r.type for r in op.results]
                        other = ir.Operation.create(wrong[op.name], types, list(op.operands))
                    op.results[0].replace_all_uses_with(other.results[0])
                    op.erase()

    monkeypatch.setitem(pipeline.PHASES, "raise", [*pipeline.PHASES["raise"], Swap])


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(MODEL)
    return f"{tmp_path / 'net.py'}:make"


def test_the_same(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", model, "--to", str(tmp_path / "repro"), "--quiet"]) == 0
    assert capsys.readouterr().out == "the same, within the tolerance of each element type\n"
    assert not (tmp_path / "repro").exists()


def test_a_faulty_pass_is_found(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    swap({"torch.aten.tanh": "torch.aten.sinh"}, monkeypatch)
    repro = tmp_path / "repro"
    assert cli.main(["compare", model, "--to", str(repro), "--json"]) == 1
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["same"], verdict["op"], verdict["kind"]) == (False, "tanh", "inference")
    assert verdict["ops"] == ["tanh"]  # alone, without the ops around it
    assert verdict["where"] == f"{tmp_path / 'net.py'}:12"
    assert verdict["step"] == "pass swap"

    assert {f.name for f in repro.iterdir()} == {"repro.py", "module.mlir", "inputs.pt", "README.txt"}
    assert "torch.aten.tanh" in (repro / "module.mlir").read_text()
    readme = (repro / "README.txt").read_text()
    assert "pass swap" in readme and torch.__version__ in readme
    for fault, code in ((True, 1), (False, 0)):
        if not fault:
            monkeypatch.setitem(pipeline.PHASES, "raise", pipeline.PHASES["raise"][:-1])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(repro / "repro.py"), run_name="__main__")
        assert ended.value.code == code
        assert ("differ" in capsys.readouterr().out) is fault


def test_a_fault_in_the_backward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    swap({"torch.aten.mul.Tensor": "torch.aten.atan2"}, monkeypatch)

    found = compare.compare(torch.exp, (torch.randn(3, 4, requires_grad=True),), {}, {"library": False})
    assert found is not None
    assert (found.kind, found.op, found.step) == ("backward", "mul", "pass swap")


def test_random_numbers_and_statistics_do_not_count_as_differences() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))
    statistics = model[1].running_mean.clone()
    assert compare.compare(model, (torch.randn(5, 4),), {}) is None
    assert torch.equal(model[1].running_mean, statistics)


def test_a_model_that_differs_from_itself() -> None:
    calls: list[int] = []

    def model(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x + len(calls)

    found = compare.compare(model, (torch.zeros(3),), {})
    assert found is not None and "two runs in torch" in found.step
