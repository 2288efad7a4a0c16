"""Where the kernel for few rows of spikes has its counts from: memory, or its own block, which encodes them piece by piece.

To encode rows in each block of columns saves the launch before and its way through memory. A piece is some channels of all rows,
in shared memory: counts as ``spike_counts.py`` tells them, and the flags of the piece. Threshold and counts are those of the
launch, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes.kernels.builders import (
    Index,
    add,
    compare,
    floor_div,
    get,
    i32,
    i32_type,
    index,
    load,
    loop,
    minimum,
    mul,
    put,
    rem,
    sub,
    when,
)
from spikingbrain.passes.wave_kernels.builders import (
    TILE,
    WAVE,
    any_lane,
    barrier,
    over_lanes,
    shared,
    thread,
)
from spikingbrain.passes.wave_kernels.row_tiles import Rows
from spikingbrain.passes.wave_kernels.row_values import RowValues
from spikingbrain.passes.wave_kernels.spike_codes import Codes
from spikingbrain.passes.wave_kernels.spike_counts import (
    FLAG_CHANNELS,
    UNIT,
    Counts,
    Encoding,
    Floats,
    Thresholds,
    count_of,
    counted,
    is_marked,
)
from spikingbrain.tuning import Tuning

WAVES = 4  # of a block
THREADS = WAVES * WAVE
PIECE_BYTES = 8 << 10  # of counts that a block encodes, in shared memory: four blocks fit a processor
FEWEST_ROWS, MOST_ROWS = 2, 8  # up to which a block always, and may, encode rows itself
# Operations that the machine does while it reads a byte, as of rows of floats (``linear.py``), and those that a count takes.
OPS_PER_BYTE, COUNT_OPS = 7, 40


@dataclass(frozen=True)
class Steps:
    """How the waves of a block go through the channels: ``each`` chunks or groups a step, in ``count`` steps.

    Attributes:
        ahead: chunks or groups of a wave in a step.
        chunks: of a step.
    """

    ahead: int
    each: int
    count: int
    chunks: int

    @staticmethod
    def of(codes: Codes, ahead: int) -> Steps:
        """Returns the steps of a projection: through its chunks, or through its groups if there are several."""
        if codes.groups == 1:
            ahead = max(1, min(ahead, codes.chunks // WAVES))
            return Steps(ahead, WAVES * ahead, -(-codes.chunks // (WAVES * ahead)), WAVES * ahead)
        ahead = min(ahead, -(-codes.groups // WAVES))
        each = WAVES * ahead
        return Steps(ahead, each, -(-codes.groups // each), each * codes.group_chunks)

    def bytes(self, codes: Codes, rows: int) -> int:
        """Returns the bytes of a step's counts."""
        return 2 * rows * self.chunks * codes.chunk


def rows_that_pay(codes: Codes, computed: RowValues | None) -> int:
    """Returns for how many rows it is free to encode them in every block of columns, next to reading the weight; 0: for none.

    One or two always pay: the launch that they save is as many blocks, for which all others wait.
    """
    operations = COUNT_OPS + (2 * computed.cost if computed is not None else 0)
    bytes_of_columns = TILE * codes.bits // 8  # of a channel
    pay = max(FEWEST_ROWS, min(MOST_ROWS, OPS_PER_BYTE * bytes_of_columns // operations))
    return min(pay, PIECE_BYTES // Steps.of(codes, 1).bytes(codes, 1))


class Stored:
    """Counts of rows in memory."""

    def __init__(self, codes: Codes, tuning: Tuning, cut: Encoding, counts: Counts, rows: Rows) -> None:
        self.steps, self.most = Steps.of(codes, tuning.spike_chunks_ahead), TILE
        self.codes, self.cut, self.counts, self.rows = codes, cut, counts, rows
        self.row = rows.number(rem(rem(thread(), WAVE), TILE))
        self.low, self.high = counts.low, counts.high
        self.wide = flags(codes, cut, counts, rows, self.steps.count, self.steps.chunks, TILE)

    def pieces(self, body: Callable[..., list[ir.Value]], carried: Sequence[ir.Value]) -> list[ir.Value]:
        """Returns what ``body(first, end, *carried)`` returns for all steps, from ``first`` on."""
        return body(index(0), index(self.steps.count), *carried)

    def words(self, plane: ir.Value, places: Sequence[ir.Value]) -> list[ir.Value]:
        """Returns the words of the lane's row that begin at some places, in words of a row."""
        return self.codes.words([load(plane, [self.row, place], 4) for place in places])

    def is_wide(self, step: ir.Value, chunks: Sequence[ir.Value]) -> ir.Value:
        """Returns whether some row has a high byte in the chunks of a step; the same for all lanes of a wave."""
        return compare("ne", get(self.wide, [step]), i32(0))

    def threshold(self, i: ir.Value) -> ir.Value:
        return get(self.counts.threshold, [self.rows.number(i)])

    def marked(self, i: ir.Value) -> ir.Value:
        return compare("ne", get(self.counts.marked, [self.rows.number(i)]), i32(0))

    def count(self, i: ir.Value, channel: ir.Value, threshold: ir.Value) -> ir.Value:
        """Returns a count of row i as a float."""
        return count_of(get(self.counts.x, [self.rows.number(i), channel]), threshold)


class Encoded:
    """Counts of up to ``most`` rows, next to each other in memory, that the block encodes."""

    def __init__(
        self,
        codes: Codes,
        tuning: Tuning,
        cut: Encoding,
        computed: RowValues | None,
        sources: Sequence[ir.Value],
        rows: Rows,
        most: int,
    ) -> None:
        self.codes, self.cut, self.rows, self.most = codes, cut, rows, most
        ahead = tuning.spike_chunks_ahead
        while ahead > 1 and Steps.of(codes, ahead).bytes(codes, most) > PIECE_BYTES:
            ahead //= 2
        self.steps = Steps.of(codes, ahead)
        pieces = -(-self.steps.count // max(1, PIECE_BYTES // self.steps.bytes(codes, most)))
        self.piece = -(-self.steps.count // pieces)  # steps of one
        self.thread, self.lane = thread(), rem(thread(), WAVE)
        self.of_rows = sub(rows.end, rows.first)
        self.row = minimum(rem(self.lane, TILE), sub(self.of_rows, 1))
        self.units = self.piece * self.steps.chunks * codes.chunk // UNIT
        self.low, self.high = (shared([most, self.units], i32_type()) for _ in range(2))
        self.wide = shared([self.units * UNIT // FLAG_CHANNELS], i32_type())
        self.thresholds = shared([most], ir.F32Type.get())
        self.sums = shared([most, WAVES, 2], i32_type())  # of magnitudes, and whether some does not fit
        self.first: ir.Value = index(0)  # chunk of the piece
        self.floats = self._floats(computed, sources, most)
        self._thresholds()

    def _floats(self, computed: RowValues | None, sources: Sequence[ir.Value], most: int) -> Floats:
        first = self.rows.first
        if computed is None:
            x = Floats.stored(self.cut, sources[0])
            vector = x.vector

            def four(i: Index, at: ir.Value) -> ir.Value:
                assert vector is not None
                return vector(add(first, i), at)

            return Floats(self.cut, lambda i, k: x.one(add(first, i), k), four if vector else None)
        sums = computed.row_sums(sources, first, self.of_rows, most, THREADS)
        return Floats(self.cut, lambda i, k: computed.at(sources, add(first, i), k, sums(i)))

    def _thresholds(self) -> None:
        thresholds = Thresholds(self.cut, self.floats, THREADS)

        def row(i: ir.Value) -> None:
            value = thresholds.of(i)

            def keep() -> None:
                put(value, self.thresholds, [i])
                for wave in range(WAVES):
                    for which in range(2):
                        put(i32(0), self.sums, [i, wave, which])

            when(compare("eq", self.thread, index(0)), keep)

        loop(0, self.of_rows, 1, row)
        barrier()

    def pieces(self, body: Callable[..., list[ir.Value]], carried: Sequence[ir.Value]) -> list[ir.Value]:
        """Returns what ``body(first, end, *carried)`` returns for all steps, from ``first`` on, after all pieces."""

        def piece(first: ir.Value, *carried: ir.Value) -> list[ir.Value]:
            self.first = mul(first, self.steps.chunks)
            self._encode()
            barrier()
            result = body(first, minimum(add(first, self.piece), self.steps.count), *carried)
            barrier()
            return result

        return loop(0, self.steps.count, self.piece, piece, carried)

    def _encode(self) -> None:
        sharers, wave = FLAG_CHANNELS // UNIT, floor_div(self.thread, WAVE)
        start = mul(self.first, self.codes.chunk)

        def row(i: ir.Value) -> None:
            threshold = get(self.thresholds, [i])

            # as often in every thread: waves stay together
            def unit(step: ir.Value, total: ir.Value, misfits: ir.Value) -> list[ir.Value]:
                at = add(mul(step, THREADS), self.thread)
                first, end = self.cut.channels_at(add(start, mul(at, UNIT)))
                inside = compare("slt", at, index(self.units))
                if self.units % THREADS:  # those behind are in the next piece
                    end = arith.select(inside, index(end), index(0))
                values = self.floats.four(i, first, end)
                low, high, total, misfits = counted(values, threshold, total, misfits)
                is_wide = over_lanes(arith.ori, high, sharers)

                def write() -> None:
                    put(low, self.low, [i, at])
                    put(high, self.high, [i, at])

                def flag() -> None:
                    place = [floor_div(at, sharers)]
                    is_first = compare("eq", i, index(0))
                    others = arith.select(is_first, i32(0), get(self.wide, place))
                    put(arith.ori(others, is_wide), self.wide, place)

                when(inside, write)
                when(arith.andi(inside, compare("eq", rem(self.lane, sharers), index(0))), flag)
                return [total, misfits]

            steps = -(-self.units // THREADS)
            total, misfits = loop(0, steps, 1, unit, [i32(0), i32(0)])
            total, misfits = over_lanes(arith.addi, total), over_lanes(arith.ori, misfits)

            def add_up() -> None:
                places = [[i, wave, which] for which in range(2)]
                put(arith.addi(get(self.sums, places[0]), total), self.sums, places[0])
                put(arith.ori(get(self.sums, places[1]), misfits), self.sums, places[1])

            when(compare("eq", self.lane, index(0)), add_up)

        loop(0, self.of_rows, 1, row)

    def words(self, plane: ir.Value, places: Sequence[ir.Value]) -> list[ir.Value]:
        """Returns the words of the lane's row that begin at some places, in words of a row."""
        start = mul(self.first, self.codes.chunk // UNIT)
        return self.codes.words([load(plane, [self.row, sub(place, start)], 4) for place in places])

    def is_wide(self, step: ir.Value, chunks: Sequence[ir.Value]) -> ir.Value:
        """Returns whether some row has a high byte in some chunks; the same for all lanes of a wave."""
        each, found = self.codes.chunk // FLAG_CHANNELS, i32(0)
        for chunk in chunks:
            first = mul(sub(chunk, self.first), each)
            for i in range(each):
                found = arith.ori(found, get(self.wide, [add(first, i)]))
        return any_lane(compare("ne", found, i32(0)))

    def threshold(self, i: ir.Value) -> ir.Value:
        return get(self.thresholds, [i])

    def marked(self, i: ir.Value) -> ir.Value:
        total, misfits = i32(0), i32(0)
        for wave in range(WAVES):
            total = arith.addi(total, get(self.sums, [i, wave, 0]))
            misfits = arith.ori(misfits, get(self.sums, [i, wave, 1]))
        return is_marked(self.cut, total, misfits)

    def count(self, i: ir.Value, channel: ir.Value, threshold: ir.Value) -> ir.Value:
        """Returns a count of row i as a float."""
        return count_of(self.floats.one(i, channel), threshold)


def flags(
    codes: Codes, cut: Encoding, counts: Counts, rows: Rows, steps: int, chunks: int, most: int
) -> ir.Value:
    """Returns, in shared memory, for each step of ``chunks`` chunks whether one of ``most`` rows has a high byte there."""
    found = shared([steps], i32_type())
    each = chunks * codes.chunk // FLAG_CHANNELS

    def one(step: ir.Value) -> None:
        first = mul(step, each)
        end = minimum(add(first, each), cut.flags)

        def row(i: ir.Value, so_far: ir.Value) -> list[ir.Value]:
            number = rows.number(i)
            return loop(first, end, 1, lambda at, f: [arith.ori(f, get(counts.wide, [number, at]))], [so_far])

        count = minimum(sub(rows.end, rows.first), most)
        put(loop(0, count, 1, row, [i32(0)])[0], found, [step])

    loop(thread(), steps, THREADS, one)
    barrier()
    return found
