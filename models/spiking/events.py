"""Spikes as a list of events, for simulators and hardware that are driven by events.

An event is one spike: layer, token, step, neuron, sign; a spike of a step counts what `codings.step_weights` says. Codings
without a sign code the size of a count, and the sign is that of the count. Events are in the order of layers, tokens, steps,
neurons.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spikingbrain.models.spiking.codings import DEFAULT, SIGNED, encode, steps_needed
from spikingbrain.models.spiking.errors import SpikingError
from spikingbrain.models.spiking.files import new_file
from spikingbrain.models.spiking.observe import LayerCounts

FIELDS = ("layer", "token", "step", "neuron", "sign")


def events(seen: LayerCounts, coding: str = DEFAULT) -> Iterator[Tensor]:
    """Yields for each token its events at one input, int32 [n, 4]: token, step, neuron, sign.

    Where the steps are limited, those that the budget's train holds.
    """
    counts = seen.held()
    told = counts if coding in SIGNED else counts.abs()
    steps = steps_needed(told, coding)
    for token, (count, size) in enumerate(zip(counts, told, strict=True)):
        if coding in ("binary", "ternary"):
            step, neuron = _unary(size.abs().to(torch.int64))
        else:  # two's complement repeats the sign bit up to the layer's last step; other trains end when they end
            train = encode(size, coding, steps if coding == "twos_complement" else None)
            step, neuron = train.nonzero(as_tuple=True)
        sign = torch.ones_like(step) if coding == "twos_complement" else count[neuron].sign().to(step.dtype)
        yield torch.stack([torch.full_like(step, token), step, neuron, sign], 1).to(torch.int32)


def _unary(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns step and neuron of every spike of trains of ones, by step; the trains themselves may be too long to be made."""
    neuron = torch.arange(len(sizes)).repeat_interleave(sizes)
    step = torch.arange(len(neuron)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    order = step.argsort(stable=True)
    return step[order], neuron[order]


def write_events(path: Path, inputs: Sequence[LayerCounts], coding: str = DEFAULT) -> int:
    """Writes the events of all inputs to ``path``; returns how many there are.

    ``.csv``: a line each, layers by name. ``.npz``: an array for each field, layers as indices into ``layers``, and ``coding``.
    """
    if path.suffix not in (".csv", ".npz"):
        raise SpikingError(f"events as {path.suffix or path.name!r}", hint="a file .csv or .npz")
    written = 0
    with new_file(path) as temporary:
        if path.suffix == ".csv":
            with temporary.open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(FIELDS)
                for seen in inputs:
                    for some in events(seen, coding):
                        writer.writerows((seen.name, *event) for event in some.tolist())
                        written += len(some)
        else:
            parts = [np.concatenate([e.numpy() for e in events(seen, coding)]) for seen in inputs]
            written = sum(map(len, parts))
            layer = np.repeat(np.arange(len(parts), dtype=np.int32), [len(p) for p in parts])
            token, step, neuron, sign = np.concatenate(parts).T
            np.savez_compressed(
                temporary,
                layers=np.array([seen.name for seen in inputs]),
                coding=np.array(coding),
                layer=layer,
                token=token,
                step=step,
                neuron=neuron,
                sign=sign.astype(np.int8),
            )
    return written
