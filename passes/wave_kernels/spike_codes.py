"""Codes of weights as waves multiply them with counts, by the matrix instruction for bytes.

A chunk is what a wave multiplies at a time: 16 columns and 64 channels, 128 of nibbles. A lane holds 16 neighbouring channels of
one column, as 4 words of 4 bytes; which channels meet in one instruction does not matter, as long as both operands agree. A
packed weight holds the words of a chunk in the order of the lanes, so that a wave reads 1 KiB without gaps.

Each group of channels that share a scale begins with a chunk of its own. Counts have zeros behind a group, up to whole chunks. Of
a weight only whole steps are stored, of 16 channels, 32 of nibbles: lanes beyond the last one of a group read that again, for
counts of 0.

* 8 bits: a word is an operand.
* 4 bits: stored with 8 added, two channels 16 apart in a byte. A nibble becomes a byte of 16 times the code, in two or three
  instructions for four of them; sums are divided by 16 at the end.
* 16 bits: ``code = 256 * high + low + 128`` with bytes ``high`` and ``low``: two operands, and the sum of the counts.

Counts are ``256 * high + low``; the high bytes are multiplied only where there are any. All sums are right modulo 2**32, and the
encoder marks rows whose sums could exceed 32 bits (``spike_encode.py``).
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
    i32,
    i32_type,
    load,
    minimum,
    mul,
    rem,
)
from spikingbrain.passes.wave_kernels.builders import TILE, element_at, matrix_multiply, matrix_zero

NIBBLE_OFFSET = 8
LANE_CHANNELS = 16  # of one stored vector
STEPS = 4  # of a chunk: one for each 16 lanes
_EVERY_ONE = 0x01010101
_EVERY_SIGN = -0x7F7F7F80  # 0x80808080
_HIGH_NIBBLES = -0x0F0F0F10  # 0xF0F0F0F0


@dataclass(frozen=True)
class Codes:
    """How codes of ``bits`` bits (4, 8 or 16) of ``channels`` in ``groups`` are stored and multiplied."""

    bits: int
    channels: int
    groups: int = 1

    @property
    def block(self) -> int:
        """Returns the columns of a panel."""
        return TILE

    @property
    def step(self) -> int:
        """Returns the channels of one column that a lane reads at a time."""
        return LANE_CHANNELS * self.count_vectors

    @property
    def chunk(self) -> int:
        """Returns the channels that a wave multiplies at a time."""
        return self.step * STEPS

    @property
    def group(self) -> int:
        """Returns the channels that share a scale."""
        return self.channels // self.groups

    @property
    def group_steps(self) -> int:
        """Returns the steps of a group, the last one with zeros."""
        return -(-self.group // self.step)

    @property
    def group_chunks(self) -> int:
        """Returns the chunks of a group's counts."""
        return -(-self.group_steps // STEPS)

    @property
    def chunks(self) -> int:
        """Returns the chunks of a row's counts."""
        return self.groups * self.group_chunks

    @property
    def gaps(self) -> tuple[int, int]:
        """Returns the channels of a group and the places for their counts, 0 and 0 where channels lie beside each other."""
        places = self.group_chunks * self.chunk
        return (0, 0) if self.groups == 1 or places == self.group else (self.group, places)

    @property
    def count_vectors(self) -> int:
        """Returns how many vectors of counts a lane takes for a chunk."""
        return 2 if self.bits == 4 else 1

    @property
    def code_vectors(self) -> int:
        """Returns how many vectors of 4 words of codes a lane takes for a chunk."""
        return 2 if self.bits == 16 else 1

    @property
    def largest_code(self) -> int:
        """Returns the magnitude that bounds codes, of nibbles that of their bytes."""
        return 32768 if self.bits == 16 else 128

    def stored_type(self, columns: int) -> ir.RankedTensorType:
        """Returns the type of a packed weight, ``[panels, steps, words]``; the words of the 16 lanes beside each other."""
        shape = [-(-columns // TILE), self.groups * self.group_steps, TILE * 4 * self.code_vectors]
        return ir.RankedTensorType.get(shape, i32_type())

    def recipe(self) -> list[str]:
        """Returns the steps that pack a weight so; see ``passes/recipes.py``."""
        tile = f"lanes={TILE} vectors=1 width={LANE_CHANNELS}"
        whole = self.group_steps * self.step
        gaps = [f"pad_groups size={self.group} to={whole}"] if self.groups > 1 and whole > self.group else []
        if self.bits == 4:
            return [*gaps, f"pack_nibbles {tile} offset={NIBBLE_OFFSET} multiple=2", "words"]
        return [*gaps, f"pack_dot {tile} offset=0", "words"]

    def scale_recipe(self) -> str:
        """Returns the step that packs ``[N, G]`` scales as ``[panels, G, 16]``."""
        return f"pack_columns block={TILE}"

    # What a lane reads for a chunk

    def count_places(self, chunk: Index, lane: ir.Value) -> list[ir.Value]:
        """Returns at which words of a row's counts a lane's vectors begin."""
        first = add(mul(chunk, self.chunk // 4), mul(floor_div(lane, TILE), 4 * self.count_vectors))
        return [add(first, 4 * i) for i in range(self.count_vectors)]

    def code_vectors_at(
        self, weight: ir.Value, panel: ir.Value, group: Index, chunk: Index, lane: ir.Value
    ) -> list[ir.Value]:
        """Returns a lane's vectors of codes of a chunk of a group."""
        step = add(mul(chunk, STEPS), floor_div(lane, TILE))
        if self.group_steps % STEPS:
            step = minimum(step, self.group_steps - 1)
        step = add(mul(group, self.group_steps), step)
        first = mul(rem(lane, TILE), 4 * self.code_vectors)
        return [load(weight, [panel, step, add(first, 4 * i)], 4) for i in range(self.code_vectors)]

    def code_at(
        self, read: Callable[[list[ir.Value]], ir.Value], panel: ir.Value, channel: ir.Value, column: ir.Value
    ) -> ir.Value:
        """Returns one code as an i32; ``read`` returns a word of the packed weight, ``column`` is that of the panel."""
        if self.group_steps * self.step > self.group:
            group, at = floor_div(channel, self.group), rem(channel, self.group)
            channel = add(mul(group, self.group_steps * self.step), at)
        step, part = floor_div(channel, LANE_CHANNELS), rem(channel, LANE_CHANNELS)
        half = None
        if self.bits == 4:
            step, half = floor_div(step, 2), rem(step, 2)
        bits = 16 if self.bits == 16 else 8
        each = 32 // bits
        word = read([panel, step, add(mul(column, LANE_CHANNELS // each), floor_div(part, each))])
        up = arith.index_cast(i32_type(), mul(arith.subi(_index(each - 1), rem(part, each)), bits))
        word = arith.shli(word, up)
        if half is None:
            return arith.shrsi(word, i32(32 - bits))
        high = arith.shrui(word, i32(28))
        low = arith.andi(arith.shrui(word, i32(24)), i32(15))
        return arith.subi(arith.select(compare("ne", half, _index(0)), high, low), i32(NIBBLE_OFFSET))

    # Products

    def words(self, vectors: Sequence[ir.Value]) -> list[ir.Value]:
        return [element_at(vector, i) for vector in vectors for i in range(4)]

    def operands(self, vectors: Sequence[ir.Value]) -> list[list[ir.Value]]:
        """Returns, for each word of counts, the operands of the codes: low bytes, then high ones if there are any."""
        words = self.words(vectors)
        if self.bits == 8:
            return [[word] for word in words]
        if self.bits == 4:
            sign, mask = i32(_EVERY_SIGN), i32(_HIGH_NIBBLES)
            low = [arith.andi(arith.shli(word, i32(4)), mask) for word in words]
            high = [arith.andi(word, mask) for word in words]
            return [[arith.xori(word, sign)] for word in [*low, *high]]
        pairs = zip(words[::2], words[1::2], strict=True)
        return [[arith.xori(_bytes(a, b, 0), i32(_EVERY_SIGN)), _bytes(a, b, 8)] for a, b in pairs]

    def zeros(self) -> list[ir.Value]:
        """Returns a lane's part of the sums of a tile: by the power of 256; of 16 bits also of the counts alone, low and high."""
        return [matrix_zero("i8")] * (5 if self.bits == 16 else 2)

    def add_low(
        self, sums: Sequence[ir.Value], counts: Sequence[ir.Value], codes: Sequence[Sequence[ir.Value]]
    ) -> list[ir.Value]:
        """Returns the sums with the products of the counts' low bytes, of a tile of 16 rows."""
        return self._add(sums, counts, codes, 0)

    def add_high(
        self, sums: Sequence[ir.Value], counts: Sequence[ir.Value], codes: Sequence[Sequence[ir.Value]]
    ) -> list[ir.Value]:
        """The same for the high bytes."""
        return self._add(sums, counts, codes, 1)

    def _add(
        self,
        sums: Sequence[ir.Value],
        counts: Sequence[ir.Value],
        codes: Sequence[Sequence[ir.Value]],
        power: int,
    ) -> list[ir.Value]:
        result = list(sums)
        for count, parts in zip(counts, codes, strict=True):
            for p, part in enumerate(parts, power):
                result[p] = matrix_multiply("i8", count, part, result[p])
            if self.bits == 16:
                result[3 + power] = matrix_multiply("i8", count, i32(_EVERY_ONE), result[3 + power])
        return result

    def totals(self, sums: Sequence[ir.Value]) -> list[ir.Value]:
        """Returns the four sums that a lane holds, i32."""
        factors = [1, 256, 65536, 128, 32768]
        result = []
        for v in range(4):
            parts = [element_at(value, v) for value in sums]
            total = parts[0]
            for part, factor in zip(parts[1:], factors[1:], strict=False):
                total = arith.addi(total, arith.muli(part, i32(factor)))
            result.append(arith.shrsi(total, i32(4)) if self.bits == 4 else total)
        return result


def _index(value: int) -> ir.Value:
    return arith.constant(ir.IndexType.get(), value)


def _bytes(a: ir.Value, b: ir.Value, shift: int) -> ir.Value:
    """Returns one byte of each of the four words of 16 bits in a and b: from bit ``shift`` on."""

    def moved(word: ir.Value, left: int, mask: int) -> ir.Value:
        if left > 0:
            word = arith.shli(word, i32(left))
        elif left < 0:
            word = arith.shrui(word, i32(-left))
        return arith.andi(word, i32(mask))

    parts = [
        moved(a, -shift, 0xFF),
        moved(a, -8 - shift, 0xFF00),
        moved(b, 16 - shift, 0xFF0000),
        moved(b, 8 - shift, -0x1000000),
    ]
    return arith.ori(arith.ori(parts[0], parts[1]), arith.ori(parts[2], parts[3]))
