"""raise-cache-write: a scatter of whole token rows becomes ``spikingbrain.cache_write``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.casts import builtin_type, from_builtin, to_builtin


@dataclass(frozen=True)
class RaiseCacheWrite:
    """Raises ``cache.scatter(1, slots.expand(...), rows)`` where every value of a row goes to the same slot.

    In: torch dialect. Out: ``spikingbrain.cache_write`` between ``torch_c`` casts.
    Not handled: scatters along other dims, and indices that differ within a row (upstream lowers those).
    A slot outside the cache is an error in torch; compiled, nothing is written for it.
    """

    name: ClassVar[str] = "raise-cache-write"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "torch.aten.scatter.src"):
            cache, dim, index, rows = op.operands
            sizes, of_rows = torch_ir.shape(cache), torch_ir.shape(rows)
            if sizes is None or len(sizes) < 2 or torch_ir.constant(dim) != 1:
                context.record(self, "refused", op, "the scatter is not along dim 1")
                continue
            slots = _slots(index, len(sizes))
            whole_rows = of_rows is not None and of_rows[2:] == sizes[2:] and torch_ir.shape(index) == of_rows
            if slots is None or not whole_rows or torch_ir.shape(slots) != (of_rows or [])[:2]:
                context.record(self, "refused", op, "the index differs within a row")
                continue
            if of_rows is None or of_rows[0] != sizes[0] or -1 in sizes[2:]:
                context.record(
                    self, "refused", op, "the rows cover part of the batch, or their size is dynamic"
                )
                continue
            with ir.InsertionPoint(op), op.location:
                write = ir.Operation.create(
                    "spikingbrain.cache_write",
                    [builtin_type(op.results[0].type)],
                    [to_builtin(cache), to_builtin(rows), to_builtin(slots)],
                )
                value = from_builtin(write.result, op.results[0].type)
            op.results[0].replace_all_uses_with(value)
            context.record(self, "raised", op)
            op.erase()


def _slots(index: ir.Value, rank: int) -> ir.Value | None:
    """Returns the [B, T] tensor that ``index`` repeats over its further dims, if it does."""
    expand = torch_ir.defining(index, "torch.aten.expand")
    value = expand.operands[0] if expand else index
    for axis in range(rank - 1, 1, -1):
        unsqueeze = torch_ir.defining(value, "torch.aten.unsqueeze")
        if unsqueeze is None or torch_ir.constant(unsqueeze.operands[1]) not in (axis, -1):
            return None
        value = unsqueeze.operands[0]
    return value if len(torch_ir.shape(value) or []) == 2 else None
