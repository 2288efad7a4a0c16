"""Calling a compiled region with torch's tensors, without copies where their memory allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C import _from_dlpack, _to_dlpack

from spikingbrain.backend import SharedMemory
from spikingbrain.frontend.dynamo.layout import inverse
from spikingbrain.frontend.dynamo.lowering import Compiled
from spikingbrain.frontend.dynamo.region import RegionGraph
from spikingbrain.frontend.dynamo.weights import FrozenWeights


@dataclass(frozen=True)
class RegionCall:
    """How to call one region of a graph.

    Attributes:
        unit: index of the compiled module that holds it.
        entry: its name there.
        inputs: for each argument, None for a number, or the order of axes in which the tensor is contiguous
            (``layout.memory_order``).
        weights: how the arguments that follow are made from the region's weights: ``sources`` and ``recipe``.
        outputs: for each result, the axes to permute back, and the element type where it has to be set.
    """

    unit: int
    entry: str
    inputs: tuple[tuple[int, ...] | None, ...]
    weights: tuple[Mapping[str, Any], ...]
    outputs: tuple[tuple[tuple[int, ...], torch.dtype | None], ...]

    @staticmethod
    def of(region: RegionGraph, compiled: Compiled, unit: int) -> RegionCall:
        inputs = [
            order if isinstance(n.meta["val"], torch.Tensor) else None
            for n, order in zip(region.inputs, region.input_orders, strict=True)
        ]
        outputs = []
        for node, order in zip(region.outputs, region.output_orders, strict=True):
            dtype = node.meta["val"].dtype
            unsigned = dtype if dtype is torch.uint8 else None  # compiled code knows integers without a sign
            outputs.append((tuple(inverse(order)) if order else (), unsigned))
        return RegionCall(unit, compiled.entry, tuple(inputs), tuple(compiled.weights), tuple(outputs))


# Of memory that cannot be used as it is; IREE says OUT_OF_RANGE of memory that is not aligned to 64 bytes.
_REFUSALS = (RuntimeError, ValueError, BufferError, IndexError)


def region_function(call: RegionCall, executable: SharedMemory, name: str) -> Callable[..., Any]:
    """Returns a function of the region's inputs, then its weights, that returns its outputs."""
    invoke, borrow, lend = executable.function(call.entry), executable.borrow, executable.lend
    count = len(call.inputs)
    frozen = FrozenWeights(executable, call.weights) if call.weights else None
    permuted = [(i, order) for i, order in enumerate(call.inputs) if order]
    numbers = [i for i, order in enumerate(call.inputs) if order is None]
    finish = [(i, back, dtype) for i, (back, dtype) in enumerate(call.outputs) if back or dtype]
    shared: list[int] | None = (
        None  # which results are other tensors' memory; a property of the code, seen at the first call
    )

    def borrow_slowly(arguments: Sequence[Any]) -> list[Any]:
        buffers: list[Any] = []
        for i, value in enumerate(arguments):
            if i in numbers:
                buffers.append(value)
                continue
            try:
                buffers.append(borrow(_to_dlpack(value)))
            except _REFUSALS:
                buffers.append(borrow(_to_dlpack(_aligned(value))))
        return buffers

    def run(*arguments: Any) -> Any:
        inputs: Sequence[Any] = arguments[:count] if frozen is not None else arguments
        if permuted:
            inputs = list(inputs)
            for i, order in permuted:
                inputs[i] = inputs[i].permute(order)
        nonlocal shared
        try:
            if numbers:
                buffers = [v if v.__class__ is int else borrow(_to_dlpack(v)) for v in inputs]
            else:
                buffers = [borrow(_to_dlpack(v)) for v in inputs]
        except (*_REFUSALS, AttributeError, TypeError):
            buffers = borrow_slowly(inputs)
        if frozen is not None:
            buffers += frozen.buffers(arguments[count:])
        borrowed = buffers[:count] if shared is None else ()
        results = [_from_dlpack(lend(b)) for b in invoke(buffers)]
        if shared is None:
            shared = _shared([_from_dlpack(lend(b)) for b in borrowed if b.__class__ is not int], results)
        for i in shared:
            results[i] = results[i].clone()
        for i, back, dtype in finish:
            if dtype is not None:
                results[i] = results[i].view(dtype)
            if back:
                results[i] = results[i].permute(back)
        return results

    run.__name__ = run.__qualname__ = name
    return run


def _shared(inputs: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> list[int]:
    """Returns the results that lie in an input's memory or in an earlier result's: copies that the compiler left out."""
    taken = [_span(t) for t in inputs]
    found = []
    for i, result in enumerate(results):
        start, end = _span(result)
        if any(start < other_end and other_start < end for other_start, other_end in taken):
            found.append(i)
        taken.append((start, end))
    return found


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous copy in memory of its own."""
    return tensor.detach().contiguous(memory_format=torch.contiguous_format).clone()
