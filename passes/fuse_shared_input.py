"""fuse-shared-input: projections of one input become one projection, their weights stored as one."""

from __future__ import annotations

import itertools
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

    Where the target has wave kernels, each launch costs: there it joins projections of spikes and by experts, too. Where only
    some of spikes have a bias, the others get one that changes nothing.
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
            self._join(module, context)

    def _join(self, module: ir.Module, context: PassContext) -> None:
        groups: dict[tuple[object, ...], list[ir.Operation]] = defaultdict(list)
        for op in torch_ir.walk(module):
            if op.name in _STORED and (key := _key(op)) is not None:
                groups[key].append(op)
        for group in itertools.chain.from_iterable(map(_by_bias, groups.values())):
            if len(group) > 1:
                context.record(self, "fused", group[0], f"{len(group)} projections of one input")
                _fuse_stored(group)
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


# Where projections have what is stored for them, and its axis of columns; a bias, which may be absent, is the last one.
_BIAS = 4
_STORED = {
    "spikingbrain.spike_linear": ((2, 3, _BIAS), 0),
    "spikingbrain.grouped_linear": ((1,), 1),
    "spikingbrain.spike_grouped_linear": ((2, 3), 1),
}
# What may have been done to stored tensors that can be joined along that axis.
_STEPS = {"matrix", "column", "ones", "float32", "codes bits=4", "codes bits=8", "codes bits=16"}


def _key(op: ir.Operation) -> tuple[object, ...] | None:
    """Returns what projections that can be joined have in common; None for one that cannot be."""
    numbers, axis = _STORED[op.name]
    key: list[object] = [op.name, hash(op.block)]
    for i, value in enumerate(op.operands):
        encode = torch_ir.defining(value, "spikingbrain.spike_encode")
        if encode is not None:  # each projection in the model's code has a neuron of its own
            settings = [str(encode.attributes[name]) for name in ("k", "lower", "upper")]
            key += [hash(encode.operands[0]), value == encode.results[0], *settings]
            continue
        if i not in numbers:
            key.append(hash(value))
            continue
        owner, type_ = parameters.parameter(value), ir.RankedTensorType(value.type)
        if owner is None or not set(parameters.stored(owner).recipe) <= _STEPS:
            return None
        if i == _BIAS:
            continue
        sizes = [n for d, n in enumerate(type_.shape) if d != axis]
        key += [parameters.stored(owner).recipe, str(type_.element_type), *sizes]
    key += [str(op.attributes[name]) for name in op.attributes if name != "columns"]
    return tuple(key)


def _bias(op: ir.Operation) -> ir.Value | None:
    return op.operands[_BIAS] if op.name == "spikingbrain.spike_linear" and len(op.operands) > _BIAS else None


def _by_bias(group: list[ir.Operation]) -> list[list[ir.Operation]]:
    """Returns groups whose biases are made in one way; those without a bias are in the first."""

    def way(op: ir.Operation) -> tuple[str, ...] | None:
        bias = _bias(op)
        return None if bias is None else tuple(parameters.stored(bias.owner.operation).recipe)

    ways = list(dict.fromkeys(w for op in group if (w := way(op)) is not None)) or [()]
    return [[op for op in group if way(op) == w or (w == ways[0] and way(op) is None)] for w in ways]


def _fuse_stored(group: list[ir.Operation]) -> None:
    first = group[0]
    numbers, axis = _STORED[first.name]
    group = sorted(group, key=lambda op: -len(op.operands))  # biases lie beside each other
    biases = [bias for op in group if (bias := _bias(op)) is not None]
    columns = sum(ir.RankedTensorType(op.results[0].type).shape[-1] for op in group)
    attributes = {name: first.attributes[name] for name in first.attributes}
    if "columns" in attributes:
        attributes["columns"] = ir.IntegerAttr.get(attributes["columns"].type, columns)
    with ir.InsertionPoint(first), first.location:
        operands = [
            _joined([op.operands[i] for op in group], axis) if i in numbers else value
            for i, value in enumerate(first.operands)
            if i != _BIAS or not biases
        ]
        if biases:
            operands.append(_lengthened(_joined(biases), columns))
        type_ = _wider(first.results[0].type, columns)
        joint = ir.Operation.create(first.name, [type_], operands, attributes).result
        _cut(joint, first.operands[0], group)


def _joined(values: list[ir.Value], axis: int = 0) -> ir.Value:
    """Returns stored tensors of one recipe joined along an axis, stored."""
    all_stored = [parameters.stored(value.owner.operation) for value in values]
    shape = list(ir.RankedTensorType(values[0].type).shape)
    shape[axis] = sum(ir.RankedTensorType(value.type).shape[axis] for value in values)
    type_ = ir.RankedTensorType.get(shape, ir.RankedTensorType(values[0].type).element_type)
    sources = [source for stored in all_stored for source in stored.sources]
    return parameters.create(sources, [*all_stored[0].recipe, f"concat axis={axis}"], type_)


def _lengthened(bias: ir.Value, columns: int) -> ir.Value:
    """Returns a stored bias with numbers behind it that change nothing."""
    stored, type_ = parameters.stored(bias.owner.operation), ir.RankedTensorType(bias.type)
    if type_.shape[0] == columns:
        return bias
    recipe = [*stored.recipe, f"lengthen to={columns}"]
    return parameters.create(stored.sources, recipe, _wider(type_, columns))


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
