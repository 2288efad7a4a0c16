"""Small words for index arithmetic; each emits ops where the insertion point is."""

from __future__ import annotations

from collections.abc import Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, memref


def index(value: int) -> ir.Value:
    """Returns a constant."""
    return arith.constant(ir.IndexType.get(), value)


def size(buffer: ir.Value, axis: int) -> ir.Value:
    """Returns the size of an axis; canonicalization folds it where it is known."""
    return memref.dim(buffer, index(axis))


def product(sizes: Sequence[ir.Value]) -> ir.Value:
    """Returns the product of sizes, 1 of none."""
    total = index(1)
    for size in sizes:
        total = arith.muli(total, size)
    return total


def split(flat: ir.Value, sizes: Sequence[ir.Value]) -> list[ir.Value]:
    """Returns the row-major coordinates of a flat index."""
    coordinates: list[ir.Value] = []
    for axis, size in reversed(list(enumerate(sizes))):
        coordinates.insert(0, arith.remsi(flat, size) if axis else flat)
        flat = arith.divsi(flat, size) if axis else flat
    return coordinates


def negated(condition: ir.Value) -> ir.Value:
    """Returns whether a condition does not hold."""
    return arith.xori(condition, arith.constant(ir.IntegerType.get_signless(1), 1))


def less(a: ir.Value, b: ir.Value) -> ir.Value:
    """Returns whether a < b, signed."""
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)
