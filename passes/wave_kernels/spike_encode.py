"""Wave kernel for ``spikingbrain.spike_encode``: a block makes a row of floats a row of counts in bytes, nothing clamped.

A row that is a norm, a gate or a slice of something else is computed first, and kept as x. What counts are is told in
``spike_counts.py``.
"""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes.kernels.builders import (
    add,
    compare,
    floor_div,
    get,
    i32,
    i32_type,
    index,
    launch,
    loop,
    mul,
    put,
    rem,
    size,
    when,
)
from spikingbrain.passes.wave_kernels.builders import (
    WAVE,
    barrier,
    kernel,
    memref_of,
    over_lanes,
    shared,
    thread,
)
from spikingbrain.passes.wave_kernels.row_values import RowValues, flat_sources
from spikingbrain.passes.wave_kernels.spike_counts import (
    FLAG_CHANNELS,
    PADDED,
    UNIT,
    Counts,
    Encoding,
    Floats,
    Thresholds,
    counted,
    is_marked,
)


def emit_spike_encode(x: ir.Value, cut: Encoding, computed: RowValues | None = None) -> Counts:
    """Emits a launch of the kernel on ``[M, K]`` at the insertion point; the module gets it unless it has it already.

    ``computed`` is how x is computed, if the kernel is to do that: its x is then another one than was given.
    """
    m = ir.RankedTensorType(x.type).shape[0]
    is_dynamic = m == ir.ShapedType.get_dynamic_size()
    types = cut.types(m)
    name = cut.name + ("" if is_dynamic else f"_m{m}")
    inputs, made = ([x], types[1:]) if computed is None else (flat_sources(computed), types)
    name += "" if computed is None else f"_{computed.digest}"
    count = len(inputs)

    def body(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        if computed is None:
            _Row(cut, buffers).emit(block[0])
            return
        row = _Row(cut, buffers[count:])
        row.compute(block[0], computed, buffers[:count])
        row.emit(block[0])

    kernel(name, [memref_of(v.type) for v in inputs] + [memref_of(t) for t in made], cut.threads, body)
    # of a source, if it is computed: nothing is to ask for x then
    rows = size(x if computed is None else inputs[computed.source_of_rows], 0) if is_dynamic else index(m)
    sizes = [rows] * len(made) if is_dynamic else []
    op = launch(name, made, [rows, index(1), index(1)], inputs, sizes, [-1] * len(made))
    return Counts(*([x] if computed is None else []), *op.results)


class _Row:
    """Emits what a block does with its row."""

    def __init__(self, cut: Encoding, buffers: list[ir.Value]) -> None:
        self.cut, self.threads, self.to = cut, cut.threads, Counts(*buffers)
        self.thread = thread()

    def compute(self, row: ir.Value, values: RowValues, sources: list[ir.Value]) -> None:
        """Computes x."""
        sums = values.row_sums(sources, row, 1, 1, self.threads)(index(0))

        def one(k: ir.Value) -> None:
            put(values.at(sources, row, k, sums), self.to.x, [row, k])

        loop(self.thread, self.cut.channels, self.threads, one)
        barrier()

    def emit(self, row: ir.Value) -> None:
        cut, to = self.cut, self.to
        floats = Floats.stored(cut, to.x)
        threshold = Thresholds(cut, floats, self.threads).of(row)
        sharers, lane = FLAG_CHANNELS // UNIT, rem(self.thread, WAVE)

        # as often in every thread: waves stay together
        def unit(step: ir.Value, total: ir.Value, misfits: ir.Value) -> list[ir.Value]:
            at = add(mul(step, self.threads), self.thread)
            values = floats.four(row, *cut.channels_at(mul(at, UNIT)))
            low, high, total, misfits = counted(values, threshold, total, misfits)
            is_wide = over_lanes(arith.ori, high, sharers)

            def write() -> None:
                put(low, to.low, [row, at])
                put(high, to.high, [row, at])

            def flag() -> None:
                bit = arith.extui(i32_type(), compare("ne", is_wide, i32(0)))
                put(bit, to.wide, [row, floor_div(at, sharers)])

            inside = compare("slt", at, index(cut.units))
            when(inside, write)
            when(arith.andi(inside, compare("eq", rem(lane, sharers), index(0))), flag)
            return [total, misfits]

        total, misfits = loop(0, -(-cut.units // self.threads), 1, unit, [i32(0), i32(0)])

        def behind(at: ir.Value) -> None:
            for plane in (to.low, to.high):
                put(i32(0), plane, [row, add(at, cut.units)])

        loop(self.thread, PADDED // UNIT, self.threads, behind)
        waves = self.threads // WAVE
        sums = shared([2, waves], i32_type())
        parts = [over_lanes(arith.addi, total), over_lanes(arith.ori, misfits)]

        def part() -> None:
            for which, value in enumerate(parts):
                put(value, sums, [which, floor_div(self.thread, WAVE)])

        when(compare("eq", lane, index(0)), part)
        barrier()

        def mark() -> None:
            def more(wave: ir.Value, total: ir.Value, misfits: ir.Value) -> list[ir.Value]:
                return [
                    arith.addi(total, get(sums, [0, wave])),
                    arith.ori(misfits, get(sums, [1, wave])),
                ]

            total, misfits = loop(0, waves, 1, more, [i32(0), i32(0)])
            put(arith.extui(i32_type(), is_marked(cut, total, misfits)), to.marked, [row])
            put(threshold, to.threshold, [row])

        when(compare("eq", self.thread, index(0)), mark)
