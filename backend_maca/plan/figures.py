"""What a call costs, told from the plan: launches, bytes that kernels touch, workspace; for one token of one sequence.

``chain`` is how many of the launches wait for each other whatever streams there are, ``waits`` how often a stream waits
for another one.

Every size that is known at run time only counts as 1. A kernel touches its buffers whole, each once; of a buffer that it
reaches only at places that depend on data, such as the table of an embedding, it touches as much as of the largest
other one. ``least`` is what must be touched: every weight and all state, once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch_mlir import ir

from spikingbrain.backend_maca.lower.mlir import nested
from spikingbrain.backend_maca.plan.resolve import resolve, storage, used_by
from spikingbrain.backend_maca.plan.steps import Launch, Product
from spikingbrain.backend_maca.plan.streams import Access, dependencies, longest
from spikingbrain.errors import CallError

if TYPE_CHECKING:
    from spikingbrain.backend_maca.source.printer import Kernel

_ACCESSES = {
    "memref.load": 0,
    "vector.load": 0,
    "memref.store": 1,
    "vector.store": 1,
}  # which operand is the buffer


def figures(
    plan: Mapping[str, Any], scattered: Mapping[str, set[int]], kernels: Mapping[str, Kernel]
) -> dict[str, dict[str, Any]]:
    """Returns the figures of every entry point whose launches depend on sizes alone, and that takes sizes of 1.

    ``scattered`` has, for each kernel, the numbers of the parameters that it reaches at places that depend on data.
    """
    found = {}
    written = {
        k.name: {n for n, (number, axis) in enumerate(k.arguments) if axis is None and number in k.written}
        for k in kernels.values()
    }
    for name, entry in plan["entries"].items():
        # one size may have to be the double of another
        with contextlib.suppress(CallError):
            if entry["static"]:
                found[name] = _of_entry(plan, name, scattered, written)
    return found


def scattered_parameters(module: ir.Module, kernels: Mapping[str, Kernel]) -> dict[str, set[int]]:
    """Returns for each printed kernel the parameters that it reaches only at places that depend on data."""
    found: dict[str, set[int]] = {}
    for op in nested(module.operation):
        name = op.attributes["sym_name"].value if op.name == "gpu.func" else ""
        if name in kernels and kernels[name].name == name:
            places = _scattered_arguments(op)
            parameters = enumerate(kernels[name].arguments)
            found[name] = {n for n, (number, axis) in parameters if axis is None and number in places}
    return found


def _scattered_arguments(function: ir.Operation) -> set[int]:
    """Returns the arguments of a kernel that it reaches only at places that depend on what it has loaded."""
    arguments = list(function.regions[0].blocks[0].arguments)
    by_data: dict[int, bool] = {}
    for op in nested(function):
        place = _ACCESSES.get(op.name)
        if place is not None and op.operands[place] in arguments:
            number = arguments.index(op.operands[place])
            depends = any(map(_is_data, list(op.operands)[place + 1 :]))
            by_data[number] = depends and by_data.get(number, True)
    return {number for number, depends in by_data.items() if depends}


def _is_data(value: ir.Value) -> bool:
    if isinstance(value.owner, ir.Block):
        return False
    op = value.owner.operation
    return op.name in ("memref.load", "vector.load") or (
        op.name.startswith(("arith.", "scf.if")) and any(map(_is_data, _sources(op)))
    )


def _sources(op: ir.Operation) -> list[ir.Value]:
    """Returns the operands of an op, and what its regions yield."""
    yields = [v.operation for region in op.regions for block in region.blocks for v in block.operations]
    return [*op.operands, *(v for o in yields if o.name == "scf.yield" for v in o.operands)]


def _of_entry(
    plan: Mapping[str, Any], entry: str, scattered: Mapping[str, set[int]], written: Mapping[str, set[int]]
) -> dict[str, Any]:
    records = plan["entries"][entry]["buffers"]
    inputs = {i: _smallest(b["shape"]) for i, b in enumerate(records) if b["role"] == "input"}
    steps = resolve(plan, entry, inputs)
    shapes = {**{i: _smallest(b["shape"]) for i, b in enumerate(records)}, **steps.temporaries}

    def size(buffer: int) -> int:
        return math.prod(shapes[buffer]) * storage(records[buffer]["dtype"]).itemsize

    touched = 0
    accesses: dict[int, Access | None] = {}  # of the launches
    weights: dict[int, int] = {}
    for place, step in enumerate(steps.steps):
        if isinstance(step, Product) and not math.prod(step.step["sizes"]):
            continue  # its kernel is taken for these sizes
        accesses[place] = set(used_by(step)), _written(step, written)
        used, few = set(used_by(step)), set()
        if not isinstance(step, Product):
            few = {
                i for n, (i, _) in enumerate(step.arguments) if i is not None and n in scattered[step.kernel]
            }
        most = max((size(i) for i in used - few), default=0)
        for i in used:
            mine = min(size(i), most) if i in few else size(i)
            touched += mine
            if records[i]["role"] == "weight":
                weights[i] = max(weights.get(i, 0), mine)
    state = sum(size(i) for i in inputs if records[i].get("donated"))
    least = sum(weights.values()) + state
    space = steps.workspace
    order = steps.order
    return {
        "launches": len(accesses),
        "chain": len(longest(dependencies(accesses))),
        "streams": order.count if order else 1,
        "waits": sum(map(len, order.waits)) + len(order.forks) + len(order.joins) if order else 0,
        "bytes": touched,
        "least": least,
        "workspace": space.size if space else 0,
        "workspace_least": space.least if space else 0,
    }


def _written(step: Launch | Product, written: Mapping[str, set[int]]) -> set[int]:
    """Returns the buffers that a step writes."""
    if isinstance(step, Product):
        return {step.buffers[-1]}
    places = written[step.kernel]
    return {i for n, (i, _) in enumerate(step.arguments) if i is not None and n in places}


def _smallest(shape: Sequence[Any]) -> tuple[int, ...]:
    """Returns a shape with 1 for every size that is known at run time only."""
    return tuple(size if isinstance(size, int) else 1 for size in shape)
