"""Which axes of the tensors in a loop's body are the same axis: the space in which the body is pointwise.

Axes that a linalg op walks over together are joined; what remains apart are the axes of the space. Axes of size 1 are no axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch_mlir import ir

from spikingbrain.passes import torch_ir

Key: TypeAlias = tuple[Any, int]

GENERIC, FILL, TRANSPOSE, BROADCAST, EMPTY, CONSTANT = (
    "linalg.generic",
    "linalg.fill",
    "linalg.transpose",
    "linalg.broadcast",
    "tensor.empty",
    "arith.constant",
)
RESHAPES = ("tensor.expand_shape", "tensor.collapse_shape")


class NotPointwise(Exception):
    """Raised for a body that is not elementwise in one space, with the reason."""


@dataclass
class Axes:
    """The axes of a body's tensors.

    ``Use`` keys, (op, operand number), stand for tensors from outside the loop: each use may lie differently in the space.
    """

    _parent: dict[Key, Key] = field(default_factory=dict)
    space: list[Key] = field(default_factory=list)

    def find(self, key: Key) -> Key:
        while (above := self._parent.get(key, key)) != key:
            key = above
        return key

    def join(self, a: Key, b: Key) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parent[a] = b

    def join_tensors(self, a: Any, b: Any, type_: ir.Type) -> None:
        for axis in _long_axes(type_):
            self.join((a, axis), (b, axis))

    def place(self, name: Any, type_: ir.Type) -> list[int | None]:
        """Returns for each axis of a tensor which one of the space it is, None where its size is 1."""
        long = _long_axes(type_)
        keys = [self.find((name, axis)) for axis in long]
        if missing := [k for k in keys if k not in self.space]:
            raise NotPointwise(
                f"an axis is none of a carried tensor ({len(missing)} of {ir.RankedTensorType(type_)})"
            )
        if len(set(keys)) != len(keys):
            raise NotPointwise("a tensor is read along a diagonal")
        found = dict(zip(long, map(self.space.index, keys), strict=True))
        return [found.get(axis) for axis in range(len(ir.RankedTensorType(type_).shape))]


def find_axes(block: ir.Block, carried: int) -> Axes:
    """Returns the axes of a time loop's body, the space being that of its largest carried value.

    Raises NotPointwise for ops that are not elementwise.
    """
    axes = Axes()
    *ops, terminator = [o.operation for o in block.operations]
    for op in ops:
        _join_op(axes, op, block)
    arguments = list(block.arguments)[:carried]
    for i, argument in enumerate(arguments):
        yielded = terminator.operands[i]
        axes.join_tensors(argument, name_of(yielded, block, terminator, i), argument.type)
    if not arguments:
        raise NotPointwise("nothing is carried")
    largest = max(arguments, key=lambda a: len(_long_axes(a.type)))
    axes.space = [axes.find((largest, axis)) for axis in _long_axes(largest.type)]
    if len(set(axes.space)) != len(axes.space):
        raise NotPointwise("a carried tensor is mixed with its transpose")
    _align(axes, block, terminator, largest)
    return axes


def _align(axes: Axes, block: ir.Block, terminator: ir.Operation, largest: ir.Value) -> None:
    """Lays carried and stacked tensors that have nothing to do with the largest one over it, where the sizes agree."""
    sizes = [ir.RankedTensorType(largest.type).shape[a] for a in _long_axes(largest.type)]
    named = [(a, a.type) for a in block.arguments]
    named += [(name_of(v, block, terminator, i), v.type) for i, v in enumerate(terminator.operands)]
    for name, type_ in named:
        long = _long_axes(type_)
        keys = [axes.find((name, axis)) for axis in long]
        own = [ir.RankedTensorType(type_).shape[a] for a in long]
        if own == sizes and min(own, default=0) >= 0 and not set(keys) & set(axes.space):
            for key, place in zip(keys, axes.space, strict=True):
                axes.join(key, place)
            axes.space = [axes.find(place) for place in axes.space]


def name_of(value: ir.Value, block: ir.Block, user: ir.Operation, operand: int) -> Any:
    """Returns what stands for a tensor among the axes: itself if the body makes it, else its use."""
    return value if is_inside(value, block) else (user, operand)


def is_inside(value: ir.Value, block: ir.Block) -> bool:
    owner = value.owner
    around = owner if isinstance(owner, ir.Block) else owner.operation.block
    return bool(around == block)


def maps_of(op: ir.Operation) -> list[ir.AffineMap]:
    return [attribute.value for attribute in op.attributes["indexing_maps"]]


def iterators(op: ir.Operation) -> list[str]:
    return [str(a).split("<")[1].rstrip(">") for a in op.attributes["iterator_types"]]


def inputs_of(op: ir.Operation) -> list[ir.Value]:
    """Returns the inputs of a linalg op, its initial results left out."""
    return list(op.operands)[: len(op.operands) - len(op.results)]


def uniform(value: ir.Value) -> ir.Attribute | None:
    """Returns the constant that every element of a tensor is."""
    op = torch_ir.defining(value)
    if op is None:
        return None
    if op.name == FILL:
        source = torch_ir.defining(op.operands[0], CONSTANT)
        return source.attributes["value"] if source else None
    if op.name == CONSTANT and isinstance(value.type, ir.RankedTensorType):
        elements = ir.DenseElementsAttr(op.attributes["value"])
        return elements.get_splat_value() if elements.is_splat else None
    return None


def _join_op(axes: Axes, op: ir.Operation, block: ir.Block) -> None:
    if op.name in (EMPTY, FILL, CONSTANT):
        return
    if op.name == GENERIC:
        _join_generic(axes, op, block)
    elif op.name == TRANSPOSE:
        order = list(ir.DenseI64ArrayAttr(op.attributes["permutation"]))
        source = name_of(op.operands[0], block, op, 0)
        for axis, of in enumerate(order):
            axes.join((op.results[0], axis), (source, of))
    elif op.name == BROADCAST:
        added = set(ir.DenseI64ArrayAttr(op.attributes["dimensions"]))
        rank = len(ir.RankedTensorType(op.results[0].type).shape)
        source = name_of(op.operands[0], block, op, 0)
        for of, axis in enumerate(a for a in range(rank) if a not in added):
            axes.join((op.results[0], axis), (source, of))
    elif op.name == "tensor.cast":
        axes.join_tensors(name_of(op.operands[0], block, op, 0), op.results[0], op.results[0].type)
    elif op.name in RESHAPES:
        _join_reshape(axes, op, block)
    else:
        raise NotPointwise(f"{op.name} is not elementwise")


def _join_generic(axes: Axes, op: ir.Operation, block: ir.Block) -> None:
    if set(iterators(op)) - {"parallel"}:
        raise NotPointwise("it reduces along an axis")
    names: list[Any] = [name_of(v, block, op, i) for i, v in enumerate(inputs_of(op))]
    for name, value, map_ in zip(
        [*names, *op.results], [*inputs_of(op), *op.results], maps_of(op), strict=True
    ):
        long = set(_long_axes(value.type))
        for axis, expression in enumerate(map_.results):
            if isinstance(expression, ir.AffineDimExpr):
                if axis in long:
                    axes.join((name, axis), (op, expression.position))
            elif axis in long or not isinstance(expression, ir.AffineConstantExpr):
                raise NotPointwise(f"a tensor is read by {map_}")


def _join_reshape(axes: Axes, op: ir.Operation, block: ir.Block) -> None:
    """Joins the one long axis of each group; a reshape that merges or splits axes is none of points."""
    source, result = op.operands[0], op.results[0]
    groups = [[a.value for a in group] for group in op.attributes["reassociation"]]
    if op.name == "tensor.collapse_shape":
        many, one = (name_of(source, block, op, 0), source.type), (result, result.type)
    else:
        many, one = (result, result.type), (name_of(source, block, op, 0), source.type)
    long_many, long_one = set(_long_axes(many[1])), set(_long_axes(one[1]))
    for axis, group in enumerate(groups):
        long = [a for a in group if a in long_many]
        if len(long) > 1 or bool(long) != (axis in long_one):
            raise NotPointwise(f"{op.name} joins or splits axes")
        for a in long:
            axes.join((many[0], a), (one[0], axis))


def _long_axes(type_: ir.Type) -> Sequence[int]:
    return [axis for axis, n in enumerate(ir.RankedTensorType(type_).shape) if n != 1]
