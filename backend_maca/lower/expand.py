"""Ops without a form in MACA C++ in terms of those that have one; upstream expands the others."""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.backend_maca.lower.mlir import nested


def expand(module: ir.Module) -> None:
    """Replaces ``math.absi``; as in MLIR, the smallest integer stays what it is."""
    for op in nested(module.operation):
        if op.name == "math.absi":
            value = op.operands[0]
            with ir.InsertionPoint(op), op.location:
                zero = arith.constant(value.type, 0)
                op.results[0].replace_all_uses_with(arith.maxsi(value, arith.subi(zero, value)))
            op.erase()
