"""Spiking networks in NIR compute the same, executed here and by norse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spike_models import static
from torch import Tensor, nn

from spikingbrain.models import spiking
from spikingbrain.models.spiking import SpikeLinear, SpikingError


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


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nir")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[2] / "docs" / "spikes.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/spikes.md", "exec"), {})
    assert (tmp_path / "network.nir").is_file()
