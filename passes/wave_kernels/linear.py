"""Wave kernels for projections of floats: ``y[m, n] = sum_k x[m, k] * w[n, k]``, the weight as the model stores it.

Up to 8 rows, a wave computes some columns: its lanes share the channels, read 16 bytes at a time, and the weight streams past all
rows once. With more rows, a block computes a tile of 64 rows by the matrix instruction; its waves share operands. Sums are f32.
A kernel for any number of rows holds both.

Few rows that are a norm, a gate or a slice of something else are computed by each block that reads them, piece by piece through
shared memory. For any number of rows that is a kernel of its own, beside one for many rows, of which one has no blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from torch_mlir import ir
from torch_mlir.dialects import arith, math, vector

from spikingbrain.passes.dialect import MULTIPLIES
from spikingbrain.passes.kernels.builders import (
    add,
    ceil_div,
    compare,
    f32,
    floor_div,
    get,
    index,
    launch,
    load,
    loop,
    minimum,
    mul,
    put,
    rem,
    size,
    store,
    sub,
    when,
)
from spikingbrain.passes.wave_kernels.builders import (
    MATRIX_INSTRUCTIONS,
    SHARED_BYTES,
    TILE,
    WAVE,
    barrier,
    choose,
    element_at,
    kernel,
    matrix_multiply,
    matrix_zero,
    memref_of,
    over_lanes,
    shared,
    thread,
    zero,
)
from spikingbrain.passes.wave_kernels.row_tiles import Rows
from spikingbrain.passes.wave_kernels.row_values import RowValues, flat_sources
from spikingbrain.tuning import USUAL, Tuning

FEW_ROWS = 8
WAVES = 4  # of a block
THREADS = WAVES * WAVE
VECTOR_BYTES = 16  # that a lane reads at a time
PIECE_BYTES = 16 << 10  # of computed rows in shared memory: two blocks and more fit a processor
# Multiply-adds that the machine does while it reads a byte; an estimate. Computing rows is free while that is not reached.
OPS_PER_BYTE = 7
MANY = "_many"  # ends the names of kernels that have no blocks for few rows


@dataclass(frozen=True)
class Shape:
    """One projection: K, columns, rows (None: any number), the type of everything, and how many other values are added."""

    channels: int
    columns: int
    rows: int | None
    element: str = "f32"
    addends: int = 0
    few_rows: int = FEW_ROWS
    tuning: Tuning = USUAL

    @property
    def few_columns(self) -> int:
        """Returns the columns of a block in the kernel for few rows."""
        return WAVES * self.tuning.linear_columns

    @property
    def tiles(self) -> tuple[int, int]:
        """Returns the tiles of rows and of columns of a wave in the kernel for many rows; its waves are two by two."""
        return self.tuning.linear_row_tiles, self.tuning.linear_column_tiles

    @property
    def tile_rows(self) -> int:
        """Returns the rows of a block in that kernel."""
        return 2 * self.tiles[0] * TILE

    @property
    def tile_columns(self) -> int:
        """Returns the columns of a block in that kernel."""
        return 2 * self.tiles[1] * TILE

    @property
    def fragments(self) -> int:
        """Returns the vectors of a lane along the channels for each barrier, as far as shared memory holds them."""
        most = SHARED_BYTES // (2 * sum(self.tiles) * WAVE * VECTOR_BYTES)
        return min(self.tuning.linear_fragments, most)

    @property
    def most_rows(self) -> int:
        """Returns how many rows the kernel for few rows has; 0 where there are always more, or none."""
        if self.rows is None:
            return self.few_rows
        return self.rows if self.rows <= self.few_rows else 0

    @property
    def bytes(self) -> int:
        """Returns the bytes of an element."""
        return 4 if self.element == "f32" else 2

    @property
    def lanes(self) -> int:
        """Returns how many elements a lane reads at a time."""
        return VECTOR_BYTES // self.bytes

    @property
    def result(self) -> ir.RankedTensorType:
        """Returns the type of y."""
        rows = ir.ShapedType.get_dynamic_size() if self.rows is None else self.rows
        return ir.RankedTensorType.get([rows, self.columns], ir.Type.parse(self.element))

    def are_few(self, rows: ir.Value) -> ir.Value:
        return compare("sle", rows, index(self.few_rows))

    @property
    def name(self) -> str:
        m = "" if self.rows is None else self.rows
        return f"linear_{self.element}_k{self.channels}_n{self.columns}_m{m}{'_sum' * self.addends}"


def emit_linear(
    x: ir.Value,
    weight: ir.Value,
    tuning: Tuning,
    addends: Sequence[ir.Value] = (),
    computed: RowValues | None = None,
) -> ir.Value:
    """Emits the launch of a kernel at the insertion point; returns y, ``[M, N]``.

    ``x`` is ``[M, K]`` with M static or dynamic, ``weight`` ``[N, K]``, addends ``[M, N]``, all of one type: f32, f16 or bf16.
    ``computed`` is how x is computed, if that can be done where it is read: few rows are then not read from x.
    """
    kind = ir.RankedTensorType(x.type)
    (m, k), (n, _) = kind.shape, ir.RankedTensorType(weight.type).shape
    rows = None if kind.is_dynamic_dim(0) else m
    shape = Shape(k, n, rows, str(kind.element_type), len(addends), tuning=tuning)
    inputs, count = [x, weight, *addends], size(x, 0)
    if computed is not None:
        shape = replace(shape, few_rows=rows_that_pay(shape, computed))
    if computed is None or not shape.most_rows:
        return _emit_both(replace(shape, few_rows=FEW_ROWS), inputs, count)
    few = _emit_few(shape, computed, [*flat_sources(computed), *inputs[1:]], count)
    return few if rows is not None else _emit_many(shape, inputs, few, count)


def has_few_rows(x: ir.Value) -> bool:
    """Returns whether x, ``[..., K]``, surely has few rows."""
    leading = list(ir.RankedTensorType(x.type).shape)[:-1]
    return min(leading, default=1) >= 0 and prod(leading) <= FEW_ROWS


def is_for_many(launch: ir.Operation) -> bool:
    """Returns whether a launch is that of the kernel for many rows, beside one for few."""
    name: str = ir.FlatSymbolRefAttr(launch.attributes["callee"]).value
    return name.endswith(MANY)


def rows_that_pay(shape: Shape, computed: RowValues) -> int:
    """Returns for how many rows it is free to compute them in every block of columns, next to reading the weight."""
    columns = shape.few_columns  # they share what a block computes
    return max(1, min(FEW_ROWS, int(OPS_PER_BYTE * shape.bytes / (1 + computed.cost / columns))))


def column_blocks(shape: Shape, rows: ir.Value) -> ir.Value:
    """Returns how many blocks of columns a kernel has, for so many rows in all."""
    few, tiles = (-(-shape.columns // each) for each in (shape.few_columns, shape.tile_columns))
    if shape.rows is None:
        return arith.select(shape.are_few(rows), index(few), index(tiles))
    return index(few if shape.most_rows else tiles)


def _emit_both(shape: Shape, inputs: list[ir.Value], rows: ir.Value) -> ir.Value:
    """Emits the launch of the kernel that takes few rows and many, as far as ``shape`` has both."""

    def body(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        x, weight, *addends, y = buffers
        LinearKernel(shape, x, weight, [], y, addends).emit(block[0], _tile(shape, block, y))

    grid = [column_blocks(shape, rows), ceil_div(rows, shape.tile_rows), index(1)]
    return _launch(shape.name, body, grid, inputs, shape.result, [rows] if shape.rows is None else [])


def _emit_few(shape: Shape, computed: RowValues, inputs: list[ir.Value], rows: ir.Value) -> ir.Value:
    """Emits the launch of the kernel that computes few rows itself; it has no blocks where there are more."""
    count = len(computed.sources)

    def body(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        sources, (weight, *addends, y) = buffers[:count], buffers[count:]
        block_rows = Rows(index(0), size(y, 0))
        kernel = LinearKernel(shape, weight, weight, [], y, addends)
        rows = Computed(kernel, computed, sources, block_rows, shape.most_rows)
        kernel.few(block[0], block_rows, shape.most_rows, rows)

    columns = index(-(-shape.columns // shape.few_columns))
    sizes = []
    if shape.rows is None:
        columns, sizes = arith.select(shape.are_few(rows), columns, index(0)), [rows]
    # of no rows at all there is nothing to compute
    grid = [columns, minimum(rows, 1), index(1)]
    name = f"{shape.name}_{computed.digest}"
    return _launch(name, body, grid, inputs, shape.result, sizes, is_product=False)


def _emit_many(shape: Shape, inputs: list[ir.Value], few: ir.Value, rows: ir.Value) -> ir.Value:
    """Emits the launch of the kernel for many rows, into the memory of the result for few; it has no blocks for few."""

    def body(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        x, weight, *addends, y = buffers
        kernel = LinearKernel(shape, x, weight, [], y, addends)
        kernel.tiles(block[0], _tile(shape, block, y))

    columns = arith.select(shape.are_few(rows), index(0), index(-(-shape.columns // shape.tile_columns)))
    grid = [columns, ceil_div(rows, shape.tile_rows), index(1)]
    return _launch(shape.name + MANY, body, grid, [*inputs, few], shape.result, [], tied=len(inputs))


def _launch(
    name: str,
    body: Callable[[list[ir.Value], list[ir.Value]], None],
    grid: list[ir.Value],
    inputs: list[ir.Value],
    result: ir.RankedTensorType,
    sizes: list[ir.Value],
    tied: int = -1,
    is_product: bool = True,
) -> ir.Value:
    """Emits a launch; ``is_product`` where it is ``x w^T`` of its first inputs."""
    kinds = [memref_of(v.type) for v in inputs] + ([memref_of(result)] if tied < 0 else [])
    kernel(name, kinds, THREADS, body)
    op = launch(name, result, grid, inputs, sizes, tied)
    if is_product:
        op.attributes[MULTIPLIES] = ir.UnitAttr.get()
    return op.result


def _tile(shape: Shape, block: list[ir.Value], y: ir.Value) -> Rows:
    first = mul(block[1], shape.tile_rows)
    return Rows(first, minimum(add(first, shape.tile_rows), size(y, 0)))


class LinearKernel:
    """Emits what a block does at the insertion point; ``expert`` is the place of the weight in a stack, if it is one."""

    def __init__(
        self,
        shape: Shape,
        x: ir.Value,
        weight: ir.Value,
        expert: list[ir.Value],
        y: ir.Value,
        addends: Sequence[ir.Value],
    ) -> None:
        self.shape, self.x, self.weight, self.expert = shape, x, weight, expert
        self.y, self.addends = y, addends
        self.element = ir.MemRefType(weight.type).element_type
        self.thread = thread()
        self.wave, self.lane = floor_div(self.thread, WAVE), rem(self.thread, WAVE)

    def emit(self, block: ir.Value, rows: Rows) -> None:
        """Computes a block of columns for some rows."""
        most = self.shape.most_rows
        if self.shape.rows is not None:
            self.few(block, rows, most) if most else self.tiles(block, rows)
            return
        when(
            self.shape.are_few(size(self.x, 0)),
            lambda: self.few(block, rows, most),
            lambda: self.tiles(block, rows),
        )

    # Few rows

    def few(self, block: ir.Value, some_rows: Rows, most: int, computed: Computed | None = None) -> None:
        """Computes some columns of up to ``most`` rows in each wave."""
        rows = [some_rows.number(i) for i in range(most)]
        count = self.shape.tuning.linear_columns
        mine = self.mine(block, rows, computed)
        row = rows[0]
        for r, number in enumerate(rows[1:], 1):
            row = arith.select(compare("sge", self.lane, index(r * count)), number, row)
        has_one = some_rows.has(floor_div(self.lane, count))
        has_one = arith.andi(has_one, compare("slt", self.lane, index(len(rows) * count)))
        column = self.few_column(block)
        inside = arith.andi(has_one, compare("slt", column, index(self.shape.columns)))
        when(inside, lambda: self.finish(mine, row, column))

    def few_column(self, block: ir.Value) -> ir.Value:
        """Returns the column of a lane, of few rows; there may be none."""
        count = self.shape.tuning.linear_columns
        return add(mul(add(mul(block, WAVES), self.wave), count), rem(self.lane, count))

    def mine(self, block: ir.Value, rows: list[ir.Value], computed: Computed | None = None) -> ir.Value:
        """Returns the product of a lane in f32: of its column and, a group of lanes each, of one of few rows."""
        shape, count = self.shape, self.shape.tuning.linear_columns
        first = mul(add(mul(block, WAVES), self.wave), count)
        columns = [minimum(add(first, c), shape.columns - 1) for c in range(count)]
        lanes = shape.lanes if shape.channels % shape.lanes == 0 else 1
        places = list(itertools.product(range(len(rows)), range(count)))

        def products(
            x: Callable[[int], list[ir.Value]], k: ir.Value, sums: Sequence[ir.Value]
        ) -> list[ir.Value]:
            xs = [x(r) for r in range(len(rows))]
            ws = [self.values(self.weight, [*self.expert, column, k], lanes) for column in columns]
            result = []
            for (r, c), total in zip(places, sums, strict=True):
                for a, b in zip(xs[r], ws[c], strict=True):
                    total = math.fma(a, b, total)
                result.append(total)
            return result

        zeros, first_channel = [f32(0.0)] * len(places), mul(self.lane, lanes)
        if computed is None:

            def more(k: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                return products(lambda r: self.values(self.x, [rows[r], k], lanes), k, sums)

            sums = loop(first_channel, shape.channels, WAVE * lanes, more, zeros)
        else:
            sums = computed.pieces(products, first_channel, lanes, zeros)
        sums = [over_lanes(arith.addf, total) for total in sums]
        mine = sums[0]  # a lane has one of them
        for at, total in enumerate(sums[1:], 1):
            mine = arith.select(compare("eq", self.lane, index(at)), total, mine)
        return mine

    def values(self, source: ir.Value, at: list[ir.Value], lanes: int) -> list[ir.Value]:
        """Returns neighbouring elements as f32."""
        if lanes == 1:
            return [self.widened(get(source, at))]
        values = load(source, at, lanes)
        return [self.widened(element_at(values, i)) for i in range(lanes)]

    def widened(self, value: ir.Value) -> ir.Value:
        return value if self.shape.element == "f32" else arith.extf(ir.F32Type.get(), value)

    def finish(self, total: ir.Value, row: ir.Value, column: ir.Value) -> None:
        for addend in self.addends:
            total = arith.addf(total, self.widened(get(addend, [row, column])))
        value = total if self.shape.element == "f32" else arith.truncf(self.element, total)
        put(value, self.y, [row, column])

    # Many rows

    def tiles(self, block: ir.Value, rows: Rows) -> None:
        """Computes a tile; waves 0 and 1 have its first rows, waves 0 and 2 its first columns."""
        row_tiles, column_tiles = self.shape.tiles
        first_column = mul(block, self.shape.tile_columns)
        row_tile, column_tile = mul(floor_div(self.wave, 2), row_tiles), mul(rem(self.wave, 2), column_tiles)
        places = list(itertools.product(range(row_tiles), range(column_tiles)))
        stage = _Stage(self, rows, first_column, row_tile, column_tile)
        steps = -(-self.shape.channels // stage.channels)
        zeros = [matrix_zero(self.shape.element)] * len(places)
        sums = loop(0, steps, 1, lambda step, *sums: stage.products(mul(step, stage.channels), sums), zeros)
        quarter = mul(floor_div(self.lane, TILE), 4)
        for r, v in itertools.product(range(row_tiles), range(4)):
            i = add(add(mul(add(row_tile, r), TILE), quarter), v)

            def write(r: int = r, v: int = v, i: ir.Value = i) -> None:
                number = rows.number(i)
                for c in range(column_tiles):
                    column = add(add(first_column, mul(add(column_tile, c), TILE)), rem(self.lane, TILE))
                    total = element_at(sums[places.index((r, c))], v)
                    inside = compare("slt", column, index(self.shape.columns))
                    when(inside, partial(self.finish, total, number, column))

            when(rows.has(i), write)


class Computed:
    """Few rows that the block computes, piece by piece, in shared memory."""

    def __init__(
        self, kernel: LinearKernel, values: RowValues, sources: list[ir.Value], rows: Rows, most: int
    ) -> None:
        self.kernel, self.values, self.sources, self.rows, self.most = kernel, values, sources, rows, most
        shape = kernel.shape
        step = WAVE * shape.lanes
        whole = -(-shape.channels // step) * step
        self.channels = min(whole, PIECE_BYTES // (most * shape.bytes) // step * step)
        self.piece = shared([most, self.channels], kernel.element)
        self.count = sub(rows.end, rows.first)

    def pieces(
        self,
        products: Callable[[Callable[[int], list[ir.Value]], ir.Value, Sequence[ir.Value]], list[ir.Value]],
        first_channel: ir.Value,
        lanes: int,
        zeros: list[ir.Value],
    ) -> list[ir.Value]:
        """Returns the sums of products with all pieces."""
        kernel, channels = self.kernel, self.kernel.shape.channels
        sums_of = self.values.row_sums(self.sources, self.rows.first, self.count, self.most, THREADS)

        def one(start: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            length = minimum(sub(channels, start), self.channels)

            def row(i: ir.Value) -> None:
                known, number = sums_of(i), add(self.rows.first, i)

                def channel(k: ir.Value) -> None:
                    value = self.values.at(self.sources, number, add(start, k), known)
                    put(value, self.piece, [i, k])

                loop(kernel.thread, length, THREADS, channel)

            loop(0, self.count, 1, row)
            barrier()

            def more(k: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                def x(r: int) -> list[ir.Value]:  # of the last row where there are not so many
                    return kernel.values(self.piece, [minimum(r, sub(self.count, 1)), k], lanes)

                return products(x, add(start, k), sums)

            result = loop(first_channel, length, WAVE * lanes, more, sums)
            barrier()
            return result

        return loop(0, channels, self.channels, one, zeros)


class _Stage:
    """Some channels of a tile in shared memory: fragments of 64 lanes of x and of the weight, 16 bytes each."""

    def __init__(
        self,
        kernel: LinearKernel,
        rows: Rows,
        first_column: ir.Value,
        row_tile: ir.Value,
        column_tile: ir.Value,
    ) -> None:
        self.kernel, self.shape = kernel, kernel.shape
        self.row_tile, self.column_tile = row_tile, column_tile
        self.lanes = kernel.shape.lanes
        self.fragments = self.shape.fragments
        self.channels = self.fragments * self.fragment
        self.row_tiles, self.column_tiles = self.shape.tiles
        self.x = shared([2 * self.row_tiles * self.fragments * WAVE, self.lanes], kernel.element)
        self.weight = shared([2 * self.column_tiles * self.fragments * WAVE, self.lanes], kernel.element)
        lane = rem(kernel.lane, TILE)
        # what a wave reads: tiles wave, wave + 4, ...
        self.x_tiles = [add(kernel.wave, WAVES * i) for i in range(2 * self.row_tiles // WAVES)]
        self.weight_tiles = [add(kernel.wave, WAVES * i) for i in range(2 * self.column_tiles // WAVES)]
        self.rows = [rows.number(add(mul(tile, TILE), lane)) for tile in self.x_tiles]
        last = self.shape.columns - 1
        self.columns = [
            minimum(add(first_column, add(mul(tile, TILE), lane)), last) for tile in self.weight_tiles
        ]

    @property
    def fragment(self) -> int:
        """Returns the channels that a wave's lanes hold with one vector each."""
        return self.lanes * (WAVE // TILE)

    def products(self, first: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
        """Returns the sums with the products of the channels from ``first`` on."""
        kernel, element = self.kernel, self.shape.element
        for f in range(self.fragments):
            k = add(add(first, f * self.fragment), mul(floor_div(kernel.lane, TILE), self.lanes))
            for tile, row in zip(self.x_tiles, self.rows, strict=True):
                store(self.part(kernel.x, [row], k), self.x, [self.place(tile, f), 0])
            for tile, column in zip(self.weight_tiles, self.columns, strict=True):
                at = [*kernel.expert, column]
                store(self.part(kernel.weight, at, k), self.weight, [self.place(tile, f), 0])
        barrier()
        result = list(sums)
        width = MATRIX_INSTRUCTIONS[element][1] // (WAVE // TILE)  # of a lane's operand
        for f in range(self.fragments):
            xs = [self.operands(self.x, add(self.row_tile, r), f, width) for r in range(self.row_tiles)]
            ws = [
                self.operands(self.weight, add(self.column_tile, c), f, width)
                for c in range(self.column_tiles)
            ]
            for place, (x, w) in enumerate(itertools.product(xs, ws)):
                for a, b in zip(x, w, strict=True):
                    result[place] = matrix_multiply(element, a, b, result[place])
        barrier()
        return result

    def place(self, tile: ir.Value, fragment: int) -> ir.Value:
        return add(mul(add(mul(tile, self.fragments), fragment), WAVE), self.kernel.lane)

    def part(self, source: ir.Value, at: list[ir.Value], k: ir.Value) -> ir.Value:
        """Returns neighbouring channels as they are stored; 0 behind the last one."""
        channels, kind = self.shape.channels, self.kernel.element
        if channels % self.channels == 0:
            return load(source, [*at, k], self.lanes)
        none = zero(kind)
        if channels % self.lanes == 0:
            zeros = vector.broadcast(ir.VectorType.get([self.lanes], kind), none)
            inside = compare("slt", k, index(channels))
            return choose(inside, lambda: [load(source, [*at, k], self.lanes)], [zeros])[0]
        values = []
        for i in range(self.lanes):
            place = add(k, i)
            inside = compare("slt", place, index(channels))
            values += choose(inside, partial(_one, source, [*at, place]), [none])
        return vector.from_elements(ir.VectorType.get([self.lanes], kind), values)

    def operands(self, source: ir.Value, tile: ir.Value, fragment: int, width: int) -> list[ir.Value]:
        """Returns a lane's operands of the instructions for one fragment."""
        place = self.place(tile, fragment)
        if width == 1:
            values = load(source, [place, 0], self.lanes)
            return [element_at(values, i) for i in range(self.lanes)]
        return [load(source, [place, i], width) for i in range(0, self.lanes, width)]


def _one(source: ir.Value, at: list[ir.Value]) -> list[ir.Value]:
    return [get(source, at)]
