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

    Where the target has wave kernels, each launch costs: there it joins ``spikingbrain.spike_linear`` ops of one input, too.
    In and out: our dialect on builtin tensors. The weights must be whole model tensors, or codes of them; each result
    becomes a slice of the joint one. Projections in different blocks stay apart. Not handled: a weight that other ops read
    too, in its own form, is then stored twice.
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
        if context.target.wave_kernels:
            self._join_spikes(module, context)

    def _join_spikes(self, module: ir.Module, context: PassContext) -> None:
        groups: dict[tuple[object, ...], list[ir.Operation]] = defaultdict(list)
        for op in torch_ir.operations(module, "spikingbrain.spike_linear"):
            if (key := _spikes_key(op)) is not None:
                groups[key].append(op)
        for group in groups.values():
            if len(group) > 1:
                context.record(self, "fused", group[0], f"{len(group)} projections of one neuron's spikes")
                _fuse_spikes(group)
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
    columns = [op.attributes["columns"].value for op in group]
    with ir.InsertionPoint(first), first.location:
        weight = _joined([op.operands[1] for op in group])
        i64 = ir.IntegerType.get_signless(64)
        joint = ir.Operation.create(
            "spikingbrain.linear",
            [_wider(first.results[0].type, sum(columns))],
            [x, weight],
            {"columns": ir.IntegerAttr.get(i64, sum(columns))},
        ).result
        _cut(joint, x, group)


# What makes a stored tensor whose rows can be joined with those of others.
_BY_ROW = ("matrix", "column", "ones", "float32", "codes bits=4", "codes bits=8", "codes bits=16")


def _spikes_key(op: ir.Operation) -> tuple[object, ...] | None:
    """Returns what projections of spikes that can be joined have in common; None for one that cannot be."""
    counts, threshold, *stored = op.operands
    encode = torch_ir.defining(counts, "spikingbrain.spike_encode")
    if encode is None or counts != encode.results[0] or threshold != encode.results[1]:
        return None
    recipes = []
    for value in stored:
        owner = parameters.parameter(value)
        if owner is None or not set(parameters.stored(owner).recipe) <= set(_BY_ROW):
            return None
        recipes.append(parameters.stored(owner).recipe)
    settings = [str(encode.attributes[name]) for name in ("k", "lower", "upper")]
    shapes = [str(value.type.element_type) for value in stored] + [
        ir.RankedTensorType(stored[1].type).shape[1]
    ]
    own = [str(op.attributes[name]) if name in op.attributes else "" for name in ("bits", "silent")]
    return (hash(encode.operands[0]), hash(op.block), *settings, *recipes, *shapes, *own)


def _fuse_spikes(group: list[ir.Operation]) -> None:
    first = group[0]
    counts, threshold, *stored = first.operands
    columns = sum(ir.RankedTensorType(op.operands[2].type).shape[0] for op in group)
    attributes = {name: first.attributes[name] for name in ("bits", "silent") if name in first.attributes}
    with ir.InsertionPoint(first), first.location:
        joined = [_joined([op.operands[2 + i] for op in group]) for i in range(len(stored))]
        joint = ir.Operation.create(
            "spikingbrain.spike_linear",
            [_wider(first.results[0].type, columns)],
            [counts, threshold, *joined],
            attributes,
        ).result
        _cut(joint, counts, group)


def _joined(values: list[ir.Value]) -> ir.Value:
    """Returns stored tensors of one recipe joined along their first axis, stored."""
    all_stored = [parameters.stored(value.owner.operation) for value in values]
    first = ir.RankedTensorType(values[0].type)
    rows = sum(ir.RankedTensorType(value.type).shape[0] for value in values)
    type_ = ir.RankedTensorType.get([rows, *first.shape[1:]], first.element_type)
    sources = [source for stored in all_stored for source in stored.sources]
    return parameters.create(sources, [*all_stored[0].recipe, "concat axis=0"], type_)


def _wider(type_: ir.Type, columns: int) -> ir.RankedTensorType:
    """Returns a type with another last size."""
    ranked = ir.RankedTensorType(type_)
    return ir.RankedTensorType.get([*ranked.shape[:-1], columns], ranked.element_type)


def _cut(joint: ir.Value, like: ir.Value, group: list[ir.Operation]) -> None:
    """Puts slices of the joint result for those of the group; leading sizes are those of ``like``."""
    leading = list(ir.RankedTensorType(like.type).shape)[:-1]
    dynamic = ir.ShapedType.get_dynamic_size()
    sizes = [build.size(like, d) for d, n in enumerate(leading) if n == dynamic]
    start = 0
    for op in group:
        n = ir.RankedTensorType(op.results[0].type).shape[-1]
        offsets, steps = [0] * len(leading) + [start], [1] * (len(leading) + 1)
        piece = tensor.ExtractSliceOp(op.results[0].type, joint, [], sizes, [], offsets, [*leading, n], steps)
        op.results[0].replace_all_uses_with(piece.result)
        start += n
