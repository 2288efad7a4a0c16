"""SpikingBrain models of real size whose integer weights are random: they show speed and memory, and speak nonsense.

No weight is ever a float: a model is built without storage, and each layer is given codes in turn.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import spikingbrain
from spikingbrain.frontend.capture import Entry
from spikingbrain.models.spiking import SpikeEmbedding, SpikeLinear
from spikingbrain.models.spikingbrain import (
    LayerConfig,
    SpikingBrain,
    SpikingBrainConfig,
    spikingbrain_1b,
    spikingbrain_7b,
)

GROUP, SPREAD = 128, 0.02  # inputs that share a scale; standard deviation of a weight
POOL = 1 << 26

CONFIGS: dict[str, SpikingBrainConfig] = {
    "0.55b": replace(
        spikingbrain_1b(),
        vocabulary=32_000,
        layers=spikingbrain_1b().layers[:8],
        heads=16,
        key_heads=4,
        head_size=128,
        window=1024,
    ),
    "1b": spikingbrain_1b(),
    "1b-full": replace(spikingbrain_1b(), layers=(LayerConfig(softmax="full"),) * 16),
    "7b": spikingbrain_7b(),
}


def random_model(config: SpikingBrainConfig, bits: int, table_bits: int = 8) -> SpikingBrain:
    """Returns a model whose linear layers have codes of ``bits`` bits, embedding and head of ``table_bits``.

    Codes are pieces of one pool of random numbers: all have memory of their own, and billions are made in seconds.
    """
    pools = {width: _pool(width) for width in {bits, table_bits}}
    taken = 0
    with torch.device("meta"):
        model = SpikingBrain(config)

    def layer(weight: Tensor, bias: Tensor | None, width: int) -> SpikeLinear:
        nonlocal taken
        outputs, inputs = weight.shape
        largest = 2 ** (width - 1) - 1
        codes = torch.empty(outputs, inputs, dtype=torch.int8)
        for piece in codes.view(-1).split(POOL // 2):
            piece.copy_(pools[width][taken : taken + len(piece)])
            taken = (taken + 12_345_677) % (POOL // 2)
        groups = inputs // GROUP if inputs % GROUP == 0 else 1
        scale = torch.full((outputs, groups), SPREAD * 3**0.5 / largest)
        return SpikeLinear(codes, scale, None if bias is None else torch.zeros(outputs))

    for name, module in list(model.named_modules()):
        made: nn.Module | None = None
        if isinstance(module, nn.Embedding):
            made = SpikeEmbedding(layer(module.weight, None, table_bits))
        elif isinstance(module, nn.Linear):
            made = layer(module.weight, module.bias, table_bits if name == "head" else bits)
        if made is not None:
            model.set_submodule(name, made)
    for name, parameter in list(model.named_parameters()):  # norms
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, nn.Parameter(torch.ones(parameter.shape)))
    return model.eval()


def _pool(bits: int) -> Tensor:
    largest = 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(bits)
    return torch.empty(POOL, dtype=torch.int8).random_(-largest, largest + 1, generator=generator)


def export(
    model: SpikingBrain,
    path: Path,
    longest: int = 512,
    capacity: int | None = None,
    cache: torch.dtype | None = None,
) -> None:
    """Writes an artifact with the entry points ``prefill``, of up to ``longest`` tokens, and ``decode``."""
    state, length = model.initial_state(1, capacity, cache), torch.export.Dim("T", min=1, max=longest)
    some, one = torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    entries = {
        "prefill": Entry((some, state), {"last_only": True}, {"tokens_BT": {1: length}}),
        "decode": Entry((one, state), {"last_only": True}),
    }
    spikingbrain.export(model, entries, path, state="state")


def bytes_per_token(program: spikingbrain.Program, config: SpikingBrainConfig) -> tuple[int, int]:
    """Returns how many bytes of weights, and of state, decode reads for one token."""
    weights = sum(w.nbytes for name, w in program.artifact.weights().items() if not _table(name, config))
    state = program.new_state()
    return weights, sum(value.nbytes for value in state.snapshot().values())


def _table(name: str, config: SpikingBrainConfig) -> bool:
    """Tells whether a stored tensor is read for a few rows only."""
    return not config.tied_head and name.startswith("embedding.")
