"""Adaptive-threshold spiking in linear algebra, for every target: the reference of the kernels.

Integers stay integers: a product of a count and a code is made in i32, sums are i64. Counts too large for that, which only
rows clamped at the upper threshold have, and those that are no numbers go a second way, through floats.
"""

from __future__ import annotations

from collections.abc import Callable
from math import nan as NAN

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg, math, tensor

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes.dialect_spikes import LARGEST_CODE
from spikingbrain.passes.kernels.group_rows import known_expert
from spikingbrain.target import Target


def threshold(x: ir.Value, k: float, lower: float, upper: float) -> ir.Value:
    """Emits ``clamp(mean |x| / k, lower, upper)`` of every row of ``[M, K]``; returns ``[M]``.

    Sums are f64; code generators for GPUs without it make them f32.
    """
    channels = ir.RankedTensorType(x.type).shape[1]
    f64, f32 = ir.F64Type.get(), ir.F32Type.get()
    row, cell = _maps(2, [0], [0, 1])
    sums = build.generic(
        [x],
        _zeros(f64, x, 1),
        [cell, row],
        ["parallel", "reduction"],
        lambda value, total: arith.addf(total, arith.extf(f64, math.absf(value))),
    )

    def clamped(total: ir.Value, _: ir.Value) -> ir.Value:
        mean = arith.truncf(f32, arith.divf(total, arith.constant(f64, float(channels))))
        value = arith.divf(mean, arith.constant(f32, k))
        value = arith.maximumf(value, arith.constant(f32, lower))
        return arith.minimumf(value, arith.constant(f32, upper))

    (row,) = _maps(1, [0])
    return build.generic([sums], _empty(f32, x, 1), [row, row], ["parallel"], clamped)


def counts(x: ir.Value, thresholds: ir.Value) -> ir.Value:
    """Emits ``round_half_even(x / threshold)`` for ``[M, K]`` and ``[M]``."""
    cell, row = _maps(2, [0, 1], [0])
    return build.generic(
        [x, thresholds],
        _empty(ir.F32Type.get(), x, 2),
        [cell, row, cell],
        ["parallel", "parallel"],
        lambda value, by, _: math.roundeven(arith.divf(value, by)),
    )


def spike_linear(
    spikes: ir.Value,
    thresholds: ir.Value,
    weight: ir.Value,
    scale: ir.Value,
    bias: ir.Value | None,
    bits: int,
    target: Target,
    expert: ir.Value | None = None,
) -> ir.Value:
    """Emits the projection of counts ``[M, K]`` with thresholds ``[M]``; returns ``[M, N]``.

    ``weight`` is ``[N, K]`` of codes, ``scale`` ``[N, G]``, ``bias`` ``[N]``. Exact for counts below
    2**31 / 2**(bits - 1), and above as far as f64 is, on targets that have it. With experts ``[M]`` weight and scale are stacks
    ``[E, N, K]`` and ``[E, N, G]``, of which a row takes its expert's; NaN where there is none.
    """
    groups = ir.RankedTensorType(scale.type).shape[-1]
    f32, i32, i64 = ir.F32Type.get(), _integer(32), _integer(64)
    wide = ir.F64Type.get() if target.kind == "cpu" else f32
    limit = float(2**31 // LARGEST_CODE[bits])

    def is_small(count: ir.Value) -> ir.Value:
        return arith.cmpf(arith.CmpFPredicate.OLT, math.absf(count), arith.constant(f32, limit))

    def whole(count: ir.Value, _: ir.Value) -> ir.Value:
        return arith.fptosi(i32, arith.select(is_small(count), count, arith.constant(f32, 0.0)))

    def rest(count: ir.Value, _: ir.Value) -> ir.Value:
        value = arith.select(is_small(count), arith.constant(f32, 0.0), count)
        return value if wide == f32 else arith.extf(wide, value)

    def add_whole(count: ir.Value, code: ir.Value, total: ir.Value) -> ir.Value:
        return arith.addi(total, arith.extsi(i64, arith.muli(count, arith.extsi(i32, code))))

    def add_rest(count: ir.Value, code: ir.Value, total: ir.Value) -> ir.Value:
        return arith.addf(total, arith.mulf(count, arith.sitofp(wide, code)))

    grouped = _grouped(weight, groups)
    sums = _products(_grouped(_each(spikes, i32, whole), groups), grouped, expert, i64, add_whole)
    rests = _products(_grouped(_each(spikes, wide, rest), groups), grouped, expert, wide, add_rest)

    factors, of_factor, read = _table(scale, expert, 3, [1, 2])

    def scaled(total: ir.Value, other: ir.Value, factor: ir.Value, so_far: ir.Value) -> ir.Value:
        value = arith.addf(arith.sitofp(wide, total), other)
        value = value if wide == f32 else arith.truncf(f32, value)
        return arith.addf(so_far, arith.mulf(value, read(factor)))

    group, column = _maps(3, [0, 1, 2], [0, 1])
    y = build.generic(
        [sums, rests, factors],
        _zeros(f32, sums, 2),
        [group, group, of_factor, column],
        ["parallel", "parallel", "reduction"],
        scaled,
    )
    cell, row, column = _maps(2, [0, 1], [0], [1])
    inputs = [y, thresholds, *([] if bias is None else [bias])]

    def finished(value: ir.Value, by: ir.Value, *others: ir.Value) -> ir.Value:
        value = arith.mulf(value, by)
        return value if bias is None else arith.addf(value, others[0])

    maps = [cell, row, *([] if bias is None else [column]), cell]
    return build.generic(inputs, _empty(f32, y, 2), maps, ["parallel", "parallel"], finished)


def _products(
    spikes: ir.Value,
    weight: ir.Value,
    expert: ir.Value | None,
    kind: ir.Type,
    body: Callable[..., ir.Value],
) -> ir.Value:
    """Emits the products of ``[M, G, J]`` and ``[N, G, J]``, summed over J; returns ``[M, N, G]`` of ``kind``."""
    dynamic = ir.ShapedType.get_dynamic_size()
    m, groups, _ = ir.RankedTensorType(spikes.type).shape
    n = ir.RankedTensorType(weight.type).shape[-3]
    type_ = ir.RankedTensorType.get([m, n, groups], kind)
    init = _filled(type_, build.dynamic_sizes(spikes) if m == dynamic else [])
    codes, of_code, read = _table(weight, expert, 4, [1, 2, 3])
    of_count, result = _maps(4, [0, 2, 3], [0, 1, 2])
    return build.generic(
        [spikes, codes],
        init,
        [of_count, of_code, result],
        ["parallel"] * 3 + ["reduction"],
        lambda count, code, total: body(count, read(code), total),
    )


def _table(
    table: ir.Value, expert: ir.Value | None, dims: int, places: list[int]
) -> tuple[ir.Value, ir.AffineMap, Callable[[ir.Value], ir.Value]]:
    """Returns an input of a generic, its map, and what makes of its element the table's at loops ``places``.

    With experts ``[M]``, one for each step of loop 0, the table is the expert's of a stack; floats are NaN where there is none.
    """
    if expert is None:
        (place,) = _maps(dims, places)
        return table, place, lambda value: value
    type_ = ir.RankedTensorType(table.type)
    experts = type_.shape[0]
    zero, limit = build.constant_index(0), build.constant_index(experts)

    def read(number: ir.Value) -> ir.Value:
        e = known_expert(number, experts)
        exists = arith.cmpi(arith.CmpIPredicate.ult, e, limit)
        at = [arith.select(exists, e, zero), *(linalg.IndexOp(place).result for place in places)]
        value = tensor.extract(table, at)
        if not isinstance(type_.element_type, ir.F32Type):
            return value
        return arith.select(exists, value, arith.constant(type_.element_type, NAN))

    (row,) = _maps(dims, [0])
    return expert, row, read


def _each(value: ir.Value, kind: ir.Type, body: Callable[..., ir.Value]) -> ir.Value:
    """Emits a function of each element of ``[M, K]``."""
    (cell,) = _maps(2, [0, 1])
    return build.generic([value], _empty(kind, value, 2), [cell, cell], ["parallel"] * 2, body)


def _grouped(value: ir.Value, groups: int) -> ir.Value:
    """Returns ``[..., K]`` as ``[..., G, K / G]``."""
    ranked = ir.RankedTensorType(value.type)
    *rows, k = ranked.shape
    type_ = ir.RankedTensorType.get([*rows, groups, k // groups], ranked.element_type)
    axes = build.reassociation([*([d] for d in range(len(rows))), [len(rows), len(rows) + 1]])
    return tensor.ExpandShapeOp(type_, value, axes, build.dynamic_sizes(value), list(type_.shape)).result


def _empty(kind: ir.Type, like: ir.Value, rank: int) -> ir.Value:
    """Emits a tensor without content, of the first ``rank`` sizes of ``like``."""
    sizes = list(ir.RankedTensorType(like.type).shape)[:rank]
    type_ = ir.RankedTensorType.get(sizes, kind)
    dynamic = [build.size(like, d) for d, n in enumerate(sizes) if n == ir.ShapedType.get_dynamic_size()]
    return build.empty(type_, dynamic)


def _zeros(kind: ir.Type, like: ir.Value, rank: int) -> ir.Value:
    init = _empty(kind, like, rank)
    return _filled(init.type, build.dynamic_sizes(init))


def _filled(type_: ir.Type, sizes: list[ir.Value]) -> ir.Value:
    kind = ir.RankedTensorType(type_).element_type
    return build.filled(type_, sizes, 0 if isinstance(kind, ir.IntegerType) else 0.0)


def _maps(dims: int, *places: list[int]) -> list[ir.AffineMap]:
    return [ir.AffineMap.get(dims, 0, [ir.AffineDimExpr.get(d) for d in place]) for place in places]


def _integer(bits: int) -> ir.Type:
    return ir.IntegerType.get_signless(bits)
