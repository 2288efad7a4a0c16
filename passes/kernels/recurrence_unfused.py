"""The form of ``fused_recurrence`` in tensors: what it computes around its recurrence becomes linalg ops again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg, tensor

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes.dialect_fused import (
    FLAGS,
    OPERANDS,
    OUT,
    SPACE,
    SUM,
    FusedRecurrence,
    Part,
    channels_of,
    element_of,
    linear,
)
from spikingbrain.passes.kernels.bodies import inlined
from spikingbrain.passes.kernels.recurrence_launch import size_of
from spikingbrain.passes.kernels.recurrence_operands import is_computed


def unfuse(fused: FusedRecurrence) -> ir.Operation:
    """Replaces a ``fused_recurrence`` by a ``linear_recurrence`` and linalg ops on tensors; returns the recurrence."""
    parts = fused.parts
    y_type = ir.RankedTensorType(fused.y.type)
    state_type = ir.RankedTensorType(fused.final_state.type)
    with ir.InsertionPoint(fused.op), fused.op.location:
        reads = [(read.value, read.map) for part in parts for read in part.reads]
        sizes = [size_of(reads, y_type, axis) for axis in (0, 1)]
        space = _Space(fused, sizes)
        named = {part.name: space.operand(part) for part in parts if part.name in OPERANDS}
        operands = [*named.values(), *([] if fused.state is None else [fused.state])]
        present = [int(name in named) for name in OPERANDS] + [int(fused.state is not None)]
        attributes = {name: fused.op.attributes[name] for name in FLAGS}
        attributes["operandSegmentSizes"] = ir.DenseI32ArrayAttr.get(present)
        o_type = ir.RankedTensorType.get(y_type.shape, state_type.element_type)
        op = ir.Operation.create("spikingbrain.linear_recurrence", [o_type, state_type], operands, attributes)
        y, sums = op.results[0], list[ir.Value]()
        for part in (part for part in parts if part.name in (SUM, OUT)):
            if part.name == SUM:
                sums.append(space.row_sum(part, op.results[0], sums))
            else:
                y = space.output(part, op.results[0], sums)
    fused.y.replace_all_uses_with(y)
    fused.final_state.replace_all_uses_with(op.results[1])
    fused.op.erase()
    return op


class _Space:
    """The space of a recurrence, in which parts are computed."""

    def __init__(self, fused: FusedRecurrence, sizes: Sequence[ir.Value]):
        self.fused, self.sizes = fused, sizes

    def operand(self, part: Part) -> ir.Value:
        """Returns the tensor that a part computes."""
        shape, axes = channels_of(self.fused, part.name), list(range(SPACE))
        if part.name == "bonus":
            axes = [2, 3]
        elif part.name == "decay" and self.fused.op.attributes["decay_axis"].value == "head":
            axes = [0, 1, 2]
        (read, *rest), type_ = part.reads, self._type([shape[a] for a in axes], element_of(part))
        identity = ir.AffineMap.get(SPACE, 0, [ir.AffineDimExpr.get(a) for a in axes])
        if not rest and read.map == identity and not is_computed(part) and read.value.type == type_:
            return read.value

        def at(axis: int) -> ir.Value:
            return linalg.IndexOp(axes.index(axis)).result if axis in axes else build.constant_index(0)

        return self._generic([], type_, ["parallel"] * len(axes), [], lambda *_: self._body(part, at, []))

    def row_sum(self, part: Part, o: ir.Value, sums: Sequence[ir.Value]) -> ir.Value:
        """Returns a row sum for each head, [B, T, H]."""
        kind = element_of(part)
        shape = channels_of(self.fused, SUM)

        def body(*scalars: ir.Value) -> ir.Value:
            value = self._body(part, lambda axis: linalg.IndexOp(axis).result, scalars[:-1])
            return arith.addf(value, scalars[-1])

        type_ = self._type(shape[:3], kind)
        init = build.filled(type_, self._dynamic(type_), 0.0)
        maps = [self._map(4), *[self._map(3)] * len(sums), self._map(3)]
        return build.generic([o, *sums], init, maps, ["parallel"] * 3 + ["reduction"], body)

    def output(self, part: Part, o: ir.Value, sums: Sequence[ir.Value]) -> ir.Value:
        def body(*scalars: ir.Value) -> ir.Value:
            return self._body(part, lambda axis: linalg.IndexOp(axis).result, scalars[:-1])

        maps = [self._map(4), *[self._map(3)] * len(sums)]
        return self._generic([o, *sums], self.fused.y.type, ["parallel"] * SPACE, maps, body)

    def _generic(
        self,
        inputs: Sequence[ir.Value],
        type_: ir.Type,
        kinds: Sequence[str],
        maps: Sequence[ir.AffineMap],
        body: Callable[..., ir.Value],
    ) -> ir.Value:
        init = build.empty(type_, self._dynamic(type_))
        return build.generic(inputs, init, [*maps, ir.AffineMap.get_identity(len(kinds))], kinds, body)

    def _body(self, part: Part, at: Callable[[int], ir.Value], given: Sequence[ir.Value]) -> ir.Value:
        elements = []
        for read in part.reads:
            assert read.map is not None
            place = [self._index(e, at) for e in read.map.results]
            elements.append(tensor.ExtractOp(read.value, place).result)
        assert part.body is not None
        (value,) = inlined(part.body, [*given, *elements], 1)
        return value

    def _index(self, expression: ir.AffineExpr, at: Callable[[int], ir.Value]) -> ir.Value:
        factors, constant = linear(expression)
        total = build.constant_index(constant)
        for axis, factor in enumerate(factors):
            if factor:
                total = arith.addi(total, arith.muli(at(axis), build.constant_index(factor)))
        return total

    def _map(self, axes: int) -> ir.AffineMap:
        return ir.AffineMap.get(SPACE, 0, [ir.AffineDimExpr.get(a) for a in range(axes)])

    def _type(self, shape: Sequence[int], element: ir.Type) -> ir.RankedTensorType:
        return ir.RankedTensorType.get(shape, element)

    def _dynamic(self, type_: ir.Type) -> list[ir.Value]:
        shape = ir.RankedTensorType(type_).shape
        return [
            size for size, n in zip(self.sizes, shape, strict=False) if n == ir.ShapedType.get_dynamic_size()
        ]
