"""Kernels with one thread per element of a tensor, in the form that ``spikingbrain_control.launch`` calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, tensor

from spikingbrain.backend_maca.lower.index import index, less, product, split
from spikingbrain.passes.kernels import builders
from spikingbrain.passes.wave_kernels.builders import kernel, memref_of, thread

BLOCK = 256

# Fills a kernel: the coordinates of this thread's element, and the buffers of inputs and results.
Body = Callable[[list[ir.Value], list[ir.Value]], None]


def unique_name(stem: str) -> str:
    """Returns a name that no function of the module around the insertion point has."""
    symbols = ir.SymbolTable(builders.root_module().operation)
    return next(name for n in itertools.count() if (name := f"{stem}_{n}") not in symbols)


def launch_per_element(
    name: str,
    of: ir.Value,
    inputs: Sequence[ir.Value],
    results: Sequence[ir.Type],
    body: Body,
    tied: Sequence[int] | None = None,
) -> list[ir.Value]:
    """Emits a kernel, one thread per element of the input ``of``, and its launch; returns the results.

    Results in new memory have the sizes of ``of`` where these are dynamic; ``tied`` as in ``launch``.
    """
    tied = list(tied or [-1] * len(results))
    rank = ir.RankedTensorType(of.type).rank
    place = list(inputs).index(of)
    fresh = [kind for kind, to in zip(results, tied, strict=True) if to < 0]

    def fill(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        sizes = [builders.size(buffers[place], axis) for axis in range(rank)]
        flat = arith.addi(arith.muli(block[0], index(BLOCK)), thread())
        builders.when(less(flat, product(sizes)), lambda: body(split(flat, sizes), buffers))

    name = unique_name(name)
    kernel(name, [memref_of(kind) for kind in [*(v.type for v in inputs), *fresh]], BLOCK, fill)
    count = product([builders.size(of, axis) for axis in range(rank)])
    grid = [arith.ceildivsi(count, index(BLOCK)), index(1), index(1)]
    return list(builders.launch(name, list(results), grid, inputs, dynamic_sizes(of, fresh), tied).results)


def dynamic_sizes(of: ir.Value, kinds: Sequence[ir.Type]) -> list[ir.Value]:
    """Emits the dynamic sizes of tensors that are as long as ``of``."""
    found = []
    for kind in map(ir.RankedTensorType, kinds):
        for axis in range(kind.rank):
            if kind.is_dynamic_dim(axis):
                found.append(tensor.dim(of, index(axis)))
    return found
