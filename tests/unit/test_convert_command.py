"""`spikingbrain convert`, and checkpoints as models of the other commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import spikingbrain
from spikingbrain.errors import OptionError
from spikingbrain.generate import batch_ids, generate_ids
from spikingbrain.models.llama import Llama, LlamaConfig
from spikingbrain.models.llama.checkpoint import save
from spikingbrain.models.spiking import SpikeLinear
from spikingbrain.models.spikingbrain import SpikingBrain
from spikingbrain.models.spikingbrain.checkpoint import load
from spikingbrain.tools import cli, named_models

CONFIG = LlamaConfig(
    vocabulary=100, width=64, layers=3, heads=4, key_value_heads=2, head_size=16, feed_forward=96, context=256
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    torch.manual_seed(0)
    save(Llama(CONFIG).eval(), folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_to_the_7b_style_and_on(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(source), "--to", "7b-style", "--window", "9", "--linear-layers", "1"]
    assert cli.main([*command, "--sinks", "1", "--sink-token", "3", "-o", str(tmp_path / "made")]) == 0
    out = capsys.readouterr().out
    assert "1 with linear attention, 2 with a window of 9" in out and "sinks (embedding of token 3)" in out
    assert [layer.linear for layer in load(tmp_path / "made").config.layers] == [False, True, False]
    assert (tmp_path / "made" / "tokenizer.json").read_text() == "{}"

    ready = named_models.load(str(tmp_path / "made"), named_models.ModelOptions(), lambda _: None)
    assert isinstance(ready.model, SpikingBrain)
    generation = ready.metadata["generation"]
    assert (generation["stop"], generation["capacity"]) == ([7, 9], None)
    assert not any(isinstance(m, SpikeLinear) for m in ready.model.modules())
    assert cli.main([*command, "-o", str(tmp_path / "made")]) == 1
    assert "not empty" in capsys.readouterr().err


def test_to_the_76b_style(source: Path, tmp_path: Path) -> None:
    command = ["convert", str(source), "--to", "76b-style", "--window", "9", "--full-layers", "2"]
    more = ["--dense-layers", "none", "--experts", "4", "--sinks", "2", "-o", str(tmp_path / "made")]
    assert cli.main([*command, *more]) == 0
    config = load(tmp_path / "made").config
    assert (config.experts, config.sinks, config.layers[2].softmax) == (4, 2, "full")
    ready = named_models.load(str(tmp_path / "made"), named_models.ModelOptions(capacity=50), lambda _: None)
    assert ready.metadata["generation"]["capacity"] == 50
    assert ready.entries["decode"].args[1].keys[2].shape[1] == 51


@pytest.mark.slow
def test_texts_of_different_lengths_side_by_side(source: Path, tmp_path: Path) -> None:
    command = ["convert", str(source), "--to", "7b-style", "--window", "9", "--linear-layers", "1"]
    assert cli.main([*command, "-o", str(tmp_path / "made")]) == 0
    options = named_models.ModelOptions(batch=4)
    ready = named_models.load(str(tmp_path / "made"), options, lambda _: None)
    file = tmp_path / "made.sbrain"
    spikingbrain.export(ready.model, ready.entries, file, state="state", metadata=ready.metadata)
    program, prompts = spikingbrain.load(file), [[5, 3, 8], list(range(20, 41)), [9]]
    together: dict[int, list[int]] = {n: [] for n in range(3)}
    for number, token in batch_ids(program, prompts, 5):
        together[number].append(token)
    assert together == {n: list(generate_ids(program, p, 5)) for n, p in enumerate(prompts)}
    assert program.entries["prefill"].inputs[1].shape == program.entries["decode"].inputs[0].shape[:1]


def test_spiking(source: Path, tmp_path: Path) -> None:
    command = ["convert", str(source), "--to", "7b-style", "--spike", "-o", str(tmp_path / "made")]
    assert cli.main(command) == 0
    ready = named_models.load(str(tmp_path / "made"), named_models.ModelOptions(), lambda _: None)
    # seven linears a layer, two more in the gates of the first and the third
    assert sum(isinstance(m, SpikeLinear) for m in ready.model.modules()) == 3 * 7 + 2 * 2


def test_an_artifact_is_kept_for_a_folder_until_it_changes(source: Path) -> None:
    options = named_models.ModelOptions(window=8)
    first = named_models.cached_artifact(str(source), "cpu", options)
    assert first.name.startswith("llama-") and first == named_models.cached_artifact(
        str(source), "cpu", options
    )
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert first != named_models.cached_artifact(str(source), "cpu", options)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["convert", "nowhere", "--to", "7b-style"], "no file or folder nowhere"),
        (["convert", "SOURCE", "--to", "7b-style", "--linear-layers", "5"], "no layer 5"),
        (["convert", "SOURCE", "--to", "76b-style", "--experts", "0"], "1 experts per token of 0"),
        (["convert", "SOURCE", "--to", "76b-style", "--spike"], "no names are published"),
    ],
)
def test_what_cannot_be_converted(
    command: list[str], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(source) if part == "SOURCE" else part for part in command]
    assert cli.main([*command, "-o", str(tmp_path / "made")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_folder_with_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(OptionError, match="a model of the type 'bert'"):
        named_models.known(str(tmp_path))
