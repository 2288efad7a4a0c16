"""A workaround for a conversion that IREE 3.13 computes wrongly: f64 to f16, which takes results below 6.1e-5 for zero.

Processors have no such instruction; code calls a function that IREE links in, and that function knows no denormal numbers.
Can go when ``test_iree_still_needs_it`` of ``tests/unit/test_narrowing.py`` fails.
"""

from __future__ import annotations

from torch_mlir import ir

from spikingbrain.passes import torch_ir


def narrow_by_f32(module: ir.Module) -> int:
    """Makes each conversion from f64 to f16 go by way of f32, as torch's does; returns how many there were."""
    found = 0
    for op in torch_ir.operations(module, "arith.truncf"):
        source, result = op.operands[0], op.results[0]
        if not (element_of(source.type) == ir.F64Type.get() and element_of(result.type) == ir.F16Type.get()):
            continue
        found += 1
        with ir.InsertionPoint(op), op.location:
            between = ir.Operation.create(
                "arith.truncf", [with_element(source.type, ir.F32Type.get())], [source]
            )
        op.operands[0] = between.result
    return found


def element_of(kind: ir.Type) -> ir.Type:
    """Returns the type of the elements of a vector or tensor type; any other type is its own."""
    return ir.ShapedType(kind).element_type if isinstance(kind, ir.ShapedType) else kind


def with_element(kind: ir.Type, element: ir.Type) -> ir.Type:
    """Returns a scalar, vector or tensor type like ``kind`` with other elements."""
    if isinstance(kind, ir.VectorType):
        return ir.VectorType.get(kind.shape, element)
    return ir.RankedTensorType.get(kind.shape, element) if isinstance(kind, ir.RankedTensorType) else element
