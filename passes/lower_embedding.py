"""lower-embedding: table look-ups become gathers in linalg."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg, tensor

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext

_UNSIGNED_LESS = 6


@dataclass(frozen=True)
class LowerEmbedding:
    """Lowers ``spikingbrain.embedding`` of a plain or packed table to ``linalg.generic``.

    In: our dialect. Out: linalg and tensor.
    """

    name: ClassVar[str] = "lower-embedding"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "spikingbrain.embedding"):
            with ir.InsertionPoint(op), op.location:
                value = _gather(op)
            op.results[0].replace_all_uses_with(value)
            context.record(self, "lowered", op, "linalg")
            op.erase()


def _gather(op: ir.Operation) -> ir.Value:
    ids, table = op.operands
    result = ir.RankedTensorType(op.results[0].type)
    rank, index, element = len(result.shape), ir.IndexType.get(), result.element_type
    block = ir.RankedTensorType(table.type).shape[2] if len(ir.RankedTensorType(table.type).shape) == 3 else 0
    zero, rows = build.constant_index(0), build.constant_index(op.attributes["rows"].value)
    width = build.constant_index(block) if block else None
    is_code = isinstance(element, ir.IntegerType)
    none = ir.IntegerAttr.get(element, 0) if is_code else ir.FloatAttr.get(element, math.nan)
    outside = arith.ConstantOp(element, none).result
    dims = [ir.AffineDimExpr.get(d) for d in range(rank)]
    maps = [ir.AffineMap.get(rank, 0, dims[:-1]), ir.AffineMap.get(rank, 0, dims)]

    def body(token: ir.Value, _: ir.Value) -> ir.Value:
        row = arith.IndexCastOp(index, token).result
        inside = arith.CmpIOp(_UNSIGNED_LESS, row, rows).result
        row = arith.SelectOp(inside, row, zero).result
        column = linalg.IndexOp(rank - 1).result
        if width is None:
            at = [row, column]
        else:
            at = [arith.DivUIOp(row, width).result, column, arith.RemUIOp(row, width).result]
        return arith.SelectOp(inside, tensor.ExtractOp(table, at).result, outside).result

    init = build.empty(result, build.dynamic_sizes(ids))
    return build.generic([ids], init, maps, ["parallel"] * rank, body)
