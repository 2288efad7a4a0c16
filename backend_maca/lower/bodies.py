"""Copies of what a region computes for one element."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch_mlir import ir

from spikingbrain.backend_maca.lower.mlir import nested


def copy_body(
    block: ir.Block, values: Sequence[ir.Value | None], indices: Sequence[ir.Value] = ()
) -> list[ir.Value]:
    """Copies a block here for values of its arguments and loops; returns what its terminator gives on.

    An argument that the block does not use needs no value.
    """
    known = {a: v for a, v in zip(block.arguments, values, strict=True) if v is not None}
    *steps, terminator = [view.operation for view in block.operations]
    for op in steps:
        if op.name == "linalg.index":
            known[op.results[0]] = indices[op.attributes["dim"].value]
            continue
        copy = op.clone().operation
        rename(copy, known)
        known.update(zip(op.results, copy.results, strict=True))
    return [known.get(v, v) for v in terminator.operands]


def rename(root: ir.Operation, known: Mapping[ir.Value, ir.Value]) -> None:
    """Replaces the operands of an op and of everything nested in it."""
    for op in [root, *nested(root)]:
        for i, value in enumerate(op.operands):
            if value in known:
                op.operands[i] = known[value]
