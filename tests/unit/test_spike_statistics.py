"""What is said about spikes: statistics, weight blocks, event files, golden vectors, NIR, static thresholds and budgets."""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spikingbrain.models import spiking
from spikingbrain.models.spiking import Budget, SpikeLinear, SpikingError
from spikingbrain.models.spiking.blocks import skipped, skipped_in_all
from spikingbrain.models.spiking.events import events, write_events
from spikingbrain.models.spiking.golden import write_golden
from spikingbrain.models.spiking.observe import LayerCounts, observe_counts
from spikingbrain.models.spiking.statistics import Statistics, statistics, total
from spikingbrain.tools import cli, spikes
from spikingbrain.tools.spike_page import draw, page


class Shared(nn.Module):
    """Two layers that read one input, and a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 6, bias=False)
        self.c = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.b(x) + self.a(x).sum(-1, keepdim=True))
        return y


@pytest.fixture
def model() -> Shared:
    torch.manual_seed(0)
    return Shared()


def seen(counts: list[list[int]], outputs: int = 1, **options: Any) -> LayerCounts:
    values = torch.tensor(counts)
    return LayerCounts(("layer",), outputs, values, torch.ones(len(values)), **options)


# Static thresholds and budgets


def test_a_static_threshold_is_the_mean_of_the_adaptive_ones(model: Shared) -> None:
    x = torch.randn(5, 8)
    adaptive = spiking.threshold(x, 2.0)
    report = spiking.spike(model, 2.0, calibration=[x[:2], x[2:]], threshold="static")
    assert "thresholds fixed by calibration" in str(report)
    assert isinstance(model.a, SpikeLinear) and model.a.static_threshold is not None
    torch.testing.assert_close(model.a.static_threshold, adaptive.mean().view(1))
    counts, v = model.a.counts(x)
    torch.testing.assert_close(counts, torch.round(x / adaptive.mean()))
    assert v.shape == (1,)
    y = v * (counts @ (model.a.codes * model.a.scale).mT) + model.a.bias
    torch.testing.assert_close(model.a(x), y)


def test_static_thresholds_need_calibration_and_serve_inference(model: Shared) -> None:
    with pytest.raises(SpikingError, match="static thresholds without calibration"):
        spiking.spike(model, threshold="static")
    with pytest.raises(SpikingError, match="in training"):
        spiking.spike(model, threshold="static", calibration=[torch.randn(1, 8)], training=True)
    with pytest.raises(SpikingError, match=r"threshold 'fixed'\n  try: adaptive or static"):
        spiking.spike(model, threshold="fixed")


@pytest.mark.parametrize("coding", ["ternary", "bitwise_ternary", "twos_complement"])
def test_a_budget_saturates_or_changes_nothing(coding: str) -> None:
    linear, x = nn.Linear(16, 5), torch.randn(7, 16)
    free = SpikeLinear.of(linear, k=6.0)
    exact = SpikeLinear.of(linear, k=6.0, budget=Budget(2, coding))
    drop = SpikeLinear.of(linear, k=6.0, budget=Budget(2, coding, "drop"))
    torch.testing.assert_close(exact(x), free(x), rtol=0, atol=0)
    counts, v = free.counts(x)
    held, _ = drop.counts(x)
    train, rest = spiking.budget(counts, coding, 2)
    torch.testing.assert_close(held.long(), spiking.decode(train, coding))
    assert rest.any()
    torch.testing.assert_close(drop(x), v * (held @ (free.codes * free.scale).mT) + free.bias)


def test_budgets_that_hold_no_signed_count_are_refused() -> None:
    for coding, steps in (("binary", 3), ("bitwise", 3), ("ternary", 0), ("twos_complement", 1)):
        with pytest.raises(SpikingError, match="counts have both signs"):
            Budget(steps, coding)
    with pytest.raises(SpikingError, match="remainder 'lose'"):
        Budget(3, remainder="lose")


# Statistics


def test_statistics_are_exact() -> None:
    found = statistics(seen([[0, 1, -2, 3], [0, 0, 7, -17]], outputs=10))
    assert (found.tokens, found.channels, found.values, found.largest) == (2, 4, 8, 17)
    assert found.histogram == {-17: 1, -2: 1, 0: 3, 1: 1, 3: 1, 7: 1}
    assert found.spikes == {
        "binary": 30,
        "ternary": 30,
        "bitwise": 1 + 1 + 2 + 3 + 2,
        "bitwise_ternary": 1 + 1 + 2 + 3 + 2,
        "twos_complement": 1 + 5 + 2 + 3 + 5,  # -2 = 111110, -17 = 101111
    }
    assert found.steps == dict(zip(spiking.CODINGS, (17, 17, 5, 5, 6), strict=True))
    assert (found.share(0, 0), found.share(0, 7), found.share(17), found.share(128)) == (
        3 / 8,
        7 / 8,
        1 / 8,
        0,
    )
    assert found.sparsity == {
        "silent": 3 / 8,
        "needed_steps": 1 - 9 / 40,
        "window": 1 - (1 + 1 + 2 + 3 + 3) / 24,
    }
    assert (found.operations, found.multiplications) == (90, 80)
    assert found.energy == pytest.approx({"spikes": 45 * 0.03, "int8": 40 * 0.23, "fp16": 40 * 1.5})


@pytest.mark.parametrize("coding", spiking.CODINGS)
def test_spikes_are_those_of_the_train(coding: str) -> None:
    counts = torch.randint(-40, 41, (6, 9))
    told = counts.abs() if coding in ("binary", "bitwise") else counts
    train = spiking.encode(told, coding)
    found = statistics(seen(counts.tolist()))
    assert found.spikes[coding] == int(train.abs().sum())
    assert found.pairs[coding] == train.numel()


def test_the_total_lets_each_input_have_its_own_steps() -> None:
    small, large = statistics(seen([[1, 0]], outputs=3)), statistics(seen([[8, 0, 0, -1]], outputs=5))
    whole = total([small, large])
    assert whole.sparsity["needed_steps"] == 1 - 3 / (2 * 1 + 4 * 4)
    assert (whole.operations, whole.multiplications) == (3 + 10, 6 + 20)
    assert whole.histogram == {-1: 1, 0: 3, 1: 1, 8: 1} and whole.steps["bitwise_ternary"] == 4
    assert json.loads(json.dumps(whole.to_json()))["sizes"] == {"0": 3, "1": 2, "8": 1}


def test_a_silent_input_has_statistics() -> None:
    found = statistics(seen([[0, 0]]))
    assert found.largest == 0 and found.spikes_per_value() == 0
    assert found.sparsity == {"silent": 1, "needed_steps": 1, "window": 1}


def test_counts_are_observed_once_for_layers_that_share_them(model: Shared) -> None:
    spiking.spike(model, 3.0)
    x = torch.randn(2, 5, 8)
    shared, single = observe_counts(model, [x[:1], x[1:]])
    assert (shared.layers, shared.outputs, single.layers, single.outputs) == (("b", "a"), 10, ("c",), 3)
    counts, v = spiking.spike_counts(x.flatten(0, 1), 3.0)
    torch.testing.assert_close(shared.counts, counts.to(torch.int16))
    torch.testing.assert_close(shared.thresholds, v.flatten())
    assert single.counts.shape == (10, 6)


def test_layers_that_count_differently_share_nothing(model: Shared) -> None:
    spiking.spike(model, 3.0, only=["a"])
    spiking.spike(model, 2.0, only=["b"])
    assert [s.layers for s in observe_counts(model, [torch.randn(4, 8)])] == [("b",), ("a",)]


def test_what_a_budget_does_not_hold_is_counted(model: Shared) -> None:
    x = torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, -10.0]])
    (free, *_) = observe_counts_of(model, x, None)
    (exact, *_) = observe_counts_of(model, x, Budget(3))
    (drop, *_) = observe_counts_of(model, x, Budget(3, remainder="drop"))
    largest = int(free.counts.abs().max())
    assert largest > 7 and (free.beyond, exact.beyond, drop.beyond) == (0, 1, 1)
    assert exact.beyond_size == drop.beyond_size == largest - 7
    assert (int(exact.counts.min()), int(exact.held().min()), int(drop.counts.min())) == (-largest, -7, -7)


def observe_counts_of(model: Shared, x: Tensor, budget: Budget | None) -> list[LayerCounts]:
    copy = Shared()
    copy.load_state_dict(model.state_dict())
    spiking.spike(copy, 3.0, budget=budget)
    return observe_counts(copy, [x])


def test_models_without_spikes_are_refused(model: Shared) -> None:
    with pytest.raises(SpikingError, match="no layer of the model spikes"):
        observe_counts(model, [torch.randn(1, 8)])
    spiking.spike(model)
    with pytest.raises(SpikingError, match="no spiking layer was reached"):
        observe_counts(model, [])
    with pytest.raises(SpikingError, match=r"NaN or infinite\n  at: b"):
        observe_counts(model, [torch.full((1, 8), float("nan"))])


# Weight blocks


def test_blocks_are_skipped_when_all_their_channels_are_silent() -> None:
    counts = torch.zeros(4, 80, dtype=torch.int16)
    counts[:, ::2] = 1  # every other channel fires: no block of two is silent, half of all are once ordered
    found = skipped(seen(counts.tolist(), outputs=3), 32)
    assert (found.blocks, found.as_is, found.ordered) == (2 * 3 * 3, 0, 2 * 3 * 1)
    assert skipped(seen(counts.tolist()), 2).as_is == 0
    assert skipped(seen(counts.tolist()), 2).ordered == 2 * 20
    counts[3] = 0  # a silent token needs no weights
    assert skipped(seen(counts.tolist()), 32).as_is == 3


def test_the_order_comes_from_other_tokens() -> None:
    counts = torch.zeros(2, 64)
    counts[0, :32], counts[1, ::2] = 1, 1
    (found,) = skipped_in_all([seen(counts.long().tolist())], [32])
    assert (found.blocks, found.as_is, found.ordered) == (2, 0, 0)
    with pytest.raises(SpikingError, match="from one token"):
        skipped(seen([[1]]), 32)


# Event files


def test_events_give_the_counts_back(tmp_path: Path) -> None:
    inputs = [seen([[0, 1, -2], [5, 0, -17]]), LayerCounts(("other",), 1, torch.tensor([[3]]), torch.ones(1))]
    for coding in spiking.CODINGS:
        number = write_events(tmp_path / "e.csv", inputs, coding)
        assert write_events(tmp_path / "e.npz", inputs, coding) == number
        rows = list(csv.reader((tmp_path / "e.csv").open()))
        assert rows[0] == ["layer", "token", "step", "neuron", "sign"] and len(rows) == number + 1
        stored = np.load(tmp_path / "e.npz")
        names = [str(stored["layers"][i]) for i in stored["layer"]]
        columns = [stored[f].tolist() for f in ("token", "step", "neuron", "sign")]
        as_text = [list(map(str, row)) for row in zip(names, *columns, strict=True)]
        assert rows[1:] == as_text and str(stored["coding"]) == coding
        told = inputs[0].counts if coding in spiking.codings.SIGNED else inputs[0].counts.abs()
        weights = spiking.codings.step_weights(spiking.steps_needed(told, coding), coding).tolist()
        counts = torch.zeros(2, 3, dtype=torch.int64)
        for layer, token, step, neuron, sign in rows[1:]:
            if layer == "layer":
                counts[int(token), int(neuron)] += weights[int(step)] * int(sign)
        torch.testing.assert_close(counts, inputs[0].counts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.csv", "e.npz"]


def test_events_of_a_budget_are_those_that_it_holds() -> None:
    (token,) = events(seen([[9, -1]], budget=Budget(2)))
    assert token.tolist() == [[0, 0, 0, 1], [0, 0, 1, -1], [0, 1, 0, 1]]


def test_events_of_an_unknown_kind_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(SpikingError, match=r"a file \.csv or \.npz"):
        write_events(tmp_path / "e.txt", [seen([[1]])])
    with pytest.raises(SpikingError, match="unknown coding"):
        write_events(tmp_path / "e.csv", [seen([[1]])], "morse")
    assert not list(tmp_path.iterdir())


# Golden vectors


@pytest.mark.parametrize("budget", [None, Budget(2), Budget(2, "ternary", "drop")])
@pytest.mark.parametrize("static", [False, True])
def test_golden_vectors_say_how_the_output_comes_about(
    model: Shared, tmp_path: Path, budget: Budget | None, static: bool
) -> None:
    x = torch.randn(5, 8)
    expected: dict[str, Tensor] = {}
    how: dict[str, Any] = {"threshold": "static", "calibration": [x]} if static else {}
    spiking.spike(model, 3.0, 4, budget=budget, only=["a", "b"], **how)
    for name in ("a", "b"):
        expected[name] = getattr(model, name)(x)
    assert write_golden(model, [x, x + 1], tmp_path / "golden") == 2
    index = json.loads((tmp_path / "golden" / "index.json").read_text())
    assert list(index["layers"]) == ["b", "a"]
    for name, about in index["layers"].items():
        z = np.load(tmp_path / "golden" / about["file"])
        assert {n: [str(z[n].dtype), list(z[n].shape)] for n in z.files} == about["arrays"]
        weights = np.array(about["step_weights"])
        held = (z["train"].astype(np.int64) * weights[:, None, None]).sum(0)
        np.testing.assert_array_equal(held + z["remainder"], z["counts"])
        if budget is None or budget.remainder == "exact":
            np.testing.assert_array_equal(np.round(z["input"] / z["threshold"][:, None]), z["counts"])
        counts, codes = z["counts"].astype(np.int64), z["codes"].astype(np.int64)
        sums = np.einsum("tgc,ngc->tng", counts.reshape(5, 2, 4), codes.reshape(-1, 2, 4))
        np.testing.assert_array_equal(sums, z["sums"])
        y = z["threshold"][:, None] * (z["scale"] * z["sums"]).sum(-1) + (z["bias"] if name == "a" else 0)
        np.testing.assert_allclose(y, z["output"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(z["output"], expected[name].numpy())


def test_trains_of_many_thousand_steps_are_not_written(tmp_path: Path) -> None:
    layer = static(2, 1, 0.5, 7)
    layer.budget = None
    with pytest.raises(SpikingError, match="a train of 20000 steps"):
        write_golden(layer, [torch.tensor([[10_000.0, 0.0]])], tmp_path / "golden", "ternary")
    assert write_golden(layer, [torch.tensor([[10_000.0, 0.0]])], tmp_path / "golden") == 1


def test_golden_vectors_overwrite_nothing(model: Shared, tmp_path: Path) -> None:
    spiking.spike(model)
    (tmp_path / "golden").mkdir()
    write_golden(model, [torch.randn(1, 8)], tmp_path / "golden")  # an empty folder is filled
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(SpikingError, match="is there already"):
        write_golden(model, [torch.randn(1, 8)], tmp_path / "golden")
    with pytest.raises(SpikingError, match="no folder"):
        write_golden(model, [torch.randn(1, 8)], tmp_path / "none" / "golden")
    with pytest.raises(RuntimeError):
        write_golden(model, [torch.randn(1, 9)], tmp_path / "broken")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


# NIR


def static(inputs: int, outputs: int, threshold: float, levels: int, bias: bool = True) -> SpikeLinear:
    """A layer with numbers that floats hold exactly, so that no sum depends on its order; its outputs are no ties."""
    codes = torch.randint(-9, 10, (outputs, inputs), dtype=torch.int8)
    return SpikeLinear(
        codes,
        torch.full((outputs, 1), 0.125),
        torch.randint(-4, 5, (outputs,)) / 4 + 1 / 256 if bias else None,
        channel_scale=torch.tensor([1.0, 2.0]).repeat(inputs // 2 + 1)[:inputs],
        static_threshold=torch.tensor([threshold]),
        budget=Budget(levels, "ternary", "drop"),
    )


def values(*shape: int) -> Tensor:
    """Multiples of 1/64 that are no ties for thresholds of 1/8 or more."""
    return torch.randint(-200, 200, shape) / 64 + 1 / 256


def run_nir(graph: Any, steps: list[np.ndarray]) -> list[np.ndarray]:
    """Executes a chain as NIR defines it: a neuron fires if v > threshold, and is then at v_reset."""
    order = [b for _, b in graph.edges]
    potential: dict[str, np.ndarray] = {}
    outputs = []
    for x in steps:
        for name in order:
            node = graph.nodes[name]
            match type(node).__name__:
                case "Affine":
                    x = x @ node.weight.T + node.bias
                case "Linear":
                    x = x @ node.weight.T
                case "IF":
                    v = potential.get(name, np.zeros_like(x)) + node.r * x
                    x = (v > node.v_threshold).astype(np.float32)
                    potential[name] = np.where(x > 0, node.v_reset, v)
        outputs.append(x)
    return outputs


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(static(6, 5, 0.5, 4), nn.ReLU(), static(5, 4, 1.0, 3), static(4, 3, 0.25, 9))


def test_a_network_in_nir_computes_the_same(network: nn.Sequential, tmp_path: Path) -> None:
    nir = pytest.importorskip("nir")
    from spikingbrain.models.spiking.nir import population_graph, write_nir

    write_nir(tmp_path / "network.nir", population_graph(network))
    graph = nir.read(tmp_path / "network.nir")
    assert graph.nodes["fire_0"].v_threshold.shape == (2 * 4 * 6,)
    assert graph.nodes["fire_1"].v_threshold.shape == (3 * 5,)  # behind a ReLU there are no negative spikes
    x = values(50, 6)
    (y,) = run_nir(graph, [x.numpy()])
    np.testing.assert_array_equal(y, network(x).numpy())
    assert network[0].counts(x)[0].abs().max() == 4


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_in_nir_fires_its_train(bias: bool, tmp_path: Path) -> None:
    nir = pytest.importorskip("nir")
    from spikingbrain.models.spiking.nir import train_graph, train_input, write_nir

    layer, x = static(6, 5, 0.5, 7, bias), values(50, 6)
    write_nir(tmp_path / "layer.nir", train_graph(layer))
    graph = nir.read(tmp_path / "layer.nir")
    currents = list(train_input(x, 7).numpy())
    y = sum(run_nir(graph, currents))
    np.testing.assert_array_equal(y, layer(x).numpy())
    graph.edges = [e for e in graph.edges if e[0] in ("input", "encode")]  # up to the spikes
    fired = torch.tensor(np.stack(run_nir(graph, currents)))
    counts, _ = layer.counts(x)
    torch.testing.assert_close(
        (fired[..., :6] - fired[..., 6:12]).to(torch.int8), spiking.encode(counts, "ternary", 7)
    )


def test_norse_computes_the_same(network: nn.Sequential, tmp_path: Path) -> None:
    nir, norse = pytest.importorskip("nir"), pytest.importorskip("norse.torch")
    from spikingbrain.models.spiking.nir import population_graph, train_graph, train_input, write_nir

    write_nir(tmp_path / "network.nir", population_graph(network))
    x = values(50, 6)
    y, _ = norse.from_nir(nir.read(tmp_path / "network.nir"))(x)
    torch.testing.assert_close(y, network(x), rtol=0, atol=0)
    layer: SpikeLinear = network[0]  # type: ignore[assignment]
    write_nir(tmp_path / "layer.nir", train_graph(layer))
    program, state, y = norse.from_nir(nir.read(tmp_path / "layer.nir")), None, torch.zeros(50, 5)
    for current in train_input(x, 4):
        out, state = program(current, state)
        y = y + out
    torch.testing.assert_close(y, layer(x), rtol=0, atol=0)


def test_what_nir_cannot_say_is_refused() -> None:
    pytest.importorskip("nir")
    from spikingbrain.models.spiking.nir import population_graph, train_graph

    adaptive = SpikeLinear.of(nn.Linear(4, 4))
    with pytest.raises(
        SpikingError, match=r'an adaptive threshold.*\n.*\n.*\n  try: spike\(..., threshold="static"'
    ):
        train_graph(adaptive)
    with pytest.raises(SpikingError, match="GELU in NIR"):
        population_graph(nn.Sequential(static(4, 4, 0.5, 2), nn.GELU()))
    with pytest.raises(SpikingError, match="does not end with"):
        population_graph(nn.Sequential(static(4, 4, 0.5, 2), nn.ReLU()))
    with pytest.raises(SpikingError, match="no largest count"):
        population_graph(SpikeLinear.of(nn.Linear(4, 4), static_threshold=torch.ones(1)))


# The command


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
    assert [len(row) for row in found.rows()] == [13] * 4


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
        (["gpt5", "text"], "neither an artifact file nor a model known by name"),
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


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nir")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[2] / "docs" / "spikes.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/spikes.md", "exec"), {})
    assert (tmp_path / "network.nir").is_file()


def test_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(SpikingError, match="no tokens"):
        statistics(LayerCounts(("layer",), 1, torch.zeros(0, 4, dtype=torch.int16), torch.zeros(0)))
    assert isinstance(total([statistics(seen([[1]]))]), Statistics)
