"""``spikingbrain spikes``: its table, its page, its files, and wrong use."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spike_models import Shared, seen

from spikingbrain.models import spiking
from spikingbrain.tools import cli, spikes
from spikingbrain.tools.spike_page import draw, page


@pytest.fixture
def model() -> Shared:
    torch.manual_seed(0)
    return Shared()


@pytest.fixture
def found(model: Shared) -> spikes.Findings:
    spiking.spike(model)
    return spikes.examine(model, [torch.randn(12, 8)], "a <model>", "some text", "all layers spike")


def test_the_table_names_every_input_and_formula(
    found: spikes.Findings, capsys: pytest.CaptureFixture[str]
) -> None:
    spikes.print_table(found)
    out = capsys.readouterr().out
    for text in (
        "b +a ",
        "\nc ",
        "\ntotal ",
        *spiking.CODINGS,
        "x 0.03 pJ",
        "x 0.23 pJ",
        "x 1.5 pJ",
        "128 bytes",
    ):
        assert text in out
    assert [len(row) for row in found.rows()] == [14] * 4


def test_the_page_needs_nothing_else(found: spikes.Findings) -> None:
    text = page(found)
    assert "a &lt;model&gt;" in text and "prefers-color-scheme: dark" in text
    for outside in ("http", "<script", "<link", "@import", "url("):
        assert outside not in text
    charts = text.split("<svg")[1:]
    assert len(charts) == 2 + 2 + 5
    for chart in charts:
        ElementTree.fromstring("<svg" + chart.partition("</svg>")[0] + "</svg>")


def test_a_raster_shows_the_train_and_says_what_it_leaves_out() -> None:
    drawn = draw(seen([[0, 1, -20], [2, 0, 0]]), "ternary")
    assert (drawn.steps, drawn.tokens, drawn.neurons, drawn.hidden) == (16, 2, 3, 4)
    assert sorted(drawn.spikes)[:3] == [(0, 0, 1, 1), (0, 0, 2, -1), (0, 1, 2, -1)]
    assert len(drawn.spikes) == 1 + 16 + 2
    assert {sign for *_, sign in draw(seen([[-3]]), "bitwise").spikes} == {1}
    assert draw(seen([[-2]]), "twos_complement").spikes == [(0, 1, 0, -1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["gpt5", "text"], "nor a model known by name"),
        (["smollm2", "@/no/such/file"], "no text in"),
        (["smollm2", "text", "--tokens", "0"], "--tokens 0"),
        (["smollm2", "text", "--k", "-1"], "--k -1"),
        (["smollm2", "text", "--events", "e.txt"], r"a file .csv or .npz"),
        (["smollm2", "text", "--threshold", "static"], "belong together"),
        (["smollm2", "text", "--json", "/no/such/folder/x"], "no folder"),
        (["smollm2", "text", "--golden", "/no/such/folder/x"], "no folder"),
        (["smollm2", "text", "--steps", "3", "--coding", "binary"], "counts have both signs"),
    ],
)
def test_wrong_use_is_refused_before_the_model_is_loaded(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from spikingbrain.tools import named_models

    def loaded(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setitem(named_models.MODELS, "smollm2", (loaded, *named_models.MODELS["smollm2"][1:]))  # type: ignore[arg-type]
    assert cli.main(["spikes", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.weights
def test_a_real_model_fires_as_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from spikingbrain.models.llama import MissingPackage, smollm2

    try:
        smollm2.locate()
    except MissingPackage as missing:
        pytest.skip(str(missing))
    text = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all."
    files = {name: tmp_path / f"x.{name}" for name in ("json", "html", "npz")}
    command = ["spikes", "smollm2", text, "--quiet", "--only", "blocks.5.*", "--json", str(files["json"])]
    command += [
        "--html",
        str(files["html"]),
        "--events",
        str(files["npz"]),
        "--golden",
        str(tmp_path / "golden"),
    ]
    assert cli.main(command) == 0
    assert "test vectors of 7 layers" in capsys.readouterr().out
    report = json.loads(files["json"].read_text())
    whole = report["total"]
    assert whole["channels"] == 3 * 576 + 1536 and len(report["inputs"]) == 4
    # Over 512 tokens of Wikipedia and all layers: 1.18 spikes, 17.5 % silent, 93 % of |s| up to 7.
    assert whole["spikes_per_value"]["bitwise_ternary"] == pytest.approx(1.2, abs=0.1)
    assert whole["silent"] == pytest.approx(0.17, abs=0.04) and whole["up_to_7"] == pytest.approx(
        0.93, abs=0.03
    )
    spikes_written = len(np.load(files["npz"])["sign"])
    assert spikes_written == round(whole["spikes_per_value"]["bitwise_ternary"] * whole["values"])
