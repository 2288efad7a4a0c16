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
            for size in found.get("tensor.dim", []):
                _bound(size, (1 << _BITS // most) - 1)


def _most_dynamic_sizes(loop: ir.Operation) -> int:
    """Returns how many dynamic sizes a tensor has that the loop carries beside others."""
    carried = [ir.RankedTensorType(v.type) for v in loop.results if isinstance(v.type, ir.RankedTensorType)]
    return max((sum(n < 0 for n in t.shape) for t in carried), default=0) if len(carried) > 1 else 0


def _bound(size: ir.Operation, largest: int) -> None:
    users = list(size.results[0].uses)
    with ir.InsertionPoint(size), size.location:
        limit = arith.ConstantOp(ir.IndexType.get(), largest).result
        stated = ir.Operation.create(
            "util.assume.int",
            [size.results[0].type],
            [size.results[0]],
            {"assumptions": ir.Attribute.parse(f"[[#util.int.assumption<umin = 0, umax = {largest}>]]")},
        )
        inside = arith.cmpi(arith.CmpIPredicate.ule, size.results[0], limit)
        check = cf.AssertOp(inside, f"a size is larger than {largest}")
    stated.move_after(size)
    limit.owner.move_before(size)
    inside.owner.move_after(size)
    check.operation.move_after(inside.owner)
    for use in users:
        use.owner.operands[use.operand_number] = stated.result
