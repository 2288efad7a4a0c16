"""spikingbrain.explain: what it lists, and that it leaves everything as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import spikingbrain
from spikingbrain.tools import cli


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        hidden = torch.nn.functional.gelu(self.norm(self.inner(x))) * scale
        return self.outer(hidden + torch.linalg.svdvals(x).sum())


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_training_lists_forward_and_backward() -> None:
    explanation = spikingbrain.explain(Net(), torch.randn(3, 6), scale=2.0)
    found = json.loads(json.dumps(explanation.to_dict()))
    assert [graph["kind"] for graph in found["graphs"]] == ["forward", "backward"]
    assert len(found["regions"]) == sum(len(graph["regions"]) for graph in found["graphs"])
    assert {"graph", "kind", "status", "ops", "where", "reason", "remedy"} == set(found["regions"][0])
    assert {r["status"] for r in found["regions"]} == {"compiled", "library", "eager"}
    assert found["graph_breaks"] == []
    assert sum(found["share"].values()) == pytest.approx(1)
    assert found["counts"]["eager"] >= 1
    (svd,) = [r for r in found["regions"] if "_linalg_svd" in r["ops"] and r["kind"] == "forward"]
    assert svd["where"].startswith(__file__ + ":")
    text = str(explanation)
    assert "hidden + torch.linalg.svdvals(x).sum()" in text  # the user's line itself
    assert text.startswith(f"{found['counts']['compiled']} ops compiled (")


def test_without_gradients_there_is_one_graph() -> None:
    with torch.no_grad():
        explanation = spikingbrain.explain(Net().eval(), torch.randn(3, 6))
    assert [graph.kind for graph in explanation.graphs] == ["inference"]


def test_nothing_is_left_changed() -> None:
    model, x = nn.Sequential(Net(), nn.BatchNorm1d(2), nn.Dropout()), torch.randn(3, 6)
    spikingbrain.compile(model)(x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seed = torch.random.get_rng_state()
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    first, second = spikingbrain.explain(model, x), spikingbrain.explain(model, x)
    assert first.counts == second.counts  # each compiles afresh
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted + 2
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), seed)
    spikingbrain.compile(model)(x)
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted + 2
    )  # found what was compiled first


def prints(x: Tensor) -> Tensor:
    y = x.tanh() * 2 + 1
    for _ in range(2):
        print(end="")
    return y.exp() * 3 + 1


def test_a_function_that_dynamo_gives_up_is_listed() -> None:
    (given_up,) = spikingbrain.explain(prints, torch.randn(3)).graph_breaks
    assert given_up.where == f"{__file__}:{prints.__code__.co_firstlineno + 3}"
    assert "all of prints runs in Python" in given_up.reason


def test_options_reach_the_compiler() -> None:
    with torch.no_grad():
        explanation = spikingbrain.explain(Net().eval(), torch.randn(3, 6), options={"level": 0})
    assert explanation.counts["compiled"] == 0
    with pytest.raises(spikingbrain.errors.OptionError, match="unknown option 'levle'"):
        spikingbrain.explain(Net(), torch.randn(3, 6), options={"levle": 0})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.py"
    file.write_text(
        "import torch\ndef make():\n    return (lambda x: (x.tanh() * 2 + 1).exp()), (torch.ones(3),)\n"
    )
    assert cli.main(["explain", f"{file}:make"]) == 0
    assert "ops compiled (100%), 0 ops left" in capsys.readouterr().out
    assert cli.main(["explain", f"{file}:make", "--json", "--option", "level=0"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["compiled"] == 0
