"""Sorts: an order of NaN that torch-mlir lacks, and two workarounds for IREE 3.13.

IREE writes over what others read, and takes memory of unknown size from the stack.
"""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir

_DESCENDING = (
    arith.CmpFPredicate.OGE,
    arith.CmpFPredicate.OGT,
    arith.CmpFPredicate.UGE,
    arith.CmpFPredicate.UGT,
)


def order_nan(module: ir.Module) -> int:
    """Lets sorts of floats take NaN for the largest number, as torch does; returns how many.

    torch-mlir compares alone, so that NaN stays about where it is and stops what should pass it
    (``tests/unit/test_iree_sorts.py`` fails when this can go). What is equal keeps its order: both NaN are in order.
    """
    count = 0
    for op in torch_ir.operations(module, "tm_tensor.sort"):
        block = op.regions[0].blocks[0]
        *_, ends = block.operations
        for compare in [o.operation for o in block.operations if o.operation.name == "arith.cmpf"]:
            first, second = compare.operands
            descends = arith.CmpFPredicate(compare.attributes["predicate"].value) in _DESCENDING
            later = first if descends else second
            with ir.InsertionPoint(ends), op.location:
                is_nan = arith.cmpf(arith.CmpFPredicate.UNO, later, later)
                either = arith.ori(compare.result, is_nan)
            compare.result.replace_all_uses_except(either, either.owner.operation)
            count += 1
    return count


def own_sort_operands(module: ir.Module) -> int:
    """Lets each sort read copies that are nobody else's; returns how many.

    IREE sorts in place. A tensor that is also read elsewhere it should copy first and does not: of ``y = x + 1; y.sort();
    y * 2`` the last reads sorted numbers, and of two ``topk`` the second begins with the first one's permutation, since
    both share one ``0, 1, 2, ...`` (``tests/unit/test_iree_sorts.py`` fails when this can go). A copy that could be
    seen through would be removed, so it selects by a truth that IREE does not know.
    """
    count = 0
    for op in torch_ir.operations(module, "tm_tensor.sort"):
        with ir.InsertionPoint(op), op.location:
            for i, value in enumerate(list(op.operands)):
                op.operands[i] = _copy(value)
                count += 1
    return count


def keep_sort_results(module: ir.Module) -> int:
    """Lets something read each result of a sort; returns how many nothing had read.

    What nothing reads, such as the values of an ``argsort``, IREE keeps on the stack of the sort's loop, and for an axis of
    unknown length it then stops: "exceeded stack allocation limit" (``tests/unit/test_iree_sorts.py`` fails when this can go).
    """
    count = 0
    for op in torch_ir.operations(module, "tm_tensor.sort"):
        for result in op.results:
            if not list(result.uses) and not ir.RankedTensorType(result.type).has_static_shape:
                with ir.InsertionPoint.after(op), op.location:
                    ir.Operation.create("util.optimization_barrier", [result.type], [result])
                count += 1
    return count


def _copy(value: ir.Value) -> ir.Value:
    type_ = ir.RankedTensorType(value.type)
    boolean = ir.IntegerType.get_signless(1)
    true = arith.constant(boolean, ir.IntegerAttr.get(boolean, 1))
    unknown = ir.Operation.create("util.optimization_barrier", [boolean], [true]).result
    is_float = isinstance(type_.element_type, ir.FloatType)
    attribute = (ir.FloatAttr if is_float else ir.IntegerAttr).get(type_.element_type, 0)
    zero = arith.constant(type_.element_type, attribute)
    same = ir.AffineMap.get_identity(type_.rank)
    empty = build.empty(type_, build.dynamic_sizes(value))
    loops = ["parallel"] * type_.rank
    return build.generic([value], empty, [same, same], loops, lambda x, _: arith.select(unknown, x, zero))
