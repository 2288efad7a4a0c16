"""fuse-shared-input: projections of one input become one projection, their weights stored as one."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import tensor

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import parameters, torch_ir
from spikingbrain.passes.base import PassContext


@dataclass(frozen=True)
class FuseSharedInput:
    """Joins ``spikingbrain.linear`` ops that read one value (query, key and value; gate and up).

    In and out: our dialect on builtin tensors. The weights must be whole model tensors; each result becomes a slice of
    the joint one. Projections in different blocks stay apart. Not handled: a weight that other ops read too, in its
    own form, is then stored twice.
    """

    name: ClassVar[str] = "fuse-shared-input"

    def run(self, module: ir.Module, context: PassContext) -> None:
        groups: dict[tuple[int, int], list[ir.Operation]] = defaultdict(list)
        for op in torch_ir.walk(module):
            if op.name == "spikingbrain.linear" and _is_plain(op):
                groups[hash(op.operands[0]), hash(op.block)].append(op)
        for group in groups.values():
            if len(group) < 2:
                continue
            _fuse(group)
            context.record(self, "fused", group[0], f"{len(group)} projections of one input")
            for op in group:
                op.erase()


def _is_plain(op: ir.Operation) -> bool:
    weight = parameters.parameter(op.operands[1])
    return (
        weight is not None
        and len(ir.RankedTensorType(op.operands[1].type).shape) == 2
        and not (parameters.stored(weight).recipe)
    )


def _fuse(group: list[ir.Operation]) -> None:
    first = group[0]
    x = first.operands[0]
    x_type = ir.RankedTensorType(x.type)
    columns = [op.attributes["columns"].value for op in group]
    sources = [s for op in group for s in parameters.stored(op.operands[1].owner.operation).sources]
    dynamic = ir.ShapedType.get_dynamic_size()
    leading = list(x_type.shape)[:-1]
    with ir.InsertionPoint(first), first.location:
        weight_type = ir.RankedTensorType.get([sum(columns), x_type.shape[-1]], x_type.element_type)
        weight = parameters.create(sources, ["concat axis=0"], weight_type)
        joint_type = ir.RankedTensorType.get([*leading, sum(columns)], x_type.element_type)
        i64 = ir.IntegerType.get_signless(64)
        joint = ir.Operation.create(
            "spikingbrain.linear",
            [joint_type],
            [x, weight],
            {"columns": ir.IntegerAttr.get(i64, sum(columns))},
        ).result
        sizes = [build.size(x, d) for d, n in enumerate(leading) if n == dynamic]
        start = 0
        for op, n in zip(group, columns, strict=True):
            piece = tensor.ExtractSliceOp(
                op.results[0].type,
                joint,
                [],
                sizes,
                [],
                [0] * len(leading) + [start],
                [*leading, n],
                [1] * (len(leading) + 1),
            )
            op.results[0].replace_all_uses_with(piece.result)
            start += n
