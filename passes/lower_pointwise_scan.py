"""lower-pointwise-scan: pointwise scans become one kernel launch, or a loop over time where there is no kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg, tensor

from spikingbrain.passes import dialect_scans, torch_ir
from spikingbrain.passes import linalg_build as build
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.dialect_scans import PointwiseScan, affine_map, dims


@dataclass(frozen=True)
class LowerPointwiseScan:
    """Lowers ``spikingbrain_control.pointwise_scan``.

    In: the op on builtin tensors. Out: with vector or wave kernels a launch that streams every tensor once; without, a
    ``time_loop`` around one linalg op, its scanned tensors brought to time first.
    """

    name: ClassVar[str] = "lower-pointwise-scan"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, dialect_scans.NAME):
            with ir.InsertionPoint(op), op.location:
                values, how = _lower(PointwiseScan(op), context)
            for old, new in zip(op.results, values, strict=True):
                old.replace_all_uses_with(new)
            context.record(self, "lowered", op, how)
            op.erase()


def _lower(scan: PointwiseScan, context: PassContext) -> tuple[list[ir.Value], str]:
    if context.target.vector_bits:
        from spikingbrain.passes.kernels.scan import emit_pointwise_scan, has_kernel

        if has_kernel(scan):
            return emit_pointwise_scan(scan, context.target), "kernel"
    elif context.target.wave_kernels:
        from spikingbrain.passes.wave_kernels import scan as waves

        return waves.emit_pointwise_scan(scan), "kernel"
    return _as_time_loop(scan), "time_loop"


def _as_time_loop(scan: PointwiseScan) -> list[ir.Value]:
    """Emits a loop over time around one linalg op; returns the final and the stacked values."""
    sizes, maps = scan.sizes(), [dims(m) for m in scan.maps]
    carried, first, last = len(scan.initial), len(scan.initial) + len(scan.scanned), len(scan.op.operands)
    space = list(range(1, scan.rank + 1))
    in_time = [
        _time_first(v, place, backwards)
        for v, place, backwards in zip(scan.scanned, maps[carried:first], scan.backwards, strict=False)
    ]
    places = [
        *maps[:carried],
        *([p for p in place if p != 0] for place in maps[carried:first]),
        *maps[first:last],
    ]
    pieces = []
    for result, place in zip(scan.stacked, maps[last:], strict=True):
        ranked = ir.RankedTensorType(result.type)
        size_of = dict(zip(place, ranked.shape, strict=True))
        pieces.append((size_of[0], ir.RankedTensorType.get([size_of[d] for d in space], ranked.element_type)))
    stacks = [ir.RankedTensorType.get([steps, *piece.shape], piece.element_type) for steps, piece in pieces]
    loop = time_loop(scan.initial, in_time, stacks)
    with ir.InsertionPoint(loop.regions[0].blocks[0]):
        inputs = [*loop.regions[0].blocks[0].arguments, *scan.invariants]
        yielded = [*(v.type for v in scan.initial), *(piece for _, piece in pieces)]
        dialect_scans.close(
            _step(scan, inputs, places, yielded, [*maps[:carried], *[space] * len(pieces)], sizes)
        )
    results = list(loop.results)
    for i, (old, place) in enumerate(zip(scan.stacked, maps[last:], strict=True)):
        backwards = scan.backwards[len(in_time) + i]
        results[carried + i] = _in_place(results[carried + i], old.type, place, backwards, sizes)
    return results


def time_loop(
    initial: Sequence[ir.Value], scanned: Sequence[ir.Value], stacks: Sequence[ir.Type], reverse: bool = False
) -> ir.Operation:
    """Emits a ``time_loop`` with an empty body, whose block has its arguments."""
    types = [ir.RankedTensorType(v.type) for v in scanned]
    slices = [ir.RankedTensorType.get(t.shape[1:], t.element_type) for t in types]
    loop = ir.Operation.create(
        "spikingbrain_control.time_loop",
        [*(v.type for v in initial), *stacks],
        [*initial, *scanned],
        {
            "carried": ir.IntegerAttr.get(ir.IntegerType.get_signless(64), len(initial)),
            "reverse": ir.BoolAttr.get(reverse),
        },
        regions=1,
    )
    arguments = [*(v.type for v in initial), *slices]
    loop.regions[0].blocks.append(*arguments, arg_locs=[loop.location] * len(arguments))
    return loop


def _step(
    scan: PointwiseScan,
    inputs: Sequence[ir.Value],
    places: Sequence[Sequence[int | None]],
    types: Sequence[ir.Type],
    results: Sequence[Sequence[int | None]],
    sizes: Sequence[ir.Value],
) -> list[ir.Value]:
    """Emits one step over the space, an op for each result.

    In one op with all of them IREE 3.13 wrote booleans into the memory of the integers next to them.
    """
    in_space = [[None if p is None else p - 1 for p in place] for place in places]
    terminator = scan.body.operations[len(scan.body.operations) - 1].operation
    made = []
    for type_, place, wanted in zip(types, results, terminator.operands, strict=True):
        out = build.empty(type_, _dynamic(ir.RankedTensorType(type_), place, sizes))
        maps = [affine_map(scan.rank, p) for p in in_space]
        maps.append(affine_map(scan.rank, [None if p is None else p - 1 for p in place]))

        def element(*arguments: ir.Value, wanted: ir.Value = wanted) -> ir.Value:
            return _computed(wanted, dict(zip(scan.body.arguments, arguments, strict=False)))

        made.append(build.generic(inputs, out, maps, ["parallel"] * scan.rank, element))
    return made


def _computed(wanted: ir.Value, values: dict[ir.Value, ir.Value]) -> ir.Value:
    """Emits copies of the ops that ``wanted`` takes, given its arguments."""
    waiting = [wanted]
    while waiting:
        value = waiting[-1]
        if value in values:
            waiting.pop()
            continue
        op = value.owner.operation
        missing = [v for v in op.operands if v not in values]
        waiting += missing
        if not missing:
            made = op.clone()
            for i, operand in enumerate(op.operands):
                made.operands[i] = values[operand]
            values.update(zip(op.results, made.results, strict=True))
    return values[wanted]


def _time_first(value: ir.Value, place: Sequence[int | None], backwards: bool) -> ir.Value:
    """Returns a scanned tensor with time as its first axis, running forward."""
    axis = place.index(0)
    order = [axis, *(a for a in range(len(place)) if a != axis)]
    return moved(value, order, backwards, 0)


def _in_place(
    value: ir.Value, type_: ir.Type, place: Sequence[int | None], backwards: bool, sizes: Sequence[ir.Value]
) -> ir.Value:
    """Returns a stack, whose axes are (t, space), with the axes of its result."""
    order = [p for p in place if p is not None]
    value = moved(value, order, backwards, order.index(0))
    ranked = ir.RankedTensorType(type_)
    if len(order) == len(place):
        return value
    groups: list[list[int]] = []
    for axis, p in enumerate(place):  # axes of size 1 go with a neighbour
        if groups and (p is None or all(place[a] is None for a in groups[-1])):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    wanted = _dynamic(ranked, place, sizes)
    return tensor.ExpandShapeOp(ranked, value, build.reassociation(groups), wanted, list(ranked.shape)).result


def moved(value: ir.Value, order: Sequence[int], backwards: bool, time: int) -> ir.Value:
    """Returns ``value`` with its axes in ``order``; the new axis ``time`` runs the other way where ``backwards``."""
    if list(order) == sorted(order) and not backwards:
        return value
    ranked, rank = ir.RankedTensorType(value.type), len(order)
    type_ = ir.RankedTensorType.get([ranked.shape[a] for a in order], ranked.element_type)
    dynamic = ir.ShapedType.get_dynamic_size()
    out = build.empty(type_, [build.size(value, a) for a in order if ranked.shape[a] == dynamic])
    last = arith.subi(build.size(value, order[time]), build.constant_index(1))

    def element(_: ir.Value) -> ir.Value:
        at: list[ir.Value] = [last] * rank
        for axis, source in enumerate(order):
            here = linalg.IndexOp(axis).result
            at[source] = arith.subi(last, here) if backwards and axis == time else here
        return tensor.ExtractOp(value, at).result

    return build.generic([], out, [ir.AffineMap.get_identity(rank)], ["parallel"] * rank, element)


def _dynamic(
    type_: ir.RankedTensorType, place: Sequence[int | None], sizes: Sequence[ir.Value]
) -> list[ir.Value]:
    dynamic = ir.ShapedType.get_dynamic_size()
    return [sizes[p] for p, n in zip(place, type_.shape, strict=True) if n == dynamic and p is not None]
