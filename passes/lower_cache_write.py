"""lower-cache-write: cache writes become in-place kernel launches, or linalg where there is no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg, tensor

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext

_EQUAL, _SIGNED_GREATER_EQUAL = 0, 5  # arith.cmpi predicates


@dataclass(frozen=True)
class LowerCacheWrite:
    """Lowers ``spikingbrain.cache_write``.

    In: our dialect. Out: a launch whose result is tied to the cache (where the target has kernels), or linalg that makes the
    whole new cache. The write is moved behind every other use of the cache in its block, so that it can happen in place.
    """

    name: ClassVar[str] = "lower-cache-write"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "spikingbrain.cache_write"):
            _sink(op)
            row = ir.RankedTensorType(op.operands[0].type).shape[2:]
            reason = "kernel" if context.target.vector_bits or context.target.wave_kernels else "linalg"
            with ir.InsertionPoint(op), op.location:
                if 0 in row:
                    value, reason = op.operands[0], "there is nothing to write"
                elif ir.ShapedType.get_dynamic_size() in row:
                    value, reason = _dense(*op.operands), "linalg: rows of a size that is not known"
                elif context.target.vector_bits:
                    from spikingbrain.passes.kernels.cache_write import emit_cache_write

                    value = emit_cache_write(*op.operands)
                elif context.target.wave_kernels:
                    from spikingbrain.passes.wave_kernels.cache_write import emit_cache_write

                    value = emit_cache_write(*op.operands)
                else:
                    value = _dense(*op.operands)
            op.results[0].replace_all_uses_with(value)
            context.record(self, "lowered", op, reason)
            op.erase()


def _sink(op: ir.Operation) -> None:
    """Moves a write whose result only leaves the function to the end of its block."""
    block = op.block
    terminator = block.operations[len(block.operations) - 1].operation
    users = [use.owner.operation for use in op.results[0].uses]
    if users and all(user == terminator for user in users):
        op.move_before(terminator)


def _dense(cache: ir.Value, rows: ir.Value, slots: ir.Value) -> ir.Value:
    """Emits the write as two parallel steps: which token each slot takes (the last that names it), then a select."""
    type_ = ir.RankedTensorType(cache.type)
    index, i64 = ir.IndexType.get(), ir.IntegerType.get_signless(64)
    b, r, t = (ir.AffineDimExpr.get(d) for d in range(3))
    none = arith.ConstantOp(i64, ir.IntegerAttr.get(i64, -1)).result
    sizes = build.dynamic_sizes(cache)
    static = [n for n in type_.shape[:2] if n == ir.ShapedType.get_dynamic_size()]
    empty = build.empty(ir.RankedTensorType.get(type_.shape[:2], i64), sizes[: len(static)])
    start = linalg.fill(none, outs=[empty])

    def later(slot: ir.Value, found: ir.Value) -> ir.Value:
        here = arith.IndexCastOp(i64, linalg.IndexOp(1).result).result
        time = arith.IndexCastOp(i64, linalg.IndexOp(2).result).result
        named = arith.CmpIOp(_EQUAL, slot, here).result
        return arith.MaxSIOp(found, arith.SelectOp(named, time, none).result).result

    maps = [ir.AffineMap.get(3, 0, [b, t]), ir.AffineMap.get(3, 0, [b, r])]
    token = build.generic([slots], start, maps, ["parallel", "parallel", "reduction"], later)

    rank = len(type_.shape)
    dims = [ir.AffineDimExpr.get(d) for d in range(rank)]
    whole, of_slot = ir.AffineMap.get(rank, 0, dims), ir.AffineMap.get(rank, 0, dims[:2])

    def choose(taken: ir.Value, old: ir.Value, _: ir.Value) -> ir.Value:
        zero = arith.ConstantOp(i64, ir.IntegerAttr.get(i64, 0)).result
        written = arith.CmpIOp(_SIGNED_GREATER_EQUAL, taken, zero).result
        at = arith.IndexCastOp(index, arith.SelectOp(written, taken, zero).result).result
        rest = [linalg.IndexOp(d).result for d in range(2, rank)]
        new = tensor.ExtractOp(rows, [linalg.IndexOp(0).result, at, *rest]).result
        return arith.SelectOp(written, new, old).result

    init = build.empty(type_, sizes)
    return build.generic([token, cache], init, [of_slot, whole, whole], ["parallel"] * rank, choose)
