"""Wave kernel for ``spikingbrain.spike_encode``: a block makes a row of floats a row of counts in bytes, nothing clamped.

``count = 256 * high + low``, both signed; a word holds four bytes. For every 64 channels a row says whether one has a high byte,
so that others need not be multiplied. A row that does not fit is marked, and computed from x by whoever reads it: one with NaN or
infinity, with a count of more than 16 bits, or so large in all that its products could exceed 32 bits.
A row that is a norm, a gate or a slice of something else is computed first, and kept as x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch_mlir import ir
from torch_mlir.dialects import arith, math

from spikingbrain.passes.kernels.builders import (
    add,
    compare,
    f32,
    floor_div,
    get,
    greater,
    i32,
    i32_type,
    index,
    launch,
    less,
    load,
    loop,
    mul,
    no_larger,
    put,
    rem,
    size,
    when,
)
from spikingbrain.passes.wave_kernels.builders import (
    MAX_THREADS,
    WAVE,
    barrier,
    choose,
    element_at,
    kernel,
    memref_of,
    over_lanes,
    shared,
    thread,
)
from spikingbrain.passes.wave_kernels.row_values import RowValues, flat_sources

LARGEST_COUNT = 127 * 256 + 127  # that two bytes with signs hold, of either sign
FLAG_CHANNELS = 64  # that share a flag
PADDED = 128  # rows are padded to whole chunks of any codes, and one more of zeros
FEW_ROWS = 16  # a block of as many threads as there is work for
MANY_ROWS_THREADS = 256
PARTS = 16  # of a sum, added by every thread


@dataclass(frozen=True)
class Counts:
    """Rows of counts as wave kernels read them.

    Attributes:
        x: the floats, ``[M, K]`` f32.
        low, high: ``[M, words]`` i32, four bytes each; zeros behind the channels.
        threshold: ``[M]`` f32.
        marked: ``[M]`` i32, 1 for a row that does not fit.
        wide: ``[M, flags]`` i32, 1 where one of 64 channels has a high byte.
    """

    x: ir.Value
    low: ir.Value
    high: ir.Value
    threshold: ir.Value
    marked: ir.Value
    wide: ir.Value

    def values(self) -> list[ir.Value]:
        return [self.x, self.low, self.high, self.threshold, self.marked, self.wide]


@dataclass(frozen=True)
class Encoding:
    """What a kernel is made for: K channels, the largest magnitude of a code, and the settings of the op."""

    channels: int
    largest_code: int
    k: float
    lower: float
    upper: float

    @property
    def flags(self) -> int:
        """Returns how many flags a row has."""
        return -(-self.channels // PADDED) * (PADDED // FLAG_CHANNELS)

    @property
    def words(self) -> int:
        """Returns the words of a row: whole chunks, then one of zeros."""
        return (-(-self.channels // PADDED) + 1) * PADDED // 4

    def types(self, rows: int) -> list[ir.RankedTensorType]:
        """Returns the types of the parts of ``Counts``."""
        number, kind = ir.F32Type.get(), i32_type()
        shapes = [([rows, self.channels], number), *[([rows, self.words], kind)] * 2, ([rows], number)]
        shapes += [([rows], kind), ([rows, self.flags], kind)]
        return [ir.RankedTensorType.get(shape, element) for shape, element in shapes]

    def name(self, threads: int) -> str:
        settings = "_".join(map(repr, [self.largest_code, self.k, self.lower, self.upper]))
        settings = settings.replace("-", "m").replace("+", "").replace(".", "p")
        return f"spike_encode_k{self.channels}_{settings}_t{threads}"


def emit_spike_encode(x: ir.Value, cut: Encoding, computed: RowValues | None = None) -> Counts:
    """Emits a launch of the kernel on ``[M, K]`` at the insertion point; the module gets it unless it has it already.

    ``computed`` is how x is computed, if the kernel is to do that: its x is then another one than was given.
    """
    m = ir.RankedTensorType(x.type).shape[0]
    is_dynamic = m == ir.ShapedType.get_dynamic_size()
    units = cut.words - PADDED // 4
    few = MANY_ROWS_THREADS if is_dynamic or m > FEW_ROWS else MAX_THREADS
    threads = min(few, -(-units // WAVE) * WAVE)
    types = cut.types(m)
    name = cut.name(threads) + ("" if is_dynamic else f"_m{m}")
    inputs, made = ([x], types[1:]) if computed is None else (flat_sources(computed), types)
    name += "" if computed is None else f"_{computed.digest}"
    count = len(inputs)

    def body(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        if computed is None:
            _Row(cut, threads, buffers).emit(block[0])
            return
        row = _Row(cut, threads, buffers[count:])
        row.compute(block[0], computed, buffers[:count])
        row.emit(block[0])

    kernel(name, [memref_of(v.type) for v in inputs] + [memref_of(t) for t in made], threads, body)
    # of a source, if it is computed: nothing is to ask for x then
    rows = size(x if computed is None else inputs[computed.source_of_rows], 0) if is_dynamic else index(m)
    sizes = [rows] * len(made) if is_dynamic else []
    op = launch(name, made, [rows, index(1), index(1)], inputs, sizes, [-1] * len(made))
    return Counts(*([x] if computed is None else []), *op.results)


class _Row:
    """Emits what a block does with its row."""

    def __init__(self, cut: Encoding, threads: int, buffers: list[ir.Value]) -> None:
        self.cut, self.threads, self.to = cut, threads, Counts(*buffers)
        self.thread = thread()
        self.units = cut.words - PADDED // 4  # of four channels, those behind the channels too
        self.steps = -(-self.units // threads)

    def compute(self, row: ir.Value, values: RowValues, sources: list[ir.Value]) -> None:
        """Computes x."""
        sums = values.row_sums(sources, row, 1, 1, self.threads)(index(0))

        def one(k: ir.Value) -> None:
            put(values.at(sources, row, k, sums), self.to.x, [row, k])

        loop(self.thread, self.cut.channels, self.threads, one)
        barrier()

    def emit(self, row: ir.Value) -> None:
        cut, to = self.cut, self.to
        threshold = self.threshold(row)
        limit, sharers = f32(float(LARGEST_COUNT)), FLAG_CHANNELS // 4
        lane = rem(self.thread, WAVE)

        def unit(at: ir.Value, total: ir.Value, misfits: ir.Value) -> list[ir.Value]:
            low, high = i32(0), i32(0)
            for i, value in enumerate(self.x(row, at)):
                count = math.roundeven(arith.divf(value, threshold))
                fits = no_larger(math.absf(count), limit)  # not so for NaN
                whole = arith.fptosi(i32_type(), arith.select(fits, count, f32(0.0)))
                misfits = arith.select(fits, misfits, i32(1))
                total = arith.addi(total, arith.maxsi(whole, arith.subi(i32(0), whole)))
                low = arith.ori(low, _byte(whole, i))
                high = arith.ori(high, _byte(arith.shrsi(arith.addi(whole, i32(128)), i32(8)), i))
            is_wide = over_lanes(arith.ori, high, sharers)

            def write() -> None:
                put(low, to.low, [row, at])
                put(high, to.high, [row, at])

            def flag() -> None:
                bit = arith.extui(i32_type(), compare("ne", is_wide, i32(0)))
                put(bit, to.wide, [row, floor_div(at, sharers)])

            inside = compare("slt", at, index(self.units))
            when(inside, write)
            when(arith.andi(inside, compare("eq", rem(lane, sharers), index(0))), flag)
            return [total, misfits]

        total, misfits = self.each_unit(unit, [i32(0), i32(0)])

        def behind(at: ir.Value) -> None:
            for plane in (to.low, to.high):
                put(i32(0), plane, [row, add(at, self.units)])

        loop(self.thread, PADDED // 4, self.threads, behind)
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
            too_many = compare("sgt", total, i32((2**31 - 1) // cut.largest_code))
            marked = arith.ori(too_many, compare("ne", misfits, i32(0)))
            put(arith.extui(i32_type(), marked), to.marked, [row])
            put(threshold, to.threshold, [row])

        when(compare("eq", self.thread, index(0)), mark)

    def each_unit(self, body: Callable[..., list[ir.Value]], carried: list[ir.Value]) -> list[ir.Value]:
        """Runs ``body`` for all units of four channels and some behind them, as often in every thread: waves stay together."""

        def some(step: ir.Value, *values: ir.Value) -> list[ir.Value]:
            return body(add(mul(step, self.threads), self.thread), *values)

        return loop(0, self.steps, 1, some, carried)

    def threshold(self, row: ir.Value) -> ir.Value:
        """Returns the row's threshold, in every thread; sums are f64, each in an order that does not depend on time."""
        cut, f64 = self.cut, ir.F64Type.get()
        zero = arith.constant(f64, 0.0)

        def unit(at: ir.Value, total: ir.Value) -> list[ir.Value]:
            for value in self.x(row, at):
                total = arith.addf(total, arith.extf(f64, math.absf(value)))
            return [total]

        (total,) = self.each_unit(unit, [zero])
        sums, parts = shared([self.threads], f64), shared([PARTS], f64)

        def added(source: ir.Value, low: ir.Value | int, high: int, step: int) -> ir.Value:
            (result,) = loop(low, high, step, lambda at, t: [arith.addf(t, get(source, [at]))], [zero])
            return result

        put(total, sums, [self.thread])
        barrier()
        is_part = compare("slt", self.thread, index(PARTS))
        when(is_part, lambda: put(added(sums, self.thread, self.threads, PARTS), parts, [self.thread]))
        barrier()
        mean = arith.divf(added(parts, 0, PARTS, 1), arith.constant(f64, float(cut.channels)))
        value = arith.divf(arith.truncf(ir.F32Type.get(), mean), f32(cut.k))
        lower, upper = f32(cut.lower), f32(cut.upper)
        value = arith.select(less(value, lower), lower, value)  # NaN stays
        return arith.select(greater(value, upper), upper, value)

    def x(self, row: ir.Value, unit: ir.Value) -> list[ir.Value]:
        """Returns four channels; 0 behind the last one."""
        channels, first = self.cut.channels, mul(unit, 4)
        zero = f32(0.0)
        if channels % 4 == 0:

            def four() -> list[ir.Value]:
                vector = load(self.to.x, [row, first], 4)
                return [element_at(vector, i) for i in range(4)]

            if channels == 4 * self.steps * self.threads:
                return four()
            return choose(compare("slt", first, index(channels)), four, [zero] * 4)
        values = []
        for i in range(4):
            at = add(first, i)
            inside = compare("slt", at, index(channels))
            values += choose(inside, partial(self.one, row, at), [zero])
        return values

    def one(self, row: ir.Value, at: ir.Value) -> list[ir.Value]:
        return [get(self.to.x, [row, at])]


def _byte(value: ir.Value, place: int) -> ir.Value:
    byte = arith.andi(value, i32(255))
    return arith.shli(byte, i32(8 * place)) if place else byte
