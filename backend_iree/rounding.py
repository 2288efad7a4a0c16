"""A workaround for roundings that IREE 3.13 drops: those to bf16, where the dispatch that rounds also computes with the result.

It computes in f32 what is written in bf16, and on the way takes ``extf(truncf(x))`` for x (``iree-convert-bf16-arith-to-f32``).
That suits arithmetic in bf16, which then rounds once at its end, but a conversion is a rounding that somebody asked for.
Can go when ``test_iree_still_needs_it`` of ``tests/unit/test_rounding.py`` fails.
"""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.backend_iree.narrowing import element_of, with_element
from spikingbrain.passes import torch_ir

# What hands a tensor on, and what only stores it or multiplies matrices with it: IREE begins a dispatch for a product.
_PASS_ON = ("tensor.", "linalg.broadcast", "linalg.transpose", "util.optimization_barrier", "flow.tensor.")
_PRODUCTS = ("batch_", "conv_", "depthwise_conv_", "dot", "mat", "mmt4d", "vecmat")
_KEEP = (
    *("func.return", "memref.store", "vector.store", "vector.transfer_write"),
    *(f"linalg.{name}" for name in _PRODUCTS),
)


def keep_roundings(module: ir.Module) -> int:
    """Writes as integer arithmetic each conversion to bf16 whose result is computed with again; returns how many.

    It costs a CPU no more than ``truncf``, which IREE expands in the same way, later.
    """
    found = [op for op in torch_ir.operations(module, "arith.truncf") if _is_needed(op)]
    for op in found:
        with ir.InsertionPoint(op), op.location:
            op.results[0].replace_all_uses_with(_rounded(op.operands[0], op.results[0].type))
        op.erase()
    return len(found)


def _is_needed(op: ir.Operation) -> bool:
    if torch_ir.defining(op.operands[0], "arith.constant"):
        return False
    return element_of(op.results[0].type) == ir.BF16Type.get() and _is_computed_with(op.results[0])


def _is_computed_with(value: ir.Value) -> bool:
    """Returns whether an op that may share a dispatch with the definition of ``value`` computes with it."""
    seen, waiting = {value}, [value]
    while waiting:
        for use in waiting.pop().uses:
            user, position = use.owner.operation, use.operand_number
            if user.name == "linalg.yield":
                reached = [user.parent.results[position]]
            elif user.name == "linalg.generic":
                reached = [user.regions[0].blocks[0].arguments[position]]
            elif user.name.startswith(_PASS_ON):
                reached = [v for v in user.results if element_of(v.type) == element_of(value.type)]
            elif user.name.startswith(_KEEP):
                reached = []
            else:
                return True
            waiting += [v for v in reached if v not in seen]
            seen.update(reached)
    return False


def _rounded(value: ir.Value, kind: ir.Type) -> ir.Value:
    """Emits the conversion of f32 or f64 to bf16: to nearest, ties to even, and every NaN to the same quiet one."""
    if element_of(value.type) == ir.F64Type.get():  # torch rounds twice as well
        value = arith.truncf(with_element(value.type, ir.F32Type.get()), value)
    i16, i32 = (ir.IntegerType.get_signless(n) for n in (16, 32))

    def constant(integer: ir.Type, number: int) -> ir.Value:
        type_, attribute = with_element(value.type, integer), ir.IntegerAttr.get(integer, number)
        if type_ != integer:
            attribute = ir.DenseElementsAttr.get_splat(type_, attribute)
        return arith.ConstantOp(type_, attribute).result

    width = constant(i32, 16)
    bits = arith.bitcast(with_element(value.type, i32), value)
    odd = arith.andi(arith.shrui(bits, width), constant(i32, 1))
    sum_ = arith.addi(bits, arith.addi(odd, constant(i32, 0x7FFF)))
    upper = arith.trunci(with_element(value.type, i16), arith.shrui(sum_, width))
    is_nan = arith.cmpf(arith.CmpFPredicate.UNO, value, value)
    return arith.bitcast(kind, arith.select(is_nan, constant(i16, 0x7FC0), upper))
