"""Matrix products by the vendor's library: which ones, and the call that stands for one between kernels.

A large product is a call of mcblas, a small one a kernel. The library counts in columns: the row-major result
``C = A B`` is its column-major ``C^T = B^T A^T``, so a call names B first. What a call needs travels in an op of
its own, ``maca.product``, until the plan takes it:

    "maca.product"(%a, %b, %c, %m, %n, %k, %batch) {transposed = [false, true], batched = [true, false], adds = false}
        : (memref<..>, memref<..>, memref<..>, index, index, index, index) -> ()

is ``c[i, m, n] = sum_k a[i, m, k] * b[n, k]``: the second operand is stored with its columns first, and every matrix
of the batch uses the same one. It runs where no size but ``k`` is 0. Integer products are exact, modulo 2**32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import TypeAlias

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.backend_maca.lower.generic import Generic
from spikingbrain.backend_maca.lower.index import index, product, size

Length: TypeAlias = "int | ir.Value"
PRODUCT = "maca.product"
FEW_ROWS = 16  # up to here a product is bound by reading the weight: a kernel's lanes share its rows
FEW_COLUMNS = 16  # the width of a matrix instruction; also keeps vectors times matrices with the kernels

# (type of the operands, type of the result) -> ops that the body of a product has, conversions left out.
TYPES = {
    ("f32", "f32"): ("arith.mulf", "arith.addf"),
    ("f16", "f16"): ("arith.mulf", "arith.addf"),
    ("bf16", "bf16"): ("arith.mulf", "arith.addf"),
    ("f16", "f32"): ("arith.mulf", "arith.addf"),
    ("bf16", "f32"): ("arith.mulf", "arith.addf"),
    ("i8", "i32"): ("arith.muli", "arith.addi"),
}
CONVERSIONS = ("arith.extf", "arith.extsi")


@dataclass(frozen=True)
class Product:
    """A product of two operands: whether each is transposed (columns first) and has a batch axis, and the sizes."""

    operands: tuple[ir.Value, ir.Value]
    result: ir.Value
    transposed: tuple[bool, bool]
    batched: tuple[bool, bool]
    rows: Length
    columns: Length
    inner: Length
    batch: Length

    def is_large(self) -> bool | ir.Value:
        """Returns whether both sides of the result are larger than what a kernel is best at; emitted where it depends."""
        sides = ((self.rows, FEW_ROWS), (self.columns, FEW_COLUMNS))
        known = [length > few for length, few in sides if isinstance(length, int)]
        if not all(known):
            return False
        unknown = [(length, few) for length, few in sides if not isinstance(length, int)]
        larger = [arith.cmpi(arith.CmpIPredicate.sgt, length, index(few)) for length, few in unknown]
        return reduce(arith.andi, larger) if larger else True

    def has_form(self) -> bool:
        """Tells whether the library takes it: rows in memory are of a multiple of 4 bytes for integers."""
        if str(self.result.type.element_type) != "i32":
            return True
        stored = [self.rows if t else self.inner for t in self.transposed[:1]]
        stored += [self.inner if t else self.columns for t in self.transposed[1:]]
        return all(isinstance(length, int) and length % 4 == 0 for length in [*stored, self.columns])

    def emit(self, runs: bool | ir.Value, *, adds: bool) -> None:
        """Emits the call, for no rows at all where ``runs`` does not hold; ``adds`` adds to what the result holds."""
        rows, columns, inner, batch = (
            index(n) if isinstance(n, int) else n for n in (self.rows, self.columns, self.inner, self.batch)
        )
        if not isinstance(runs, bool):
            rows = arith.select(runs, rows, index(0))
        flags = [
            ir.ArrayAttr.get([ir.BoolAttr.get(f) for f in pair]) for pair in (self.transposed, self.batched)
        ]
        ir.Operation.create(
            PRODUCT,
            [],
            [*self.operands, self.result, rows, columns, inner, batch],
            {"transposed": flags[0], "batched": flags[1], "adds": ir.BoolAttr.get(adds)},
        )


def of_generic(generic: Generic) -> Product | None:
    """Reads a linalg op as a matrix product; None where it is none, or where its memory is no stack of matrices."""
    if len(generic.operands) != 3 or not _multiplies(generic):
        return None
    if any(not _is_contiguous(v) for v in generic.operands):
        return None
    axes = [found for found in map(_axes, generic.maps) if found is not None]
    if len(axes) != 3:
        return None
    a, b, c = axes
    loops = range(len(generic.parallel))
    if any(generic.parallel[i] != (i in c) for i in loops):
        return None
    batch = [i for i in c if i in a and i in b]
    inner = [i for i in a if i in b and i not in c]
    rows, columns = [i for i in c if i in a and i not in b], [i for i in c if i in b and i not in a]
    if sorted([*batch, *inner, *rows, *columns]) != list(loops) or not rows or not columns:
        return None
    operands = generic.operands
    if c != [*batch, *rows, *columns]:
        if c != [*batch, *columns, *rows]:
            return None
        a, b, rows, columns, operands = b, a, columns, rows, [operands[1], operands[0], operands[2]]
    first, second = _order(a, batch, rows, inner), _order(b, batch, inner, columns)
    if first is None or second is None:
        return None
    lengths = [_length(*place[0]) for place in generic.places]
    sizes = [_together([lengths[i] for i in group]) for group in (rows, columns, inner, batch)]
    flags = (bool(batch), bool(batch))
    return Product((operands[0], operands[1]), operands[2], (first, second), flags, *sizes)


def of_launch(op: ir.Operation, inputs: Sequence[ir.Value], result: ir.Value) -> Product:
    """Returns the product ``x w^T`` that a launch of a projection computes."""
    x, weight = inputs[:2]
    rows, columns, inner = _length(x, 0), _length(weight, 0), _length(x, 1)
    return Product((x, weight), result, (False, True), (False, False), rows, columns, inner, 1)


def _length(buffer: ir.Value, axis: int) -> Length:
    known = buffer.type.shape[axis]
    return size(buffer, axis) if known == ir.ShapedType.get_dynamic_size() else known


def _together(lengths: Sequence[Length]) -> Length:
    known = prod(n for n in lengths if isinstance(n, int))
    unknown = [n for n in lengths if not isinstance(n, int)]
    return product([*unknown, index(known)]) if unknown else known


def _axes(affine_map: ir.AffineMap) -> list[int] | None:
    """Returns the loops that index an operand, in order; None where an index is more than a loop's number."""
    if not all(isinstance(e, ir.AffineDimExpr) for e in affine_map.results):
        return None
    return [ir.AffineDimExpr(e).position for e in affine_map.results]


def _order(axes: list[int], batch: list[int], first: list[int], last: list[int]) -> bool | None:
    """Returns whether an operand has its axes the other way round; None where they are mixed."""
    if axes == [*batch, *first, *last]:
        return False
    return True if axes == [*batch, *last, *first] else None


def _is_contiguous(value: ir.Value) -> bool:
    kind = value.type
    return isinstance(kind, ir.MemRefType) and kind.affine_map == ir.AffineMap.get_identity(kind.rank)


def _multiplies(generic: Generic) -> bool:
    """Tells whether the body is ``c + a * b`` in types that the library has."""
    a, b, c = (v.type.element_type if isinstance(v.type, ir.MemRefType) else None for v in generic.operands)
    wanted = TYPES.get((str(a), str(c)))
    if a != b or wanted is None:
        return False
    *_, total = generic.terminator.operands
    add, accumulator = total.owner, list(generic.body.arguments)[2]
    if isinstance(add, ir.Block) or add.name != wanted[1] or accumulator not in list(add.operands):
        return False
    (other,) = [v for v in add.operands if v != accumulator] or [None]
    if other is None or isinstance(other.owner, ir.Block) or other.owner.name != wanted[0]:
        return False
    factors = {_unconverted(v) for v in other.owner.operands}
    return factors == set(list(generic.body.arguments)[:2])


def _unconverted(value: ir.Value) -> ir.Value:
    while not isinstance(value.owner, ir.Block) and value.owner.name in CONVERSIONS:
        value = value.owner.operands[0]
    return value
