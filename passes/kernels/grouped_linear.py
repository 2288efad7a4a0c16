"""CPU kernels for ``spikingbrain.grouped_linear``, with the weight of each expert packed as ``linear`` packs one.

Rows are sorted by expert first (``group_rows.py``); then a workgroup multiplies the rows of one expert with some panels of its
weight, by the register tiles of ``linear``, which find their rows through the sorted list. Experts without rows have no
workgroups. A few rows are not worth sorting: each reads the weight of its expert by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import func

from spikingbrain.passes.kernels.builders import add, index, launch, loop, minimum, mul, root_module, size
from spikingbrain.passes.kernels.group_rows import Place, Routing, Routings
from spikingbrain.passes.kernels.linear import LinearKernel, Schedule, schedule
from spikingbrain.target import Target


@dataclass(frozen=True)
class Shape:
    """What a kernel is made for."""

    routing: Routing
    channels: int
    columns: int
    stored_as: str = "f32"  # type of the weight

    @property
    def name(self) -> str:
        m = "" if self.routing.rows is None else self.routing.rows
        kind = "" if self.stored_as == "f32" else f"_{self.stored_as}"
        return f"grouped_linear{kind}_e{self.routing.experts}_k{self.channels}_n{self.columns}_m{m}"

    def stored(self, cut: Schedule) -> list[int]:
        """Returns the shape of the packed weight."""
        return [self.routing.experts, -(-self.columns // cut.block), self.channels, cut.block]


def emit_grouped_linear(
    x: ir.Value, weight: ir.Value, expert: ir.Value, columns: int, target: Target, routings: Routings
) -> ir.Value:
    """Emits launches of ``y_r = weight[expert_r] x_r`` at the insertion point; returns y, ``[R, columns]``.

    ``x`` is ``[R, K]`` of f32 with R static or dynamic, ``weight`` is packed by ``packed_block(target)``, of f32, f16 or bf16;
    ``expert`` is ``[R]`` i64. Rows that are sorted once are kept in ``routings``, which serves one block of operations.
    """
    x_type = ir.RankedTensorType(x.type)
    m, k = x_type.shape
    weight_type = ir.RankedTensorType(weight.type)
    packed, kind = weight_type.shape, str(weight_type.element_type)
    shape = Shape(Routing(packed[0], None if x_type.is_dynamic_dim(0) else m), k, columns, kind)
    cut = schedule(k, target)
    if packed != shape.stored(cut):
        raise ValueError(f"a packed weight of {columns} columns is {shape.stored(cut)}, got {packed}")
    module = root_module()
    if shape.name not in ir.SymbolTable(module.operation):
        with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]):
            build_grouped_linear(shape, target)
    routing, grid = shape.routing.emit(expert, cut.group_rows, routings)
    panels = index(-(-packed[1] // cut.group_panels))
    result = ir.RankedTensorType.get([m, columns], x_type.element_type)
    sizes = [size(x, 0)] if shape.routing.rows is None else []
    return launch(shape.name, result, [panels, *grid], [x, weight, *routing], sizes).result


def build_grouped_linear(shape: Shape, target: Target) -> func.FuncOp:
    """Builds a kernel function at the insertion point.

    Its arguments are the workgroup ids, x ``[rows, K]``, the packed weight, what the routing takes, and y ``[rows, columns]``.
    The grid is groups of panels x that of the routing.
    """
    cut = schedule(shape.channels, target)
    index_type, f32 = ir.IndexType.get(), ir.F32Type.get()
    m = ir.ShapedType.get_dynamic_size() if shape.routing.rows is None else shape.routing.rows
    stored_as = ir.Type.parse(shape.stored_as)
    memrefs = [ir.MemRefType.get([m, shape.channels], f32), ir.MemRefType.get(shape.stored(cut), stored_as)]
    memrefs += [*shape.routing.types(), ir.MemRefType.get([m, shape.columns], f32)]
    function = func.FuncOp(shape.name, ([index_type] * 3 + memrefs, []), visibility="private")
    entry = function.add_entry_block()
    with ir.InsertionPoint(entry):
        group, *workgroup, x, weight = entry.arguments[:5]
        *routing, y = entry.arguments[5:]
        place = shape.routing.place(routing, y, workgroup, cut.group_rows)
        panel = mul(group, cut.group_panels)
        last_panel = minimum(add(panel, cut.group_panels), shape.stored(cut)[1])
        kernel = _GroupedKernel(cut, shape, x, weight, place)
        low, high = mul(panel, cut.block), minimum(mul(last_panel, cut.block), shape.columns)
        place.fill(low, high, lambda: kernel.panels(panel, last_panel))
        func.ReturnOp([])
    return function


class _GroupedKernel(LinearKernel):
    """Emits the parts of one kernel function at the insertion point, for the rows and the expert of a place."""

    def __init__(self, cut: Schedule, shape: Shape, x: ir.Value, weight: ir.Value, place: Place) -> None:
        super().__init__(cut, shape.channels, shape.columns, x, weight, place.y, None)
        self.place = place

    def row_numbers(self, first: ir.Value, count: int) -> list[ir.Value]:
        return self.place.rows(first, count)

    def weight_at(self, panel: ir.Value, k: ir.Value, column: ir.Value) -> list[ir.Value]:
        return [self.place.expert, panel, k, column]

    def panels(self, panel: ir.Value, last_panel: ir.Value) -> None:
        """Multiplies the rows with some panels of the weight."""
        first, end = self.place.first, self.place.end
        zero, whole_k = index(0), index(self.k)

        def one_panel(panel: ir.Value) -> None:
            if self.place.order is None:
                self.tile(1, first, panel, zero, whole_k, resume=False)
            elif self.cut.steps >= self.k:
                self.rows(first, end, panel, zero, whole_k, resume=False)
            else:
                loop(zero, whole_k, self.cut.steps, lambda first_k: some_k(panel, first_k))

        def some_k(panel: ir.Value, first_k: ir.Value) -> None:
            self.rows(first, end, panel, first_k, minimum(add(first_k, self.cut.steps), whole_k), resume=True)

        loop(panel, last_panel, 1, one_panel)
