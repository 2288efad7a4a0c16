"""Wave kernel that sorts rows by the expert that they are sent to: a counting sort by one block, for all products of a routing.

Each expert has some threads, and each of these some of the rows: it counts those of its expert, learns where they go, and puts
them there. So rows of one expert stay in their order, and nothing depends on which thread comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes.kernels.builders import (
    add,
    ceil_div,
    compare,
    floor_div,
    get,
    i32_type,
    index,
    launch,
    loop,
    minimum,
    mul,
    put,
    rem,
    size,
    when,
)
from spikingbrain.passes.kernels.group_rows import END, EXPERT, FIRST, known_expert
from spikingbrain.passes.wave_kernels.builders import (
    MAX_THREADS,
    as_i32,
    barrier,
    kernel,
    memref_of,
    shared,
    thread,
)
from spikingbrain.passes.wave_kernels.row_tiles import Rows

FEW_ROWS = 8  # not worth sorting: each has a block of its own
MOST_EXPERTS = MAX_THREADS - 1  # and one for rows that are sent to none that there is
RUN = 32  # counts that are added before those of others
# By the experts, their number and the rows of a tile.
Tiles = dict[tuple[ir.Value, int, int], tuple[ir.Value, ir.Value]]


@dataclass(frozen=True)
class Routing:
    """How the blocks of a kernel find their rows: sorted by expert in tiles of ``tile`` rows, or, if they are few, each its own.

    Attributes:
        experts: N; rows for others become NaN.
        rows: R, None for any number.
        tile: rows of a block, where they are sorted.
        are_few: they are, however many are possible.
    """

    experts: int
    rows: int | None
    tile: int
    are_few: bool = False

    @property
    def has_few_rows(self) -> bool:
        return self.are_few or (self.rows is not None and self.rows <= FEW_ROWS)

    def emit(self, expert: ir.Value, known: Tiles) -> tuple[list[ir.Value], ir.Value]:
        """Returns what a kernel takes to find its rows, and how many blocks of rows there are."""
        if self.has_few_rows:
            return [expert], size(expert, 0)
        key = (expert, self.experts, self.tile)
        if key not in known:
            known[key] = emit_group_rows(expert, self.experts, self.tile)
        return list(known[key]), size(known[key][1], 0)

    def place(self, block: ir.Value, taken: list[ir.Value], body: Callable[[ir.Value, Rows], None]) -> None:
        """Runs ``body(expert, rows)`` for the rows of a block, if there are any; the number of no expert is N."""
        if self.has_few_rows:
            body(known_expert(get(taken[0], [block]), self.experts), Rows(block, add(block, 1)))
            return
        order, tiles = taken
        expert, first, end = (
            arith.index_cast(ir.IndexType.get(), get(tiles, [block, column]))
            for column in (EXPERT, FIRST, END)
        )
        when(compare("slt", first, end), lambda: body(expert, Rows(first, end, order)))


def emit_group_rows(expert: ir.Value, experts: int, tile: int) -> tuple[ir.Value, ir.Value]:
    """Emits a launch of the kernel on ``[R]`` i64 at the insertion point; returns rows and tiles, both i32.

    ``order [R]`` are the rows, those of one expert beside each other. A tile of ``tiles [T, 3]`` is an expert and where its rows
    begin and end in ``order``; the last ones may be empty, from 0 to 0.
    """
    m = ir.RankedTensorType(expert.type).shape[0]
    dynamic = ir.ShapedType.get_dynamic_size()
    is_dynamic = m == dynamic
    rows = size(expert, 0)
    most = dynamic if is_dynamic else m // tile + min(m, experts + 1)
    types = [ir.RankedTensorType.get(shape, i32_type()) for shape in ([m], [most, 3])]
    name = f"group_rows_n{experts}_t{tile}_m{'' if is_dynamic else m}"
    kernel(
        name,
        [memref_of(t) for t in (expert.type, *types)],
        MAX_THREADS,
        lambda _, buffers: _Sort(experts, tile, *buffers).emit(),
    )
    sizes = [rows, add(floor_div(rows, tile), minimum(rows, experts + 1))] if is_dynamic else []
    order, tiles = launch(name, types, [index(1)] * 3, [expert], sizes, [-1, -1]).results
    return order, tiles


class _Sort:
    """Emits the work of the block: thread ``e * each + c`` has part c of the rows, and among them those of expert e."""

    def __init__(self, experts: int, tile: int, expert: ir.Value, order: ir.Value, tiles: ir.Value) -> None:
        self.kinds, self.tile = experts + 1, tile  # the last kind has no expert
        self.expert, self.order, self.tiles = expert, order, tiles
        self.thread, self.rows = thread(), size(expert, 0)
        self.each = MAX_THREADS // self.kinds

    def emit(self) -> None:
        own, part = floor_div(self.thread, self.each), rem(self.thread, self.each)
        length = ceil_div(self.rows, self.each)
        is_used = compare("slt", own, index(self.kinds))
        low = minimum(mul(part, length), self.rows)
        high = arith.select(is_used, minimum(add(low, length), self.rows), low)
        experts = self.kinds - 1

        def is_own(row: ir.Value) -> ir.Value:
            return compare("eq", known_expert(get(self.expert, [row]), experts), own)

        def counted(row: ir.Value, count: ir.Value) -> list[ir.Value]:
            return [arith.select(is_own(row), add(count, 1), count)]

        (count,) = loop(low, high, 1, counted, [index(0)])
        start = self.sum_before(count)

        def placed(row: ir.Value, at: ir.Value) -> list[ir.Value]:
            mine = is_own(row)
            when(mine, lambda: put(as_i32(row), self.order, [at]))
            return [arith.select(mine, add(at, 1), at)]

        loop(low, high, 1, placed, [start])
        self.list_tiles(start)

    def sum_before(self, count: ir.Value) -> ir.Value:
        """Returns the sum of the counts of the threads before this one."""
        kind = ir.IndexType.get()
        counts, runs = shared([MAX_THREADS], i32_type()), shared([MAX_THREADS // RUN], i32_type())

        def total(source: ir.Value, low: ir.Value | int, high: ir.Value) -> ir.Value:
            def more(at: ir.Value, so_far: ir.Value) -> list[ir.Value]:
                return [add(so_far, arith.index_cast(kind, get(source, [at])))]

            return loop(low, high, 1, more, [index(0)])[0]

        def run() -> None:
            first = mul(self.thread, RUN)
            put(as_i32(total(counts, first, add(first, RUN))), runs, [self.thread])

        put(as_i32(count), counts, [self.thread])
        barrier()
        when(compare("slt", self.thread, index(MAX_THREADS // RUN)), run)
        barrier()
        own_run = floor_div(self.thread, RUN)
        return add(total(runs, 0, own_run), total(counts, mul(own_run, RUN), self.thread))

    def list_tiles(self, start: ir.Value) -> None:
        """Cuts the rows of each kind into tiles, in a thread for each; then empties the tiles that are left."""
        starts, end = shared([self.kinds + 1], i32_type()), shared([1], i32_type())
        own = floor_div(self.thread, self.each)
        leads = arith.andi(
            compare("eq", rem(self.thread, self.each), index(0)), compare("slt", own, index(self.kinds))
        )
        when(leads, lambda: put(as_i32(start), starts, [own]))
        is_last = compare("eq", self.thread, index(MAX_THREADS - 1))
        when(is_last, lambda: put(as_i32(self.rows), starts, [self.kinds]))
        barrier()

        def bounds(kind: ir.Value) -> list[ir.Value]:
            return [arith.index_cast(ir.IndexType.get(), get(starts, [add(kind, i)])) for i in range(2)]

        def tiles_of(kind: ir.Value, so_far: ir.Value) -> list[ir.Value]:
            first, last = bounds(kind)
            return [add(so_far, ceil_div(arith.subi(last, first), self.tile))]

        def write(at: ir.Value, values: list[ir.Value]) -> None:
            for column, value in zip((EXPERT, FIRST, END), values, strict=True):
                put(as_i32(value), self.tiles, [at, column])

        def listed() -> None:
            kind = self.thread
            (at,) = loop(0, kind, 1, tiles_of, [index(0)])
            first, last = bounds(kind)

            def one(row: ir.Value, at: ir.Value) -> list[ir.Value]:
                write(at, [kind, row, minimum(add(row, self.tile), last)])
                return [add(at, 1)]

            (at,) = loop(first, last, self.tile, one, [at])
            when(compare("eq", kind, index(self.kinds - 1)), lambda: put(as_i32(at), end, [0]))

        when(compare("slt", self.thread, index(self.kinds)), listed)
        barrier()
        used = arith.index_cast(ir.IndexType.get(), get(end, [0]))
        nothing = [index(0)] * 3
        loop(add(used, self.thread), size(self.tiles, 0), MAX_THREADS, lambda at: write(at, nothing))
