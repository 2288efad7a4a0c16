"""Small builders for linalg on tensors; torch-mlir's Python bindings are verbose for these."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg, tensor


def constant_index(n: int) -> ir.Value:
    index = ir.IndexType.get()
    return arith.ConstantOp(index, ir.IntegerAttr.get(index, n)).result


def size(value: ir.Value, axis: int) -> ir.Value:
    """Returns the size of ``value`` along ``axis`` as an index."""
    n = ir.RankedTensorType(value.type).shape[axis]
    if n == ir.ShapedType.get_dynamic_size():
        return tensor.DimOp(value, constant_index(axis)).result
    return constant_index(n)


def dynamic_sizes(value: ir.Value) -> list[ir.Value]:
    """Returns the dynamic sizes of ``value``, in order."""
    shape = ir.RankedTensorType(value.type).shape
    return [size(value, d) for d, n in enumerate(shape) if n == ir.ShapedType.get_dynamic_size()]


def empty(type_: ir.Type, sizes: Sequence[ir.Value]) -> ir.Value:
    """Emits a tensor without content; ``sizes`` are its dynamic sizes."""
    ranked = ir.RankedTensorType(type_)
    return ir.Operation.create("tensor.empty", [ranked], list(sizes)).result


def filled(type_: ir.Type, sizes: Sequence[ir.Value], number: float) -> ir.Value:
    """Emits a tensor full of ``number``, an int for a tensor of integers."""
    element = ir.RankedTensorType(type_).element_type
    value = arith.constant(element, number)
    result: ir.Value = linalg.fill(value, outs=[empty(type_, sizes)])
    return result


def generic(
    inputs: Sequence[ir.Value],
    init: ir.Value,
    maps: Sequence[ir.AffineMap],
    iterators: Sequence[str],
    body: Callable[..., ir.Value],
) -> ir.Value:
    """Emits a linalg.generic with one result; ``body`` gets the scalars of the inputs, then of the result."""
    kinds = ir.ArrayAttr.get([ir.Attribute.parse(f"#linalg.iterator_type<{kind}>") for kind in iterators])
    op = linalg.GenericOp(
        [init.type], list(inputs), [init], ir.ArrayAttr.get([ir.AffineMapAttr.get(m) for m in maps]), kinds
    )
    elements = [ir.RankedTensorType(v.type).element_type for v in [*inputs, init]]
    block = op.regions[0].blocks.append(*elements)
    with ir.InsertionPoint(block):
        linalg.YieldOp([body(*block.arguments)])
    return op.results[0]


def is_half(type_: ir.Type) -> bool:
    """Tells whether a tensor's elements are floats of 16 bits."""
    return isinstance(ir.RankedTensorType(type_).element_type, ir.F16Type | ir.BF16Type)


def converted(value: ir.Value, element: ir.Type) -> ir.Value:
    """Returns a tensor of f16, bf16 or f32 with elements of another of these types: exact, or rounded to nearest even."""
    old = ir.RankedTensorType(value.type)
    if old.element_type == element:
        return value
    identity = ir.AffineMap.get_identity(old.rank)
    cast = arith.ExtFOp if element == ir.F32Type.get() else arith.TruncFOp
    init = empty(ir.RankedTensorType.get(old.shape, element), dynamic_sizes(value))
    return generic(
        [value], init, [identity] * 2, ["parallel"] * old.rank, lambda x, _: cast(element, x).result
    )


def flatten_leading(value: ir.Value) -> ir.Value:
    """Returns ``[..., K]`` as ``[M, K]``, collapsing every axis but the last (one axis is added to ``[K]``)."""
    ranked = ir.RankedTensorType(value.type)
    rank, dynamic = len(ranked.shape), ir.ShapedType.get_dynamic_size()
    if rank == 2:
        return value
    if rank == 1:
        type_ = ir.RankedTensorType.get([1, *ranked.shape], ranked.element_type)
        return tensor.ExpandShapeOp(type_, value, reassociation([[0, 1]]), [], list(type_.shape)).result
    rows = 1
    for n in ranked.shape[:-1]:
        rows = dynamic if dynamic in (n, rows) else rows * n
    type_ = ir.RankedTensorType.get([rows, ranked.shape[-1]], ranked.element_type)
    return tensor.CollapseShapeOp(type_, value, reassociation([list(range(rank - 1)), [rank - 1]])).result


def unflatten_leading(value: ir.Value, type_: ir.Type, like: ir.Value) -> ir.Value:
    """Undoes ``flatten_leading``: ``[M, N]`` as ``type_``, whose leading sizes are those of ``like``."""
    ranked = ir.RankedTensorType(type_)
    rank = len(ranked.shape)
    if rank == 2:
        return value
    if rank == 1:
        return tensor.CollapseShapeOp(ranked, value, reassociation([[0, 1]])).result
    sizes = [size(like, d) for d, n in enumerate(ranked.shape[:-1]) if n == ir.ShapedType.get_dynamic_size()]
    groups = reassociation([list(range(rank - 1)), [rank - 1]])
    return tensor.ExpandShapeOp(ranked, value, groups, sizes, list(ranked.shape)).result


def flatten(value: ir.Value) -> ir.Value:
    """Returns a tensor of any rank as ``[M]``."""
    ranked = ir.RankedTensorType(value.type)
    rank, dynamic = len(ranked.shape), ir.ShapedType.get_dynamic_size()
    if rank == 1:
        return value
    rows = dynamic if dynamic in ranked.shape else math.prod(ranked.shape)
    type_ = ir.RankedTensorType.get([rows], ranked.element_type)
    if rank == 0:
        return tensor.ExpandShapeOp(type_, value, reassociation([]), [], [1]).result
    return tensor.CollapseShapeOp(type_, value, reassociation([list(range(rank))])).result


def unflatten(value: ir.Value, type_: ir.Type, sizes: Sequence[ir.Value]) -> ir.Value:
    """Undoes ``flatten``: ``[M]`` as ``type_``, whose dynamic sizes are ``sizes``."""
    ranked = ir.RankedTensorType(type_)
    rank = len(ranked.shape)
    if rank == 1:
        return value
    if rank == 0:
        return tensor.CollapseShapeOp(ranked, value, reassociation([])).result
    groups = reassociation([list(range(rank))])
    return tensor.ExpandShapeOp(ranked, value, groups, list(sizes), list(ranked.shape)).result


def reassociation(groups: Sequence[Sequence[int]]) -> ir.ArrayAttr:
    """Returns the grouping of axes that collapse_shape and expand_shape take."""
    i64 = ir.IntegerType.get_signless(64)
    return ir.ArrayAttr.get([ir.ArrayAttr.get([ir.IntegerAttr.get(i64, d) for d in g]) for g in groups])
