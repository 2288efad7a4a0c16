"""Spiking layers in NIR, the exchange format of neuromorphic tools (PyPI `nir`), as integrate-and-fire neurons.

NIR's neuron fires if v > threshold and is then reset to 0, whatever was left; a count above one needs more than that. There are
two ways, both exact for static thresholds up to a number of levels, above which counts saturate:

- `population_graph`: a count is a number of neurons. Neuron j of a channel fires if |x| > (j + 1/2) V, all in one step, so
  that nothing depends on leak and reset, and layers follow one another. C channels take 2 x levels x C neurons.
- `train_graph`: a count is a number of steps, the ternary coding. A neuron gets the constant current x and a ramp that falls by
  V at each step, and fires at step t if |x| > (t + 1/2) V. One layer; y is the sum of the outputs of all steps.

Positive and negative spikes are neurons of their own. A value within rounding of a tie may fire either way.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spikingbrain.models.spiking.codings import held_range
from spikingbrain.models.spiking.errors import SpikingError
from spikingbrain.models.spiking.files import new_file
from spikingbrain.models.spiking.linear import SpikeLinear
from spikingbrain.models.spiking.quantise import dequantise_weight

if TYPE_CHECKING:
    import nir

INSTALL = "pip install nir==1.0.8"


def population_graph(network: nn.Module, levels: int | None = None) -> nir.NIRGraph:
    """Returns a network as a graph of one step: x [C] in, y [N] out.

    ``network``: a `SpikeLinear`, or an ``nn.Sequential`` of them, with or without an ``nn.ReLU`` before each: its counts are
    then positive, and take half the neurons. ``levels``: the largest count; by default that of a layer's budget.
    """
    nir = _nir()
    nodes: dict[str, Any] = {}
    layers = _layers(network)
    for i, (layer, positive) in enumerate(layers):
        high = levels if levels is not None else _levels(layer, i)
        signs = torch.tensor([1.0]) if positive else torch.tensor([1.0, -1.0])
        v, inputs = _threshold(layer, i), layer.codes.shape[1]
        rising = torch.eye(inputs) * _channel_scale(layer) / v
        encode = (signs[:, None, None, None] * rising).expand(-1, high, -1, -1).reshape(-1, inputs)
        offset = (0.5 - torch.arange(high)).repeat_interleave(inputs).repeat(len(signs))
        add = (signs[:, None, None] * _weight(layer)[:, None, None, :] * v).expand(-1, -1, high, -1)
        bias = torch.zeros(len(add)) if layer.bias is None else layer.bias.detach().float()
        nodes[f"encode_{i}"] = nir.Affine(weight=encode.numpy(), bias=offset.numpy())
        nodes[f"fire_{i}"] = _neurons(len(encode), 1.0)
        nodes[f"add_{i}"] = nir.Affine(
            weight=add.reshape(len(add), -1).contiguous().numpy(), bias=bias.numpy()
        )
    return _chain(nodes, layers[0][0].codes.shape[1], layers[-1][0].codes.shape[0])


def train_graph(layer: SpikeLinear) -> nir.NIRGraph:
    """Returns a layer as a graph over time: `train_input` in, [N] out at each step."""
    nir = _nir()
    v, inputs = _threshold(layer, 0), layer.codes.shape[1]
    current = torch.diag(_channel_scale(layer))
    ramp = torch.full((inputs, 1), v)
    rows = [torch.cat([current, ramp], 1), torch.cat([-current, ramp], 1)]
    columns = [_weight(layer) * v, -_weight(layer) * v]
    if (
        layer.bias is not None
    ):  # a neuron that fires once: the ramp is 1/2 at step 0, and below 0 from then on
        rows.append(torch.cat([torch.zeros(1, inputs), torch.full((1, 1), 4 * v)], 1))
        columns.append(layer.bias.detach().float()[:, None])
    encode, add = torch.cat(rows), torch.cat(columns, 1)
    nodes = {
        "encode": nir.Linear(weight=encode.numpy()),
        "fire": _neurons(len(encode), v),
        "add": nir.Linear(weight=add.contiguous().numpy()),
    }
    return _chain(nodes, inputs + 1, len(add))


def train_input(x: Tensor, steps: int) -> Tensor:
    """Returns what a `train_graph` is fed with for x [..., C]: [steps, ..., C + 1], x and the ramp 1/2 - t."""
    ramp = 0.5 - torch.arange(steps, dtype=x.dtype).view(-1, *[1] * x.ndim)
    return torch.cat([x.expand(steps, *x.shape), ramp.expand(steps, *x.shape[:-1], 1)], -1)


def write_nir(path: Path, graph: nir.NIRGraph) -> None:
    """Writes a graph to a file ``.nir``."""
    nir = _nir()
    with new_file(path) as temporary:
        nir.write(temporary, graph)


def _chain(nodes: dict[str, Any], inputs: int, outputs: int) -> nir.NIRGraph:
    """Returns a graph of nodes one after another."""
    import numpy as np

    nir = _nir()
    nodes = {
        "input": nir.Input(input_type={"input": np.array([inputs])}),
        **nodes,
        "output": nir.Output(output_type={"output": np.array([outputs])}),
    }
    names = list(nodes)
    return nir.NIRGraph(nodes=nodes, edges=list(itertools.pairwise(names)))


def _neurons(number: int, threshold: float) -> nir.IF:
    one = torch.ones(number)
    return _nir().IF(r=one.numpy(), v_threshold=(one * threshold).numpy(), v_reset=(one * 0).numpy())


def _layers(network: nn.Module) -> list[tuple[SpikeLinear, bool]]:
    """Returns the layers of a network, each with whether only positive values reach it."""
    found: list[tuple[SpikeLinear, bool]] = []
    positive = False
    modules: Sequence[nn.Module] = list(network) if isinstance(network, nn.Sequential) else [network]
    for name, module in enumerate(modules):
        if isinstance(module, SpikeLinear):
            found.append((module, positive))
        elif not isinstance(module, nn.ReLU):
            raise SpikingError(
                f"{type(module).__name__} in NIR", where=f"layer {name}", hint="SpikeLinear and ReLU"
            )
        positive = isinstance(module, nn.ReLU)
    if positive or not found:
        raise SpikingError(
            "a network that does not end with a SpikeLinear", why="spikes are what it fires at"
        )
    return found


def _threshold(layer: SpikeLinear, index: int) -> float:
    if layer.static_threshold is None:
        raise SpikingError(
            "an adaptive threshold in NIR",
            where=f"layer {index}",
            why="its neurons have fixed thresholds",
            hint='spike(..., threshold="static", calibration=...)',
        )
    return float(layer.static_threshold)


def _levels(layer: SpikeLinear, index: int) -> int:
    if layer.budget is None:
        raise SpikingError(
            "no largest count", where=f"layer {index}", hint='levels=..., or Budget(..., remainder="drop")'
        )
    return held_range(layer.budget.coding, layer.budget.steps)[1]


def _channel_scale(layer: SpikeLinear) -> Tensor:
    if layer.channel_scale is None:
        return torch.ones(layer.codes.shape[1])
    return layer.channel_scale.float().cpu()


def _weight(layer: SpikeLinear) -> Tensor:
    """Returns the weights [N, C] of counts, without the channels' scale."""
    return dequantise_weight(layer.codes, layer.scale).float().cpu()


def _nir() -> Any:
    try:
        import nir
    except ImportError as error:
        raise SpikingError("NIR needs the package nir", why=str(error), hint=INSTALL) from error
    return nir
