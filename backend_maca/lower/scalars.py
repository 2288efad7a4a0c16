"""Scalars of the device: what is computed from elements of tensors moves into the kernels that use it.

The host reads an element (``tensor.extract``) only where a size, a bound or a condition depends on it.
"""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg, tensor

from spikingbrain.backend_maca.lower.bodies import rename
from spikingbrain.backend_maca.lower.index import index
from spikingbrain.backend_maca.lower.mlir import nested


def sink_scalars(op: ir.Operation) -> None:
    """Rewrites an op on tensors so that it computes the scalars of the device that it takes."""
    if op.name == "tensor.from_elements":
        if len(op.operands):
            _compute(op, list(op.operands))
    elif op.name == "tensor.insert":
        _insert(op)
    elif op.name == "linalg.fill" and _on_device(op.operands[0]):
        _compute(op, [op.operands[0]], op.operands[1])
    elif op.name == "linalg.generic":
        inner = nested(op)
        for use in {v for o in inner for v in o.operands}:
            if not _inside(use, op) and _on_device(use):
                with ir.InsertionPoint.at_block_begin(op.regions[0].blocks[0]), op.location:
                    copy = _copied(use)
                for o in inner:
                    for i, value in enumerate(o.operands):
                        if value == use:
                            o.operands[i] = copy


def _insert(op: ir.Operation) -> None:
    """Makes the insertion of a scalar that of a tensor of one element."""
    scalar, target, *at = op.operands
    kind = ir.RankedTensorType(target.type)
    with ir.InsertionPoint(op), op.location:
        one = tensor.FromElementsOp(ir.RankedTensorType.get([1] * kind.rank, kind.element_type), [scalar])
        dynamic, ones = [ir.ShapedType.get_dynamic_size()] * kind.rank, [1] * kind.rank
        made = tensor.InsertSliceOp(one.result, target, at, [], [], dynamic, ones, ones).result
    op.results[0].replace_all_uses_with(made)
    op.erase()
    sink_scalars(one.operation)


def _compute(op: ir.Operation, scalars: list[ir.Value], target: ir.Value | None = None) -> None:
    """Replaces an op by a ``linalg.generic`` that writes scalars, in row-major order, or one everywhere."""
    kind = ir.RankedTensorType(op.results[0].type)
    identity = ir.AffineMapAttr.get(ir.AffineMap.get_identity(kind.rank))
    with ir.InsertionPoint(op), op.location:
        target = target if target is not None else tensor.empty(list(kind.shape), kind.element_type)
        parallel = ir.Attribute.parse("#linalg.iterator_type<parallel>")
        made = linalg.GenericOp(
            [kind], [], [target], ir.ArrayAttr.get([identity]), ir.ArrayAttr.get([parallel] * kind.rank)
        )
        block = made.regions[0].blocks.append(kind.element_type)
    with ir.InsertionPoint(block), op.location:
        value = _copied(scalars[-1])
        if len(scalars) > 1:
            flat = index(0)
            for axis in range(kind.rank):
                here = linalg.IndexOp(axis).result
                flat = arith.addi(arith.muli(flat, index(kind.shape[axis])), here)
            for number, scalar in list(enumerate(scalars))[-2::-1]:
                here = arith.cmpi(arith.CmpIPredicate.eq, flat, index(number))
                value = arith.select(here, _copied(scalar), value)
        linalg.YieldOp([value])
    op.results[0].replace_all_uses_with(made.results[0])
    op.erase()


def _inside(value: ir.Value, op: ir.Operation) -> bool:
    block = value.owner if isinstance(value.owner, ir.Block) else value.owner.operation.block
    while block is not None:
        around = block.owner.operation
        if around == op:
            return True
        block = around.block if around.parent is not None else None
    return False


def _on_device(value: ir.Value) -> bool:
    """Returns whether a scalar depends on an element of a tensor."""
    if isinstance(value.owner, ir.Block) or isinstance(value.type, ir.RankedTensorType):
        return False
    op = value.owner.operation
    return op.name == "tensor.extract" or (_pure(op) and any(map(_on_device, op.operands)))


def _pure(op: ir.Operation) -> bool:
    return str(op.name).startswith(("arith.", "math."))


def _copied(value: ir.Value) -> ir.Value:
    """Copies the ops here that compute a scalar from elements of tensors; others are used as they are."""
    if not _on_device(value):
        return value
    op = value.owner.operation
    known = {v: _copied(v) for v in op.operands}
    copy = op.clone().operation
    rename(copy, known)
    return copy.results[list(op.results).index(value)]
