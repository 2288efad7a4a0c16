"""CPU kernels for ``spikingbrain.spike_grouped_linear``: the exact sums of ``spike_linear``, each row with its expert's weight.

The weights of all experts are packed as those of one projection, each expert's from a panel of its own on; a workgroup multiplies
the rows of one expert, found as in ``grouped_linear.py``, with some of its panels. Where weights are stored by channel and rows
are few, a row of which few channels fire adds the weights of those alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import func

from spikingbrain.passes.kernels import spike_linear as one
from spikingbrain.passes.kernels.builders import (
    add,
    compare,
    get,
    i32,
    index,
    launch,
    loop,
    minimum,
    mul,
    root_module,
    size,
    sub,
)
from spikingbrain.passes.kernels.group_rows import Place, Routing, Routings
from spikingbrain.passes.kernels.spike_dot import ChannelDot, Dot
from spikingbrain.passes.kernels.spike_encode import Encoding, Spikes
from spikingbrain.target import Target


@dataclass(frozen=True)
class Shape:
    """What a kernel is made for: the counts' encoding, with events for few rows alone, the columns of an expert, the routing."""

    cut: Encoding
    columns: int
    routing: Routing

    def name(self, dot: Dot) -> str:
        m = "" if self.routing.rows is None else self.routing.rows
        sizes = f"e{self.routing.experts}_k{self.cut.channels}_g{self.cut.groups}_n{self.columns}_m{m}"
        way = "events" if isinstance(dot, ChannelDot) else "linear"
        return f"spike_grouped_{way}_i{dot.bits}_{sizes}"

    def panels(self, dot: Dot) -> int:
        """Returns the panels of one expert."""
        return -(-self.columns // dot.block)

    def stored(self, dot: Dot) -> tuple[ir.RankedTensorType, ir.RankedTensorType]:
        """Returns the types of the packed weight and its scales, of all experts together."""
        panels = self.routing.experts * self.panels(dot)
        scales = ir.RankedTensorType.get([panels, self.cut.groups, dot.block], ir.F32Type.get())
        return dot.stored_type(panels * dot.block, self.cut.channels), scales


def recipes(dot: Dot) -> tuple[list[str], list[str]]:
    """Returns the steps that pack weights ``[N, O, K]`` and scales ``[N, O, G]``."""
    stack = f"stack block={dot.block}"
    return [stack, dot.recipe()], [stack, one.scale_recipe(dot)]


def emit_spike_grouped_linear(
    spikes: Spikes,
    weight: ir.Value,
    scale: ir.Value,
    expert: ir.Value,
    dot: Dot,
    shape: Shape,
    target: Target,
    routings: Routings,
) -> ir.Value:
    """Emits launches at the insertion point; returns y, ``[M, O]`` f32. Weight and scale are packed by ``recipes``.

    ``expert`` is ``[M]`` i64. Rows that are sorted once are kept in ``routings``, which serves one block of operations.
    """
    name = shape.name(dot)
    module = root_module()
    if name not in ir.SymbolTable(module.operation):
        with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]):
            build_spike_grouped_linear(name, dot, shape, target)
    routing, grid = shape.routing.emit(expert, one.rows_of_workgroup(dot), routings)
    panels = index(-(-shape.panels(dot) // one.panels_of_workgroup(dot, shape.cut)))
    m = ir.RankedTensorType(spikes.x.type).shape[0]
    result = ir.RankedTensorType.get([m, shape.columns], ir.F32Type.get())
    sizes = [size(spikes.x, 0)] if shape.routing.rows is None else []
    inputs = [*spikes.values(), weight, scale, *routing]
    return launch(name, result, [panels, *grid], inputs, sizes).result


def build_spike_grouped_linear(name: str, dot: Dot, shape: Shape, target: Target) -> func.FuncOp:
    """Builds the kernel function: the parts of ``Spikes``, weight, scale, what the routing takes, and y ``[rows, O]``.

    The grid is groups of panels x that of the routing.
    """
    m = ir.ShapedType.get_dynamic_size() if shape.routing.rows is None else shape.routing.rows
    parts = [ir.MemRefType.get(sizes, kind) for sizes, kind in shape.cut.types(m)]
    stored = [ir.MemRefType.get(t.shape, t.element_type) for t in shape.stored(dot)]
    y_type = ir.MemRefType.get([m, shape.columns], ir.F32Type.get())
    types = [*[ir.IndexType.get()] * 3, *parts, *stored, *shape.routing.types(), y_type]
    function = func.FuncOp(name, (types, []), visibility="private")
    entry = function.add_entry_block()
    with ir.InsertionPoint(entry):
        (group, *workgroup), buffers = entry.arguments[:3], list(entry.arguments[3:])
        spikes, (weight, scale, *routing, y) = Spikes(*buffers[: len(parts)]), buffers[len(parts) :]
        place = shape.routing.place(routing, y, workgroup, one.rows_of_workgroup(dot))
        most = one.panels_of_workgroup(dot, shape.cut)
        panel = mul(group, most)
        last_panel = minimum(add(panel, most), shape.panels(dot))
        kernel = _GroupedKernel(dot, shape, target, spikes, [weight, scale, y], place)
        low, high = mul(panel, dot.block), minimum(mul(last_panel, dot.block), shape.columns)
        place.fill(low, high, lambda: kernel.panels(panel, last_panel))
        func.ReturnOp([])
    return function


class _GroupedKernel(one.SpikeKernel):
    """Emits the parts of one kernel function at the insertion point, for the rows and the expert of a place."""

    def __init__(
        self,
        dot: Dot,
        shape: Shape,
        target: Target,
        spikes: Spikes,
        buffers: list[ir.Value],
        place: Place,
    ) -> None:
        rows = 1 if place.order is None else None
        self.place = place
        super().__init__(dot, one.Shape(shape.cut, shape.columns, rows, False), target, spikes, buffers)
        self.first_panel: ir.Value = index(0)  # of the expert, among those of all
        self.panels_each = shape.panels(dot)

    def panels(self, panel: ir.Value, last_panel: ir.Value) -> None:
        """Computes some panels of the expert's weight for the rows."""
        self.first_panel = mul(self.place.expert, self.panels_each)
        loop(
            add(self.first_panel, panel),
            add(self.first_panel, last_panel),
            1,
            lambda at: self.panel(at, self.place.first, self.place.end),
        )

    def _few_fire(self) -> ir.Value:
        """Returns whether few channels of the row fire: no other row shares its weights."""
        cut = self.shape.cut
        steps = get(self.spikes.active_ends, [self.place.first, cut.groups - 1])
        limit = i32(self.tuning.firing_percent * cut.channels // (100 * cut.width))
        return compare("sle", steps, limit)

    def row_numbers(self, first: ir.Value, count: int) -> list[ir.Value]:
        return self.place.rows(first, count)

    def finish(self, row: ir.Value, panel: ir.Value, totals: list[ir.Value]) -> None:
        super().finish(row, sub(panel, self.first_panel), totals)
