"""Wave kernels for ``spikingbrain.spike_grouped_linear``: the exact sums of ``spike_linear``, each row with its expert's weight.

The weights of all experts are packed as those of one projection, each expert's from a panel of its own on; blocks find their rows
as in ``grouped_linear.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_mlir import ir

from spikingbrain.passes.kernels.builders import compare, index, launch, mul, size, when
from spikingbrain.passes.wave_kernels import spike_linear as one
from spikingbrain.passes.wave_kernels.builders import TILE, kernel, memref_of
from spikingbrain.passes.wave_kernels.group_rows import Routing, Tiles
from spikingbrain.passes.wave_kernels.grouped_linear import fill
from spikingbrain.passes.wave_kernels.row_tiles import Rows
from spikingbrain.passes.wave_kernels.spike_codes import Codes
from spikingbrain.passes.wave_kernels.spike_encode import Counts


@dataclass(frozen=True)
class Shape:
    """What a kernel is made for: the number of experts and the product of each."""

    experts: int
    each: one.Shape

    @property
    def routing(self) -> Routing:
        return Routing(self.experts, self.each.rows, self.each.tile_rows)

    def name(self, codes: Codes) -> str:
        return f"grouped_{self.each.name(codes)}_e{self.experts}"

    def stored(self, codes: Codes) -> tuple[ir.RankedTensorType, ir.RankedTensorType]:
        """Returns the types of the packed weight and its scales, of all experts together."""
        panels = self.experts * self.each.panels
        scales = ir.RankedTensorType.get([panels, self.each.groups, TILE], ir.F32Type.get())
        return codes.stored_type(panels * TILE, self.each.cut.channels), scales


def recipes(codes: Codes) -> tuple[list[str], list[str]]:
    """Returns the steps that pack weights ``[N, O, K]`` and scales ``[N, O, G]``."""
    stack = f"stack block={TILE}"
    return [stack, *codes.recipe()], [stack, codes.scale_recipe()]


def emit_spike_grouped_linear(
    counts: Counts,
    weight: ir.Value,
    scale: ir.Value,
    expert: ir.Value,
    codes: Codes,
    shape: Shape,
    tiles: Tiles,
) -> ir.Value:
    """Emits launches at the insertion point; returns y, ``[M, O]`` f32. Weight and scale are packed by ``recipes``.

    ``expert`` is ``[M]`` i64. Rows that are sorted once are kept in ``tiles``, which serves one block of operations.
    """
    each, routing = shape.each, shape.routing
    taken, blocks = routing.emit(expert, tiles)

    def body(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        parts, (weight, scale, *taken, y) = Counts(*buffers[:6]), buffers[6:]

        def rows_of(expert: ir.Value, rows: Rows) -> None:
            def product() -> None:
                product = one.SpikeKernel(codes, each, parts, weight, scale, None, y)
                product.first_panel = mul(expert, each.panels)
                product.emit(block[0], rows)

            exists = compare("slt", expert, index(shape.experts))
            when(exists, product, lambda: fill(block[0], rows, y))

        routing.place(block[1], taken, rows_of)

    inputs = [*counts.values(), weight, scale, *taken]
    m = ir.RankedTensorType(counts.x.type).shape[0]
    result = ir.RankedTensorType.get([m, each.columns], ir.F32Type.get())
    name = shape.name(codes)
    kernel(name, [memref_of(v.type) for v in inputs] + [memref_of(result)], one.THREADS, body)
    rows = size(counts.x, 0)
    grid = [one.column_blocks(codes, each, rows), blocks, index(1)]
    sizes = [rows] if each.rows is None else []
    return launch(name, result, grid, inputs, sizes).result
