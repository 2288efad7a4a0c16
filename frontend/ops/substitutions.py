"""Puts the recurrence ops where models call plain functions: those of `models.recurrences`, and GPU kernels that `compat` maps.

torch's ``associative_scan`` becomes a ``scan`` in the same way; and when a model is exported, our spiking layers become the
spiking ops, so that nothing of theirs has to be found and tried.

Two ways, for the two doors. `substituted()` exchanges the functions while a model is captured by running it
(torch.export); `register_for_dynamo()` tells Dynamo to trace the replacement instead, for torch.compile. Either way the
graph holds the op, and the op its gradient. Outside both, models run as they are written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from spikingbrain.compat.table import functions
from spikingbrain.frontend.ops import associative_scan
from spikingbrain.models.recurrences import linear_recurrence as matrices
from spikingbrain.models.recurrences import scan
from spikingbrain.models.spiking import experts
from spikingbrain.models.spiking.linear import adaptive_spike_linear as plain_spike_linear


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    erase: Tensor | None = None,
    predict: Tensor | None = None,
    bonus: Tensor | None = None,
    state: Tensor | None = None,
    decay_axis: str = "none",
    log_decay: bool = False,
    exclusive: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Calls the op of that name."""
    o, last = torch.ops.spikingbrain.linear_recurrence(
        q, k, v, decay, erase, predict, bonus, state, decay_axis, log_decay, exclusive, reverse
    )
    return o, last


def linear_scan(
    decay: Tensor, update: Tensor, state: Tensor | None = None, log_decay: bool = False, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Calls the op of that name."""
    h, last = torch.ops.spikingbrain.linear_scan(decay, update, state, log_decay, reverse)
    return h, last


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Calls the op of that name."""
    y, last = torch.ops.spikingbrain.selective_scan(x, dt, a, b, c, state, reverse)
    return y, last


def adaptive_spike_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, k: float, lower: float, upper: float
) -> Tensor:
    """Calls `spike_encode` and `spike_linear`; for inference, as gradients do not pass."""
    if x.dtype != torch.float32:
        return plain_spike_linear(x, codes, scale, bias, k, lower, upper)
    counts, threshold = torch.ops.spikingbrain.spike_encode(x, k, lower, upper)
    bits = 16 if codes.dtype == torch.int16 else 8
    y: Tensor = torch.ops.spikingbrain.spike_linear(counts, threshold, codes, scale, bias, bits)
    return y


def adaptive_spike_experts(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    expert: Tensor,
    k: float,
    lower: float,
    upper: float,
    silent: float = 0.0,
) -> Tensor:
    """Calls `spike_encode` and `spike_grouped_linear`; where gradients may be asked for, what the layer computes without them."""
    if x.dtype != torch.float32 or x.requires_grad:
        return experts.gathering_spike_experts(x, codes, scale, expert, k, lower, upper)
    counts, threshold = torch.ops.spikingbrain.spike_encode(x, k, lower, upper)
    y: Tensor = torch.ops.spikingbrain.spike_grouped_linear(
        counts, threshold, codes, scale, expert, silent=silent
    )
    return y


_PACKAGE = __name__.rpartition(".")[0]

# All functions of models.recurrences are written in the first three.
_OWN: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (matrices.linear_recurrence, linear_recurrence),
    (scan.linear_scan, linear_scan),
    (scan.selective_scan, selective_scan),
    (experts.adaptive_spike_experts, adaptive_spike_experts),
    (associative_scan.original, associative_scan.associative_scan),
]


def table() -> list[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Returns the functions that are replaced, with what replaces them; GPU kernels only if the program imported them."""
    found = list(_OWN)
    for module, name, replacement in functions():
        original = getattr(sys.modules.get(module), "__dict__", {}).get(name)
        if isinstance(original, FunctionType) and original is not replacement:
            found.append((original, replacement))
    return found


@contextmanager
def substituted(keep: Collection[Callable[..., Any]] = ()) -> Iterator[None]:
    """Exchanges the functions in every module that holds them by a name of its own, and puts them back afterwards.

    Those of ``keep`` stay what they are.

    All threads see the exchange. The ops themselves go on calling the plain functions.
    """
    both = [*table(), (plain_spike_linear, adaptive_spike_linear)]
    replacements = {id(original): replacement for original, replacement in both if original not in keep}
    exchanged: list[tuple[dict[str, Any], str, Any]] = []
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        ours = getattr(module, "__name__", "").startswith(_PACKAGE)
        if ours or not isinstance(names, dict):
            continue
        exchanged += [
            (names, name, value) for name, value in list(names.items()) if id(value) in replacements
        ]
    try:
        for names, name, value in exchanged:
            names[name] = replacements[id(value)]
        yield
    finally:
        for names, name, value in exchanged:
            names[name] = value


_registered: set[int] = set()


def register_for_dynamo() -> None:
    """Lets torch.compile, with any backend, trace the replacements from now on; may be called again when more was imported."""
    for original, replacement in table():
        if id(original) not in _registered:
            torch.compiler.substitute_in_graph(original, skip_signature_check=True)(replacement)
            _registered.add(id(original))
