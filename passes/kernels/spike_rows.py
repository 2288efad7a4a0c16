"""Rows of a weight that is packed for dot products: the vectors of tokens, where the head's codes are their table."""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg, tensor

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes.kernels.spike_dot import Dot
from spikingbrain.passes.wave_kernels.spike_codes import Codes

_UNSIGNED_LESS = 6


def emit_rows_of_words(ids: ir.Value, packed: ir.Value, rows: int, type_: ir.Type, codes: Codes) -> ir.Value:
    """Returns the same as ``emit_rows`` for a weight that wave kernels read."""
    result = ir.RankedTensorType(type_)
    rank, index, element = len(result.shape), ir.IndexType.get(), result.element_type
    zero, count, width = (build.constant_index(n) for n in (0, rows, codes.block))
    dims = [ir.AffineDimExpr.get(d) for d in range(rank)]
    maps = [ir.AffineMap.get(rank, 0, dims[:-1]), ir.AffineMap.get(rank, 0, dims)]

    def body(token: ir.Value, _: ir.Value) -> ir.Value:
        row = arith.index_cast(index, token)
        inside = arith.cmpi(arith.CmpIPredicate.ult, row, count)
        row = arith.select(inside, row, zero)
        channel = linalg.IndexOp(rank - 1).result
        panel, column = arith.divui(row, width), arith.remui(row, width)
        code = codes.code_at(lambda at: tensor.extract(packed, at), panel, channel, column)
        return arith.select(inside, arith.trunci(element, code), arith.constant(element, 0))

    init = build.empty(result, build.dynamic_sizes(ids))
    return build.generic([ids], init, maps, ["parallel"] * rank, body)


def emit_rows(ids: ir.Value, packed: ir.Value, rows: int, type_: ir.Type, dot: Dot) -> ir.Value:
    """Returns the codes ``[..., K]`` of the rows ``ids [...]`` of a weight ``[rows, K]`` that ``dot.recipe()`` packed.

    A row for an id outside ``0 .. rows - 1`` is zero. Each code is read alone: a row is spread over its panel, a ``width``
    of it in every step.
    """
    result = ir.RankedTensorType(type_)
    rank, index, element = len(result.shape), ir.IndexType.get(), result.element_type
    numbers = {n: build.constant_index(n) for n in {0, 2, rows, dot.block, dot.lanes, dot.width}}
    dims = [ir.AffineDimExpr.get(d) for d in range(rank)]
    maps = [ir.AffineMap.get(rank, 0, dims[:-1]), ir.AffineMap.get(rank, 0, dims)]

    def split(value: ir.Value, by: int) -> tuple[ir.Value, ir.Value]:
        return arith.DivUIOp(value, numbers[by]).result, arith.RemUIOp(value, numbers[by]).result

    def number(value: int) -> ir.Value:
        signed = (value + 128) % 256 - 128
        return arith.ConstantOp(element, ir.IntegerAttr.get(element, signed)).result

    def body(token: ir.Value, _: ir.Value) -> ir.Value:
        row = arith.IndexCastOp(index, token).result
        inside = arith.CmpIOp(_UNSIGNED_LESS, row, numbers[rows]).result
        panel, column = split(arith.SelectOp(inside, row, numbers[0]).result, dot.block)
        register, lane = split(column, dot.lanes)
        step, part = split(linalg.IndexOp(rank - 1).result, dot.width)
        step, half = split(step, 2) if dot.steps_per_vector == 2 else (step, None)
        place = arith.AddIOp(arith.MulIOp(lane, numbers[dot.width]).result, part).result
        code = tensor.ExtractOp(packed, [panel, step, register, place]).result
        if half is not None:
            high = arith.ShRUIOp(code, number(4)).result
            low = arith.AndIOp(code, number(15)).result
            even = arith.CmpIOp(0, half, numbers[0]).result
            code = arith.SelectOp(even, low, high).result
        if dot.offset:
            code = arith.SubIOp(code, number(dot.offset)).result
        return arith.SelectOp(inside, code, number(0)).result

    init = build.empty(result, build.dynamic_sizes(ids))
    return build.generic([ids], init, maps, ["parallel"] * rank, body)
