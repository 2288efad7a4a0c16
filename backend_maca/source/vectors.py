"""Vectors of at most 16 bytes in MACA C++: their types, their elements, and how they meet memory.

A vector of 4- or 8-byte elements is a ``__NATIVE_VECTOR__`` of them. Narrower elements (i8, i16, f16, bf16) lie
packed in 32-bit words, the form that the matrix builtins take; a vector that is one element or word is a plain
number. Elements are reached one by one: the device compiler's arithmetic on vectors is not used, as the compilers
that stand in for it have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from torch_mlir import ir

from spikingbrain.backend_maca.lower.mlir import constant, is_shared
from spikingbrain.backend_maca.source.types import TYPES

MAX_BYTES = 16
WORD = 4  # bytes
WIDE = {"f32": "float", "i32": "int32_t", "f64": "double", "i64": "int64_t"}

HELPERS = {
    "sb_cast": """\
// The same bits as another type.
template <class To, class From>
static __device__ __forceinline__ To sb_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
""",
    "sb_pair": """\
// Two 16-bit values in a word, the first one low.
template <class T>
static __device__ __forceinline__ uint32_t sb_pair(T a, T b) {
  return (uint32_t)sb_cast<uint16_t>(a) | (uint32_t)sb_cast<uint16_t>(b) << 16;
}
""",
    "sb_quad": """\
// Four bytes in a word, the first one low.
static __device__ __forceinline__ uint32_t sb_quad(int8_t a, int8_t b, int8_t c, int8_t d) {
  return (uint32_t)(uint8_t)a | (uint32_t)(uint8_t)b << 8 | (uint32_t)(uint8_t)c << 16 | (uint32_t)(uint8_t)d << 24;
}
""",
    "sb_load": """\
// A vector that lies at a multiple of its size.
template <class V, class T>
static __device__ __forceinline__ V sb_load(const T* place) {
  return *(const V*)place;
}
""",
    "sb_store": """\
// A vector to a multiple of its size.
template <class V, class T>
static __device__ __forceinline__ void sb_store(T* place, V value) {
  *(V*)place = value;
}
""",
    "sb_gather": """\
// A vector that may lie at any element.
template <class V, class T>
static __device__ __forceinline__ V sb_gather(const T* place) {
  V value;
  __builtin_memcpy(&value, place, sizeof value);
  return value;
}
""",
    "sb_scatter": """\
// A vector to any element.
template <class V, class T>
static __device__ __forceinline__ void sb_scatter(T* place, V value) {
  __builtin_memcpy(place, &value, sizeof value);
}
""",
}
NEEDS = {"sb_pair": {"sb_cast"}}  # helpers that helpers use


def refusal(kind: ir.VectorType) -> str:
    """Returns why a vector type has no form in MACA C++; empty when it has one."""
    element = str(kind.element_type)
    if kind.rank != 1:
        return f"{kind} has not one axis"
    if element not in TYPES or element in ("index", "i1"):
        return f"vectors of {element} do not exist"
    size = kind.shape[0] * TYPES[element][1]
    if size not in (WORD, 2 * WORD, MAX_BYTES):
        return f"{kind} has {size} bytes; vectors have {WORD}, {2 * WORD} or {MAX_BYTES}"
    return ""


def per_word(kind: ir.VectorType) -> int:
    """Returns how many elements share a 32-bit word: 1 where each stands alone."""
    return max(1, WORD // TYPES[str(kind.element_type)][1])


def _parts(kind: ir.VectorType) -> tuple[int, str]:
    """Returns the number of elements or words that a vector is made of, and their short name."""
    if per_word(kind) > 1:
        return kind.shape[0] // per_word(kind), "u32"
    return kind.shape[0], str(kind.element_type)


def type_name(kind: ir.VectorType) -> tuple[str, str]:
    """Returns the C++ type of a vector and the line that declares it, empty for a plain number."""
    count, part = _parts(kind)
    plain = "uint32_t" if part == "u32" else WIDE[part]
    if count == 1:
        return plain, ""
    name = f"sb_{part}x{count}"
    return name, f"typedef __NATIVE_VECTOR__({count}, {plain}) {name};\n"


def part(kind: ir.VectorType, text: str, number: int) -> str:
    """Returns an element, or the word of packed elements, of a vector that has a name."""
    return text if _parts(kind)[0] == 1 else f"{text}[{number}]"


def element(kind: ir.VectorType, text: str, position: int) -> str:
    """Returns one element of a vector that has a name."""
    count = per_word(kind)
    word, bits = part(kind, text, position // count), 32 // count * (position % count)
    if count == 1:
        return word
    shifted = f"({word} >> {bits})" if bits else word
    if count == 4 or str(kind.element_type) == "i16":
        return f"({TYPES[str(kind.element_type)][0]}){shifted}"
    return f"sb_cast<{TYPES[str(kind.element_type)][0]}>((uint16_t){shifted})"


def value(kind: ir.VectorType, elements: Sequence[str]) -> str:
    """Returns the initialiser of a vector with these elements, each a word or a call."""
    count = per_word(kind)
    groups = [elements[i : i + count] for i in range(0, len(elements), count)]
    helper = {2: "sb_pair", 4: "sb_quad"}.get(count, "")
    parts = [f"{helper}({', '.join(group)})" if helper else group[0] for group in groups]
    return parts[0] if len(parts) == 1 else "{" + ", ".join(parts) + "}"


# Alignment


def is_aligned(op: ir.Operation) -> bool:
    """Tells whether a ``vector.load`` or ``vector.store`` surely meets a multiple of the vector's size.

    Buffers and shared memory begin at multiples of 16 bytes; what is asked for is divisible by the vector's length.
    """
    loads = op.name == "vector.load"
    buffer, *at = list(op.operands)[0 if loads else 1 :]
    kind = op.results[0].type if loads else op.operands[0].type
    place = 0
    for axis, index in enumerate(at):
        size = buffer.type.shape[axis]
        place = gcd(place * (size if size >= 0 else 1), divisor(index))
    owner = buffer.owner
    registers = not isinstance(owner, ir.Block) and owner.name == "memref.alloca" and not is_shared(buffer)
    return not registers and place % kind.shape[0] == 0


def divisor(index: ir.Value) -> int:
    """Returns a number that divides an index for sure; 0 for the index 0."""
    number = constant(index)
    if number is not None:
        return abs(int(number))
    if isinstance(index.owner, ir.Block):
        loop = index.owner.owner.operation
        if loop.name == "scf.for" and index == index.owner.arguments[0]:
            return gcd(divisor(loop.operands[0]), divisor(loop.operands[2]))
        return 1
    op = index.owner
    if op.name == "arith.muli":
        return divisor(op.operands[0]) * divisor(op.operands[1])
    if op.name in ("arith.addi", "arith.subi", "arith.remsi", "arith.remui", "arith.minsi", "arith.maxsi"):
        return gcd(divisor(op.operands[0]), divisor(op.operands[1]))
    if op.name in ("arith.minui", "arith.maxui"):
        return gcd(divisor(op.operands[0]), divisor(op.operands[1]))
    if op.name == "arith.select":
        return gcd(divisor(op.operands[1]), divisor(op.operands[2]))
    if op.name == "arith.shli" and (shift := constant(op.operands[1])) is not None:
        return divisor(op.operands[0]) << int(shift)
    if op.name == "arith.andi":
        masks = [divisor(v) & -divisor(v) for v in op.operands]
        return max(masks)  # zeros at the end of either operand stay
    if op.name.startswith("arith.index_cast"):
        return divisor(op.operands[0])
    return 1
