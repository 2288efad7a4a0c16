"""Bounds the sizes of what loops carry; without, IREE 3.13 computes loops over tensors of two dynamic sizes wrongly.

What an iteration returns lies in one block of memory. The places in it are sums of sizes, rounded up by ``util.align``, whose
range the pass optimize-int-arithmetic does not know where a product of sizes might overflow; it then takes the place in the
first iteration, 0, for that in all. Can go when ``test_places_of_carried_tensors`` passes without this module.
"""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith, cf

# Bits of all sizes of a tensor together, elements of 16 bytes and the sum of some tensors being left out of 63.
_BITS = 56
_MADE_OF_SIZES = ("tensor.empty", "tensor.expand_shape")


def bound_sizes(module: ir.Module) -> None:
    """Rewrites functions with such loops in place: the sizes in them are checked, and stated to be within bounds."""
    for function in list(module.body.operations):
        found: dict[str, list[ir.Operation]] = {}

        def collect(op: ir.Operation, found: dict[str, list[ir.Operation]] = found) -> ir.WalkResult:
            found.setdefault(op.name, []).append(op.operation)
            return ir.WalkResult.ADVANCE

        function.operation.walk(collect)
        most = max(map(_most_dynamic_sizes, found.get("scf.for", [])), default=0)
        if most > 1:
            sizes = {op.results[0]: None for op in found.get("tensor.dim", [])}
            for name in _MADE_OF_SIZES:
                sizes.update(dict.fromkeys(v for op in found.get(name, []) for v in op.operands))
            for size in sizes:
                if isinstance(size.type, ir.IndexType) and not isinstance(size.owner, ir.Block):
                    _bound(size, (1 << _BITS // most) - 1)


def _most_dynamic_sizes(loop: ir.Operation) -> int:
    """Returns how many dynamic sizes a tensor has that the loop carries beside others."""
    carried = [ir.RankedTensorType(v.type) for v in loop.results if isinstance(v.type, ir.RankedTensorType)]
    return max((sum(n < 0 for n in t.shape) for t in carried), default=0) if len(carried) > 1 else 0


def _bound(size: ir.Value, largest: int) -> None:
    """States behind the definition of a size how large it is, for all its users, and checks it."""
    definition = size.owner.operation
    if definition.name == "arith.constant":
        return
    users = list(size.uses)
    with ir.InsertionPoint(definition), definition.location:
        limit = arith.ConstantOp(ir.IndexType.get(), largest).operation
        inside = arith.CmpIOp(arith.CmpIPredicate.ule, size, limit.result).operation
        check = cf.AssertOp(inside.result, f"a size is larger than {largest}").operation
        bounds = ir.Attribute.parse(f"[[#util.int.assumption<umin = 0, umax = {largest}>]]")
        stated = ir.Operation.create("util.assume.int", [size.type], [size], {"assumptions": bounds})
    last = definition
    for op in (limit, inside, check, stated):
        op.move_after(last)
        last = op
    for use in users:
        use.owner.operands[use.operand_number] = stated.result
