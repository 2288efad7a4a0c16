"""Wave kernels for ``spikingbrain.grouped_linear``: the products of ``linear``, each row with the weight of its expert.

Rows are sorted by expert first (``group_rows.py``); a block multiplies a tile of one expert's rows. A few rows are not worth
sorting: each has blocks of its own, which read the weight of its expert and no other. They compute rows that are a norm or a
gate, as those of ``linear`` do, and add up what the experts of a token give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes.kernels.builders import (
    add,
    compare,
    get,
    index,
    launch,
    loop,
    minimum,
    mul,
    put,
    size,
    when,
)
from spikingbrain.passes.kernels.group_rows import known_expert
from spikingbrain.passes.wave_kernels import linear
from spikingbrain.passes.wave_kernels.builders import choose, kernel, memref_of, thread, zero
from spikingbrain.passes.wave_kernels.combination import Combination
from spikingbrain.passes.wave_kernels.group_rows import FEW_ROWS, MOST_EXPERTS, Routing, Tiles
from spikingbrain.passes.wave_kernels.row_tiles import Rows
from spikingbrain.passes.wave_kernels.row_values import RowValues, flat_sources
from spikingbrain.tuning import Tuning


@dataclass(frozen=True)
class Shape:
    """What a kernel is made for."""

    routing: Routing
    each: linear.Shape  # of one expert's product

    @property
    def name(self) -> str:
        part = "" if self.each.rows is not None else "_few" if self.routing.are_few else linear.MANY
        return f"grouped_{self.each.name}_e{self.routing.experts}{part}"


def refusal(experts: int) -> str:
    """Returns why rows for so many experts have no kernel, or an empty text."""
    return f"{experts} experts; {MOST_EXPERTS} can be sorted" if experts > MOST_EXPERTS else ""


def computes(rows: int) -> bool:
    """Returns whether so many rows, -1 for any number, may be few, and computed where they are read."""
    return rows < 0 or 0 < rows <= FEW_ROWS


def emit_grouped_linear(
    x: ir.Value,
    weight: ir.Value,
    expert: ir.Value,
    tiles: Tiles,
    tuning: Tuning,
    computed: RowValues | None = None,
) -> ir.Value:
    """Emits launches of ``y_r = weight[expert_r] x_r`` at the insertion point; returns y, ``[R, O]``.

    ``x`` is ``[R, K]`` with R static or dynamic, ``weight`` ``[N, O, K]`` of the same type, ``expert`` ``[R]`` i64. Rows that are
    sorted once are kept in ``tiles``, which serves one block of operations. ``computed`` is how few rows are computed, if that
    can be done where they are read. Of any number of rows there are two launches, of which one has no blocks.
    """
    kind = ir.RankedTensorType(x.type)
    (m, k), (experts, columns, _) = kind.shape, ir.RankedTensorType(weight.type).shape
    rows = None if kind.is_dynamic_dim(0) else m
    each = linear.Shape(k, columns, rows, str(kind.element_type), tuning=tuning)
    shape, count = Shape(Routing(experts, rows, each.tile_rows), each), size(x, 0)
    if rows is not None:
        how = computed if shape.routing.has_few_rows else None
        return _emit(shape, x, weight, expert, tiles, linear.column_blocks(each, count), how)
    none, are_few = index(0), each.are_few(count)
    few = replace(shape, routing=replace(shape.routing, are_few=True))
    grid = arith.select(are_few, index(-(-columns // each.few_columns)), none)
    y = _emit(few, x, weight, expert, tiles, grid, computed)
    grid = arith.select(are_few, none, index(-(-columns // each.tile_columns)))
    return _emit(shape, x, weight, expert, tiles, grid, into=y)


def _emit(
    shape: Shape,
    x: ir.Value,
    weight: ir.Value,
    expert: ir.Value,
    tiles: Tiles,
    column_blocks: ir.Value,
    computed: RowValues | None = None,
    into: ir.Value | None = None,
) -> ir.Value:
    """Emits a launch for few rows or for many, into the memory of another result if there is one."""
    routing, each = shape.routing, shape.each
    taken, blocks = routing.emit(expert, tiles)
    result = ir.RankedTensorType.get(
        [ir.RankedTensorType(x.type).shape[0], each.columns], each.result.element_type
    )
    sources = [x] if computed is None else flat_sources(computed)

    def body(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        given, (weight, *taken, y) = buffers[: len(sources)], buffers[len(sources) :]

        def rows_of(expert: ir.Value, rows: Rows) -> None:
            exists = compare("slt", expert, index(routing.experts))

            def product() -> None:
                one = linear.LinearKernel(each, given[0], weight, [expert], y, [])
                if not routing.has_few_rows:
                    one.tiles(block[0], rows)
                elif computed is None:
                    one.few(block[0], rows, 1)
                else:
                    one.few(block[0], rows, 1, linear.Computed(one, computed, given, rows, 1))

            when(exists, product, lambda: fill(block[0], rows, y))

        routing.place(block[1], taken, rows_of)

    inputs = [*sources, weight, *taken]
    name = shape.name if computed is None else f"{shape.name}_{computed.digest}"
    kernel(name, [memref_of(v.type) for v in inputs] + [memref_of(result)], linear.THREADS, body)
    grid = [column_blocks, blocks, index(1)]
    if into is not None:
        return launch(name, result, grid, [*inputs, into], [], len(inputs)).result
    return launch(name, result, grid, inputs, build.dynamic_sizes(x)).result


def emit_combined(
    x: ir.Value,
    weight: ir.Value,
    expert: ir.Value,
    tuning: Tuning,
    combination: Combination,
    computed: RowValues | None = None,
) -> ir.Value:
    """Emits the launch of ``y_t = sum_j f_j(weight[expert_(t, j)] x_(t, j))`` for few rows; returns y, ``[T, O]``.

    A block has a token and some columns, and goes through the token's experts in their order.
    """
    (m, k), (experts, columns, _) = (ir.RankedTensorType(v.type).shape for v in (x, weight))
    element = ir.RankedTensorType(x.type).element_type
    each = linear.Shape(k, columns, m, str(element), tuning=tuning)
    result = ir.RankedTensorType.get([m // combination.each, columns], combination.type)
    sources = [x] if computed is None else flat_sources(computed)
    others = combination.sources

    def body(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        given, (weight, expert, *read, y) = buffers[: len(sources)], buffers[len(sources) :]

        def added(number: ir.Value, total: ir.Value) -> list[ir.Value]:
            row = add(mul(block[1], combination.each), number)
            own = known_expert(get(expert, [row]), experts)
            one = linear.LinearKernel(each, given[0], weight, [own], y, [])

            def product() -> list[ir.Value]:
                rows = (
                    None
                    if computed is None
                    else linear.Computed(one, computed, given, Rows(row, add(row, 1)), 1)
                )
                return [one.mine(block[0], [row], rows)]

            nan = arith.constant(ir.F32Type.get(), math.nan)
            (value,) = choose(compare("slt", own, index(experts)), product, [nan])
            value = value if each.element == "f32" else arith.truncf(element, value)
            column = minimum(one.few_column(block[0]), columns - 1)
            return [arith.addf(total, combination.summand(read, block[1], number, column, value))]

        (total,) = loop(0, combination.each, 1, added, [zero(combination.type)])
        one = linear.LinearKernel(each, weight, weight, [], y, [])
        column = one.few_column(block[0])
        inside = arith.andi(
            compare("slt", one.lane, index(tuning.linear_columns)), compare("slt", column, index(columns))
        )
        when(inside, lambda: put(total, y, [block[1], column]))

    inputs = [*sources, weight, expert, *others]
    name = f"{Shape(Routing(experts, m, each.tile_rows), each).name}_{combination.digest}"
    name += "" if computed is None else f"_{computed.digest}"
    kernel(name, [memref_of(v.type) for v in inputs] + [memref_of(result)], linear.THREADS, body)
    grid = [linear.column_blocks(each, size(x, 0)), index(m // combination.each), index(1)]
    return launch(name, result, grid, inputs, []).result


def fill(block: ir.Value, rows: Rows, y: ir.Value) -> None:
    """Writes NaN to rows without an expert, in the first block of columns."""
    nan = arith.constant(ir.MemRefType(y.type).element_type, math.nan)
    columns = ir.MemRefType(y.type).shape[1]

    def row(at: ir.Value) -> None:
        number = rows.at(at)
        loop(thread(), columns, linear.THREADS, lambda column: put(nan, y, [number, column]))

    def all_rows() -> None:
        loop(rows.first, rows.end, 1, row)

    when(compare("eq", block, index(0)), all_rows)
