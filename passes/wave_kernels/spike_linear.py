"""Wave kernels for ``spikingbrain.spike_linear``: exact sums of small integers by the matrix instruction for bytes.

Up to 16 rows, a block computes 16 columns: its waves share the channels, and the weight, read once, streams from memory to the
instruction. With more rows, a block computes a tile of 64 rows whose operands its waves share. A kernel for any number of rows
holds both. A sum runs over one group of channels in i32, then enters the result by its scale, group by group. The high bytes of
counts are multiplied where there are any (``spike_counts.py``). Rows that are marked are computed again from x, in f64:
exact there too as far as 2**53, NaN and infinity included.

A few rows are encoded by the blocks that read them (``spike_few.py``). For any number of rows that is a kernel of its own, beside
one for more, of which one has no blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch_mlir import ir
from torch_mlir.dialects import arith

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
from spikingbrain.passes.wave_kernels.row_values import RowValues, flat_sources
from spikingbrain.passes.wave_kernels.spike_codes import Codes
from spikingbrain.passes.wave_kernels.spike_counts import Counts, Encoding, count_of
from spikingbrain.passes.wave_kernels.spike_few import THREADS, WAVES, Encoded, Stored, flags, rows_that_pay
from spikingbrain.tuning import USUAL, Tuning

FEW_ROWS = 16
MOST_PADDING = 2  # times as many channels may be stored as there are


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

    @property
    def result(self) -> ir.RankedTensorType:
        """Returns the type of y."""
        m = ir.ShapedType.get_dynamic_size() if self.rows is None else self.rows
        return ir.RankedTensorType.get([m, self.columns], ir.F32Type.get())

    def scale_type(self) -> ir.RankedTensorType:
        return ir.RankedTensorType.get([self.panels, self.groups, TILE], ir.F32Type.get())


def refusal(codes: Codes) -> str:
    """Returns why a projection has no kernel, or an empty text."""
    stored = codes.group_steps * codes.step
    if codes.groups > 1 and stored > MOST_PADDING * codes.group:
        return f"groups of {codes.group} channels; {stored} would be stored for each"
    return ""


def column_tiles(codes: Codes) -> int:
    """Returns the tiles of columns of a wave in the kernel for many rows."""
    return 2 if codes.bits == 16 else 4


@dataclass(frozen=True)
class Stack:
    """What is stored for a projection, and what is added: the weight is packed by ``codes.recipe()``, ``scale`` by its own."""

    weight: ir.Value
    scale: ir.Value
    bias: ir.Value | None = None  # [N]
    addend: ir.Value | None = None  # [M, N]

    def values(self) -> list[ir.Value]:
        return [v for v in (self.weight, self.scale, self.bias, self.addend) if v is not None]

    def of(self, values: Sequence[ir.Value]) -> Stack:
        """Returns other values in the same places."""
        weight, scale, *more = values
        bias = more.pop(0) if self.bias is not None else None
        return Stack(weight, scale, bias, more[0] if more else None)


def emit_spike_linear(
    x: ir.Value,
    encode: Callable[[], Counts],
    stored: Stack,
    codes: Codes,
    shape: Shape,
    computed: RowValues | None = None,
    may_encode: bool = True,
) -> ir.Value:
    """Emits launches at the insertion point; returns y, ``[M, N]`` f32.

    ``x`` is ``[M, K]``, ``computed`` how it is computed, if the kernel is to do that. ``encode`` emits its counts, where they are
    needed; ``may_encode``: they are not, for few rows.
    """
    few_rows = rows_that_pay(codes, computed) if may_encode else 0
    sources = [x] if computed is None else flat_sources(computed)
    if shape.rows is not None and shape.rows > few_rows:
        few_rows = 0
    if not few_rows:
        counts = encode()
        return _emit_both(counts, stored, codes, shape, size(counts.x, 0))
    rows = _rows(shape, sources, computed)
    few = _emit_few(sources, computed, stored, codes, shape, few_rows, rows)
    if shape.rows is not None:
        return few
    return _emit_both(encode(), stored, codes, shape, rows, few, few_rows)


def _rows(shape: Shape, sources: list[ir.Value], computed: RowValues | None) -> ir.Value:
    if shape.rows is not None:
        return index(shape.rows)
    return size(sources[0 if computed is None else computed.source_of_rows], 0)


def _emit_few(
    sources: list[ir.Value],
    computed: RowValues | None,
    stored: Stack,
    codes: Codes,
    shape: Shape,
    few_rows: int,
    rows: ir.Value,
) -> ir.Value:
    """Emits the launch of the kernel that encodes few rows itself; it has no blocks where there are more."""
    most, count = few_rows if shape.rows is None else max(1, shape.rows), len(sources)

    def body(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        own, y = stored.of(buffers[count:-1]), buffers[-1]
        block_rows = Rows(index(0), size(y, 0))
        source = Encoded(codes, shape.tuning, shape.cut, computed, buffers[:count], block_rows, most)
        SpikeKernel(codes, shape, own, y).few(block[0], block_rows, source)

    columns, sizes = index(shape.panels), []
    if shape.rows is None:
        are_few = compare("sle", rows, index(few_rows))
        columns, sizes = arith.select(are_few, columns, index(0)), [rows]
    # of no rows at all there is nothing to compute
    grid = [columns, minimum(rows, 1), index(1)]
    name = f"{shape.name(codes)}_{shape.cut.settings}_{'x' if computed is None else computed.digest}"
    inputs = [*sources, *stored.values()]
    kernel(name, [memref_of(v.type) for v in inputs] + [memref_of(shape.result)], THREADS, body)
    return launch(name, shape.result, grid, inputs, sizes).result


def _emit_both(
    counts: Counts,
    stored: Stack,
    codes: Codes,
    shape: Shape,
    rows: ir.Value,
    few: ir.Value | None = None,
    few_rows: int = 0,
) -> ir.Value:
    """Emits the launch of the kernel on counts in memory, for few rows and for many, as far as ``shape`` has both.

    ``few`` is the result for up to ``few_rows`` rows: this one goes to its memory, and has no blocks there.
    """

    def body(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        parts, y = Counts(*buffers[:6]), buffers[-1]
        first, count = mul(block[1], shape.tile_rows), size(parts.x, 0)
        block_rows = Rows(first, minimum(add(first, shape.tile_rows), count))
        SpikeKernel(codes, shape, stored.of(buffers[6:-1]), y).emit(block[0], block_rows, parts)

    columns = column_blocks(codes, shape, rows)
    if few is not None:
        columns = arith.select(compare("sle", rows, index(few_rows)), index(0), columns)
    grid = [columns, ceil_div(rows, shape.tile_rows), index(1)]
    inputs, name = [*counts.values(), *stored.values()], shape.name(codes)
    kernel(name, [memref_of(v.type) for v in inputs] + [memref_of(shape.result)], THREADS, body)
    if few is not None:
        return launch(name, shape.result, grid, [*inputs, few], [], len(inputs)).result
    return launch(name, shape.result, grid, inputs, [rows] if shape.rows is None else []).result


def column_blocks(codes: Codes, shape: Shape, rows: ir.Value) -> ir.Value:
    """Returns how many blocks of columns a kernel has, for so many rows in all."""
    few, tiles = shape.panels, -(-shape.panels // (2 * column_tiles(codes)))
    if shape.rows is None:
        return arith.select(compare("sle", rows, index(FEW_ROWS)), index(few), index(tiles))
    return index(few if shape.rows <= FEW_ROWS else tiles)


class SpikeKernel:
    """Emits what a block does at the insertion point; ``first_panel`` is where the weight begins among those of all experts."""

    def __init__(self, codes: Codes, shape: Shape, stored: Stack, y: ir.Value) -> None:
        self.codes, self.shape, self.y = codes, shape, y
        self.weight, self.scale, self.bias, self.addend = (
            stored.weight,
            stored.scale,
            stored.bias,
            stored.addend,
        )
        self.first_panel: ir.Value = index(0)
        self.thread = thread()
        self.wave, self.lane = floor_div(self.thread, WAVE), rem(self.thread, WAVE)

    def emit(self, block: ir.Value, rows: Rows, counts: Counts) -> None:
        """Computes a block of columns for some rows."""

        def few() -> None:
            source = Stored(self.codes, self.shape.tuning, self.shape.cut, counts, rows)
            self.few(block, rows, source)

        def many() -> None:
            self.tiles(block, rows, counts)

        if self.shape.rows is not None:
            (few if self.shape.rows <= FEW_ROWS else many)()
            return
        when(compare("sle", size(counts.x, 0), index(FEW_ROWS)), few, many)

    # Few rows

    def few(self, panel: ir.Value, rows: Rows, source: Stored | Encoded) -> None:
        """Computes 16 columns of up to 16 rows. A part is a group, or what one wave has added of the only one."""
        groups, steps = self.codes.groups, source.steps
        column, i = (
            rem(self.thread, TILE),
            floor_div(self.thread, TILE),
        )  # of the element that a thread writes
        # and where the instruction leaves it
        element = add(mul(add(mul(floor_div(i, 4), TILE), column), 4), rem(i, 4))
        parts = steps.each if groups > 1 else WAVES
        quarters = -(-source.most // 4)  # of a wave, that hold rows
        sums = shared([parts, quarters * TILE * 4], i32_type())
        element = minimum(element, quarters * TILE * 4 - 1)

        def write(part: ir.Value, totals: list[ir.Value]) -> None:
            def own() -> None:
                for v, total in enumerate(totals):
                    put(total, sums, [part, add(mul(self.lane, 4), v)])

            when(compare("slt", self.lane, index(quarters * TILE)), own)

        if groups == 1:
            write(self.wave, self.codes.totals(self.shared_channels(panel, source)))
            barrier()
            (whole,) = loop(
                0, WAVES, 1, lambda part, t: [arith.addi(t, get(sums, [part, element]))], [i32(0)]
            )
            total = self.scaled(whole, panel, index(0), column)
        else:

            def some(step: ir.Value, total: ir.Value) -> list[ir.Value]:
                for u in range(steps.ahead):
                    part = add(self.wave, u * WAVES)
                    group = minimum(add(mul(step, parts), part), groups - 1)
                    write(part, self.codes.totals(self.group_sums(panel, group, source, step)))
                barrier()

                def one(part: ir.Value, total: ir.Value) -> list[ir.Value]:
                    group = add(mul(step, parts), part)
                    value = self.scaled(get(sums, [part, element]), panel, group, column)
                    return [arith.addf(total, value)]

                left = arith.subi(index(groups), mul(step, parts))
                (total,) = loop(0, minimum(left, parts), 1, one, [total])
                barrier()
                return [total]

            def piece(first: ir.Value, end: ir.Value, total: ir.Value) -> list[ir.Value]:
                return loop(first, end, 1, some, [total])

            (total,) = source.pieces(piece, [f32(0.0)])
        number, column_of_y = rows.number(i), add(mul(panel, TILE), column)
        inside = arith.andi(rows.has(i), compare("slt", column_of_y, index(self.shape.columns)))

        def finish() -> None:
            threshold = source.threshold(i)

            def again() -> list[ir.Value]:
                return [self.exact(lambda k: source.count(i, k, threshold), panel, column)]

            (value,) = choose(source.marked(i), again, [total])
            self.finish(value, threshold, number, column_of_y)

        when(inside, finish)

    def shared_channels(self, panel: ir.Value, source: Stored | Encoded) -> list[ir.Value]:
        """Returns the sums of one wave over its share of the channels."""
        steps, chunks = source.steps, self.codes.chunks

        def some(step: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            places = [add(mul(step, steps.each), add(self.wave, u * WAVES)) for u in range(steps.ahead)]
            places = [minimum(at, chunks) for at in places]
            return self.products(panel, index(0), places, source, step, sums)

        def piece(first: ir.Value, end: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            return loop(first, end, 1, some, sums)

        return source.pieces(piece, self.codes.zeros())

    def group_sums(
        self, panel: ir.Value, group: ir.Value, source: Stored | Encoded, step: ir.Value
    ) -> list[ir.Value]:
        def some(at: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            return self.products(panel, group, [at], source, step, sums)

        return loop(0, self.codes.group_chunks, 1, some, self.codes.zeros())

    def products(
        self,
        panel: ir.Value,
        group: ir.Value,
        chunks: Sequence[ir.Value],
        source: Stored | Encoded,
        step: ir.Value,
        sums: Sequence[ir.Value],
    ) -> list[ir.Value]:
        """Returns the sums with the products of some chunks of a group; the one behind the last has counts of zero."""
        codes, panel = self.codes, add(panel, self.first_panel)
        of_row = [add(mul(group, codes.group_chunks), chunk) for chunk in chunks]
        places = [codes.count_places(chunk, self.lane) for chunk in of_row]
        weights = [
            codes.code_vectors_at(
                self.weight, panel, group, minimum(chunk, codes.group_chunks - 1), self.lane
            )
            for chunk in chunks
        ]
        low = [source.words(source.low, place) for place in places]
        operands = [codes.operands(vectors) for vectors in weights]
        for counts, operand in zip(low, operands, strict=True):
            sums = codes.add_low(sums, counts, operand)

        def wide() -> list[ir.Value]:
            result = list(sums)
            for place, operand in zip(places, operands, strict=True):
                result = codes.add_high(result, source.words(source.high, place), operand)
            return result

        return choose(source.is_wide(step, of_row), wide, list(sums))

    # Many rows

    def tiles(self, block: ir.Value, rows: Rows, counts: Counts) -> None:
        """Computes a tile of rows and columns; waves 0 and 1 have its first rows, waves 0 and 2 its first columns."""
        codes, groups = self.codes, self.codes.groups
        across = column_tiles(codes)
        first_panel = mul(block, 2 * across)
        row_tile, column_tile = (
            mul(floor_div(self.wave, 2), self.shape.row_tiles),
            mul(rem(self.wave, 2), across),
        )
        panels = [
            minimum(add(first_panel, add(column_tile, c)), self.shape.panels - 1) for c in range(across)
        ]
        wide = flags(codes, self.shape.cut, counts, rows, codes.chunks, 1, self.shape.tile_rows)
        stage = _Stage(self, counts, rows, first_panel, row_tile, column_tile)

        def totals_of(group: ir.Value) -> list[list[ir.Value]]:
            def chunk(at: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                of_row = add(mul(group, codes.group_chunks), at)
                return stage.products(group, at, of_row, get(wide, [of_row]), sums)

            zeros = codes.zeros() * (self.shape.row_tiles * across)
            sums = loop(0, codes.group_chunks, 1, chunk, zeros)
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
            totals = scaled(index(0), totals_of(index(0)))
        else:

            def group(g: ir.Value, *totals: ir.Value) -> list[ir.Value]:
                values = scaled(g, totals_of(g))
                return [arith.addf(total, value) for total, value in zip(totals, values, strict=True)]

            totals = loop(0, groups, 1, group, [f32(0.0)] * (4 * len(places)))
        values = iter(totals)
        by_place = {place: [next(values) for _ in range(4)] for place in places}
        quarter = mul(floor_div(self.lane, TILE), 4)
        for r, v in itertools.product(range(self.shape.row_tiles), range(4)):
            i = add(add(mul(add(row_tile, r), TILE), quarter), v)
            number = rows.number(i)
            kept = arith.andi(rows.has(i), compare("eq", get(counts.marked, [number]), i32(0)))

            def write(r: int = r, v: int = v, number: ir.Value = number) -> None:
                threshold = get(counts.threshold, [number])
                for c in range(across):
                    at = add(mul(add(first_panel, add(column_tile, c)), TILE), column)
                    inside = compare("slt", at, index(self.shape.columns))
                    when(inside, partial(self.finish, by_place[r, c][v], threshold, number, at))

            when(kept, write)
        self.again(rows, counts, first_panel, 2 * across)

    def again(self, rows: Rows, counts: Counts, first_panel: ir.Value, panels: int) -> None:
        """Computes the marked rows of a tile, a column in each thread."""
        column = add(mul(first_panel, TILE), self.thread)
        is_mine = compare("slt", self.thread, index(panels * TILE))
        inside = arith.andi(is_mine, compare("slt", column, index(self.shape.columns)))

        def row(i: ir.Value) -> None:
            number = rows.number(i)
            marked = arith.andi(rows.has(i), compare("ne", get(counts.marked, [number]), i32(0)))

            def compute() -> None:
                threshold = get(counts.threshold, [number])

                def count(k: ir.Value) -> ir.Value:
                    return count_of(get(counts.x, [number, k]), threshold)

                value = self.exact(count, floor_div(column, TILE), rem(column, TILE))
                self.finish(value, threshold, number, column)

            when(arith.andi(marked, inside), compute)

        loop(0, self.shape.tile_rows, 1, row)

    # Both

    def scaled(self, whole: ir.Value, panel: ir.Value, group: ir.Value, column: ir.Value) -> ir.Value:
        scale = get(self.scale, [add(panel, self.first_panel), group, column])
        return arith.mulf(arith.sitofp(ir.F32Type.get(), whole), scale)

    def finish(self, total: ir.Value, threshold: ir.Value, row: ir.Value, column: ir.Value) -> None:
        """Writes ``threshold * total + bias``, and adds what is to be added."""
        value = arith.mulf(total, threshold)
        if self.bias is not None:
            value = arith.addf(value, get(self.bias, [column]))
        if self.addend is not None:
            value = arith.addf(value, get(self.addend, [row, column]))
        put(value, self.y, [row, column])

    def exact(self, count: Callable[[ir.Value], ir.Value], panel: ir.Value, column: ir.Value) -> ir.Value:
        """Returns the sum of a marked row and one column in f64, channel by channel; ``count`` returns the row's counts."""
        number, f64 = ir.F32Type.get(), ir.F64Type.get()
        width, panel = self.codes.group, add(panel, self.first_panel)

        def group(g: ir.Value, total: ir.Value) -> list[ir.Value]:
            def channel(at: ir.Value, so_far: ir.Value) -> list[ir.Value]:
                k = add(mul(g, width), at)
                word = partial(get, self.weight)
                code = arith.sitofp(f64, self.codes.code_at(word, panel, k, column))
                return [arith.addf(so_far, arith.mulf(arith.extf(f64, count(k)), code))]

            (whole,) = loop(0, width, 1, channel, [arith.constant(f64, 0.0)])
            value = arith.mulf(arith.truncf(number, whole), get(self.scale, [panel, g, column]))
            return [arith.addf(total, value)]

        (total,) = loop(0, self.codes.groups, 1, group, [f32(0.0)])
        return total


class _Stage:
    """A chunk of a tile in shared memory: fragments of 64 lanes, four words each, of counts and of codes."""

    def __init__(
        self,
        kernel: SpikeKernel,
        counts: Counts,
        rows: Rows,
        first_panel: ir.Value,
        row_tile: ir.Value,
        column_tile: ir.Value,
    ) -> None:
        self.kernel, self.codes, self.counts = kernel, kernel.codes, counts
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

    def products(
        self,
        group: ir.Value,
        chunk: ir.Value,
        of_row: ir.Value,
        is_wide: ir.Value,
        sums: Sequence[ir.Value],
    ) -> list[ir.Value]:
        """Returns the sums with the products of a chunk of a group; high bytes, which are rare, are not shared."""
        kernel, codes = self.kernel, self.codes
        places = codes.count_places(of_row, kernel.lane)
        for tile, row in zip(self.counts_read, self.rows_read, strict=True):
            for h, place in enumerate(places):
                self.put(load(self.counts.low, [row, place], 4), self.low, tile, codes.count_vectors, h)
        for tile, panel in zip(self.panels_read, self.panel_numbers, strict=True):
            number = add(panel, kernel.first_panel)
            vectors = codes.code_vectors_at(kernel.weight, number, group, chunk, kernel.lane)
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
            words = [
                codes.words([load(self.counts.high, [row, place], 4) for place in places])
                for row in self.own_rows
            ]
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
