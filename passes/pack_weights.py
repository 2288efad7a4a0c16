"""pack-weights: weights of projections are stored in the layout that the target's kernel reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from spikingbrain.passes import parameters, torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.kernels.linear import packed_block


@dataclass(frozen=True)
class PackWeights:
    """Appends ``pack_columns`` to the recipe of every projection's weight.

    In and out: our dialect on builtin tensors. For targets without vector kernels nothing changes.
    """

    name: ClassVar[str] = "pack-weights"

    def run(self, module: ir.Module, context: PassContext) -> None:
        if not context.target.vector_bits:
            return
        block = packed_block(context.target)
        for op in torch_ir.operations(module, "spikingbrain.linear"):
            weight = parameters.parameter(op.operands[1])
            type_ = ir.RankedTensorType(op.operands[1].type)
            if weight is None or len(type_.shape) != 2:
                continue
            n, k = type_.shape
            old = parameters.stored(weight)
            packed_type = ir.RankedTensorType.get([-(-n // block), k, block], type_.element_type)
            with ir.InsertionPoint(op), op.location:
                packed = parameters.create(old.sources, [*old.recipe, f"pack_columns block={block}"], packed_type)
            op.operands[1] = packed
            context.record(self, "packed", op, f"blocks of {block} columns")
