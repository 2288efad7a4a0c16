"""pack-weights: weights of projections are stored in the layout that the target's kernel reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from spikingbrain.passes import parameters, torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.kernels.linear import packed_block

_LINEARS = ("spikingbrain.linear", "spikingbrain.grouped_linear")
_EMBEDDING = "spikingbrain.embedding"
_PLAIN_RANK = dict(zip((*_LINEARS, _EMBEDDING), (2, 3, 2), strict=True))  # of a weight that is not packed yet
_PACKED = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class PackWeights:
    """Appends ``pack_columns`` to the recipe of every projection's weight or weights, and of tables that are such a weight too.

    In and out: our dialect on builtin tensors. A table is packed only where a projection stores the same tensor, so that it is
    stored once. For targets without vector kernels nothing changes.
    """

    name: ClassVar[str] = "pack-weights"

    def run(self, module: ir.Module, context: PassContext) -> None:
        if not context.target.vector_bits:
            return
        block = packed_block(context.target)
        packed: set[tuple[str, ...]] = set()
        for op in [op for name in _LINEARS for op in torch_ir.operations(module, name)]:
            if sources := _pack(op, block):
                packed.add(sources)
                context.record(self, "packed", op, f"blocks of {block} columns")
        for op in torch_ir.operations(module, _EMBEDDING):
            table = parameters.parameter(op.operands[1])
            if table is not None and parameters.stored(table).sources in packed:
                _pack(op, block)
                context.record(self, "packed", op, "shared with a projection")


def _pack(op: ir.Operation, block: int) -> tuple[str, ...] | None:
    """Packs operand 1 of ``op`` if it is stored, each of its matrices; returns the tensors it is made from."""
    weight = parameters.parameter(op.operands[1])
    type_ = ir.RankedTensorType(op.operands[1].type)
    if weight is None or type_.rank != _PLAIN_RANK[op.name] or str(type_.element_type) not in _PACKED:
        return None
    *stack, n, k = type_.shape
    old = parameters.stored(weight)
    packed_type = ir.RankedTensorType.get([*stack, -(-n // block), k, block], type_.element_type)
    with ir.InsertionPoint(op), op.location:
        op.operands[1] = parameters.create(
            old.sources, [*old.recipe, f"pack_columns block={block}"], packed_type
        )
    return old.sources
