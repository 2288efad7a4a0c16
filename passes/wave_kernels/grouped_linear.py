"""Wave kernels for ``spikingbrain.grouped_linear``: the products of ``linear``, each row with the weight of its expert.

Rows are sorted by expert first (``group_rows.py``); a block multiplies a tile of one expert's rows. A few rows are not worth
sorting: each has blocks of its own, which read the weight of its expert and no other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes.kernels.builders import (
    compare,
    index,
    launch,
    loop,
    put,
    size,
    when,
)
from spikingbrain.passes.wave_kernels import linear
from spikingbrain.passes.wave_kernels.builders import kernel, memref_of, thread
from spikingbrain.passes.wave_kernels.group_rows import MOST_EXPERTS, Routing, Tiles
from spikingbrain.passes.wave_kernels.row_tiles import Rows
from spikingbrain.tuning import Tuning


@dataclass(frozen=True)
class Shape:
    """What a kernel is made for."""

    routing: Routing
    each: linear.Shape  # of one expert's product

    @property
    def name(self) -> str:
        return f"grouped_{self.each.name}_e{self.routing.experts}"


def refusal(experts: int) -> str:
    """Returns why rows for so many experts have no kernel, or an empty text."""
    return f"{experts} experts; {MOST_EXPERTS} can be sorted" if experts > MOST_EXPERTS else ""


def emit_grouped_linear(
    x: ir.Value, weight: ir.Value, expert: ir.Value, tiles: Tiles, tuning: Tuning
) -> ir.Value:
    """Emits launches of ``y_r = weight[expert_r] x_r`` at the insertion point; returns y, ``[R, O]``.

    ``x`` is ``[R, K]`` with R static or dynamic, ``weight`` ``[N, O, K]`` of the same type, ``expert`` ``[R]`` i64. Rows that are
    sorted once are kept in ``tiles``, which serves one block of operations.
    """
    kind = ir.RankedTensorType(x.type)
    (m, k), (experts, columns, _) = kind.shape, ir.RankedTensorType(weight.type).shape
    rows = None if kind.is_dynamic_dim(0) else m
    each = linear.Shape(k, columns, rows, str(kind.element_type), tuning=tuning)
    shape = Shape(Routing(experts, rows, each.tile_rows), each)
    taken, blocks = shape.routing.emit(expert, tiles)
    result = ir.RankedTensorType.get([m, columns], kind.element_type)

    def body(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        x, weight, *taken, y = buffers

        def rows_of(expert: ir.Value, rows: Rows) -> None:
            exists = compare("slt", expert, index(experts))

            def product() -> None:
                one = linear.LinearKernel(each, x, weight, [expert], y, None)
                if shape.routing.has_few_rows:
                    one.few(block[0], rows, 1)
                else:
                    one.emit(block[0], rows)

            when(exists, product, lambda: fill(block[0], rows, y))

        shape.routing.place(block[1], taken, rows_of)

    inputs = [x, weight, *taken]
    kernel(shape.name, [memref_of(v.type) for v in inputs] + [memref_of(result)], linear.THREADS, body)
    count = size(x, 0)
    sizes = [count] if rows is None else []
    grid = [linear.column_blocks(each, count), blocks, index(1)]
    return launch(shape.name, result, grid, inputs, sizes).result


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
