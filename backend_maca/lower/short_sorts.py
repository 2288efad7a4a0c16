"""``tm_tensor.sort`` along a short axis, in linear algebra: one kernel may hold it and what is around it.

Each element's place is the number of those that come before it. The choice of a few experts, a sorted axis that is only read at
its front, computes what is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg

from spikingbrain.backend_maca.lower.order import comes_before, looked_at, true
from spikingbrain.passes import linalg_build as build


def lower_short_sort(op: ir.Operation, axis: int) -> None:
    """Replaces a sort along an axis of known length, in time that grows as the square of it."""
    with ir.InsertionPoint(op), op.location:
        places = _places(op, axis)
        for value, result in zip(op.operands, op.results, strict=True):
            if list(result.uses):
                fronts = _fronts(op, result, axis)
                made = _at_places(value, places, axis, fronts[0].results[0].type if fronts else result.type)
                for front in fronts:
                    front.results[0].replace_all_uses_with(made)
                result.replace_all_uses_with(made)
    op.erase()


def _places(op: ir.Operation, axis: int) -> ir.Value:
    """Emits where every element belongs, i32: behind all that come before it, of equals behind the earlier ones."""
    keys = [v for v, is_key in zip(op.operands, looked_at(op), strict=True) if is_key]
    kind = ir.RankedTensorType(op.operands[0].type)
    i32 = ir.IntegerType.get_signless(32)
    init = build.filled(ir.RankedTensorType.get(kind.shape, i32), build.dynamic_sizes(op.operands[0]), 0)
    mine, theirs = _maps(kind.rank, axis)

    def pairs(values: Sequence[ir.Value]) -> list[ir.Value | None]:
        given = iter(values)
        return [next(given) if is_key else None for is_key in looked_at(op)]

    def body(*arguments: ir.Value) -> ir.Value:
        a, b, so_far = pairs(arguments[: len(keys)]), pairs(arguments[len(keys) : -1]), arguments[-1]
        here, there = linalg.IndexOp(axis).result, linalg.IndexOp(kind.rank).result
        earlier = arith.cmpi(arith.CmpIPredicate.slt, there, here)
        equal = arith.andi(earlier, arith.xori(comes_before(op, a, b), true()))
        first = arith.ori(comes_before(op, b, a), equal)
        return arith.addi(so_far, arith.extui(i32, first))

    maps = [*[mine] * len(keys), *[theirs] * len(keys), mine]
    return build.generic([*keys, *keys], init, maps, ["parallel"] * kind.rank + ["reduction"], body)


def _at_places(value: ir.Value, places: ir.Value, axis: int, type_: ir.Type) -> ir.Value:
    """Emits what is at the first places: for each, the element that belongs there."""
    kind = ir.RankedTensorType(type_)
    number = 0 if isinstance(kind.element_type, ir.IntegerType) else 0.0
    mine, theirs = _maps(kind.rank, axis)

    def body(element: ir.Value, place: ir.Value, found: ir.Value) -> ir.Value:
        here = arith.index_cast(place.type, linalg.IndexOp(axis).result)
        return arith.select(arith.cmpi(arith.CmpIPredicate.eq, place, here), element, found)

    init = build.filled(kind, build.dynamic_sizes(value), number)
    iterators = ["parallel"] * kind.rank + ["reduction"]
    return build.generic([value, places], init, [theirs, theirs, mine], iterators, body)


def _maps(rank: int, axis: int) -> tuple[ir.AffineMap, ir.AffineMap]:
    """Returns where an element lies, and the one that it is compared with: the last loop runs along the axis."""
    loops = [ir.AffineDimExpr.get(d) for d in range(rank + 1)]
    theirs = [loops[rank] if d == axis else loops[d] for d in range(rank)]
    return ir.AffineMap.get(rank + 1, 0, loops[:rank]), ir.AffineMap.get(rank + 1, 0, theirs)


def _fronts(op: ir.Operation, result: ir.Value, axis: int) -> list[ir.Operation]:
    """Returns the slices that take the front of a sorted axis, all alike, if nothing else reads it."""
    users = [use.owner.operation for use in result.uses]
    slices = [user for user in users if user.name == "tensor.extract_slice"]
    if len({str(s.results[0].type) for s in slices}) != 1 or not all(_is_front(op, s, axis) for s in slices):
        return []
    others = [user for user in users if user.name != "tensor.extract_slice"]
    return (
        slices
        if all(user.name == "tensor.dim" and _axis(user) not in (None, axis) for user in others)
        else []
    )


def _is_front(op: ir.Operation, piece: ir.Operation, axis: int) -> bool:
    """Returns whether a slice of a sort's result is whole but along the axis, and begins with it."""
    offsets, sizes, strides = (
        list(ir.DenseI64ArrayAttr(piece.attributes[f"static_{n}"])) for n in ("offsets", "sizes", "strides")
    )
    source = ir.RankedTensorType(piece.operands[0].type)
    if (
        any(offsets)
        or any(n != 1 for n in strides)
        or ir.RankedTensorType(piece.results[0].type).rank != source.rank
    ):
        return False
    given = iter(list(piece.operands)[1:])
    found = [n if n >= 0 else _size_of(next(given).owner, [*op.operands, *op.results]) for n in sizes]
    wanted = [n if n >= 0 else f"axis {d}" for d, n in enumerate(source.shape)]
    return (
        found[:axis] + found[axis + 1 :] == wanted[:axis] + wanted[axis + 1 :] and found[axis] == sizes[axis]
    )


def _size_of(owner: ir.Operation | ir.Block, values: list[ir.Value]) -> str:
    """Returns in words of which axis of tensors that are alike something is the size."""
    is_dim = not isinstance(owner, ir.Block) and owner.name == "tensor.dim"
    return f"axis {_axis(owner)}" if is_dim and owner.operands[0] in values else ""


def _axis(dim: ir.Operation) -> int | None:
    owner = dim.operands[1].owner
    return None if isinstance(owner, ir.Block) else ir.IntegerAttr(owner.attributes["value"]).value
