"""Counts of spikes as wave kernels keep them, and the arithmetic that makes them of floats.

``count = 256 * high + low``, both signed; a word holds four bytes. For every 64 places a row says whether one has a high byte,
so that others need not be multiplied. A row that does not fit is marked, and computed from x by whoever reads it: one with NaN or
infinity, with a count of more than 16 bits, or so large in all that its products could exceed 32 bits.

Several kernels encode rows, and all give the same bits: the order of the sum behind a threshold is that of 256 threads, of which
each adds every 256th four of neighbouring channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch_mlir import ir
from torch_mlir.dialects import arith, math

from spikingbrain.passes.kernels.builders import (
    Index,
    add,
    compare,
    f32,
    floor_div,
    get,
    greater,
    i32,
    i32_type,
    index,
    less,
    load,
    loop,
    minimum,
    mul,
    no_larger,
    put,
    rem,
    when,
)
from spikingbrain.passes.wave_kernels.builders import barrier, choose, element_at, shared, thread

THREADS = 256  # of a block that encodes rows; fewer where there are fewer channels
LARGEST_COUNT = 127 * 256 + 127  # that two bytes with signs hold, of either sign
FLAG_CHANNELS = 64  # places that share a flag
UNIT = 4  # places of a word
PADDED = 128  # rows are padded to whole chunks of any codes, and one more of zeros
PARTS = 16  # of a sum, added by every thread


@dataclass(frozen=True)
class Encoding:
    """What rows are encoded for.

    Attributes:
        channels: K.
        largest_code: magnitude of a code that counts are multiplied with.
        k, lower, upper: the settings of the op.
        gaps: the channels of a group and the places for their counts; 0 and 0 where channels lie beside each other.
    """

    channels: int
    largest_code: int
    k: float
    lower: float
    upper: float
    gaps: tuple[int, int] = (0, 0)

    @property
    def places(self) -> int:
        """Returns the places for the counts of a row."""
        group, places = self.gaps
        return self.channels // group * places if group else self.channels

    @property
    def flags(self) -> int:
        """Returns how many flags a row has."""
        return -(-self.places // PADDED) * (PADDED // FLAG_CHANNELS)

    @property
    def units(self) -> int:
        """Returns the words of a row that are in whole chunks."""
        return -(-self.places // PADDED) * PADDED // UNIT

    @property
    def words(self) -> int:
        """Returns the words of a row: whole chunks, then one of zeros."""
        return self.units + PADDED // UNIT

    @property
    def are_whole(self) -> bool:
        """Returns whether four channels from a multiple of 4 on are all there, or none."""
        return self.channels % UNIT == 0 and self.gaps[0] % UNIT == 0

    @property
    def threads(self) -> int:
        """Returns the threads of a block that encodes."""
        return min(THREADS, -(-self.channels // 64) * 64)

    def channels_at(self, place: ir.Value) -> tuple[ir.Value, Index]:
        """Returns the channel whose count is at a place, and the end of its group: what is from there on counts 0."""
        group, places = self.gaps
        if not group:
            return place, self.channels
        first = mul(floor_div(place, places), group)
        return add(first, rem(place, places)), minimum(add(first, group), self.channels)

    def types(self, rows: int) -> list[ir.RankedTensorType]:
        """Returns the types of the parts of ``Counts``."""
        number, kind = ir.F32Type.get(), i32_type()
        shapes = [([rows, self.channels], number), *[([rows, self.words], kind)] * 2, ([rows], number)]
        shapes += [([rows], kind), ([rows, self.flags], kind)]
        return [ir.RankedTensorType.get(shape, element) for shape, element in shapes]

    @property
    def settings(self) -> str:
        """Returns the settings of the op, as part of a name."""
        settings = "_".join(map(repr, [self.largest_code, self.k, self.lower, self.upper]))
        return settings.replace("-", "m").replace("+", "").replace(".", "p")

    @property
    def name(self) -> str:
        gaps = "_by{}_{}".format(*self.gaps) if self.gaps[0] else ""
        return f"spike_encode_k{self.channels}{gaps}_{self.settings}"


@dataclass(frozen=True)
class Counts:
    """Rows of counts in memory.

    Attributes:
        x: the floats, ``[M, K]`` f32.
        low, high: ``[M, words]`` i32, four bytes each; zeros behind the channels of a group, and of a row.
        threshold: ``[M]`` f32.
        marked: ``[M]`` i32, 1 for a row that does not fit.
        wide: ``[M, flags]`` i32, 1 where one of 64 places has a high byte.
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
class Floats:
    """Rows of x as an encoder reads them: ``one(row, channel)``, and four channels at once where they lie in a vector."""

    cut: Encoding
    one: Callable[[Index, ir.Value], ir.Value]
    vector: Callable[[Index, ir.Value], ir.Value] | None = None

    @staticmethod
    def stored(cut: Encoding, x: ir.Value) -> Floats:
        """Returns the rows of a memref ``[M, K]``."""

        def vector(row: Index, first: ir.Value) -> ir.Value:
            return load(x, [row, first], UNIT)

        return Floats(cut, lambda row, k: get(x, [row, k]), vector if cut.are_whole else None)

    def four(self, row: Index, first: ir.Value, end: Index) -> list[ir.Value]:
        """Returns four channels; 0 from ``end`` on."""
        places, zero = [add(first, i) for i in range(UNIT)], f32(0.0)

        def some(these: Sequence[ir.Value]) -> list[ir.Value]:
            if self.vector is not None:
                vector = self.vector(row, first)
                return [element_at(vector, i) for i in range(UNIT)]
            return [self.one(row, at) for at in these]

        if self.cut.are_whole:
            return choose(compare("slt", first, index(end)), partial(some, places), [zero] * UNIT)
        each = [choose(compare("slt", at, index(end)), partial(some, [at]), [zero]) for at in places]
        return [value for (value,) in each]


class Thresholds:
    """Emits thresholds of rows, by a block of ``threads``; sums are f64."""

    def __init__(self, cut: Encoding, floats: Floats, threads: int) -> None:
        self.cut, self.floats, self.threads = cut, floats, threads
        self.sums, self.parts = shared([threads], ir.F64Type.get()), shared([PARTS], ir.F64Type.get())

    def of(self, row: Index) -> ir.Value:
        """Returns the threshold of a row, in every thread; all threads of the block come by."""
        cut, f64, me = self.cut, ir.F64Type.get(), thread()
        zero = arith.constant(f64, 0.0)

        def unit(at: ir.Value, total: ir.Value) -> list[ir.Value]:
            for value in self.floats.four(row, mul(at, UNIT), cut.channels):
                total = arith.addf(total, arith.extf(f64, math.absf(value)))
            return [total]

        def added(source: ir.Value, low: Index, high: int, step: int) -> ir.Value:
            (result,) = loop(low, high, step, lambda at, t: [arith.addf(t, get(source, [at]))], [zero])
            return result

        (total,) = loop(me, -(-cut.channels // UNIT), self.threads, unit, [zero])
        put(total, self.sums, [me])
        barrier()
        is_part = compare("slt", me, index(PARTS))
        when(is_part, lambda: put(added(self.sums, me, self.threads, PARTS), self.parts, [me]))
        barrier()
        mean = arith.divf(added(self.parts, 0, PARTS, 1), arith.constant(f64, float(cut.channels)))
        value = arith.divf(arith.truncf(ir.F32Type.get(), mean), f32(cut.k))
        lower, upper = f32(cut.lower), f32(cut.upper)
        value = arith.select(less(value, lower), lower, value)  # NaN stays
        return arith.select(greater(value, upper), upper, value)


def count_of(value: ir.Value, threshold: ir.Value) -> ir.Value:
    """Returns a count as a float."""
    return math.roundeven(arith.divf(value, threshold))


def counted(
    values: Sequence[ir.Value], threshold: ir.Value, total: ir.Value, misfits: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """Returns the words of low and of high bytes of four counts, ``total`` with their magnitudes, and whether some do not fit."""
    limit, low, high = f32(float(LARGEST_COUNT)), i32(0), i32(0)
    for i, value in enumerate(values):
        count = count_of(value, threshold)
        fits = no_larger(math.absf(count), limit)  # not so for NaN
        whole = arith.fptosi(i32_type(), arith.select(fits, count, f32(0.0)))
        misfits = arith.select(fits, misfits, i32(1))
        total = arith.addi(total, arith.maxsi(whole, arith.subi(i32(0), whole)))
        low = arith.ori(low, _byte(whole, i))
        high = arith.ori(high, _byte(arith.shrsi(arith.addi(whole, i32(128)), i32(8)), i))
    return low, high, total, misfits


def is_marked(cut: Encoding, total: ir.Value, misfits: ir.Value) -> ir.Value:
    """Returns whether a row is to be computed from x, given the sum of its magnitudes and whether some count does not fit."""
    too_many = compare("sgt", total, i32((2**31 - 1) // cut.largest_code))
    return arith.ori(too_many, compare("ne", misfits, i32(0)))


def _byte(value: ir.Value, place: int) -> ir.Value:
    byte = arith.andi(value, i32(255))
    return arith.shli(byte, i32(8 * place)) if place else byte
