"""raise-embedding: ``torch.aten.embedding`` of a stored table becomes ``spikingbrain.embedding``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from spikingbrain.passes import parameters, torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.casts import builtin_type, from_builtin, to_builtin

_KINDS = ("f32", "f16", "bf16", "si8")


@dataclass(frozen=True)
class RaiseEmbedding:
    """Raises look-ups in a stored table, of floats or of codes, so that a head tied to the table can share its stored form.

    In: torch dialect. Out: ``spikingbrain.embedding`` between ``torch_c`` casts. Not handled: other element types and
    tables computed by the model (upstream lowers those).
    """

    name: ClassVar[str] = "raise-embedding"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "torch.aten.embedding"):
            table, ids = op.operands[0], op.operands[1]
            cast = torch_ir.defining(table, "torch_c.from_builtin_tensor")
            if cast is None or parameters.parameter(cast.operands[0]) is None:
                context.record(self, "refused", op, "the table is computed by the model, not stored")
                continue
            if torch_ir.element_type(table) not in _KINDS or torch_ir.element_type(ids) != "si64":
                context.record(self, "refused", op, "only tables of floats or int8 with int64 ids are raised")
                continue
            with ir.InsertionPoint(op), op.location:
                lookup = ir.Operation.create(
                    "spikingbrain.embedding",
                    [builtin_type(op.results[0].type)],
                    [to_builtin(ids), to_builtin(table)],
                    {
                        "rows": ir.IntegerAttr.get(
                            ir.IntegerType.get_signless(64), (torch_ir.shape(table) or [0])[0]
                        )
                    },
                )
                value = from_builtin(lookup.result, op.results[0].type)
            op.results[0].replace_all_uses_with(value)
            context.record(self, "raised", op)
            op.erase()
