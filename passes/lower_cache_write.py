"""lower-cache-write: cache writes become in-place kernel launches, or linalg where there is no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg, tensor

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.target import Target

MOST_TOGETHER = 8  # caches that one launch writes: those of some layers, with code for each
_EQUAL, _SIGNED_GREATER_EQUAL = 0, 5  # arith.cmpi predicates


@dataclass(frozen=True)
class LowerCacheWrite:
    """Lowers ``spikingbrain.cache_write``.

    In: our dialect. Out: a launch whose result is tied to the cache (where the target has kernels), or linalg that makes the
    whole new cache. The write is moved behind every other use of the cache in its block, so that it can happen in place. One
    launch of a wave kernel does several writes, such as those of keys and values.
    """

    name: ClassVar[str] = "lower-cache-write"

    def run(self, module: ir.Module, context: PassContext) -> None:
        operations = torch_ir.operations(module, "spikingbrain.cache_write")
        for op in operations:
            _sink(op)
        for group in _groups(operations, context.target):
            with ir.InsertionPoint(group[-1]), group[-1].location:
                values, reason = _lowered(group, context.target)
            for op, value in zip(group, values, strict=True):
                op.results[0].replace_all_uses_with(value)
                context.record(self, "lowered", op, reason)
                op.erase()


def _lowered(group: list[ir.Operation], target: Target) -> tuple[list[ir.Value], str]:
    """Emits what takes the place of writes that are done together, and says what that is."""
    caches, rows, slots = (
        [op.operands[0] for op in group],
        [op.operands[1] for op in group],
        group[0].operands[2],
    )
    row = _row(group[0])
    if 0 in row:
        return caches, "there is nothing to write"
    if ir.ShapedType.get_dynamic_size() in row:
        return [_dense(caches[0], rows[0], slots)], "linalg: rows of a size that is not known"
    if target.vector_bits:
        from spikingbrain.passes.kernels.cache_write import emit_cache_write

        return [emit_cache_write(caches[0], rows[0], slots)], "kernel"
    if target.wave_kernels:
        from spikingbrain.passes.wave_kernels.cache_write import emit_cache_writes

        return emit_cache_writes(caches, rows, slots), "kernel"
    return [_dense(caches[0], rows[0], slots)], "linalg"


def _row(op: ir.Operation) -> list[int]:
    return list(ir.RankedTensorType(op.operands[0].type).shape[2:])


def _groups(operations: list[ir.Operation], target: Target) -> list[list[ir.Operation]]:
    """Returns writes in order; together those at the end of a block that write alike to the same slots, where a kernel can."""
    groups: list[list[ir.Operation]] = []
    last: dict[tuple[object, ...], list[ir.Operation]] = {}
    for op in operations:
        cache, rows, slots = op.operands
        key = (hash(op.block), str(cache.type), str(rows.type), hash(slots))
        group = last.get(key, [])
        can_join = target.wave_kernels and not target.vector_bits and min(_row(op), default=1) > 0
        can_join = can_join and _only_leaves(op) and cache not in [other.operands[0] for other in group]
        if not can_join or not group or len(group) == MOST_TOGETHER:
            group = []
            groups.append(group)
            if can_join:
                last[key] = group
        group.append(op)
    return groups


def _only_leaves(op: ir.Operation) -> bool:
    """Returns whether a write's result only leaves the function."""
    terminator = op.block.operations[len(op.block.operations) - 1].operation
    users = [use.owner.operation for use in op.results[0].uses]
    return bool(users) and all(user == terminator for user in users)


def _sink(op: ir.Operation) -> None:
    """Moves a write whose result only leaves the function to the end of its block."""
    if _only_leaves(op):
        op.move_before(op.block.operations[len(op.block.operations) - 1].operation)


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
