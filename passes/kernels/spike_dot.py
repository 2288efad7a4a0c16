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

from spikingbrain.passes.kernels.builders import i32_type, load, mul, splat
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
        chunk = self.width * self.steps_per_vector
        return -(-channels // chunk) * self.steps_per_vector

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

    def weights(self, source: ir.Value, at: list[ir.Value]) -> list[ir.Value]:
        """Returns one stored vector as operands of the instruction, one for each of its steps."""
        raw = load(source, at, self.lanes * self.width)
        if self.bits != 4:
            return [self._widened(raw, signed=True)]
        low = arith.andi(raw, _bytes(15, raw.type))
        high = arith.shrui(raw, _bytes(4, raw.type))
        return [self._widened(low, signed=False), self._widened(high, signed=False)]

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
