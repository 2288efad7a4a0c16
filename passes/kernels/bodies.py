"""Scalar bodies, as ops with regions have them, on vectors."""

from __future__ import annotations

from collections.abc import Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, vector


def inlined(body: ir.Block, arguments: Sequence[ir.Value], lanes: int, wide: bool = False) -> list[ir.Value]:
    """Emits the ops of a body on vectors of ``lanes`` elements, or on scalars for 1; returns what it yields.

    ``wide``: half floats are computed as f32, arguments and results included, and rounded only where the body converts to them.
    """
    values = dict(zip(body.arguments, arguments, strict=True))
    *ops, terminator = [op.operation for op in body.operations]
    for op in ops:
        operands = [values[v] for v in op.operands]
        values.update(zip(op.results, _emitted(op, operands, lanes, wide), strict=True))
    return [values[v] for v in terminator.operands]


def _emitted(op: ir.Operation, operands: Sequence[ir.Value], lanes: int, wide: bool) -> list[ir.Value]:
    kinds = [r.type for r in op.results]
    if op.name == "arith.constant":
        kind, attribute = kinds[0], op.attributes["value"]
        if wide and is_half(kind):
            kind = ir.F32Type.get()
            attribute = ir.FloatAttr.get(kind, attribute.value)
        return [spread(arith.constant(kind, attribute), lanes)]
    if wide and op.name == "arith.extf" and is_half(op.operands[0].type):
        return [
            operands[0] if kinds[0] == ir.F32Type.get() else arith.extf(shaped(kinds[0], lanes), operands[0])
        ]
    if wide and op.name == "arith.truncf" and is_half(kinds[0]):
        return [widened(arith.truncf(shaped(kinds[0], lanes), operands[0]))]
    kinds = [ir.F32Type.get() if wide and is_half(kind) else kind for kind in kinds]
    attributes = {name: op.attributes[name] for name in op.attributes}
    made = ir.Operation.create(op.name, [shaped(kind, lanes) for kind in kinds], list(operands), attributes)
    return list(made.results)


def widened(value: ir.Value) -> ir.Value:
    """Returns half floats, one or a vector, as f32; others as they are."""
    if not isinstance(value.type, ir.VectorType):
        return arith.extf(ir.F32Type.get(), value) if is_half(value.type) else value
    kind = ir.VectorType(value.type)
    if not is_half(kind.element_type):
        return value
    return arith.extf(ir.VectorType.get(kind.shape, ir.F32Type.get()), value)


def is_half(kind: ir.Type) -> bool:
    return isinstance(kind, ir.F16Type | ir.BF16Type)


def shaped(element: ir.Type, lanes: int) -> ir.Type:
    """Returns the type of ``lanes`` elements."""
    return element if lanes == 1 else ir.VectorType.get([lanes], element)


def spread(value: ir.Value, lanes: int) -> ir.Value:
    """Returns a scalar in all lanes."""
    return value if lanes == 1 else vector.broadcast(ir.VectorType.get([lanes], value.type), value)
