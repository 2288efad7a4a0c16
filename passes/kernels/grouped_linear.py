"""CPU kernels for ``spikingbrain.grouped_linear``, with the weight of each expert packed as ``linear`` packs one.

Rows are sorted by expert first (``group_rows.py``); then a workgroup multiplies the rows of one expert with some panels of its
weight, by the register tiles of ``linear``, which find their rows through the sorted list. Experts without rows have no
workgroups. A few rows are not worth sorting: each reads the weight of its expert by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith, func

from spikingbrain.passes.kernels.builders import (
    add,
    ceil_div,
    compare,
    get,
    index,
    launch,
    loop,
    minimum,
    mul,
    put,
    root_module,
    size,
    when,
)
from spikingbrain.passes.kernels.group_rows import (
    END,
    EXPERT,
    FIRST,
    Groups,
    emit_group_rows,
    group_types,
    known_expert,
)
from spikingbrain.passes.kernels.linear import LinearKernel, Schedule, schedule
from spikingbrain.target import Target

FEW_ROWS = 8  # the experts of one token: mostly different ones


@dataclass(frozen=True)
class Shape:
    """What a kernel is made for; ``rows`` None means any number of them."""

    experts: int
    channels: int
    columns: int
    rows: int | None

    @property
    def name(self) -> str:
        m = "" if self.rows is None else self.rows
        return f"grouped_linear_e{self.experts}_k{self.channels}_n{self.columns}_m{m}"

    @property
    def has_few_rows(self) -> bool:
        return self.rows is not None and self.rows <= FEW_ROWS

    def routing(self) -> list[ir.Type]:
        """Returns the types of what tells a kernel which rows go where: experts, or ``Groups``."""
        if self.has_few_rows:
            return [ir.MemRefType.get([self.rows], ir.IntegerType.get_signless(64))]
        return [ir.MemRefType.get(shape, kind) for shape, kind in group_types(self.experts, self.rows)]

    def stored(self, cut: Schedule) -> list[int]:
        """Returns the shape of the packed weight."""
        return [self.experts, -(-self.columns // cut.block), self.channels, cut.block]


Routings = dict[tuple[ir.Value, int], Groups]


def emit_grouped_linear(
    x: ir.Value, weight: ir.Value, expert: ir.Value, columns: int, target: Target, routings: Routings
) -> ir.Value:
    """Emits launches of ``y_r = weight[expert_r] x_r`` at the insertion point; returns y, ``[R, columns]``.

    ``x`` is ``[R, K]`` with R static or dynamic, ``weight`` is packed by ``packed_block(target)``, both f32; ``expert`` is
    ``[R]`` i64. Rows that are sorted once are kept in ``routings``, which serves one block of operations.
    """
    x_type = ir.RankedTensorType(x.type)
    m, k = x_type.shape
    packed = ir.RankedTensorType(weight.type).shape
    shape = Shape(packed[0], k, columns, None if x_type.is_dynamic_dim(0) else m)
    cut = schedule(k, target)
    if packed != shape.stored(cut):
        raise ValueError(f"a packed weight of {columns} columns is {shape.stored(cut)}, got {packed}")
    module = root_module()
    if shape.name not in ir.SymbolTable(module.operation):
        with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]):
            build_grouped_linear(shape, target)
    if shape.has_few_rows:
        routing, grid = [expert], [index(m), index(1)]
    else:
        key = (expert, shape.experts)
        if key not in routings:
            routings[key] = emit_group_rows(expert, shape.experts)
        routing = routings[key].values()
        grid = [size(routings[key].groups, 0), ceil_div(size(x, 0), cut.group_rows)]
    panels = index(-(-packed[1] // cut.group_panels))
    result = ir.RankedTensorType.get([m, columns], x_type.element_type)
    sizes = [size(x, 0)] if shape.rows is None else []
    return launch(shape.name, result, [panels, *grid], [x, weight, *routing], sizes).result


def build_grouped_linear(shape: Shape, target: Target) -> func.FuncOp:
    """Builds a kernel function at the insertion point.

    Its arguments are the workgroup ids, x ``[rows, K]``, the packed weight, experts ``[rows]`` or the parts of ``Groups``, and y
    ``[rows, columns]``. The grid is groups of panels x (rows x 1, or experts x groups of rows).
    """
    cut = schedule(shape.channels, target)
    index_type, f32 = ir.IndexType.get(), ir.F32Type.get()
    m = ir.ShapedType.get_dynamic_size() if shape.rows is None else shape.rows
    memrefs = [ir.MemRefType.get(s, f32) for s in ([m, shape.channels], shape.stored(cut))]
    memrefs += [*shape.routing(), ir.MemRefType.get([m, shape.columns], f32)]
    function = func.FuncOp(shape.name, ([index_type] * 3 + memrefs, []), visibility="private")
    entry = function.add_entry_block()
    with ir.InsertionPoint(entry):
        group, place, chunk, x, weight, *routing, y = entry.arguments
        if shape.has_few_rows:
            kernel = _GroupedKernel(cut, shape, x, weight, y, None)
            expert = known_expert(get(routing[0], [place]), shape.experts)
            first, end = place, add(place, 1)
        else:
            order, groups = routing
            kernel = _GroupedKernel(cut, shape, x, weight, y, order)
            expert, first, end = (
                arith.index_cast(index_type, get(groups, [place, at])) for at in (EXPERT, FIRST, END)
            )
            first = minimum(add(first, mul(chunk, cut.group_rows)), end)
            end = minimum(add(first, cut.group_rows), end)
        panel = mul(group, cut.group_panels)
        last_panel = minimum(add(panel, cut.group_panels), shape.stored(cut)[1])
        when(
            compare("ult", expert, index(shape.experts)),
            lambda: kernel.of_expert(expert, first, end, panel, last_panel),
            lambda: kernel.of_none(first, end, panel, last_panel),
        )
        func.ReturnOp([])
    return function


class _GroupedKernel(LinearKernel):
    """Emits the parts of one kernel function; ``order`` lists the rows, which are numbered in their own order without it."""

    def __init__(
        self,
        cut: Schedule,
        shape: Shape,
        x: ir.Value,
        weight: ir.Value,
        y: ir.Value,
        order: ir.Value | None,
    ) -> None:
        super().__init__(cut, shape.channels, shape.columns, x, weight, y, None)
        self.order = order
        self.expert: ir.Value = index(0)

    def row_numbers(self, first: ir.Value, count: int) -> list[ir.Value]:
        rows = super().row_numbers(first, count)
        if self.order is None:
            return rows
        return [arith.index_cast(ir.IndexType.get(), get(self.order, [row])) for row in rows]

    def weight_at(self, panel: ir.Value, k: ir.Value, column: ir.Value) -> list[ir.Value]:
        return [self.expert, panel, k, column]

    def of_expert(
        self, expert: ir.Value, first: ir.Value, end: ir.Value, panel: ir.Value, last_panel: ir.Value
    ) -> None:
        """Multiplies some rows with some panels of their expert's weight."""
        self.expert = expert
        zero, whole_k = index(0), index(self.k)

        def one_panel(panel: ir.Value) -> None:
            if self.order is None:
                self.tile(1, first, panel, zero, whole_k, resume=False)
            elif self.cut.steps >= self.k:
                self.rows(first, end, panel, zero, whole_k, resume=False)
            else:
                loop(zero, whole_k, self.cut.steps, lambda first_k: some_k(panel, first_k))

        def some_k(panel: ir.Value, first_k: ir.Value) -> None:
            self.rows(first, end, panel, first_k, minimum(add(first_k, self.cut.steps), whole_k), resume=True)

        loop(panel, last_panel, 1, one_panel)

    def of_none(self, first: ir.Value, end: ir.Value, panel: ir.Value, last_panel: ir.Value) -> None:
        """Makes the results of rows NaN whose expert does not exist."""
        f32 = ir.F32Type.get()
        nan = arith.ConstantOp(f32, ir.FloatAttr.get(f32, math.nan)).result
        low, high = mul(panel, self.cut.block), minimum(mul(last_panel, self.cut.block), self.columns)

        def row(at: ir.Value) -> None:
            (number,) = self.row_numbers(at, 1)
            loop(low, high, 1, lambda column: put(nan, self.y, [number, column]))

        loop(first, end, 1, row)
