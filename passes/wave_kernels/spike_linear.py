"""Wave kernels for ``spikingbrain.spike_linear``: exact sums of small integers by the matrix instruction for bytes.

Up to 16 rows, a block computes 16 columns: its waves share the channels, and the weight, read once, streams from memory to the
instruction. With more rows, a block computes a tile of 64 rows whose operands its waves share. A kernel for any number of rows
holds both. A sum runs over one group of channels in i32, then enters the result by its scale, group by group. The high bytes of
counts are multiplied where the encoder has seen any (``spike_encode.py``). Rows that it marked are computed again from x, in f64:
exact there too as far as 2**53, NaN and infinity included.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch_mlir import ir
from torch_mlir.dialects import arith, math

from spikingbrain.passes.kernels.builders import (
    add,
    ceil_div,
    compare,
    f32,
    floor_div,
    get,
    i32,
    i32_type,
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
    when,
)
from spikingbrain.passes.wave_kernels.builders import (
    TILE,
    WAVE,
    barrier,
    choose,
    kernel,
    memref_of,
    shared,
    thread,
)
from spikingbrain.passes.wave_kernels.row_tiles import Rows
from spikingbrain.passes.wave_kernels.spike_codes import Codes
from spikingbrain.passes.wave_kernels.spike_encode import FEW_ROWS, FLAG_CHANNELS, Counts, Encoding
from spikingbrain.tuning import USUAL, Tuning

WAVES = 4  # of a block
THREADS = WAVES * WAVE


@dataclass(frozen=True)
class Shape:
    """One projection: the counts' encoding, groups, columns, rows (None: any number), with a bias, a sum with another value."""

    cut: Encoding
    groups: int
    columns: int
    rows: int | None
    bias: bool = False
    addend: bool = False
    tuning: Tuning = USUAL

    @property
    def row_tiles(self) -> int:
        """Returns the tiles of rows of a wave in the kernel for many rows; its waves are two by two."""
        return self.tuning.spike_row_tiles

    @property
    def tile_rows(self) -> int:
        """Returns the rows of a block in the kernel for many rows."""
        return 2 * self.row_tiles * TILE

    @property
    def panels(self) -> int:
        return -(-self.columns // TILE)

    def name(self, codes: Codes) -> str:
        m = "" if self.rows is None else self.rows
        sizes = f"k{self.cut.channels}_g{self.groups}_n{self.columns}_m{m}"
        return f"spike_linear_i{codes.bits}_l{self.cut.largest_code}_{sizes}{'_bias' * self.bias}{'_sum' * self.addend}"

    def scale_type(self) -> ir.RankedTensorType:
        return ir.RankedTensorType.get([self.panels, self.groups, TILE], ir.F32Type.get())


def refusal(codes: Codes, channels: int, groups: int) -> str:
    """Returns why a projection has no kernel, or an empty text."""
    if groups > 1 and channels // groups % codes.chunk:
        return f"groups of {channels // groups} channels; a wave takes {codes.chunk}"
    return ""


def column_tiles(codes: Codes) -> int:
    """Returns the tiles of columns of a wave in the kernel for many rows."""
    return 2 if codes.bits == 16 else 4


def emit_spike_linear(
    counts: Counts,
    weight: ir.Value,
    scale: ir.Value,
    bias: ir.Value | None,
    codes: Codes,
    shape: Shape,
    addend: ir.Value | None = None,
) -> ir.Value:
    """Emits a launch of the kernel at the insertion point; returns y, ``[M, N]`` f32.

    ``weight`` is packed by ``codes.recipe()``, ``scale`` by ``codes.scale_recipe()``, ``bias`` is ``[N]``, the
    addend ``[M, N]``.
    """
    m = ir.ShapedType.get_dynamic_size() if shape.rows is None else shape.rows
    result = ir.RankedTensorType.get([m, shape.columns], ir.F32Type.get())
    more = [value for value in (bias, addend) if value is not None]
    inputs = [*counts.values(), weight, scale, *more]
    rows = size(counts.x, 0)

    def body(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        parts, (weight, scale, *more, y) = Counts(*buffers[:6]), buffers[6:]
        bias = more[0] if shape.bias else None
        kernel = SpikeKernel(codes, shape, parts, weight, scale, bias, y, more[-1] if shape.addend else None)
        first, count = mul(block[1], shape.tile_rows), size(parts.x, 0)
        kernel.emit(block[0], Rows(first, minimum(add(first, shape.tile_rows), count)))

    kernel(shape.name(codes), [memref_of(v.type) for v in inputs] + [memref_of(result)], THREADS, body)
    grid = [column_blocks(codes, shape, rows), ceil_div(rows, shape.tile_rows), index(1)]
    sizes = [rows] if shape.rows is None else []
    return launch(shape.name(codes), result, grid, inputs, sizes).result


def column_blocks(codes: Codes, shape: Shape, rows: ir.Value) -> ir.Value:
    """Returns how many blocks of columns a kernel has, for so many rows in all."""
    few, tiles = shape.panels, -(-shape.panels // (2 * column_tiles(codes)))
    if shape.rows is None:
        return arith.select(compare("sle", rows, index(FEW_ROWS)), index(few), index(tiles))
    return index(few if shape.rows <= FEW_ROWS else tiles)


class SpikeKernel:
    """Emits what a block does at the insertion point; ``first_panel`` is where the weight begins among those of all experts."""

    def __init__(
        self,
        codes: Codes,
        shape: Shape,
        counts: Counts,
        weight: ir.Value,
        scale: ir.Value,
        bias: ir.Value | None,
        y: ir.Value,
        addend: ir.Value | None = None,
    ) -> None:
        self.codes, self.shape, self.counts = codes, shape, counts
        self.weight, self.scale, self.bias, self.y, self.addend = weight, scale, bias, y, addend
        self.first_panel: ir.Value = index(0)
        self.thread = thread()
        self.wave, self.lane = floor_div(self.thread, WAVE), rem(self.thread, WAVE)
        self.chunks = codes.chunks(shape.cut.channels)  # of a row
        self.group_chunks = self.chunks // shape.groups if shape.groups > 1 else self.chunks

    def emit(self, block: ir.Value, rows: Rows) -> None:
        """Computes a block of columns for some rows."""
        if self.shape.rows is not None:
            (self.few if self.shape.rows <= FEW_ROWS else self.tiles)(block, rows)
            return
        are_few = compare("sle", size(self.counts.x, 0), index(FEW_ROWS))
        when(are_few, lambda: self.few(block, rows), lambda: self.tiles(block, rows))

    # Few rows

    def few(self, panel: ir.Value, rows: Rows) -> None:
        """Computes 16 columns of up to 16 rows. A part is a group, or what one wave has added of the only one."""
        groups = self.shape.groups
        column, i = (
            rem(self.thread, TILE),
            floor_div(self.thread, TILE),
        )  # of the element that a thread writes
        # and where the instruction leaves it
        element = add(mul(add(mul(floor_div(i, 4), TILE), column), 4), rem(i, 4))
        row = rows.number(rem(self.lane, TILE))
        ahead = min(self.shape.tuning.spike_chunks_ahead, -(-groups // WAVES))
        parts = WAVES * ahead if groups > 1 else WAVES
        sums = shared([parts, WAVE * 4], i32_type())

        def write(part: ir.Value, totals: list[ir.Value]) -> None:
            for v, total in enumerate(totals):
                put(total, sums, [part, add(mul(self.lane, 4), v)])

        if groups == 1:
            write(self.wave, self.codes.totals(self.shared_channels(panel, row, rows)))
            barrier()
            (whole,) = loop(
                0, WAVES, 1, lambda part, t: [arith.addi(t, get(sums, [part, element]))], [i32(0)]
            )
            total = self.scaled(whole, panel, index(0), column)
        else:

            def some(step: ir.Value, total: ir.Value) -> list[ir.Value]:
                for u in range(ahead):
                    part = add(self.wave, u * WAVES)
                    group = minimum(add(mul(step, parts), part), groups - 1)
                    write(part, self.codes.totals(self.group_sums(panel, group, row, flags, step)))
                barrier()

                def one(part: ir.Value, total: ir.Value) -> list[ir.Value]:
                    group = add(mul(step, parts), part)
                    value = self.scaled(get(sums, [part, element]), panel, group, column)
                    return [arith.addf(total, value)]

                left = arith.subi(index(groups), mul(step, parts))
                (total,) = loop(0, minimum(left, parts), 1, one, [total])
                barrier()
                return [total]

            steps = -(-groups // parts)
            flags = self.flags(rows, steps, parts * self.group_chunks, TILE)
            (total,) = loop(0, steps, 1, some, [f32(0.0)])
        number, column_of_y = rows.number(i), add(mul(panel, TILE), column)
        inside = arith.andi(rows.has(i), compare("slt", column_of_y, index(self.shape.columns)))

        def finish() -> None:
            marked = compare("ne", get(self.counts.marked, [number]), i32(0))
            (value,) = choose(marked, lambda: [self.exact(number, panel, column)], [total])
            self.finish(value, number, column_of_y)

        when(inside, finish)

    def shared_channels(self, panel: ir.Value, row: ir.Value, rows: Rows) -> list[ir.Value]:
        """Returns the sums of one wave over its share of the channels."""
        ahead = max(1, min(self.shape.tuning.spike_chunks_ahead, self.chunks // WAVES))
        steps = -(-self.chunks // (WAVES * ahead))
        flags = self.flags(rows, steps, WAVES * ahead, TILE)

        def some(step: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            places = [add(mul(step, WAVES * ahead), add(self.wave, u * WAVES)) for u in range(ahead)]
            places = [minimum(at, self.chunks) for at in places]
            return self.products(panel, places, row, get(flags, [step]), sums)

        return loop(0, steps, 1, some, self.codes.zeros())

    def group_sums(
        self, panel: ir.Value, group: ir.Value, row: ir.Value, flags: ir.Value, step: ir.Value
    ) -> list[ir.Value]:
        first = mul(group, self.group_chunks)

        def some(at: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            return self.products(panel, [add(first, at)], row, get(flags, [step]), sums)

        return loop(0, self.group_chunks, 1, some, self.codes.zeros())

    def products(
        self,
        panel: ir.Value,
        chunks: Sequence[ir.Value],
        row: ir.Value,
        is_wide: ir.Value,
        sums: Sequence[ir.Value],
    ) -> list[ir.Value]:
        """Returns the sums with the products of some chunks; the one behind the last has counts of zero."""
        codes, panel = self.codes, add(panel, self.first_panel)
        places = [codes.count_places(chunk, self.lane) for chunk in chunks]
        weights = [
            codes.code_vectors_at(self.weight, panel, minimum(chunk, self.chunks - 1), self.lane)
            for chunk in chunks
        ]
        low = [self.words(self.counts.low, row, place) for place in places]
        operands = [codes.operands(vectors) for vectors in weights]
        for counts, operand in zip(low, operands, strict=True):
            sums = codes.add_low(sums, counts, operand)

        def wide() -> list[ir.Value]:
            result = list(sums)
            for place, operand in zip(places, operands, strict=True):
                result = codes.add_high(result, self.words(self.counts.high, row, place), operand)
            return result

        return choose(compare("ne", is_wide, i32(0)), wide, list(sums))

    def words(self, plane: ir.Value, row: ir.Value, places: Sequence[ir.Value]) -> list[ir.Value]:
        return self.codes.words([load(plane, [row, place], 4) for place in places])

    # Many rows

    def tiles(self, block: ir.Value, rows: Rows) -> None:
        """Computes a tile of rows and columns; waves 0 and 1 have its first rows, waves 0 and 2 its first columns."""
        codes, groups = self.codes, self.shape.groups
        across = column_tiles(codes)
        first_panel = mul(block, 2 * across)
        row_tile, column_tile = (
            mul(floor_div(self.wave, 2), self.shape.row_tiles),
            mul(rem(self.wave, 2), across),
        )
        panels = [
            minimum(add(first_panel, add(column_tile, c)), self.shape.panels - 1) for c in range(across)
        ]
        flags = self.flags(rows, self.chunks, 1, self.shape.tile_rows)
        stage = _Stage(self, rows, first_panel, row_tile, column_tile)

        def chunk(at: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            return stage.products(at, get(flags, [at]), sums)

        def totals_of(first: ir.Value, count: int) -> list[list[ir.Value]]:
            zeros = codes.zeros() * (self.shape.row_tiles * across)
            sums = loop(first, add(first, count), 1, chunk, zeros)
            each = len(codes.zeros())
            return [codes.totals(sums[at : at + each]) for at in range(0, len(sums), each)]

        column = rem(self.lane, TILE)
        places = list(itertools.product(range(self.shape.row_tiles), range(across)))

        def scaled(g: ir.Value, sums: list[list[ir.Value]]) -> list[ir.Value]:
            scales = [get(self.scale, [add(p, self.first_panel), g, column]) for p in panels]
            return [
                arith.mulf(arith.sitofp(ir.F32Type.get(), total), scales[c])
                for (_, c), four in zip(places, sums, strict=True)
                for total in four
            ]

        if groups == 1:
            totals = scaled(index(0), totals_of(index(0), self.chunks))
        else:

            def group(g: ir.Value, *totals: ir.Value) -> list[ir.Value]:
                values = scaled(g, totals_of(mul(g, self.group_chunks), self.group_chunks))
                return [arith.addf(total, value) for total, value in zip(totals, values, strict=True)]

            totals = loop(0, groups, 1, group, [f32(0.0)] * (4 * len(places)))
        values = iter(totals)
        by_place = {place: [next(values) for _ in range(4)] for place in places}
        quarter = mul(floor_div(self.lane, TILE), 4)
        for r, v in itertools.product(range(self.shape.row_tiles), range(4)):
            i = add(add(mul(add(row_tile, r), TILE), quarter), v)
            number = rows.number(i)
            kept = arith.andi(rows.has(i), compare("eq", get(self.counts.marked, [number]), i32(0)))

            def write(r: int = r, v: int = v, number: ir.Value = number) -> None:
                for c in range(across):
                    at = add(mul(add(first_panel, add(column_tile, c)), TILE), column)
                    inside = compare("slt", at, index(self.shape.columns))
                    when(inside, partial(self.finish, by_place[r, c][v], number, at))

            when(kept, write)
        self.again(rows, first_panel, 2 * across)

    def again(self, rows: Rows, first_panel: ir.Value, panels: int) -> None:
        """Computes the marked rows of a tile, a column in each thread."""
        column = add(mul(first_panel, TILE), self.thread)
        is_mine = compare("slt", self.thread, index(panels * TILE))
        inside = arith.andi(is_mine, compare("slt", column, index(self.shape.columns)))

        def row(i: ir.Value) -> None:
            number = rows.number(i)
            marked = arith.andi(rows.has(i), compare("ne", get(self.counts.marked, [number]), i32(0)))

            def compute() -> None:
                value = self.exact(number, floor_div(column, TILE), rem(column, TILE))
                self.finish(value, number, column)

            when(arith.andi(marked, inside), compute)

        loop(0, self.shape.tile_rows, 1, row)

    # Both

    def flags(self, rows: Rows, steps: int, chunks: int, most: int) -> ir.Value:
        """Returns, in shared memory, for each step of ``chunks`` chunks whether a row has a high byte there."""
        flags = shared([steps], i32_type())
        each = chunks * self.codes.chunk // FLAG_CHANNELS

        def one(step: ir.Value) -> None:
            first = mul(step, each)
            end = minimum(add(first, each), self.shape.cut.flags)

            def row(i: ir.Value, so_far: ir.Value) -> list[ir.Value]:
                number = rows.number(i)
                return loop(
                    first, end, 1, lambda at, f: [arith.ori(f, get(self.counts.wide, [number, at]))], [so_far]
                )

            count = minimum(arith.subi(rows.end, rows.first), most)
            put(loop(0, count, 1, row, [i32(0)])[0], flags, [step])

        loop(self.thread, steps, THREADS, one)
        barrier()
        return flags

    def scaled(self, whole: ir.Value, panel: ir.Value, group: ir.Value, column: ir.Value) -> ir.Value:
        scale = get(self.scale, [add(panel, self.first_panel), group, column])
        return arith.mulf(arith.sitofp(ir.F32Type.get(), whole), scale)

    def finish(self, total: ir.Value, row: ir.Value, column: ir.Value) -> None:
        """Writes ``threshold * total + bias``, and adds what is to be added."""
        value = arith.mulf(total, get(self.counts.threshold, [row]))
        if self.bias is not None:
            value = arith.addf(value, get(self.bias, [column]))
        if self.addend is not None:
            value = arith.addf(value, get(self.addend, [row, column]))
        put(value, self.y, [row, column])

    def exact(self, row: ir.Value, panel: ir.Value, column: ir.Value) -> ir.Value:
        """Returns the sum of a marked row and one column, from x and in f64, channel by channel."""
        number, f64 = ir.F32Type.get(), ir.F64Type.get()
        groups, width = self.shape.groups, self.shape.cut.channels // self.shape.groups
        threshold, panel = get(self.counts.threshold, [row]), add(panel, self.first_panel)

        def group(g: ir.Value, total: ir.Value) -> list[ir.Value]:
            def channel(at: ir.Value, so_far: ir.Value) -> list[ir.Value]:
                k = add(mul(g, width), at)
                count = math.roundeven(arith.divf(get(self.counts.x, [row, k]), threshold))
                word = partial(get, self.weight)
                code = arith.sitofp(f64, self.codes.code_at(word, panel, k, column))
                return [arith.addf(so_far, arith.mulf(arith.extf(f64, count), code))]

            (whole,) = loop(0, width, 1, channel, [arith.constant(f64, 0.0)])
            value = arith.mulf(arith.truncf(number, whole), get(self.scale, [panel, g, column]))
            return [arith.addf(total, value)]

        (total,) = loop(0, groups, 1, group, [f32(0.0)])
        return total


class _Stage:
    """A chunk of a tile in shared memory: fragments of 64 lanes, four words each, of counts and of codes."""

    def __init__(
        self,
        kernel: SpikeKernel,
        rows: Rows,
        first_panel: ir.Value,
        row_tile: ir.Value,
        column_tile: ir.Value,
    ) -> None:
        self.kernel, self.codes = kernel, kernel.codes
        self.row_tile, self.column_tile = row_tile, column_tile
        self.row_tiles = kernel.shape.row_tiles
        self.across = column_tiles(self.codes)
        self.low = shared([2 * self.row_tiles * self.codes.count_vectors * WAVE, 4], i32_type())
        self.weights = shared([2 * self.across * self.codes.code_vectors * WAVE, 4], i32_type())
        lane = rem(kernel.lane, TILE)
        # what a wave reads: row tiles wave, wave + 4, ..., and panels likewise
        self.counts_read = [add(kernel.wave, WAVES * i) for i in range(-(-2 * self.row_tiles // WAVES))]
        self.panels_read = [add(kernel.wave, WAVES * i) for i in range(2 * self.across // WAVES)]
        self.rows_read = [rows.number(add(mul(tile, TILE), lane)) for tile in self.counts_read]
        last = kernel.shape.panels - 1
        self.panel_numbers = [minimum(add(first_panel, p), last) for p in self.panels_read]
        self.own_rows = [rows.number(add(mul(add(row_tile, r), TILE), lane)) for r in range(self.row_tiles)]

    def products(self, chunk: ir.Value, is_wide: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
        """Returns the sums with the products of a chunk; high bytes, which are rare, are not shared."""
        kernel, codes = self.kernel, self.codes
        places = codes.count_places(chunk, kernel.lane)
        for tile, row in zip(self.counts_read, self.rows_read, strict=True):
            for h, place in enumerate(places):
                self.put(load(kernel.counts.low, [row, place], 4), self.low, tile, codes.count_vectors, h)
        for tile, panel in zip(self.panels_read, self.panel_numbers, strict=True):
            number = add(panel, kernel.first_panel)
            vectors = codes.code_vectors_at(kernel.weight, number, chunk, kernel.lane)
            for h, vector in enumerate(vectors):
                self.put(vector, self.weights, tile, codes.code_vectors, h)
        barrier()
        low = [self.read(self.low, add(self.row_tile, r), codes.count_vectors) for r in range(self.row_tiles)]
        weights = [
            self.read(self.weights, add(self.column_tile, c), codes.code_vectors) for c in range(self.across)
        ]
        operands = [codes.operands(vectors) for vectors in weights]
        words = [codes.words(vectors) for vectors in low]
        sums = self.each(sums, words, operands, codes.add_low)

        def wide() -> list[ir.Value]:
            words = [kernel.words(kernel.counts.high, row, places) for row in self.own_rows]
            return self.each(sums, words, operands, codes.add_high)

        sums = choose(compare("ne", is_wide, i32(0)), wide, list(sums))
        barrier()
        return sums

    def each(
        self,
        sums: Sequence[ir.Value],
        words: Sequence[list[ir.Value]],
        operands: Sequence[list[list[ir.Value]]],
        add_products: Callable[..., list[ir.Value]],
    ) -> list[ir.Value]:
        count, result = len(self.codes.zeros()), []
        for at, (counts, operand) in enumerate(itertools.product(words, operands)):
            result += add_products(sums[at * count : (at + 1) * count], counts, operand)
        return result

    def put(self, vector: ir.Value, to: ir.Value, tile: ir.Value, vectors: int, h: int) -> None:
        store(vector, to, [add(mul(add(mul(tile, vectors), h), WAVE), self.kernel.lane), 0])

    def read(self, source: ir.Value, tile: ir.Value, vectors: int) -> list[ir.Value]:
        first = mul(tile, vectors)
        return [load(source, [add(mul(add(first, h), WAVE), self.kernel.lane), 0], 4) for h in range(vectors)]
