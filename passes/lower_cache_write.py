"""lower-cache-write: cache writes become in-place kernel launches, or loops over tokens where there is no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import arith, scf, tensor

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext


@dataclass(frozen=True)
class LowerCacheWrite:
    """Lowers ``spikingbrain.cache_write``.

    In: our dialect. Out: a launch whose result is tied to the cache (with vector kernels), or loops over batch and
    time that insert one row each. The write is moved behind every other use of the cache in its block, so
    that it can happen in place.
    """

    name: ClassVar[str] = "lower-cache-write"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "spikingbrain.cache_write"):
            _sink(op)
            with ir.InsertionPoint(op), op.location:
                if context.target.vector_bits:
                    from spikingbrain.passes.kernels.cache_write import emit_cache_write

                    value = emit_cache_write(*op.operands)
                else:
                    value = _loops(*op.operands)
            op.results[0].replace_all_uses_with(value)
            context.record(self, "lowered", op, "kernel" if context.target.vector_bits else "loops")
            op.erase()


def _sink(op: ir.Operation) -> None:
    """Moves a write whose result only leaves the function to the end of its block."""
    block = op.block
    terminator = block.operations[len(block.operations) - 1].operation
    users = [use.owner.operation for use in op.results[0].uses]
    if users and all(user == terminator for user in users):
        op.move_before(terminator)


def _loops(cache: ir.Value, rows: ir.Value, slots: ir.Value) -> ir.Value:
    """Emits ``cache[b, slots[b, t]] = rows[b, t]`` row by row; a slot outside the cache is skipped."""
    zero, one = build.constant_index(0), build.constant_index(1)
    dynamic = ir.ShapedType.get_dynamic_size()
    rest = list(ir.RankedTensorType(cache.type).shape)[2:]
    element = ir.RankedTensorType(cache.type).element_type
    if dynamic in rest:
        raise ValueError("cache rows must have a static shape")
    row_type = ir.RankedTensorType.get([1, 1, *rest], element)
    static_offsets, static_sizes = [dynamic, dynamic] + [0] * len(rest), [1, 1, *rest]
    strides = [1] * (2 + len(rest))
    outer = scf.ForOp(zero, build.size(rows, 0), one, [cache])
    with ir.InsertionPoint(outer.body):
        b, in_outer = outer.induction_variable, outer.inner_iter_args[0]
        inner = scf.ForOp(zero, build.size(rows, 1), one, [in_outer])
        with ir.InsertionPoint(inner.body):
            t, current = inner.induction_variable, inner.inner_iter_args[0]
            index = ir.IndexType.get()
            slot = arith.IndexCastOp(index, tensor.ExtractOp(slots, [b, t]).result).result
            below = arith.CmpIOp(6, slot, build.size(cache, 1)).result  # 6: unsigned less than, negative is large
            choice = scf.IfOp(below, [cache.type], hasElse=True)
            with ir.InsertionPoint(choice.then_block):
                row = tensor.ExtractSliceOp(row_type, rows, [b, t], [], [], static_offsets, static_sizes, strides)
                written = tensor.InsertSliceOp(
                    row.result, current, [b, slot], [], [], static_offsets, static_sizes, strides
                )
                scf.YieldOp([written.result])
            with ir.InsertionPoint(choice.else_block):
                scf.YieldOp([current])
            scf.YieldOp([choice.results[0]])
        scf.YieldOp([inner.results[0]])
    return outer.results[0]
