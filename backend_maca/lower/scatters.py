"""``tm_tensor.scatter``: updates go to their places in place; those for one place are applied in order."""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.backend_maca.lower.bodies import copy_body
from spikingbrain.backend_maca.lower.index import index, less
from spikingbrain.backend_maca.lower.per_element import launch_per_element
from spikingbrain.passes.kernels import builders


def lower_scatter(op: ir.Operation) -> None:
    """Replaces a scatter by a launch, one thread per element of the updates.

    Where indices may repeat, the thread of the first update for a place applies all of them, in order, so that the
    result does not depend on timing. Updates for places outside the tensor are dropped.
    """
    updates, indices, original = op.operands
    axes = [int(a) for a in ir.DenseI64ArrayAttr(op.attributes["dimension_map"])]
    unique = ir.BoolAttr(op.attributes["unique_indices"]).value
    region = op.regions[0].blocks[0]

    def body(at: list[ir.Value], buffers: list[ir.Value]) -> None:
        new, where, target = buffers
        number, *rest = at

        def place(k: ir.Value) -> list[ir.Value]:
            found = [builders.get(where, [k, j]) for j in range(len(axes))]
            return [arith.index_cast(ir.IndexType.get(), v) for v in found]

        def same(a: list[ir.Value], b: list[ir.Value]) -> ir.Value:
            equal = [arith.cmpi(arith.CmpIPredicate.eq, x, y) for x, y in zip(a, b, strict=True)]
            return builders.folded(arith.andi, equal)

        mine = place(number)
        inside = builders.folded(
            arith.andi,
            [
                arith.andi(
                    arith.cmpi(arith.CmpIPredicate.sge, v, index(0)), less(v, builders.size(target, axis))
                )
                for v, axis in zip(mine, axes, strict=True)
            ],
        )
        to = _address(mine, axes, rest, ir.MemRefType(target.type).rank, ir.MemRefType(new.type).rank)

        def apply(k: ir.Value) -> None:
            value = builders.get(new, [k, *rest])
            (made,) = copy_body(region, [value, builders.get(target, to)])
            builders.put(made, target, to)

        if unique:
            builders.when(inside, lambda: apply(number))
            return
        zero = index(0)
        earlier = builders.loop(
            0,
            number,
            1,
            lambda k, seen: [arith.addi(seen, arith.select(same(place(k), mine), index(1), zero))],
            [zero],
        )[0]
        first = arith.andi(inside, arith.cmpi(arith.CmpIPredicate.eq, earlier, zero))
        count = builders.size(where, 0)

        def apply_all() -> None:
            builders.loop(number, count, 1, lambda k: builders.when(same(place(k), mine), lambda: apply(k)))

        builders.when(first, apply_all)

    with ir.InsertionPoint(op), op.location:
        made = launch_per_element(
            "scatter", updates, [updates, indices, original], [original.type], body, [2]
        )
    op.results[0].replace_all_uses_with(made[0])
    op.erase()


def _address(
    mine: list[ir.Value], axes: list[int], rest: list[ir.Value], rank: int, update_rank: int
) -> list[ir.Value]:
    """Returns where an update's element goes: indexed axes, and the trailing ones that a whole slice has."""
    missing = rank - (update_rank - 1)  # leading axes that the update does not have
    at: list[ir.Value] = [*[index(0)] * missing, *rest]
    for axis, value in zip(axes, mine, strict=True):
        at[axis] = value if axis < missing else arith.addi(value, at[axis])
    return at
