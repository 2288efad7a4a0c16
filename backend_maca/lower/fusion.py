"""Elementwise ops are computed where they are used: fewer launches, and no memory for what is in between.

Upstream fuses producers with one use into their consumers. Before, cheap producers with several uses are copied, one to
a use; copies that found no consumer become one again. Matrix products keep their operands as they are: fused into one, a
producer would be computed once per row or column, and the library could not take the product.
"""

from __future__ import annotations

import re

from torch_mlir import ir

from spikingbrain.backend_maca.lower.carried import VIEWS
from spikingbrain.backend_maca.lower.mlir import functions, host_ops, parse, run_passes
from spikingbrain.passes import dialect

ROUNDS = 3  # of copies; each may make another producer's uses fit
CHEAP = 12  # ops of a body that may be computed again for every use
# What takes many instructions, or what a fused reduction would compute once for each of its results.
COSTLY = ("math.", "arith.divf", "arith.remf", "tensor.extract")
MOST_INPUTS = 48  # tensors that one kernel reads; its parameters have 4 KiB on some machines
KEEP = "maca.keep"  # holds upstream fusion off; gone afterwards

# Sizes are asked of arguments: an op of which only the size is asked, as its kernel computes it, goes.
CLEAN = (
    "func.func(linalg-generalize-named-ops)",
    "func.func(resolve-ranked-shaped-type-result-dims,canonicalize,cse)",
)
FUSE = ("func.func(linalg-fuse-elementwise-ops)", "func.func(canonicalize,cse)")


def fuse(text: str) -> str:
    """Fuses elementwise ops into those that use them."""
    with dialect.load() as context, ir.Location.unknown():
        module = parse(text, context)
        for op in [op for function in functions(module) for op in host_ops(function)]:
            if op.name.startswith("linalg.") and len(op.regions):
                op.location = ir.Location.name(_label(op), op.location)
        run_passes(module, CLEAN)
        for function in functions(module):
            for op in host_ops(function):
                if op.name == "linalg.generic" and _is_product(op):
                    _keep_operands(op)
            _limit_inputs(function)
        run_passes(module, FUSE)
        for _ in range(ROUNDS):
            for function in functions(module):
                for op in host_ops(function):
                    if op.name == "linalg.generic":
                        _copy_for_uses(op)
            run_passes(module, FUSE)
        for function in functions(module):
            for op in host_ops(function):
                if op.name == KEEP:
                    op.results[0].replace_all_uses_with(op.operands[0])
                    op.erase()
                elif op.name == "linalg.generic" and not len(op.results):
                    op.erase()  # an ``assert`` kept it when all who used it had copies, with the assert
                elif op.name == "linalg.generic" and not op.attributes["operandSegmentSizes"][0]:
                    _copy_for_results(op)
        return str(module.operation.get_asm(enable_debug_info=True))


def _label(op: ir.Operation) -> str:
    """Returns the op's name, a generic one with what it computes: ``linalg.generic mulf, addf``."""
    if op.name != "linalg.generic":
        return str(op.name)
    steps = [o.operation.name.partition(".")[2] for o in op.regions[0].blocks[0].operations][:-1]
    return "linalg.generic " + (", ".join(steps[:4]) + (", ..." if len(steps) > 4 else "") or "copy")


def _is_product(op: ir.Operation) -> bool:
    """Returns whether an op sums products of elements that each take part in several sums."""
    iterators = ["parallel" in str(a) for a in op.attributes["iterator_types"]]
    inputs = op.attributes["operandSegmentSizes"][0]
    maps = [ir.AffineMapAttr(a).value for a in op.attributes["indexing_maps"]][:inputs]
    if all(iterators) or inputs < 2:
        return False
    words = [" ".join(map(str, m.results)) for m in maps]
    parallel = [f"d{d}" for d, is_parallel in enumerate(iterators) if is_parallel]
    return sum(any(not re.search(rf"\b{d}\b", w) for d in parallel) for w in words) > 1


def _keep_operands(op: ir.Operation) -> None:
    inputs = op.attributes["operandSegmentSizes"][0]
    with ir.InsertionPoint(op), op.location:
        for i in range(inputs):
            value = op.operands[i]
            if isinstance(value.type, ir.RankedTensorType):
                op.operands[i] = ir.Operation.create(KEEP, [value.type], [value]).result


def _limit_inputs(function: ir.Operation) -> None:
    """Keeps results in memory that would be computed from very many tensors where they are used, such as long sums."""
    sources: dict[ir.Value, set[ir.Value]] = {}  # a result -> what it is computed from, once all is fused
    for op in host_ops(function):
        if op.name != "linalg.generic":
            continue
        inputs = [v for v in list(op.operands)[: op.attributes["operandSegmentSizes"][0]]]
        mine = {v: sources.get(v, {v}) for v in inputs}
        while len(found := set().union(*mine.values())) > MOST_INPUTS:
            largest = max(mine, key=lambda v: len(mine[v]))
            if len(mine[largest]) == 1:
                break  # the op itself has so many
            with ir.InsertionPoint(op), op.location:
                kept = ir.Operation.create(KEEP, [largest.type], [largest]).result
            for i, value in enumerate(inputs):
                if value == largest:
                    op.operands[i] = kept
            mine[largest] = {largest}
        if "reduction" not in str(op.attributes["iterator_types"]):
            sources.update((result, found) for result in op.results)


def _copy_for_uses(op: ir.Operation) -> None:
    """Gives each use in another ``linalg.generic`` a copy of a cheap elementwise op."""
    if any("reduction" in str(a) for a in op.attributes["iterator_types"]) or len(op.results) != 1:
        return
    if any(_is_state(v) for v in op.operands) or list(list(op.regions[0].blocks[0].arguments)[-1].uses):
        return  # read again later, state could not be updated in place before
    uses = list(op.results[0].uses)
    steps = [v.operation.name for v in op.regions[0].blocks[0].operations]
    costly = sum(name.startswith(COSTLY) for name in steps)
    if len(uses) < 2 or len(steps) > CHEAP or costly:
        return
    for use in uses:
        user = use.owner.operation
        number = use.operand_number
        if user.name == "linalg.generic" and number < user.attributes["operandSegmentSizes"][0]:
            with ir.InsertionPoint(user):
                copy = op.clone()
            user.operands[number] = copy.results[0]


def _copy_for_results(op: ir.Operation) -> None:
    """Gives each op that adds to a filled tensor a filled tensor of its own, just before it; else the first would be copied."""
    uses = list(op.results[0].uses)
    for use in uses:
        user = use.owner.operation
        if user.name != "linalg.generic" or use.operand_number < user.attributes["operandSegmentSizes"][0]:
            continue
        if len(uses) > 1 or user.block != op.block:
            with ir.InsertionPoint(user):
                user.operands[use.operand_number] = op.clone().results[0]
        else:
            op.move_before(user)
    if not list(op.results[0].uses):
        op.erase()


def _is_state(value: ir.Value) -> bool:
    """Returns whether a tensor is, or is a view of, an argument that may be written."""
    while not isinstance(value.owner, ir.Block):
        if value.owner.operation.name not in VIEWS:
            return False
        value = value.owner.operation.operands[0]
    function = value.owner.owner.operation
    donated = {a.value for a in function.attributes.get("spikingbrain.donated", ())}
    return value in [a for i, a in enumerate(value.owner.arguments) if i in donated]
