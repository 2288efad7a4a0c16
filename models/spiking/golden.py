"""Golden vectors: what each spiking layer of a model was given and gave, number by number, for test benches of hardware.

A folder holds ``index.json`` and a file ``.npz`` for each layer, of T tokens, C inputs, N outputs, G groups of inputs:

| array | shape | |
| --- | --- | --- |
| input | float32 [T, C] | x, multiplied by ``channel_scale`` if there is one |
| threshold | float32 [T] | V |
| counts | int32 [T, C] | s = round(input / V), ties to even |
| train | int8 [steps, T, C] | the spikes of the counts; with a budget, of its steps |
| remainder | int32 [T, C] | counts - what the train stands for; zeros unless a budget's remainder is exact |
| codes | int8 [N, C] | weights (int16 where a code needs it) |
| scale | float32 [N, G] | of the weights |
| sums | int64 [T, N, G] | the products of counts and codes, summed over the inputs of a group |
| bias, channel_scale | float32 [N], [C] | where there are any |
| output | float32 [T, N] | y = V (sum over groups of scale x sums) + bias |

With a budget whose remainder is dropped, ``counts`` are what is left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spikingbrain.models.spiking.calibrate import watch_inputs
from spikingbrain.models.spiking.codings import DEFAULT, SIGNED, budget, encode, step_weights, steps_needed
from spikingbrain.models.spiking.errors import SpikingError
from spikingbrain.models.spiking.files import new_folder
from spikingbrain.models.spiking.linear import SpikeLinear

FORMAT = 1
LONGEST = 4096  # steps of a train that is written spike by spike


def write_golden(model: nn.Module, calls: Iterable[Any], folder: Path, coding: str = DEFAULT) -> int:
    """Writes the vectors of the first call of each layer of ``model`` to a new ``folder``; returns how many layers it holds.

    ``coding`` is that of the trains, unless a layer's budget says another; without a sign they are those of |s|.
    """
    spiking = {name: m for name, m in model.named_modules() if isinstance(m, SpikeLinear)}
    if not spiking:
        raise SpikingError("no layer of the model spikes", hint="models.spiking.spike(model)")
    index: dict[str, dict[str, Any]] = {}
    with new_folder(folder) as temporary:

        def see(name: str, x: Tensor) -> None:
            if name in index:
                return
            file = f"{len(index):04}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.npz"
            arrays, about = vectors(spiking[name], x.flatten(0, -2), coding)
            named: dict[str, Any] = {key: a.cpu().numpy() for key, a in arrays.items()}
            np.savez_compressed(temporary / file, **named)
            index[name] = {"file": file, **about}

        watch_inputs(model, spiking, calls, see)
        text = {
            "format": FORMAT,
            "count": "round(input / threshold), ties to even",
            "output": "threshold * (scale * sums).sum(groups) + bias",
            "layers": index,
        }
        (temporary / "index.json").write_text(json.dumps(text, indent=1) + "\n")
    return len(index)


def vectors(layer: SpikeLinear, x: Tensor, coding: str = DEFAULT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the arrays of one layer for x [T, C], and what the index says about them."""
    counts, v = layer.counts(x)
    whole = counts.to(torch.int64)
    limit = layer.budget
    steps = steps_needed(whole.abs(), coding)
    if limit is None and steps > LONGEST:
        raise SpikingError(
            f"a train of {steps} steps",
            why=f"vectors hold up to {LONGEST}",
            hint="bitwise_ternary, or a budget of steps",
        )
    if limit is not None:
        coding = limit.coding
        train, rest = budget(whole, coding, limit.steps)
    else:
        train, rest = encode(whole if coding in SIGNED else whole.abs(), coding), torch.zeros_like(whole)
    outputs, groups = layer.scale.shape
    sums = torch.einsum(
        "tgc,ngc->tng",
        whole.to(torch.float64).view(-1, groups, whole.shape[-1] // groups),
        layer.codes.to(torch.float64).view(outputs, groups, -1),
    )
    arrays = {
        "input": (x if layer.channel_scale is None else x * layer.channel_scale).float(),
        "threshold": v.float().expand(len(x), 1).flatten(),
        "counts": whole.to(torch.int32),
        "train": train,
        "remainder": rest.to(torch.int32),
        "codes": layer.codes,
        "scale": layer.scale,
        "sums": sums.to(torch.int64),
        "output": layer.forward(x).float(),  # without hooks: one of them may have called this
    }
    arrays |= {n: t.float() for n in ("bias", "channel_scale") if (t := getattr(layer, n)) is not None}
    about = {
        "inputs": whole.shape[-1],
        "outputs": outputs,
        "group_size": whole.shape[-1] // groups,
        "tokens": len(x),
        "k": layer.k,
        "threshold": "adaptive" if layer.static_threshold is None else "static",
        "coding": coding,
        "steps": train.shape[0],
        "step_weights": step_weights(train.shape[0], coding).tolist(),
        "signs": "in the train" if coding in SIGNED else "those of the counts",
        "remainder": "none" if limit is None else limit.remainder,
        "arrays": {n: [str(a.dtype).removeprefix("torch."), list(a.shape)] for n, a in arrays.items()},
    }
    return arrays, about
