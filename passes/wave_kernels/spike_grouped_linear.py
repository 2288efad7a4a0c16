"""Wave kernels for ``spikingbrain.spike_grouped_linear``: the exact sums of ``spike_linear``, each row with its expert's weight.

The weights of all experts are packed as those of one projection, each expert's from a panel of its own on; blocks find their rows
as in ``grouped_linear.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch_mlir import ir

from spikingbrain.passes.kernels.builders import compare, index, launch, mul, size, when
from spikingbrain.passes.wave_kernels import spike_linear as one
from spikingbrain.passes.wave_kernels.builders import TILE, kernel, memref_of
from spikingbrain.passes.wave_kernels.group_rows import Routing, Tiles
from spikingbrain.passes.wave_kernels.grouped_linear import fill
from spikingbrain.passes.wave_kernels.row_tiles import Rows
from spikingbrain.passes.wave_kernels.row_values import RowValues, flat_sources
from spikingbrain.passes.wave_kernels.spike_codes import Codes
from spikingbrain.passes.wave_kernels.spike_counts import Counts
from spikingbrain.passes.wave_kernels.spike_few import THREADS, Encoded, rows_that_pay


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
        return codes.stored_type(panels * TILE), scales


def recipes(codes: Codes) -> tuple[list[str], list[str]]:
    """Returns the steps that pack weights ``[N, O, K]`` and scales ``[N, O, G]``."""
    stack = f"stack block={TILE}"
    return [stack, *codes.recipe()], [stack, codes.scale_recipe()]


def emit_spike_grouped_linear(
    x: ir.Value,
    encode: Callable[[], Counts],
    stored: one.Stack,
    expert: ir.Value,
    codes: Codes,
    shape: Shape,
    tiles: Tiles,
    computed: RowValues | None = None,
    may_encode: bool = True,
) -> ir.Value:
    """Emits launches at the insertion point; returns y, ``[M, O]`` f32. Weight and scale are packed by ``recipes``.

    ``expert`` is ``[M]`` i64. Rows that are sorted once are kept in ``tiles``, which serves one block of operations. ``x``,
    ``encode``, ``computed`` and ``may_encode`` are those of ``emit_spike_linear``: a few rows are not sorted, each has blocks of
    its own, which encode it.
    """
    each, routing = shape.each, shape.routing
    encodes = may_encode and routing.has_few_rows and rows_that_pay(codes, computed) > 0
    taken, blocks = routing.emit(expert, tiles)
    if encodes:
        given = [x] if computed is None else flat_sources(computed)
    else:
        given = encode().values()
    count, width = len(given), len(stored.values())

    def body(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        parts, own, y = buffers[:count], stored.of(buffers[count : count + width]), buffers[-1]

        def rows_of(expert: ir.Value, rows: Rows) -> None:
            def product() -> None:
                product = one.SpikeKernel(codes, each, own, y)
                product.first_panel = mul(expert, each.panels)
                if encodes:
                    source = Encoded(codes, each.tuning, each.cut, computed, parts, rows, 1)
                    product.few(block[0], rows, source)
                else:
                    product.emit(block[0], rows, Counts(*parts))

            exists = compare("slt", expert, index(shape.experts))
            when(exists, product, lambda: fill(block[0], rows, y))

        routing.place(block[1], buffers[count + width : -1], rows_of)

    inputs = [*given, *stored.values(), *taken]
    name = shape.name(codes)
    if encodes:
        name += f"_{each.cut.settings}_{'x' if computed is None else computed.digest}"
    kernel(name, [memref_of(v.type) for v in inputs] + [memref_of(each.result)], THREADS, body)
    rows = index(each.rows) if each.rows is not None else size(given[0], 0)
    grid = [one.column_blocks(codes, each, rows), blocks, index(1)]
    sizes = [rows] if each.rows is None else []
    return launch(name, each.result, grid, inputs, sizes).result
