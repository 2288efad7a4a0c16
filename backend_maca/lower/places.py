"""Where in memory an op works: sizes as symbols, the buffer behind a view, and what one row of an op touches.

A row is one combination of the outermost loops. Memory is row-major, so a buffer whose outermost axes have as many
elements as there are rows has one stretch for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_mlir import ir

from spikingbrain.backend_maca.lower.mlir import constant

DYNAMIC = ir.ShapedType.get_dynamic_size()


@dataclass(frozen=True)
class Count:
    """A product of a number and sizes that are known at run time."""

    number: int = 1
    symbols: tuple[tuple[int, int], ...] = ()

    def __mul__(self, other: Count) -> Count:
        return Count(self.number * other.number, tuple(sorted(self.symbols + other.symbols)))

    @property
    def static(self) -> bool:
        return not self.symbols


def size_of(buffer: ir.Value, axis: int) -> Count:
    """Returns the size of an axis of a buffer; sizes that come from one place are equal."""
    kind = ir.MemRefType(buffer.type)
    if kind.shape[axis] != DYNAMIC:
        return Count(kind.shape[axis])
    op = None if isinstance(buffer.owner, ir.Block) else buffer.owner.operation
    before = sum(size == DYNAMIC for size in list(kind.shape)[:axis])
    if op is not None and op.name == "memref.alloc":
        return _value(op.operands[before])
    if op is not None and op.name == "memref.expand_shape":
        return _value(op.operands[1 + before])
    if op is not None and op.name == "memref.cast":
        return size_of(op.operands[0], axis)
    if op is not None and op.name == "memref.collapse_shape":
        total = Count()
        for inner in op.attributes["reassociation"][axis]:
            total = total * size_of(op.operands[0], inner.value)
        return total
    if op is not None and op.name == "memref.subview":
        _, offsets, _, _ = op.attributes["operandSegmentSizes"]
        return _value(op.operands[1 + offsets + before])
    return Count(1, ((hash(buffer), axis),))


def _value(value: ir.Value) -> Count:
    number = constant(value)
    if number is not None:
        return Count(int(number))
    op = None if isinstance(value.owner, ir.Block) else value.owner.operation
    if op is not None and op.name == "memref.dim":
        axis = constant(op.operands[1])
        if axis is not None:
            return size_of(op.operands[0], int(axis))
    if op is not None and op.name == "arith.muli":
        return _value(op.operands[0]) * _value(op.operands[1])
    return Count(1, ((hash(value), -1),))


def root(buffer: ir.Value) -> ir.Value:
    """Returns the buffer that a view looks at."""
    while not isinstance(buffer.owner, ir.Block) and buffer.owner.operation.name in (
        "memref.expand_shape",
        "memref.collapse_shape",
        "memref.cast",
        "memref.subview",
    ):
        buffer = buffer.owner.operation.operands[0]
    return buffer


def rows_are_whole(buffer: ir.Value, rows: Count) -> bool:
    """Returns whether the rows of a view are those of its buffer: no view on the way cuts through the axes of rows."""
    while root(buffer) != buffer:
        op = buffer.owner.operation
        source = op.operands[0]
        if op.name == "memref.subview" and not _covers(source, _first_cut(op), rows):
            return False
        buffer = source
    return True


def _first_cut(op: ir.Operation) -> int:
    """Returns the first axis of a subview's source that it does not take whole."""
    source = ir.MemRefType(op.operands[0].type)
    offsets, sizes = (
        list(ir.DenseI64ArrayAttr(op.attributes[n])) for n in ("static_offsets", "static_sizes")
    )
    _, offsets_count, _, _ = op.attributes["operandSegmentSizes"]
    given = iter(list(op.operands)[1 + offsets_count :])
    for axis in range(source.rank):
        size = _value(next(given)) if sizes[axis] == DYNAMIC else Count(sizes[axis])
        if offsets[axis] != 0 or size != size_of(op.operands[0], axis):
            return axis
    return int(source.rank)


def _covers(buffer: ir.Value, end: int, rows: Count) -> bool:
    """Returns whether some of the axes before ``end`` have exactly as many elements as there are rows."""
    total = Count()
    if total == rows:
        return True
    for axis in range(end):
        total = total * size_of(buffer, axis)
        if total == rows:
            return True
    return False


def stays_in_row(
    buffer: ir.Value, access: ir.AffineMap, loops: Sequence[Count], outer: int, rows: Count
) -> bool:
    """Returns whether an op, in a row of its ``outer`` loops, touches that row of a buffer only."""
    if rows == Count():
        return True
    if not rows_are_whole(buffer, rows):
        return False
    wanted = [d for d in range(outer) if loops[d] != Count()]
    found, total = [], Count()
    for axis, expression in enumerate(access.results):
        if total == rows:
            break
        size = size_of(buffer, axis)
        total = total * size
        if size == Count():
            continue
        if not isinstance(expression, ir.AffineDimExpr):
            return False
        found.append(ir.AffineDimExpr(expression).position)
    return total == rows and found == wanted
