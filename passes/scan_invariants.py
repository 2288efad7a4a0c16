"""What does not change from step to step leaves the body of a loop over time."""

from __future__ import annotations

import functools

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.scan_axes import CONSTANT, EMPTY, is_inside

_KEPT = ("spikingbrain_control.yield",)


def hoist(loop: ir.Operation) -> None:
    """Moves ops of the body that read nothing of the loop in front of it; sizes of its tensors count as known outside."""
    block = loop.regions[0].blocks[0]
    for op in [o.operation for o in block.operations]:
        if op.name == "tensor.dim" and is_inside(op.operands[0], block):
            axis = torch_ir.defining(op.operands[1], CONSTANT)
            with ir.InsertionPoint(loop), op.location:
                size = axis and outer_size(op.operands[0], axis.attributes["value"].value, loop)
            if size:
                op.results[0].replace_all_uses_with(size)
                op.erase()
            continue
        if op.name not in _KEPT and not _reads(op, block):
            op.move_before(loop)


def unstack(loop: ir.Operation) -> ir.Operation:
    """Returns the loop without stacks of what is the same at every step, which are broadcast instead."""
    block, carried = loop.regions[0].blocks[0], loop.attributes["carried"].value
    terminator = block.operations[len(block.operations) - 1].operation
    yielded, results = list(terminator.operands), list(loop.results)
    kept = [i for i, v in enumerate(yielded) if i < carried or is_inside(v, block)]
    if len(kept) == len(yielded):
        return loop
    with ir.InsertionPoint(loop), loop.location:
        attributes = {n: loop.attributes[n] for n in loop.attributes}
        types = [results[i].type for i in kept]
        made = ir.Operation.create(loop.name, types, list(loop.operands), attributes, regions=1)
        block.append_to(made.regions[0])
        with ir.InsertionPoint(terminator), terminator.location:
            ir.Operation.create(terminator.name, operands=[yielded[i] for i in kept])
        terminator.erase()
        for i, value in enumerate(yielded):
            if i not in kept:
                results[i].replace_all_uses_with(_repeated(value, results[i].type, loop.operands[carried]))
    for i, new in zip(kept, made.results, strict=True):
        results[i].replace_all_uses_with(new)
    loop.erase()
    return made


def _repeated(value: ir.Value, type_: ir.Type, scanned: ir.Value) -> ir.Value:
    """Emits a stack of as many times ``value`` as a scanned tensor is long."""
    sizes = [build.size(scanned, 0)] if ir.RankedTensorType(type_).shape[0] < 0 else []
    out = build.empty(type_, [*sizes, *build.dynamic_sizes(value)])
    rank = len(ir.RankedTensorType(type_).shape)
    source = ir.AffineMap.get(rank, 0, [ir.AffineDimExpr.get(d) for d in range(1, rank)])
    maps = [source, ir.AffineMap.get_identity(rank)]
    return build.generic([value], out, maps, ["parallel"] * rank, lambda x, _: x)


def _reads(op: ir.Operation, block: ir.Block) -> bool:
    """Returns whether an op, or one within it, uses a value of ``block``."""
    found = False

    def visit(inner: ir.Operation) -> ir.WalkResult:
        nonlocal found
        found = found or any(is_inside(v, block) for v in inner.operands)
        return ir.WalkResult.INTERRUPT if found else ir.WalkResult.ADVANCE

    op.walk(visit)
    return found


def outer_size(value: ir.Value, axis: int, loop: ir.Operation) -> ir.Value | None:
    """Emits a size of a body's tensor in front of the loop; None where it follows from nothing there."""
    block = loop.regions[0].blocks[0]
    if not is_inside(value, block):
        return build.size(value, axis)
    n = ir.RankedTensorType(value.type).shape[axis]
    if n != ir.ShapedType.get_dynamic_size():
        return build.constant_index(n)
    if isinstance(value.owner, ir.Block):
        number = ir.BlockArgument(value).arg_number
        time = int(number >= loop.attributes["carried"].value)
        return build.size(loop.operands[number], axis + time)
    op = value.owner.operation
    if op.name.startswith("linalg."):
        number = list(op.results).index(value)
        return outer_size(op.operands[len(op.operands) - len(op.results) + number], axis, loop)
    if op.name in (EMPTY, "tensor.expand_shape"):
        sizes = list(op.operands)[op.name != EMPTY :]
        size = sizes[sum(n < 0 for n in ir.RankedTensorType(value.type).shape[:axis])]
        return None if is_inside(size, block) else size
    if op.name == "tensor.collapse_shape":
        group = [a.value for a in op.attributes["reassociation"][axis]]
        factors = [outer_size(op.operands[0], a, loop) for a in group]
        return None if None in factors else functools.reduce(arith.muli, factors)
    if op.name == "tensor.cast" or op.name.startswith(("arith.", "math.")):
        return outer_size(op.operands[0], axis, loop)
    if op.name == "tensor.insert_slice":
        return outer_size(op.operands[1], axis, loop)
    if op.name == "spikingbrain.linear" and axis + 1 < len(ir.RankedTensorType(value.type).shape):
        return outer_size(op.operands[0], axis, loop)
    return None
