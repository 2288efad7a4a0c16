"""Transpositions and reversals of time next to a loop, which a scan's maps can say as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch_mlir import ir

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.scan_axes import GENERIC, TRANSPOSE


@dataclass(frozen=True)
class End:
    """A tensor that a scan reads or writes: where (t, space) lie in it, and whether time runs from its end."""

    value: ir.Value
    place: list[int | None]
    backwards: bool


def follow_source(end: End, rank: int) -> End:
    """Returns the tensor that a scanned one is a transposition or reversal of, as far back as the scan can read it."""
    while (op := torch_ir.defining(end.value)) is not None:
        source = op.operands[0] if op.operands else None
        if op.name == TRANSPOSE:
            place: list[int | None] = [None] * len(end.place)
            for axis, of in enumerate(ir.DenseI64ArrayAttr(op.attributes["permutation"])):
                place[of] = end.place[axis]
            if not _has_last(place, rank):
                break
            end = End(source, place, end.backwards)
        elif reverses(op, end.place.index(0)):
            end = End(source, end.place, not end.backwards)
        else:
            break
    return end


def follow_result(end: End, rank: int, size: Callable[[int], ir.Value]) -> End:
    """Returns the tensor that a stacked one is only read as, where that is a transposition or reversal of it.

    Questions for sizes of what is passed by are answered by ``size``, which knows those of (t, space).
    """
    while True:
        users = {use.owner.operation for use in end.value.uses}
        asking = [u for u in users if u.name == "tensor.dim"]
        others = [_outermost(u, end.value) for u in users if u.name != "tensor.dim"]
        if not others or any(o != others[0] for o in others):
            return end
        op = others[0]
        if op.name == TRANSPOSE and op.operands[0] == end.value:
            order = list(ir.DenseI64ArrayAttr(op.attributes["permutation"]))
            following = End(op.results[0], [end.place[of] for of in order], end.backwards)
            if not _has_last(following.place, rank):
                return end
        elif reverses(op, end.place.index(0)):
            following = End(op.results[0], end.place, not end.backwards)
        else:
            return end
        axes = [torch_ir.defining(question.operands[1], "arith.constant") for question in asking]
        if any(axis is None for axis in axes):
            return end
        for question, axis in zip(asking, axes, strict=True):
            assert axis is not None
            dim = end.place[axis.attributes["value"].value]
            question.results[0].replace_all_uses_with(build.constant_index(1) if dim is None else size(dim))
            question.erase()
        end = following


def erase_passed(end: End, start: ir.Operation) -> None:
    """Erases the ops that ``follow_result`` passed by on its way from ``start``, last first; nothing may read them."""
    op = end.value.owner.operation
    while op != start:
        source = op.operands[0].owner.operation
        op.erase()
        op = source


def reverses(op: ir.Operation, axis: int) -> bool:
    """Returns whether ``op`` is torch-mlir's form of ``flip`` along ``axis`` alone: it gathers from its source."""
    if op.name != GENERIC or len(op.results) != 1 or len(op.operands) != 2:
        return False
    source = op.operands[0]
    *ops, terminator = [o.operation for o in op.regions[0].blocks[0].operations]
    taken = torch_ir.defining(terminator.operands[0], "tensor.extract")
    if taken is None or taken.operands[0] != source:
        return False
    names = {o.name for o in ops}
    if not names <= {"linalg.index", "arith.subi", "tensor.extract", "arith.constant"}:
        return False
    for i, index in enumerate(list(taken.operands)[1:]):
        position = index
        if i == axis:
            turned = torch_ir.defining(index, "arith.subi")
            if turned is None or not _is_last(turned.operands[0], source, axis):
                return False
            position = turned.operands[1]
        here = torch_ir.defining(position, "linalg.index")
        if here is None or here.attributes["dim"].value != i:
            return False
    return True


def _is_last(value: ir.Value, source: ir.Value, axis: int) -> bool:
    """Returns whether an index is the last one of ``source`` along ``axis``."""
    op = torch_ir.defining(value)
    size = ir.RankedTensorType(source.type).shape[axis]
    if op is None:
        return False
    if op.name == "arith.constant":
        return bool(op.attributes["value"].value == size - 1)
    # The size itself may have been traced to where the source came from; nothing but flip subtracts a position.
    one = torch_ir.defining(op.operands[1], "arith.constant") if op.name == "arith.subi" else None
    return one is not None and one.attributes["value"].value == 1


def _has_last(place: list[int | None], rank: int) -> bool:
    """Returns whether the last axis of the space is still the last: kernels read along it."""
    used = [p for p in place if p is not None]
    return rank not in used or used[-1] == rank


def _outermost(op: ir.Operation, value: ir.Value) -> ir.Operation:
    """Returns the op around ``op`` in the block where ``value`` is made."""
    block = value.owner.operation.block
    while op.block != block:
        op = op.parent.operation
    return op
