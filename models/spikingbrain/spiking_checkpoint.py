"""W8ASpike checkpoints of SpikingBrain: linear layers of int8 weights that are fed with spike counts.

They are stored as float weights beside scales `weight_quantizer.scales` [outputs, groups, 1], for groups of 128 inputs, and
their code divides, rounds and multiplies at every call. Here that happens once:

  rounded   `weight` and `weight_quantizer.scales` become codes round(weight / scale), ties to even, not clamped: about 1 % of
            the published codes of a layer lie outside int8, and such layers are kept in int16
  renamed   everything, by the tables in `checkpoint`
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from spikingbrain.models.checkpoint import Checkpoint, Entry, replace_parameter
from spikingbrain.models.checkpoint import save as save_checkpoint
from spikingbrain.models.errors import WeightsError
from spikingbrain.models.spiking import SpikeLinear
from spikingbrain.models.spiking.quantise import quantise_weight
from spikingbrain.models.spikingbrain.checkpoint import entries, read_config, write_config
from spikingbrain.models.spikingbrain.model import SpikingBrain

SCALES = ".weight_quantizer.scales"


def is_spiking(folder: str | os.PathLike[str]) -> bool:
    """Returns whether a checkpoint is a W8ASpike one: it has scales beside its weights."""
    return any(name.endswith(SCALES) for name in Checkpoint(folder).tensors)


def load_spiking(
    folder: str | os.PathLike[str], k: float = 3.0, dtype: torch.dtype | None = None
) -> SpikingBrain:
    """Returns the model of a W8ASpike checkpoint, its linear layers replaced by `SpikeLinear`.

    Args:
        k: the firing constant, which the checkpoint does not hold.
        dtype: of what stays float (embedding, norms, biases, head); None: as stored.

    Raises WeightsError, which lists every tensor that is missing, misshapen or not wanted.
    """
    checkpoint = Checkpoint(folder)
    config = read_config(checkpoint)
    with torch.device("meta"):
        model = SpikingBrain(config)
    parameters = dict(model.named_parameters())
    named = list(entries(config))
    wanted = {entry.stored: tuple(parameters[entry.parameter].shape) for entry in named}
    linears = [entry for entry in named if _is_linear(model, entry)]
    for entry in linears:
        name, (outputs, inputs) = _scales_of(entry), wanted[entry.stored]
        stored = checkpoint.tensors.get(name, (outputs, 0, 1))
        groups = (
            stored[1] if len(stored) == 3 and stored[1] and inputs % stored[1] == 0 else -(-inputs // 128)
        )
        wanted[name] = (outputs, groups, 1)
    checkpoint.check(wanted)
    for entry in named:
        value = checkpoint.read(entry.stored)
        if entry in linears:
            _make_spiking(model, entry, value, checkpoint.read(_scales_of(entry)), k)
        elif not _is_bias_of_spiking(model, entry, value, dtype):
            replace_parameter(model, entry.parameter, value if dtype is None else value.to(dtype))
    return model.eval()


def save_spiking(
    model: SpikingBrain,
    folder: str | os.PathLike[str],
    companions: str | os.PathLike[str] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes a W8ASpike checkpoint. Weights are stored in float32 as code * scale, which gives the same codes when it is
    loaded; the floats that codes were once rounded from are not known any more.

    Raises WeightsError if a linear layer of a block does not spike, or the folder is not empty.
    """
    for name, module in (("embedding", model.embedding), ("head", model.head)):
        if module is not None and not isinstance(getattr(module, "weight", None), nn.Parameter):
            raise WeightsError(
                f"the {name} is made of integers",
                why="in a W8ASpike checkpoint it is kept in floats",
                hint="models.spiking.spike(model) without head and embedding",
            )
    config = {
        **write_config(model.config),
        "torch_dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
    }
    save_checkpoint(folder, _stored(model), config, companions, files)


def _stored(model: SpikingBrain) -> Iterator[tuple[str, Tensor]]:
    for entry in entries(model.config):
        owner, _, attribute = entry.parameter.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, SpikeLinear) and attribute == "weight":
            yield entry.stored, module.weight()
            yield _scales_of(entry), module.scale.unsqueeze(-1)
            continue
        if isinstance(module, nn.Linear) and entry.parameter.startswith("blocks."):
            raise WeightsError(
                f"{owner} does not spike",
                why="in a W8ASpike checkpoint every linear layer of a block does",
                hint="checkpoint.save, or models.spiking.spike(model)",
            )
        yield entry.stored, getattr(module, attribute)


def _is_linear(model: SpikingBrain, entry: Entry) -> bool:
    owner, _, attribute = entry.parameter.rpartition(".")
    inside = entry.parameter.startswith("blocks.")
    return inside and attribute == "weight" and isinstance(model.get_submodule(owner), nn.Linear)


def _scales_of(entry: Entry) -> str:
    return entry.stored.removesuffix(".weight") + SCALES


def _make_spiking(model: SpikingBrain, entry: Entry, weight: Tensor, scales: Tensor, k: float) -> None:
    codes, scale = quantise_weight(
        weight, weight.shape[1] // scales.shape[1], scale=scales.squeeze(-1).float()
    )
    owner = entry.parameter.rpartition(".")[0]
    model.set_submodule(owner, SpikeLinear(codes, scale, None, k))


def _is_bias_of_spiking(model: SpikingBrain, entry: Entry, value: Tensor, dtype: torch.dtype | None) -> bool:
    owner, _, attribute = entry.parameter.rpartition(".")
    module = model.get_submodule(owner)
    if attribute != "bias" or not isinstance(module, SpikeLinear):
        return False
    module.bias = value if dtype is None else value.to(dtype)
    return True
