"""Calling a compiled region with torch's tensors, without copies where their memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import _from_dlpack, _to_dlpack

from spikingbrain.frontend.dynamo.layout import inverse
from spikingbrain.frontend.dynamo.lowering import Compiled
from spikingbrain.frontend.dynamo.region import RegionGraph
from spikingbrain.frontend.dynamo.weights import FrozenWeights

_ALIGNMENT = 64


def region_function(region: RegionGraph, compiled: Compiled, name: str) -> Callable[..., Any]:
    """Returns a function of the region's inputs, then its weights, that returns the tuple of its outputs."""
    executable = compiled.executable
    invoke, borrow, lend = executable.function(compiled.entry), executable.borrow, executable.lend
    count = len(region.inputs)
    frozen = FrozenWeights(executable, compiled.weights) if compiled.weights else None
    is_tensor = [isinstance(n.meta["val"], torch.Tensor) for n in region.inputs]
    permuted = [(i, order) for i, order in enumerate(region.input_orders) if order]
    finish = _finisher(region)

    def run(*arguments: Any) -> Any:
        if permuted:
            arguments = list(arguments)
            for i, order in permuted:
                arguments[i] = arguments[i].permute(order)
        buffers = []
        for i in range(count):
            value = arguments[i]
            if is_tensor[i]:
                try:
                    value = borrow(_to_dlpack(value))
                except (RuntimeError, ValueError, BufferError):
                    value = borrow(_to_dlpack(_aligned(value)))
            buffers.append(value)
        if frozen is not None:
            buffers += frozen.buffers(arguments[count:])
        results = [_from_dlpack(lend(b)) for b in invoke(buffers)]
        return finish(results) if finish else results

    run.__name__, run.__module__, run.__qualname__ = name, "spikingbrain_regions", name
    return run


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous copy in memory of its own."""
    return (
        tensor.resolve_conj().resolve_neg().detach().contiguous(memory_format=torch.contiguous_format).clone()
    )


def _finisher(region: RegionGraph) -> Callable[[list[torch.Tensor]], Sequence[torch.Tensor]] | None:
    """Returns what gives results the element type and axis order that torch expects, or None where that is nothing."""
    work: list[tuple[int, torch.dtype | None, list[int]]] = []
    for i, (node, order) in enumerate(zip(region.outputs, region.output_orders, strict=True)):
        dtype = node.meta["val"].dtype
        unsigned = dtype if dtype is torch.uint8 else None
        if order or unsigned:
            work.append((i, unsigned, inverse(order) if order else []))
    if not work:
        return None

    def finish(results: list[torch.Tensor]) -> list[torch.Tensor]:
        for i, dtype, back in work:
            if dtype is not None:
                results[i] = results[i].view(dtype)
            if back:
                results[i] = results[i].permute(back)
        return results

    return finish
