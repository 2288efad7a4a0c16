"""``tm_tensor.scatter``: updates go to their places in place; those for one place are applied in order."""

from __future__ import annotations

from collections.abc import Callable

from torch_mlir import ir
from torch_mlir.dialects import arith, scf

from spikingbrain.backend_maca.lower.bodies import copy_body
from spikingbrain.backend_maca.lower.index import index, less
from spikingbrain.backend_maca.lower.per_element import BLOCK, launch_per_element, unique_name
from spikingbrain.passes.kernels import builders
from spikingbrain.passes.wave_kernels.builders import kernel, memref_of, thread

FEW = 32  # updates of which each element looks for its equals itself, without a launch for that
_EARLIER, _NEXT = 0, 1  # rows of the links


def lower_scatter(op: ir.Operation) -> None:
    """Replaces a scatter by a launch, one thread per element of the updates.

    Where indices may repeat, the thread of the first update for a place applies all of them, in order, so that the
    result does not depend on timing; a launch before it finds for each update the next one for its place, in time that
    grows as the square of their number, not of their elements. Updates for places outside the tensor are dropped.
    """
    updates, indices, original = op.operands
    axes = [int(a) for a in ir.DenseI64ArrayAttr(op.attributes["dimension_map"])]
    unique = ir.BoolAttr(op.attributes["unique_indices"]).value
    number_of = ir.RankedTensorType(indices.type).shape[0]
    few = 0 <= number_of <= FEW
    region = op.regions[0].blocks[0]

    def body(at: list[ir.Value], buffers: list[ir.Value]) -> None:
        new, where, target, *links = buffers
        number, *rest = at
        mine = _place(where, number)
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

        if unique or number_of == 1:
            builders.when(inside, lambda: apply(number))
            return
        count = builders.size(where, 0)

        def follow(k: ir.Value) -> ir.Value:
            apply(k)
            return arith.index_cast(ir.IndexType.get(), builders.get(links[0], [_NEXT, k]))

        def apply_if_same(k: ir.Value) -> None:
            builders.when(_same(_place(where, k), mine), lambda: apply(k))

        def apply_all() -> None:
            if few:
                builders.loop(number, count, 1, apply_if_same)
            else:
                _while_below(count, number, follow)

        if few:
            earlier, _ = _equals(where, number)
        else:
            earlier = builders.get(links[0], [_EARLIER, number])
        first = arith.cmpi(arith.CmpIPredicate.eq, earlier, arith.constant(earlier.type, 0))
        builders.when(arith.andi(inside, first), apply_all)

    with ir.InsertionPoint(op), op.location:
        inputs = [updates, indices, original]
        if not (unique or few):
            inputs.append(_links(indices))
        made = launch_per_element("scatter", updates, inputs, [original.type], body, [2])
    op.results[0].replace_all_uses_with(made[0])
    op.erase()


def _links(indices: ir.Value) -> ir.Value:
    """Emits the launch that finds for each update whether an earlier one has its place, and the next that has."""
    i64 = ir.IntegerType.get_signless(64)
    result = ir.RankedTensorType.get([2, ir.RankedTensorType(indices.type).shape[0]], i64)

    def fill(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        where, links = buffers
        number = arith.addi(arith.muli(block[0], index(BLOCK)), thread())

        def find() -> None:
            for row, found in zip((_EARLIER, _NEXT), _equals(where, number), strict=True):
                builders.put(arith.index_cast(i64, found), links, [row, number])

        builders.when(less(number, builders.size(where, 0)), find)

    name = unique_name("scatter_links")
    kernel(name, [memref_of(indices.type), memref_of(result)], BLOCK, fill)
    count = builders.size(indices, 0)
    grid = [arith.ceildivsi(count, index(BLOCK)), index(1), index(1)]
    sizes = [count] if result.is_dynamic_dim(1) else []
    return builders.launch(name, result, grid, [indices], sizes).result


def _equals(where: ir.Value, number: ir.Value) -> list[ir.Value]:
    """Returns how many earlier updates have the place of one, and the number of the next that has, or of all."""
    mine, count = _place(where, number), builders.size(where, 0)

    def look(k: ir.Value, earlier: ir.Value, following: ir.Value) -> list[ir.Value]:
        same = _same(_place(where, k), mine)
        before = arith.andi(same, less(k, number))
        behind = arith.andi(same, less(number, k))
        return [
            arith.addi(earlier, arith.select(before, index(1), index(0))),
            arith.select(behind, arith.minsi(following, k), following),
        ]

    return builders.loop(0, count, 1, look, [index(0), count])


def _place(where: ir.Value, k: ir.Value) -> list[ir.Value]:
    """Returns the indices of an update."""
    axes = ir.MemRefType(where.type).shape[1]
    return [arith.index_cast(ir.IndexType.get(), builders.get(where, [k, j])) for j in range(axes)]


def _same(a: list[ir.Value], b: list[ir.Value]) -> ir.Value:
    equal = [arith.cmpi(arith.CmpIPredicate.eq, x, y) for x, y in zip(a, b, strict=True)]
    return builders.folded(arith.andi, equal)


def _while_below(limit: ir.Value, start: ir.Value, body: Callable[[ir.Value], ir.Value]) -> None:
    """Emits a loop that goes on from ``start`` to what ``body`` returns, as long as that is below a limit."""
    kind = ir.IndexType.get()
    loop = scf.WhileOp([kind], [start])
    before, after = (region.blocks.append(kind) for region in (loop.before, loop.after))
    with ir.InsertionPoint(before):
        scf.ConditionOp(less(before.arguments[0], limit), [before.arguments[0]])
    with ir.InsertionPoint(after):
        scf.YieldOp([body(after.arguments[0])])


def _address(
    mine: list[ir.Value], axes: list[int], rest: list[ir.Value], rank: int, update_rank: int
) -> list[ir.Value]:
    """Returns where an update's element goes: indexed axes, and the trailing ones that a whole slice has."""
    missing = rank - (update_rank - 1)  # leading axes that the update does not have
    at: list[ir.Value] = [*[index(0)] * missing, *rest]
    for axis, value in zip(axes, mine, strict=True):
        at[axis] = value if axis < missing else arith.addi(value, at[axis])
    return at
