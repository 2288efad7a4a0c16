"""Dot products of small integers, by instruction set: what spiking kernels are made of.

One step multiplies a vector of weights, ``width`` neighbouring codes for each of ``lanes`` columns, with ``width`` counts of a
row and adds to i32 accumulators, without saturation. Sums are right modulo 2**32, so only the last one must fit 32 bits.

* VNNI (``vpdpbusd``) takes 4 bytes, the weights unsigned: codes are stored with an offset, and sums start at
  ``-offset * sum(counts)``.
* ``sdot`` takes 4 signed bytes.
* ``pmaddwd``, and VNNI's ``vpdpwssd``, take 2 words of 16 bits. The sum of two products of words fits 32 bits unless all four are
  -32768, which no count is.
* Elsewhere on AArch64, two products of words: the code generator makes ``smlal`` of them.

Nibbles are stored with an offset of 8 everywhere: zero extension is cheaper than sign extension.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith, vector

from spikingbrain.passes.kernels.builders import LINE_BYTES, Index, add, i32_type, load, mul, prefetch, splat
from spikingbrain.target import Target

NIBBLE_OFFSET = 8


@dataclass(frozen=True)
class Dot:
    """How one target multiplies counts with codes of ``bits`` bits.

    Attributes:
        intrinsic: LLVM's name of the instruction; empty for plain multiplications.
        accumulates: whether the instruction adds to its first operand.
        lanes: columns in a vector.
        width: neighbouring channels that one step takes, as bytes (4) or words (2).
        bits: of a code.
        offset: added to each stored code.
        rows, vectors: the register tile.
    """

    intrinsic: str
    accumulates: bool
    lanes: int
    width: int
    bits: int
    offset: int
    rows: int
    vectors: int

    @property
    def block(self) -> int:
        """Returns the columns of a panel."""
        return self.lanes * self.vectors

    @property
    def steps_per_vector(self) -> int:
        """Returns how many steps one stored vector of weights holds."""
        return 2 if self.bits == 4 else 1

    @property
    def chunk(self) -> int:
        """Returns the channels of one stored vector; groups of them are a multiple of it."""
        return self.width * self.steps_per_vector

    @property
    def code_bytes(self) -> int:
        """Returns the size of an element of a packed weight."""
        return 2 if self.bits == 16 else 1

    @property
    def step_bytes(self) -> int:
        """Returns the size of one stored step of a panel."""
        return self.block * self.width * self.code_bytes

    @property
    def element(self) -> ir.Type:
        """Returns the type of one number as the instruction takes it."""
        return ir.IntegerType.get_signless(32 // self.width)

    @property
    def largest_count(self) -> int:
        """Returns the largest magnitude of a count: two bytes with signs, or one word."""
        return 127 * 256 + 127 if self.width == 4 else 32767

    def steps(self, channels: int) -> int:
        """Returns the steps for a row, a whole number of stored vectors."""
        return -(-channels // self.chunk) * self.steps_per_vector

    def stored_type(self, columns: int, channels: int) -> ir.RankedTensorType:
        """Returns the type of a packed weight, ``[panels, steps, vectors, lanes * width]`` (nibbles: two steps in one)."""
        stored = ir.IntegerType.get_signless(16 if self.bits == 16 else 8)
        steps = self.steps(channels) // self.steps_per_vector
        panels = -(-columns // self.block)
        return ir.RankedTensorType.get([panels, steps, self.vectors, self.lanes * self.width], stored)

    def recipe(self) -> str:
        """Returns the step that packs a weight so; see ``passes/recipes.py``."""
        name = "pack_nibbles" if self.bits == 4 else "pack_dot"
        return f"{name} lanes={self.lanes} vectors={self.vectors} width={self.width} offset={self.offset}"

    def weights(self, source: ir.Value, panel: ir.Value, at: ir.Value) -> list[list[ir.Value]]:
        """Returns what is stored at a place of a panel as operands of the instruction: for each vector, one for each step."""
        return [self._operands(self._stored(source, [panel, at, v, 0])) for v in range(self.vectors)]

    def _stored(self, source: ir.Value, at: list[Index]) -> ir.Value:
        return load(source, at, self.lanes * self.width)

    def _operands(self, raw: ir.Value) -> list[ir.Value]:
        """Returns one stored vector as operands, two of nibbles."""
        if self.bits != 4:
            return [self._widened(raw, signed=True)]
        low = arith.andi(raw, _bytes(15, raw.type))
        high = arith.shrui(raw, _bytes(4, raw.type))
        return [self._widened(low, signed=False), self._widened(high, signed=False)]

    def prefetch(self, source: ir.Value, panel: ir.Value, step: ir.Value) -> None:
        """Asks for the weights of one stored step."""
        for line in range(0, self.step_bytes, LINE_BYTES):
            v, column = divmod(line, self.step_bytes // self.vectors)
            prefetch(source, [panel, step, v, column // self.code_bytes])

    def counts_at(self, plane: ir.Value, row: ir.Value, step: ir.Value) -> ir.Value:
        """Returns the counts of one row and step, for all columns."""
        parts = load(plane, [row, mul(step, self.width)], self.width)
        one = vector.bitcast(ir.VectorType.get([1], i32_type()), parts)
        return self.counts(vector.extract(one, [], [0]))

    def counts(self, packed: ir.Value) -> ir.Value:
        """Returns the counts of one row and step, an i32 of ``width`` numbers, for all columns."""
        return vector.bitcast(self._operand_type(), splat(packed, self.lanes))

    def multiply_add(self, sums: ir.Value, weights: ir.Value, counts: ir.Value) -> ir.Value:
        if not self.intrinsic:
            return self._add_products(sums, weights, counts)
        if self.accumulates:
            return _call(self.intrinsic, sums.type, [sums, weights, counts])
        return arith.addi(sums, _call(self.intrinsic, sums.type, [weights, counts]))

    def _add_products(self, sums: ir.Value, weights: ir.Value, counts: ir.Value) -> ir.Value:
        for part in range(self.width):
            every = list(range(part, self.lanes * self.width, self.width))
            a, b = (arith.extsi(sums.type, vector.shuffle(v, v, every)) for v in (weights, counts))
            sums = arith.addi(sums, arith.muli(a, b))
        return sums

    def _operand_type(self) -> ir.VectorType:
        return ir.VectorType.get([self.lanes * self.width], self.element)

    def _widened(self, raw: ir.Value, signed: bool) -> ir.Value:
        if raw.type == self._operand_type():
            return raw
        return (arith.extsi if signed else arith.extui)(self._operand_type(), raw)


@dataclass(frozen=True)
class ChannelDot(Dot):
    """The same for weights stored channel by channel, so that those of a silent one need not be read.

    A panel holds ``[channels, registers, lanes * width]``: all its columns of one channel, then those of the next. What a step
    takes, ``width`` channels of each column, is put together when it is read, by interleaving; any channels can be a step.
    So that this needs no moves across 128 bits, a register's columns are stored in the order of ``pack_channels``.
    """

    @property
    def steps_per_vector(self) -> int:
        return 1

    @property
    def registers(self) -> int:
        """Returns how many stored vectors one channel of a panel has."""
        return self.vectors // self.width // (2 if self.bits == 4 else 1)

    @property
    def blocks(self) -> int:
        """Returns into how many blocks of 128 bits, or one smaller, a stored vector falls."""
        return max(1, self.lanes * self.width * self.code_bytes // 16)

    def stored_type(self, columns: int, channels: int) -> ir.RankedTensorType:
        """Returns the type of a packed weight, ``[panels, channels, registers, lanes * width]``, channels of whole steps."""
        stored = ir.IntegerType.get_signless(16 if self.bits == 16 else 8)
        shape = [-(-columns // self.block), self.steps(channels) * self.width, self.registers]
        return ir.RankedTensorType.get([*shape, self.lanes * self.width], stored)

    def recipe(self) -> str:
        name = "pack_channel_nibbles" if self.bits == 4 else "pack_channels"
        places = f"lanes={self.lanes} vectors={self.vectors} width={self.width} blocks={self.blocks}"
        return f"{name} {places} offset={self.offset}"

    def weights(self, source: ir.Value, panel: ir.Value, at: ir.Value) -> list[list[ir.Value]]:
        return self.gathered(source, panel, [add(mul(at, self.width), j) for j in range(self.width)])

    def prefetch(self, source: ir.Value, panel: ir.Value, step: ir.Value) -> None:
        for j in range(self.width):
            self.prefetch_channel(source, panel, add(mul(step, self.width), j))

    def prefetch_channel(self, source: ir.Value, panel: ir.Value, channel: ir.Value) -> None:
        """Asks for the weights of one channel."""
        stored = self.lanes * self.width
        for line in range(0, self.registers * stored, max(1, LINE_BYTES // self.code_bytes)):
            r, column = divmod(line, stored)
            prefetch(source, [panel, channel, r, column])

    def gathered(self, source: ir.Value, panel: ir.Value, channels: list[ir.Value]) -> list[list[ir.Value]]:
        """Returns the weights of ``width`` channels as one step."""
        result: list[list[ir.Value]] = []
        for r in range(self.registers):
            stored = [self._stored(source, [panel, channel, r, 0]) for channel in channels]
            halves = [self._operands(raw) for raw in _interleaved(stored, self.blocks)]
            result += [[half] for vectors in zip(*halves, strict=True) for half in vectors]
        return result


def _interleaved(parts: list[ir.Value], blocks: int) -> list[ir.Value]:
    """Returns vectors that hold in turn an element of each of 2 or 4 ``parts``, within each of their ``blocks``."""
    if len(parts) == 4:
        pairs = [_interleaved(parts[i : i + 2], blocks) for i in (0, 2)]
        kind = ir.VectorType(parts[0].type)  # of bytes
        words = ir.VectorType.get([kind.shape[0] // 2], ir.IntegerType.get_signless(16))
        halves = [[vector.bitcast(words, half) for half in pair] for pair in pairs]
        both = [_interleaved([a, b], blocks) for a, b in zip(*halves, strict=True)]
        return [vector.bitcast(kind, one) for pair in both for one in pair]
    a, b = parts
    size = ir.VectorType(a.type).shape[0]
    block = size // blocks
    result = []
    for half in (0, block // 2):
        places = [
            start + half + i + of
            for start in range(0, size, block)
            for i in range(block // 2)
            for of in (0, size)
        ]
        result.append(vector.shuffle(a, b, places))
    return result


def choose(target: Target, bits: int) -> Dot | None:
    """Returns the best way of a target for codes of 4, 8 or 16 bits; None without one.

    Register tiles of 8 x 2, 4 x 4, 8 x 3 (512 bits) and 6 x 2, 5 x 2 (AVX2) ran within 2% of these.
    """
    features, vector_bits = target.features, target.vector_bits
    if not vector_bits:
        return None
    if target.arch == "aarch64":
        offset = NIBBLE_OFFSET if bits == 4 else 0
        if "dotprod" in features and bits != 16:
            return Dot("llvm.aarch64.neon.sdot.v4i32.v16i8", True, 4, 4, bits, offset, 6, 4)
        return Dot("", False, 4, 2, bits, offset, 4, 4)
    if target.arch != "x86-64":
        return None
    lanes = vector_bits // 32
    has_vnni = "avx512vnni" in features if vector_bits == 512 else bool({"avxvnni", "avx512vnni"} & features)
    has_vnni = has_vnni and vector_bits >= 256
    rows, vectors = (6, 4) if target.vector_registers >= 32 else (6, 2)
    if has_vnni and bits != 16:
        offset = NIBBLE_OFFSET if bits == 4 else 128
        name = f"llvm.x86.avx512.vpdpbusd.{vector_bits}"
        return Dot(name, True, lanes, 4, bits, offset, rows, vectors)
    offset = NIBBLE_OFFSET if bits == 4 else 0
    if has_vnni:
        return Dot(f"llvm.x86.avx512.vpdpwssd.{vector_bits}", True, lanes, 2, bits, offset, rows, vectors)
    name = {512: "avx512.pmaddw.d.512", 256: "avx2.pmadd.wd", 128: "sse2.pmadd.wd"}[vector_bits]
    rows = 6 if target.vector_registers >= 32 else 4  # a product needs a register before it is added
    return Dot(f"llvm.x86.{name}", False, lanes, 2, bits, offset, rows, vectors)


def choose_by_channel(target: Target, bits: int) -> ChannelDot | None:
    """Returns the same for weights stored by channel; None for targets that are no CPU.

    Kernels without vector instructions are written in vectors all the same: the code generator makes scalars of them.
    """
    dot = choose(target, bits)
    if dot is None and target.kind == "cpu":
        dot = Dot("", False, 4, 2, bits, NIBBLE_OFFSET if bits == 4 else 0, 2, 4)
    if dot is None:
        return None
    vectors = (
        8 if target.vector_registers >= 32 else 4
    )  # two cache lines of a channel ran up to 30% faster than one
    vectors = max(vectors, dot.width * (2 if bits == 4 else 1))
    rows = max(1, dot.rows * dot.vectors // vectors)
    return ChannelDot(dot.intrinsic, dot.accumulates, dot.lanes, dot.width, bits, dot.offset, rows, vectors)


def _call(name: str, result: ir.Type, operands: list[ir.Value]) -> ir.Value:
    attributes = {
        "intrin": ir.StringAttr.get(name),
        "operandSegmentSizes": ir.DenseI32ArrayAttr.get([len(operands), 0]),
        "op_bundle_sizes": ir.DenseI32ArrayAttr.get([]),
    }
    return ir.Operation.create("llvm.call_intrinsic", [result], operands, attributes).result


def _bytes(value: int, type_: ir.Type) -> ir.Value:
    element = ir.VectorType(type_).element_type
    return arith.constant(type_, ir.DenseElementsAttr.get_splat(type_, ir.IntegerAttr.get(element, value)))


def sums_type(lanes: int) -> ir.VectorType:
    return ir.VectorType.get([lanes], i32_type())
