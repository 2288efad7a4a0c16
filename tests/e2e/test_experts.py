"""Products with the weights of experts, compiled in both doors: no weight is gathered, forward or backward."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler")

import spikingbrain
from spikingbrain import Entry
from spikingbrain.frontend.dynamo import report
from spikingbrain.models.spiking import SpikeExpertLinear
from spikingbrain.models.spikingbrain.experts import ExpertLinear

EXPERTS, INPUTS, HIDDEN = 5, 20, 36


class Experts(nn.Module):
    """A feed-forward network of experts, in three of the forms that people write; two experts for each token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(INPUTS, EXPERTS)
        self.up = ExpertLinear(EXPERTS, INPUTS, HIDDEN)
        self.gate = nn.Parameter(torch.randn(EXPERTS, INPUTS, HIDDEN) / 5)  # stored as [N, K, O]
        self.down = nn.Parameter(torch.randn(EXPERTS, INPUTS, HIDDEN) / 5)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.router(x).softmax(-1).topk(2, -1)
        expert, rows = chosen.flatten(), x.repeat_interleave(2, 0)
        gate = torch.bmm(rows.unsqueeze(1), self.gate[expert]).squeeze(1)
        hidden = torch.nn.functional.silu(gate) * self.up(rows, expert)
        y = torch.einsum("tah,taih->tai", hidden.unflatten(0, chosen.shape), self.down[chosen])
        return (y * scores.unsqueeze(-1)).sum(1)


def test_training_gathers_no_weights() -> None:
    torch._dynamo.reset()
    model = Experts()
    compiled = torch.compile(model, backend="spikingbrain", dynamic=True)
    with report.collect() as graphs, report.collect_found() as found:
        for rows in (7, 4):
            x = torch.randn(rows, INPUTS, requires_grad=True)
            leaves = [x, *model.parameters()]
            y, expected = compiled(x), model(x)
            got = torch.autograd.grad(y.square().sum(), leaves)
            wanted = torch.autograd.grad(expected.square().sum(), leaves)
            for a, b in zip((y, *got), (expected, *wanted), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [e.status for e in found.experts] == ["raised"] * 3
    ops = {graph.kind: [op for region in graph.regions for op in region.ops] for graph in graphs}
    assert ops["forward"].count("grouped_linear") == 3
    assert ops["backward"].count("grouped_outer") == 3
    for left in ("index", "bmm", "index_put"):
        assert left not in ops["forward"] + ops["backward"]


def test_inference_takes_packed_weights_and_notices_new_ones() -> None:
    torch._dynamo.reset()
    model = Experts().eval()
    x = torch.randn(7, INPUTS)
    with torch.no_grad(), report.collect() as graphs:
        compiled = torch.compile(model, backend="spikingbrain")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        model.up.weight.mul_(-2.0)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    status = {op: r.status for graph in graphs for r in graph.regions for op in r.ops}
    assert status["grouped_linear"] == "compiled"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experts, Any]:
    model = Experts().eval()
    rows = torch.export.Dim("rows", min=1, max=512)
    entries = {
        "prefill": Entry((torch.randn(6, INPUTS),), dynamic_shapes={"x": {0: rows}}),
        "decode": Entry((torch.randn(1, INPUTS),)),
    }
    path: Path = tmp_path_factory.mktemp("experts") / "experts.sbrain"
    spikingbrain.export(model, entries, path)
    return model, spikingbrain.load(path)


def test_export_reads_weights_in_place(artifact: tuple[Experts, Any]) -> None:
    model, program = artifact
    for entry, sizes in (("prefill", (1, 2, 9, 200)), ("decode", (1,))):
        for rows in sizes:
            x = torch.randn(rows, INPUTS)
            y = torch.as_tensor(getattr(program, entry)(x.numpy()))
            torch.testing.assert_close(y, model(x).detach(), rtol=1e-4, atol=1e-5)


def test_the_report_names_them(artifact: tuple[Experts, Any]) -> None:
    found = artifact[1].manifest["entries"]["prefill"]["experts"]
    assert [(e["status"], e["experts"]) for e in found] == [("raised", EXPERTS)] * 3
    assert sorted((e["inputs"], e["outputs"]) for e in found) == [(20, 36), (20, 36), (36, 20)]
    explanation = spikingbrain.explain(Experts(), torch.randn(3, INPUTS))
    assert "experts\n  raised    3 at " in str(explanation)
    assert len(explanation.to_dict()["experts"]) == 3


class Spiking(nn.Module):
    """Two products by the same experts, made to spike."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate = (ExpertLinear(EXPERTS, 48, HIDDEN) for _ in range(2))
        spikingbrain.spike(self, group_size=16, bits=bits)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        y: Tensor = self.up(x, expert) * self.gate(x, expert)
        return y


@pytest.mark.parametrize("bits", [8, 4])
def test_spiking_experts_are_integers_in_both_doors(bits: int, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = Spiking(bits).eval()
    model.gate.silent = 0.9
    x, expert = torch.randn(9, 48), torch.randint(0, EXPERTS, (9,))
    with torch.no_grad(), report.collect() as graphs:
        compiled = torch.compile(model, backend="spikingbrain")
        torch.testing.assert_close(compiled(x, expert), model(x, expert), rtol=1e-5, atol=1e-6)
    ops = [op for graph in graphs for r in graph.regions if r.status == "compiled" for op in r.ops]
    assert ops.count("spike_grouped_linear") == 2
    rows = {0: torch.export.Dim("rows", min=1, max=512)}
    entries = {
        "prefill": Entry((x, expert), dynamic_shapes={"x": rows, "expert": rows}),
        "decode": Entry((x[:2], expert[:2])),
    }
    spikingbrain.export(model, entries, tmp_path / "experts.sbrain")
    program = spikingbrain.load(tmp_path / "experts.sbrain")
    found = program.manifest["entries"]["prefill"]["experts"]
    assert [(e["op"], e["experts"], e["inputs"]) for e in found] == [
        ("spike_grouped_linear", EXPERTS, 48)
    ] * 2
    assert [(e["silent"], e["form"]) for e in found] == [(0.0, "dense"), (0.9, "events")]
    held = (tmp_path / "experts.sbrain").read_bytes()  # names of weights tell how they are stored
    assert (b"pack_nibbles" in held, b"pack_dot" in held) == (bits == 4, bits == 8)
    assert (b"pack_channel_nibbles" in held, b"pack_channels" in held) == (bits == 4, bits == 8)
    for entry, count in (("prefill", 1), ("prefill", 60), ("decode", 2)):
        x, expert = torch.randn(count, 48), torch.randint(0, EXPERTS, (count,))
        y = torch.as_tensor(getattr(program, entry)(x.numpy(), expert.numpy()))
        torch.testing.assert_close(y, model(x, expert), rtol=1e-5, atol=1e-6)


def test_the_code_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/experts.md"""
    page = (Path(__file__).resolve().parents[2] / "docs" / "experts.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    exec(code, {"__name__": "page"})
    assert capsys.readouterr().out == "['raised']\n"


@pytest.mark.parametrize("spiking", [False, True], ids=["floats", "spiking"])
def test_experts_on_the_emulated_gpu(spiking: bool, tmp_path: Path) -> None:
    """Without kernels of ours: linear algebra, printed as MACA C++."""
    torch.manual_seed(0)
    layer = ExpertLinear(4, 16, 8).requires_grad_(False)
    model = SpikeExpertLinear.of(layer, group_size=8) if spiking else layer
    x, expert = torch.randn(5, 16), torch.tensor([0, 1, 3, 1, 0])
    path = tmp_path / "experts.sbrain"
    spikingbrain.export(model, {"main": Entry((x, expert))}, path, target="maca-emulator")
    y = torch.as_tensor(spikingbrain.load(path).main(x.numpy(), expert.numpy()))
    torch.testing.assert_close(y, model(x, expert), rtol=1e-5, atol=1e-6)
