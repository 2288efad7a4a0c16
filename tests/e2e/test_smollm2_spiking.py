"""The real model, spiking: integer sums on its own activations, and the compiled model against eager."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spikingbrain
from spikingbrain.generate import Tokens
from spikingbrain.models import spiking
from spikingbrain.models.llama import Llama
from spikingbrain.models.spiking import SpikeLinear
from spikingbrain.tools.clean_wiki import wiki_text
from spikingbrain.tools.named_models import ModelOptions, SpikeOptions, compile_named

pytestmark = [pytest.mark.weights, pytest.mark.slow]

CHUNK = 512
OPTIONS = ModelOptions(256, 1, score=True, spike=SpikeOptions(3.0))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> spikingbrain.Program:
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("spiking") / "smollm2.sbrain"
    compile_named("smollm2", path, "cpu", OPTIONS, lambda _: None)
    return spikingbrain.load(path)


@pytest.fixture(scope="module")
def model() -> Llama:
    from spikingbrain.models.llama import smollm2

    return smollm2.load(window=OPTIONS.window, sinks=OPTIONS.sinks).eval()


@pytest.fixture(scope="module")
def wiki(program: spikingbrain.Program) -> Tensor:
    ids = Tokens(program).encode(wiki_text()[:20_000])
    return torch.tensor([[0, *ids[: CHUNK - 1]]])


def activations(model: Llama, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Returns what linear layers see."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda _, args, n=n: found.update({n: args[0].detach()})
        )
        for n in names
    ]
    with torch.no_grad():
        model(tokens, model.initial_state(1))
    for hook in hooks:
        hook.remove()
    return found


def kinds() -> Iterator[str]:
    for layer in ("attention.query", "attention.output", "feed_forward.gate", "feed_forward.down"):
        yield f"blocks.29.{layer}"
    yield "blocks.0.feed_forward.down"


def test_sums_on_real_activations_are_those_of_integers(model: Llama, wiki: Tensor) -> None:
    seen = activations(model, wiki[:, :65], list(kinds()))
    largest = 0.0
    for name, x in seen.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = SpikeLinear.of(linear)
        counts, v = spiking.spike_counts(x)
        largest = max(largest, float(counts.abs().max()))
        expected = counts.long() @ layer.codes.long().T
        for rows in (x, x[:, :1]):  # many tokens, and one
            torch._dynamo.reset()
            with torch.no_grad():
                y = torch.compile(layer, backend="spikingbrain", dynamic=False)(rows)
            steps = rows.shape[1]
            sums = torch.round(y.double() / v[:, :steps].double() / layer.scale.T.double()).long()
            assert torch.equal(sums, expected[:, :steps]), name
    assert largest > 127  # counts that a byte does not hold were among them


def test_the_compiled_model_has_eagers_perplexity(
    program: spikingbrain.Program, model: Llama, wiki: Tensor
) -> None:
    report = spiking.spike(model, OPTIONS.spike.k if OPTIONS.spike else 3.0)
    assert len(report.replaced) == 210
    with torch.inference_mode():
        expected, _ = model(wiki, model.initial_state(1))
    compiled = torch.from_numpy(np.array(program.score(wiki.numpy(), state=program.new_state())))

    def perplexity(logits: Tensor) -> float:
        log = logits[0, :-1].double().log_softmax(-1)
        return float((-log[torch.arange(CHUNK - 1), wiki[0, 1:]].mean()).exp())

    assert perplexity(compiled) == pytest.approx(perplexity(expected), rel=1e-3)


def test_it_writes_text(program: spikingbrain.Program) -> None:
    text = "".join(program.generate("The capital of France is", 6))
    assert "Paris" in text


def test_every_projection_is_of_integers(program: spikingbrain.Program) -> None:
    for entry in program.manifest["entries"].values():
        assert [s["status"] for s in entry["spikes"]] == ["raised"] * 210


def test_the_command_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from spikingbrain.tools import cli

    assert cli.main(["run", "smollm2", "x", "--spike", "k=three"]) == 1
    assert "--spike k=3" in capsys.readouterr().err
