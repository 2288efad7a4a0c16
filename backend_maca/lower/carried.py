"""Loops over tensors: what a step hands on goes to the memory that it came in, so that a loop has one buffer per value."""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import bufferization, tensor

from spikingbrain.backend_maca.lower.mlir import source_of
from spikingbrain.errors import UnsupportedOp

VIEWS = ("tensor.extract_slice", "tensor.expand_shape", "tensor.collapse_shape", "tensor.cast")


def keep_memory(op: ir.Operation) -> None:
    """Makes every tensor that a loop or branch yields be in a memory known before it."""
    if op.name == "scf.for":
        body = op.regions[0].blocks[0]
        _write_back(body, list(body.arguments)[1:])
    elif op.name == "scf.while":
        before, after = (region.blocks[0] for region in op.regions)
        _write_back(after, list(before.arguments), list(after.arguments), before)
    elif op.name == "scf.if":
        _share_result(op)


def _write_back(
    block: ir.Block,
    homes: list[ir.Value],
    arguments: list[ir.Value] | None = None,
    before: ir.Block | None = None,
) -> None:
    """Writes what a block yields into the tensors that it was given."""
    end = _last(block)
    if before is not None:
        # what the condition passes on must be what it was given, in order, for memory to be the same all along
        passed = list(_last(before).operands)[1:]
        tensors = [v for v in passed if isinstance(v.type, ir.RankedTensorType)]
        if tensors != [v for v in homes if isinstance(v.type, ir.RankedTensorType)]:
            raise UnsupportedOp(
                "a while loop whose condition changes tensors has no plan here", where=source_of(end.location)
            )
        of = dict(zip(passed, arguments or [], strict=True))
        homes = [of.get(v, v) for v in homes]
    moved = [
        (number, value, home)
        for number, (value, home) in enumerate(zip(end.operands, homes, strict=True))
        if isinstance(value.type, ir.RankedTensorType) and value != home and _memory_of(value) != home
    ]
    moved = [(number, _own(end, value), home) for number, value, home in moved]  # before any is overwritten
    for number, value, home in moved:
        end.operands[number] = _into(end, value, home)


def _share_result(op: ir.Operation) -> None:
    """Gives the branches of an ``scf.if`` one memory for every tensor that they yield."""
    for number, result in enumerate(op.results):
        if not isinstance(result.type, ir.RankedTensorType):
            continue
        kind = ir.RankedTensorType(result.type)
        if not kind.has_static_shape:
            raise UnsupportedOp(
                f"a branch that yields {kind}, whose size is not known before it, has no plan here",
                where=source_of(op.location),
            )
        with ir.InsertionPoint(op), op.location:
            home = tensor.empty(list(kind.shape), kind.element_type)
        for region in op.regions:
            end = _last(region.blocks[0])
            end.operands[number] = _into(end, end.operands[number], home)


def _own(end: ir.Operation, value: ir.Value) -> ir.Value:
    """Returns a value that shares no memory with what the block was given."""
    if not isinstance(value.owner, ir.Block) and value.owner.operation.name not in VIEWS:
        return value
    with ir.InsertionPoint(end), end.location:
        segments = {"operandSegmentSizes": ir.DenseI32ArrayAttr.get([0, 1, 0])}
        return ir.Operation.create("bufferization.alloc_tensor", [value.type], [value], segments).result


def _into(end: ir.Operation, value: ir.Value, home: ir.Value) -> ir.Value:
    with ir.InsertionPoint(end), end.location:
        return bufferization.materialize_in_destination(home.type, value, home)


def _memory_of(value: ir.Value) -> ir.Value:
    """Returns the tensor in whose memory a value is written by the ops that make it, as far as these tell."""
    while not isinstance(value.owner, ir.Block):
        op = value.owner.operation
        if op.name == "tensor.insert_slice":
            value = op.operands[1]
        elif op.name == "scf.for":
            value = op.operands[3 + list(op.results).index(value)]
        else:
            return value
    return value


def _last(block: ir.Block) -> ir.Operation:
    *_, last = block.operations
    return last.operation
