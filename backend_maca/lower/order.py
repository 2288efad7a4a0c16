"""The order that a ``tm_tensor.sort`` asks for, made strict: which of two elements surely comes first."""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.backend_maca.lower.bodies import copy_body

# Comparisons that say "comes first"; a second element that is NaN comes last, or first.
_ASCENDING = ("olt", "ole", "ult", "ule")
_DESCENDING = ("ogt", "oge", "ugt", "uge")
_PREDICATES = {str(int(p)): p.name.lower() for p in arith.CmpFPredicate}


def true() -> ir.Value:
    """Returns the truth value, of one bit."""
    return arith.constant(ir.IntegerType.get_signless(1), 1)


def looked_at(op: ir.Operation) -> list[bool]:
    """Returns for each operand of a sort whether the order depends on it."""
    arguments = list(op.regions[0].blocks[0].arguments)
    return [any(list(a.uses) for a in arguments[2 * i : 2 * i + 2]) for i in range(len(op.operands))]


def comes_before(op: ir.Operation, a: list[ir.Value | None], b: list[ir.Value | None]) -> ir.Value:
    """Returns whether a surely comes before b; of equals neither does."""
    block = op.regions[0].blocks[0]
    compare = block.operations[0].operation
    if compare.name == "arith.cmpf" and len(block.operations) == 2:
        predicate = _PREDICATES[str(ir.IntegerAttr(compare.attributes["predicate"]).value)]
        number = (
            list(block.arguments).index(compare.operands[0])
            if compare.operands[0] in list(block.arguments)
            else -1
        )
        swapped = number % 2 == 1
        if number >= 0 and predicate in _ASCENDING + _DESCENDING:
            x, y = a[number // 2], b[number // 2]
            descending = (predicate in _DESCENDING) != swapped
            p = arith.CmpFPredicate
            if descending:
                return arith.andi(arith.cmpf(p.UGT, x, y), arith.cmpf(p.ORD, y, y))
            return arith.andi(arith.cmpf(p.ULT, x, y), arith.cmpf(p.ORD, x, x))
    one = copy_body(block, [v for pair in zip(a, b, strict=True) for v in pair])[0]
    other = copy_body(block, [v for pair in zip(b, a, strict=True) for v in pair])[0]
    return arith.andi(one, arith.xori(other, true()))
