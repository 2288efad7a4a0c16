"""What a kernel in the ``gpu`` dialect may hold: each feature against numpy on the emulator, each limit by its message."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")

from test_maca import Array, compile_text, in_every_order, load, needs_cxx, random

from spikingbrain.backend_maca.source.subset import SUBSET
from spikingbrain.errors import UnsupportedOp


def scheduled(
    body: str,
    inputs: str,
    result: str,
    grid: tuple[int, int, int] = (1, 1, 1),
    threads: int = 64,
    name: str = "main",
) -> str:
    """Returns functions that launch one kernel; ``%in0``, ``%in1``, ... and ``%out`` are its memrefs."""
    kinds = [kind.strip() for kind in inputs.split(";")]
    memrefs = ", ".join(f"%in{i}: memref<{kind}>" for i, kind in enumerate(kinds))
    tensors = ", ".join(f"%in{i}: tensor<{kind}>" for i, kind in enumerate(kinds))
    types = ", ".join(f"tensor<{kind}>" for kind in kinds)
    names = ", ".join(f"%in{i}" for i in range(len(kinds)))
    declared = "".join(text for builtin, text in BUILTINS.items() if builtin in body)
    return f"""
    {declared}
    func.func private @{name}_kernel(%bx: index, %by: index, %bz: index, {memrefs}, %out: memref<{result}>)
        attributes {{spikingbrain.threads = {threads} : i64}} {{
      %c0 = arith.constant 0 : index
      %c1 = arith.constant 1 : index
      %c2 = arith.constant 2 : index
      %c4 = arith.constant 4 : index
      %c8 = arith.constant 8 : index
      %c16 = arith.constant 16 : index
      %c64 = arith.constant 64 : index
      %t = gpu.thread_id x
      {body}
      return
    }}
    func.func public @{name}({tensors}) -> tensor<{result}> {{
      %x = arith.constant {grid[0]} : index
      %y = arith.constant {grid[1]} : index
      %z = arith.constant {grid[2]} : index
      %0 = "spikingbrain_control.launch"(%x, %y, %z, {names}) {{callee = @{name}_kernel, tied = [-1]}}
        : (index, index, index, {types}) -> tensor<{result}> loc("model.py":7:3)
      return %0 : tensor<{result}>
    }}
    """


CASES: dict[str, str] = {}  # all kernels that run, compiled together


def case(name: str, *arguments: Any, **options: Any) -> str:
    """Adds a kernel that runs; returns its module, to look at the source of it alone."""
    CASES[name] = scheduled(*arguments, **options, name=name)
    return CASES[name]


@pytest.fixture(scope="module")
def feature() -> Callable[..., Array]:
    """Returns a function that runs a case in all thread orders, given its name and arguments."""
    text = "".join(CASES.values())
    for declaration in BUILTINS.values():
        text = text.replace(declaration, "")
    program = load(compile_text("".join(BUILTINS.values()) + text))
    return lambda name, *arguments: in_every_order(program, name, *arguments)


BUILTINS = {
    f"@__builtin_mxc_mma_{shape}": f"func.func private @__builtin_mxc_mma_{shape}({x}, {x}, {sums}) -> {sums}\n"
    for shape, x, sums in [
        ("16x16x16i8", "i32", "vector<4xi32>"),
        ("16x16x16f16", "vector<4xf16>", "vector<4xf32>"),
        ("16x16x16bf16", "vector<4xbf16>", "vector<4xf32>"),
        ("16x16x4f32", "f32", "vector<4xf32>"),
    ]
}
SHARED = "#gpu.address_space<workgroup>"

REVERSED_BLOCK = f"""
      %s = memref.alloca() : memref<64xf32, {SHARED}>
      %base = arith.muli %bx, %c64 : index
      %i = arith.addi %base, %t : index
      %v = memref.load %in0[%i] : memref<192xf32>
      memref.store %v, %s[%t] : memref<64xf32, {SHARED}>
      gpu.barrier
      %c63 = arith.constant 63 : index
      %mirror = arith.subi %c63, %t : index
      %r = memref.load %s[%mirror] : memref<64xf32, {SHARED}>
      memref.store %r, %out[%i] : memref<192xf32>
"""


case("reversed", REVERSED_BLOCK, "192xf32", "192xf32", (3, 1, 1))


@needs_cxx
def test_shared_memory_and_barriers(feature: Callable[..., Array]) -> None:
    x = random(192)
    got = feature("reversed", x)
    np.testing.assert_array_equal(got, x.reshape(3, 64)[:, ::-1].reshape(-1))


DYNAMIC = case(
    "dynamic",
    REVERSED_BLOCK.replace("memref<64xf32, #", "memref<9216xf32, #")
    + f"""
      %d = memref.alloca() : memref<64xf32, {SHARED}>
      memref.store %r, %d[%t] : memref<64xf32, {SHARED}>
      gpu.barrier
      %back = memref.load %d[%mirror] : memref<64xf32, {SHARED}>
      memref.store %back, %out[%i] : memref<192xf32>
    """,
    *("192xf32", "192xf32", (3, 1, 1)),
)


@needs_cxx
def test_shared_memory_beyond_the_static_limit_is_asked_for_at_the_launch(
    feature: Callable[..., Array],
) -> None:
    """36 KiB are static; the second array is dynamic."""
    x = random(192)
    np.testing.assert_array_equal(feature("dynamic", x), x)
    assert "SB_DYNAMIC_SHARED(uint8_t, dynamic);" in compile_text(DYNAMIC)["kernels.maca"].decode()
    with pytest.raises(UnsupportedOp, match="66560 bytes asked for, 65536 there"):
        compile_text(DYNAMIC.replace("memref<64xf32, #", "memref<7424xf32, #"))


REGISTERS = case(
    "registers",
    """
      %own = memref.alloca() : memref<2x4xf32>
      scf.for %a = %c0 to %c2 step %c1 {
        scf.for %b = %c0 to %c4 step %c1 {
          %row = arith.muli %a, %c4 : index
          %k = arith.addi %row, %b : index
          %v = memref.load %in0[%t, %k] : memref<64x8xf32>
          memref.store %v, %own[%a, %b] : memref<2x4xf32>
        }
      }
      %zero = arith.constant 0.0 : f32
      %c7 = arith.constant 7 : index
      %sum = scf.for %k = %c0 to %c8 step %c1 iter_args(%s = %zero) -> (f32) {
        %last = arith.subi %c7, %k : index
        %a = arith.divui %last, %c4 : index
        %b = arith.remui %last, %c4 : index
        %v = memref.load %own[%a, %b] : memref<2x4xf32>
        %n = arith.addf %s, %v : f32
        scf.yield %n : f32
      }
      memref.store %sum, %out[%t] : memref<64xf32>
    """,
    *("64x8xf32", "64xf32"),
)


@needs_cxx
def test_arrays_of_a_thread_and_unrolled_loops(feature: Callable[..., Array]) -> None:
    """Each thread sums eight numbers in an array of its own, from the last to the first."""
    x = random(64, 8)
    want = np.zeros(64, np.float32)
    for k in reversed(range(8)):
        want += x[:, k]
    np.testing.assert_array_equal(feature("registers", x), want)
    assert compile_text(REGISTERS)["kernels.maca"].decode().count("#pragma unroll") == 3


COPY_VECTORS = """
      %at = arith.muli %t, %c4 : index
      %v = vector.load %in0[%bx, %at] : memref<INxf32>, vector<4xf32>
      %a, %b, %c, %d = vector.to_elements %v : vector<4xf32>
      %r = vector.from_elements %d, %c, %b, %a : vector<4xf32>
      vector.store %r, %out[%bx, %at] : memref<INxf32>, vector<4xf32>
"""


COPIES = {
    columns: case(
        f"copy{columns}", COPY_VECTORS.replace("IN", f"3x{columns}"), *[f"3x{columns}xf32"] * 2, (3, 1, 1)
    )
    for columns in (256, 257)
}


@needs_cxx
@pytest.mark.parametrize(
    ("columns", "helpers"), [(256, ["sb_load", "sb_store"]), (257, ["sb_gather", "sb_scatter"])]
)
def test_vectors_are_loaded_whole_where_they_are_aligned(
    feature: Callable[..., Array], columns: int, helpers: list[str]
) -> None:
    x = random(3, columns)
    got = feature(f"copy{columns}", x)[:, :256]
    np.testing.assert_array_equal(got, x[:, :256].reshape(3, 64, 4)[:, :, ::-1].reshape(3, 256))
    source = compile_text(COPIES[columns])["kernels.maca"].decode()
    assert all(
        f"  {helper}<" in source or f" {helper}<" in source or f"  {helper}(" in source for helper in helpers
    )


@needs_cxx
def test_arguments_that_are_not_aligned_are_copied(feature: Callable[..., Array]) -> None:
    x = random(3 * 256 + 1)[1:].reshape(3, 256)
    assert x.ctypes.data % 16
    got = feature("copy256", x)
    np.testing.assert_array_equal(got, x.reshape(3, 64, 4)[:, :, ::-1].reshape(3, 256))


def packed(kind: str, lanes: int) -> str:
    """A kernel that reverses vectors of a narrow type and sets their second element to the last one."""
    vector, memory = f"vector<{lanes}x{kind}>", f"memref<64x{lanes}x{kind}>"
    names = [f"%e{i}" for i in range(lanes)]
    takes = "\n".join(f"{n} = vector.extract %v[{i}] : {kind} from {vector}" for i, n in enumerate(names))
    return f"""
      %v = vector.load %in0[%t, %c0] : {memory}, {vector}
      {takes}
      %r = vector.from_elements {", ".join(reversed(names))} : {vector}
      vector.store %r, %out[%t, %c0] : {memory}, {vector}
      %w = vector.load %out[%t, %c0] : {memory}, {vector}
      %s = vector.insert {names[-1]}, %w[1] : {kind} into {vector}
      vector.store %s, %out[%t, %c0] : {memory}, {vector}
    """


NARROW = [
    *(("i8", "int8", 4), ("i8", "int8", 16), ("i16", "int16", 4), ("f16", "float16", 8)),
    *(("bf16", "uint16", 8), ("bf16", "uint16", 2), ("i32", "int32", 1), ("i64", "int64", 2)),
    ("f64", "float64", 2),
]
for _kind, _, _lanes in NARROW:
    _body = packed(_kind, _lanes) if _lanes > 1 else packed(_kind, _lanes).split("%w =")[0]
    case(f"packed_{_kind}_{_lanes}", _body, *[f"64x{_lanes}x{_kind}"] * 2)


@needs_cxx
@pytest.mark.parametrize(("kind", "dtype", "lanes"), NARROW)
def test_narrow_elements_are_packed_in_words(
    feature: Callable[..., Array], kind: str, dtype: str, lanes: int
) -> None:
    raw = np.random.default_rng(1).integers(0, 256, (64, lanes * np.dtype(dtype).itemsize), np.uint8)
    x = raw.view(dtype)
    want = x[:, ::-1].copy()
    if lanes > 1:
        want[:, 1] = x[:, -1]
    got = feature(f"packed_{kind}_{lanes}", x)
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


case(
    "bits",
    """
      %v = vector.load %in0[%t, %c0] : memref<64x16xi8>, vector<16xi8>
      %w = vector.bitcast %v : vector<16xi8> to vector<4xi32>
      %one = arith.constant dense<[1, 2, 3, -4]> : vector<4xi32>
      %flag = arith.cmpi ult, %t, %c8 : index
      %s = arith.select %flag, %one, %w : vector<4xi32>
      vector.store %s, %out[%t, %c0] : memref<64x4xi32>, vector<4xi32>
    """,
    *("64x16xi8", "64x4xi32"),
)


@needs_cxx
def test_vectors_change_their_type_but_not_their_bits(feature: Callable[..., Array]) -> None:
    x = np.random.default_rng(1).integers(-128, 128, (64, 16)).astype(np.int8)
    want = x.view(np.int32).copy()
    want[:8] = [1, 2, 3, -4]
    np.testing.assert_array_equal(feature("bits", x), want)


case(
    "steps",
    """
      %start = memref.load %in0[%t] : memref<64xi32>
      %zero = arith.constant 0 : i32
      %one = arith.constant 1 : i32
      %three = arith.constant 3 : i32
      %steps, %end = scf.while (%n = %start, %s = %zero) : (i32, i32) -> (i32, i32) {
        %more = arith.cmpi ugt, %n, %one : i32
        scf.condition(%more) %s, %n : i32, i32
      } do {
      ^bb0(%s: i32, %n: i32):
        %bit = arith.andi %n, %one : i32
        %odd = arith.cmpi eq, %bit, %one : i32
        %half = arith.shrui %n, %one : i32
        %triple = arith.muli %n, %three : i32
        %next = arith.addi %triple, %one : i32
        %m = arith.select %odd, %next, %half : i32
        %r = arith.addi %s, %one : i32
        scf.yield %m, %r : i32, i32
      }
      %sum = arith.addi %steps, %end : i32
      memref.store %sum, %out[%t] : memref<64xi32>
    """,
    *("64xi32", "64xi32"),
)


@needs_cxx
def test_while_loops_stop_where_each_thread_wants(feature: Callable[..., Array]) -> None:
    """Counts the steps of the Collatz sequence down to 1."""

    def steps(n: int) -> int:
        return 0 if n <= 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    x = np.arange(64, dtype=np.int32)
    want = [steps(int(n)) + min(int(n), 1) for n in x]
    np.testing.assert_array_equal(feature("steps", x), want)


case(
    "votes",
    """
      %v = memref.load %in0[%t] : memref<128xf32>
      %zero = arith.constant 0.0 : f32
      %negative = arith.cmpf olt, %v, %zero : f32
      %votes = gpu.ballot %negative : i64
      %count = math.ctpop %votes : i64
      %narrow = arith.trunci %count : i64 to i32
      %bits = arith.bitcast %v : f32 to i32
      %other = math.ctpop %bits : i32
      %limit = arith.constant 12 : i32
      %few = arith.minui %other, %limit : i32
      %a = arith.addi %narrow, %bits : i32
      %r = arith.addi %a, %few : i32
      memref.store %r, %out[%t] : memref<128xi32>
    """,
    *("128xf32", "128xi32"),
    threads=128,
)


@needs_cxx
def test_votes_bits_and_casts(feature: Callable[..., Array]) -> None:
    """The float's bits, plus the number of lanes of the wave whose float is negative."""
    x = random(128)
    bits = x.view(np.int32)
    ones = np.array([bin(int(b)).count("1") for b in x.view(np.uint32)])
    want = bits + (x < 0).reshape(2, 64).sum(1).repeat(64) + np.minimum(ones, 12)
    got = feature("votes", x)
    np.testing.assert_array_equal(got, want.astype(np.int32))


def exchanges(*distances: int, kept: int = 0) -> str:
    """A kernel that adds four times what lane ^ distance has, then subtracts; the value before step ``kept`` goes in again."""
    text = "%x0 = memref.load %in0[%t] : memref<128xi32>\n%width = arith.constant 64 : i32\n"
    for i, distance in enumerate(distances):
        text += f"%d{i} = arith.constant {distance} : i32\n"
        text += f"%s{i}, %valid{i} = gpu.shuffle xor %x{i}, %d{i}, %width : i32\n"
        text += f"%x{i + 1} = arith.{'addi' if i < 4 else 'subi'} %x{i}, %s{i} : i32\n"
    text += f"%r = arith.addi %x{len(distances)}, %x{kept} : i32\n"
    return text + "memref.store %r, %out[%t] : memref<128xi32>"


BUTTERFLIES = {  # distances, the step before which a value is used again, the loops that are printed
    "halving": ((32, 16, 8, 4), 0, ["for (int d = 32; d >= 4; d >>= 1)"]),
    "doubling": ((2, 4, 8, 16), 0, ["for (int d = 2; d <= 16; d <<= 1)"]),
    "turning": ((4, 8, 16, 8), 0, ["for (int d = 4; d <= 16; d <<= 1)"]),
    "used_between": ((32, 16, 8, 4), 1, ["for (int d = 16; d >= 4; d >>= 1)"]),
    "other_op": ((32, 16, 8, 4, 2, 1), 0, ["for (int d = 32; d >= 4; d >>= 1)"]),
    "short": ((2, 1), 0, []),
}
for name, (distances, kept, _) in BUTTERFLIES.items():
    case(name, exchanges(*distances, kept=kept), "128xi32", "128xi32", threads=128)


@needs_cxx
@pytest.mark.parametrize("name", BUTTERFLIES)
def test_lanes_combine_in_loops(feature: Callable[..., Array], name: str) -> None:
    """Those of steps that are alike and lead to nothing but each other; the others stay as they are."""
    distances, kept, loops = BUTTERFLIES[name]
    source = compile_text(CASES[name])["kernels.maca"].decode()
    assert re.findall(r"for \(int d [^)]*\)", source) == loops
    x = np.random.default_rng(0).integers(-1000, 1000, 128).astype(np.int32)
    values = [x]
    for i, distance in enumerate(distances):
        other = values[-1].reshape(2, 64)[:, np.arange(64) ^ distance].ravel()
        values.append(values[-1] + other if i < 4 else values[-1] - other)
    np.testing.assert_array_equal(feature(name, x), values[-1] + values[kept])


BIT_OPS = ["addi", "subi", "muli", "maxui", "minui", "maxsi", "minsi"]
ORDERS = ["eq", "ne", "slt", "sle", "sgt", "sge", "ult", "ule", "ugt", "uge"]


def bits(operation: str, row: int) -> str:
    return f"""
      %r{row} = arith.{operation} %a, %b : i1
      %o{row} = arith.constant {row} : index
      memref.store %r{row}, %out[%o{row}, %t] : memref<{len(BIT_OPS) + len(ORDERS)}x64xi1>
    """


case(
    "one_bit",
    "%a = memref.load %in0[%t] : memref<64xi1>\n%b = memref.load %in1[%t] : memref<64xi1>\n"
    + "".join(bits(op, row) for row, op in enumerate(BIT_OPS))
    + "".join(bits(f"cmpi {order},", len(BIT_OPS) + row) for row, order in enumerate(ORDERS)),
    *("64xi1; 64xi1", f"{len(BIT_OPS) + len(ORDERS)}x64xi1"),
)


@needs_cxx
def test_numbers_of_one_bit(feature: Callable[..., Array]) -> None:
    """Arithmetic is modulo 2; as a signed number true is -1."""
    a, b = np.arange(64) % 2 == 1, np.arange(64) // 2 % 2 == 1
    x, y = -a.astype(int), -b.astype(int)  # signed
    u, v = a.astype(int), b.astype(int)
    want = [a ^ b, a ^ b, a & b, a | b, a & b, np.maximum(x, y), np.minimum(x, y)]
    want += [a == b, a != b, x < y, x <= y, x > y, x >= y, u < v, u <= v, u > v, u >= v]
    np.testing.assert_array_equal(feature("one_bit", a, b), np.array(want).astype(bool))


# Name in MLIR -> a function of numpy's, and what the argument in (0, 1) is multiplied by.
MATHS: dict[str, tuple[Callable[[Array], Array], float]] = {
    **{
        name: (getattr(np, name), 1.0)
        for name in ("ceil", "floor", "trunc", "expm1", "log1p", "cbrt", "sqrt")
    },
    **{name: (getattr(np, f"arc{name[1:]}"), 1.0) for name in ("acos", "asin", "atan", "asinh", "atanh")},
    **{
        name: (getattr(np, name), 30.0)
        for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "exp", "exp2")
    },
    **{name: (getattr(np, name), 1e6) for name in ("log", "log2", "log10")},
    "acosh": (lambda x: np.arccosh(1 + x), 1.0),
    "erf": (np.vectorize(math.erf), 3.0),
    "erfc": (np.vectorize(math.erfc), 3.0),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 9.0),
    "absf": (np.abs, -2.0),
    "roundeven": (np.round, 9.0),
}


def maths(kind: str) -> str:
    body = f"%v = memref.load %in0[%t] : memref<64x{kind}>\n%one = arith.constant 1.0 : {kind}\n"
    for row, (name, (_, factor)) in enumerate(MATHS.items()):
        add = f"arith.addf %s{row}, %one" if name == "acosh" else f"arith.mulf %s{row}, %one"
        body += f"""
          %f{row} = arith.constant {factor} : {kind}
          %s{row} = arith.mulf %v, %f{row} : {kind}
          %a{row} = {add} : {kind}
          %r{row} = math.{name} %a{row} : {kind}
          %c{row}r = arith.constant {row} : index
          memref.store %r{row}, %out[%c{row}r, %t] : memref<{len(MATHS)}x64x{kind}>
        """
    return body


for _kind in ("f32", "f64"):
    case(f"maths_{_kind}", maths(_kind), f"64x{_kind}", f"{len(MATHS)}x64x{_kind}")


@needs_cxx
@pytest.mark.parametrize(("kind", "dtype", "bound"), [("f32", np.float32, 4e-6), ("f64", np.float64, 1e-13)])
def test_functions_of_mathematics(feature: Callable[..., Array], kind: str, dtype: Any, bound: float) -> None:
    """Arguments are rounded as the kernel rounds them; the bound is on the error over 1 + the value."""
    x = np.random.default_rng(2).uniform(0.01, 0.99, 64).astype(dtype)
    got = feature(f"maths_{kind}", x)
    for name, row in zip(MATHS, got, strict=True):
        function, factor = MATHS[name]
        want = function((x * dtype(factor)).astype(np.float64))
        np.testing.assert_array_less(np.abs(row - want) / (1 + np.abs(want)), bound, err_msg=name)


case(
    "axes",
    """
      %width = gpu.grid_dim x
      %height = gpu.grid_dim y
      %a = arith.muli %bz, %height : index
      %b = arith.addi %a, %by : index
      %c = arith.muli %b, %width : index
      %block = arith.addi %c, %bx : index
      %v = memref.load %in0[%t] : memref<64xi32>
      %n = arith.index_castui %block : index to i32
      %r = arith.addi %v, %n : i32
      memref.store %r, %out[%bz, %by, %bx, %t] : memref<2x3x4x64xi32>
    """,
    *("64xi32", "2x3x4x64xi32", (4, 3, 2)),
)


@needs_cxx
def test_blocks_have_three_axes(feature: Callable[..., Array]) -> None:
    x = np.arange(64, dtype=np.int32)
    got = feature("axes", x)
    np.testing.assert_array_equal(got, np.arange(24).reshape(2, 3, 4, 1) + x)


def tile(load: str, builtin: str, operand: str, element: str, k: int) -> str:
    """A kernel for one 16 x 16 tile, y = x1 x2^T + x3, as the builtins lay it over the lanes."""
    sums = f"vector<4x{element}>"
    return f"""
      %lane = arith.remui %t, %c16 : index
      %group = arith.divui %t, %c16 : index
      %part = arith.constant {k // 4} : index
      %first = arith.muli %group, %part : index
      {load}
      %row = arith.muli %group, %c4 : index
      %init = arith.constant dense<0> : vector<4xi32>
      %z = vector.bitcast %init : vector<4xi32> to {sums}
      %sum = scf.for %i = %c0 to %c2 step %c1 iter_args(%s = %z) -> ({sums}) {{
        %d = func.call @{builtin}(%x, %y, %s) : ({operand}, {operand}, {sums}) -> {sums}
        scf.yield %d : {sums}
      }}
      %e0, %e1, %e2, %e3 = vector.to_elements %sum : {sums}
      %c3 = arith.constant 3 : index
      %r1 = arith.addi %row, %c1 : index
      %r2 = arith.addi %row, %c2 : index
      %r3 = arith.addi %row, %c3 : index
      memref.store %e0, %out[%row, %lane] : memref<16x16x{element}>
      memref.store %e1, %out[%r1, %lane] : memref<16x16x{element}>
      memref.store %e2, %out[%r2, %lane] : memref<16x16x{element}>
      memref.store %e3, %out[%r3, %lane] : memref<16x16x{element}>
    """


def operands(kind: str, k: int, cast: str = "") -> str:
    loads = ""
    for name, source in (("x", "%in0"), ("y", "%in1")):
        lanes = k // 4
        if lanes == 1:
            loads += f"%{name} = memref.load {source}[%lane, %first] : memref<16x{k}x{kind}>\n"
        elif cast:
            loads += f"""
            %{name}v = vector.load {source}[%lane, %first] : memref<16x{k}x{kind}>, vector<{lanes}x{kind}>
            %{name}w = vector.bitcast %{name}v : vector<{lanes}x{kind}> to vector<1xi32>
            %{name} = vector.extract %{name}w[0] : i32 from vector<1xi32>
            """
        else:
            loads += f"%{name} = vector.load {source}[%lane, %first] : memref<16x{k}x{kind}>, vector<{lanes}x{kind}>\n"
    return loads


def tile_case(kind: str) -> str:
    k = 4 if kind == "f32" else 16
    operand = {"i8": "i32", "f32": "f32"}.get(kind, f"vector<4x{kind}>")
    element = "i32" if kind == "i8" else "f32"
    loads = operands(kind, k, "i32" if kind == "i8" else "")
    body = tile(loads, f"__builtin_mxc_mma_16x16x{k}{kind}", operand, element, k)
    return case(f"tile_{kind}", body, f"16x{k}x{kind}; 16x{k}x{kind}", f"16x16x{element}")


TILES = {kind: tile_case(kind) for kind in ("i8", "f16", "bf16", "f32")}


@needs_cxx
@pytest.mark.parametrize("kind", TILES)
def test_matrix_builtins(feature: Callable[..., Array], kind: str) -> None:
    """Twice the product of tiles whose entries are small integers, so that every type is exact."""
    k = 4 if kind == "f32" else 16
    generator = np.random.default_rng(3)
    x, y = (generator.integers(-9, 10, (16, k)) for _ in range(2))

    def stored(a: Array) -> Array:
        if kind == "bf16":
            return (a.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return a.astype({"i8": np.int8, "f16": np.float16, "f32": np.float32}[kind])

    np.testing.assert_array_equal(feature(f"tile_{kind}", stored(x), stored(y)), 2 * x @ y.T)


@pytest.mark.parametrize(
    "name", ["tile_bf16", "dynamic", "registers", "copy256", "packed_bf16_8", "steps", "votes"]
)
def test_golden_source_of_scheduled_kernels(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"maca/{name}.maca", compile_text(CASES[name])["kernels.maca"].decode())


ARRAY = "%own = memref.alloca() : memref<8xf32>\n%zero = arith.constant 0.0 : f32\n"
REFUSED = {
    "vectors have no arithmetic; take their elements": """
      %v = vector.load %in0[%c0] : memref<192xf32>, vector<4xf32>
      %w = arith.addf %v, %v : vector<4xf32>
      vector.store %w, %out[%c0] : memref<192xf32>, vector<4xf32>""",
    "vector<8xf32> has 32 bytes; vectors have 4, 8 or 16": """
      %v = vector.load %in0[%c0] : memref<192xf32>, vector<8xf32>
      vector.store %v, %out[%c0] : memref<192xf32>, vector<8xf32>""",
    "vector<2x2xf32> has not one axis": """
      %v = arith.constant dense<1.0> : vector<2x2xf32>
      %i = scf.for %k = %c0 to %bx step %c1 iter_args(%s = %v) -> (vector<2x2xf32>) {
        %f = memref.load %in0[%k] : memref<192xf32>
        %w = vector.insert %f, %s[0, 0] : f32 into vector<2x2xf32>
        scf.yield %w : vector<2x2xf32>
      }
      %e = vector.extract %i[0, 0] : f32 from vector<2x2xf32>
      memref.store %e, %out[%c0] : memref<192xf32>""",
    "the element of a vector is known at compile time": """
      %v = vector.load %in0[%c0] : memref<192xf32>, vector<4xf32>
      %e = vector.extract %v[%bx] : f32 from vector<4xf32>
      memref.store %e, %out[%c0] : memref<192xf32>""",
    "it indexes an array of one thread by a value that unrolling loops does not make known": ARRAY
    + """
      memref.store %zero, %own[%t] : memref<8xf32>
      %e = memref.load %own[%c0] : memref<8xf32>
      memref.store %e, %out[%c0] : memref<192xf32>""",
    "1028 bytes are more than the 1024 that an array of one thread may have": ARRAY.replace("8x", "257x")
    + """
      memref.store %zero, %own[%c0] : memref<257xf32>
      %e = memref.load %own[%c1] : memref<257xf32>
      memref.store %e, %out[%c0] : memref<192xf32>""",
    "part of a block could miss it: it stands under a condition that depends on the thread": """
      %wave = arith.divui %t, %c64 : index
      %first = arith.cmpi eq, %wave, %c0 : index
      scf.if %first {
        gpu.barrier
      }""",
    "part of a wave could miss it: it stands under a condition that depends on the thread": """
      %first = arith.cmpi eq, %t, %c0 : index
      scf.if %first {
        %votes = gpu.ballot %first : i64
        %f = arith.sitofp %votes : i64 to f32
        memref.store %f, %out[%c0] : memref<192xf32>
      }""",
    "a vote of 64 lanes is an i64, not i32": """
      %first = arith.cmpi eq, %t, %c0 : index
      %votes = gpu.ballot %first : i32
      %f = arith.sitofp %votes : i32 to f32
      memref.store %f, %out[%c0] : memref<192xf32>""",
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_form_is_refused(why: str) -> None:
    with pytest.raises(UnsupportedOp) as refused:
        compile_text(scheduled(REFUSED[why], "192xf32", "192xf32", threads=128), target="maca")
    assert why in str(refused.value)


DIFFERENT = {
    "the rounds of a loop that starts at the thread": """
      scf.for %k = %t to %c64 step %c1 {
        gpu.barrier
      }""",
    "a value that the kernel writes": """
      %v = memref.load %out[%bx] : memref<192xf32>
      memref.store %v, %out[%t] : memref<192xf32>
      %zero = arith.constant 0.0 : f32
      %some = arith.cmpf one, %v, %zero : f32
      scf.if %some {
        gpu.barrier
      }""",
    "shared memory that is written before the next barrier": f"""
      %s = memref.alloca() : memref<1xi32, {SHARED}>
      %zero = arith.constant 0 : i32
      gpu.barrier
      %n = memref.load %s[%c0] : memref<1xi32, {SHARED}>
      %some = arith.cmpi ne, %n, %zero : i32
      memref.store %zero, %s[%c0] : memref<1xi32, {SHARED}>
      scf.if %some {{
        gpu.barrier
      }}""",
    "shared memory that the next round of a loop writes": f"""
      %s = memref.alloca() : memref<1xi32, {SHARED}>
      %zero = arith.constant 0 : i32
      scf.for %k = %c0 to %c4 step %c1 {{
        memref.store %zero, %s[%c0] : memref<1xi32, {SHARED}>
        gpu.barrier
        %n = memref.load %s[%c0] : memref<1xi32, {SHARED}>
        %some = arith.cmpi ne, %n, %zero : i32
        scf.if %some {{
          gpu.barrier
        }}
      }}""",
    "shared memory that is written behind a loop": f"""
      %s = memref.alloca() : memref<1xi32, {SHARED}>
      %zero = arith.constant 0 : i32
      memref.store %zero, %s[%c0] : memref<1xi32, {SHARED}>
      scf.for %k = %c0 to %c4 step %c1 {{
        gpu.barrier
        %n = memref.load %s[%c0] : memref<1xi32, {SHARED}>
        %some = arith.cmpi ne, %n, %zero : i32
        scf.if %some {{
          gpu.barrier
        }}
      }}
      memref.store %zero, %s[%c0] : memref<1xi32, {SHARED}>""",
    "a carried value that goes on by the thread": """
      %last = scf.while (%k = %c16) : (index) -> index {
        %more = arith.cmpi ugt, %k, %c1 : index
        scf.condition(%more) %k : index
      } do {
      ^bb0(%k: index):
        gpu.barrier
        %next = arith.subi %k, %t : index
        scf.yield %next : index
      }""",
    "the lanes of a shuffle": """
      %v = memref.load %in0[%t] : memref<192xf32>
      %one = arith.constant 1 : i32
      %width = arith.constant 64 : i32
      %o, %valid = gpu.shuffle xor %v, %one, %width : f32
      %zero = arith.constant 0.0 : f32
      %some = arith.cmpf one, %o, %zero : f32
      scf.if %some {
        gpu.barrier
      }""",
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_barriers_under_what_may_differ_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedOp, match="part of a block could miss it"):
        compile_text(scheduled(DIFFERENT[name], "192xf32", "192xf32", threads=128), target="maca")


UNIFORM = {
    "the number of the wave": """
      %wave = arith.divui %t, %c64 : index
      %first = arith.cmpi eq, %wave, %c0 : index
      scf.if %first {
        COLLECT
      }""",
    "a bound that the kernel only reads": """
      %n = memref.load %in0[%bx] : memref<192xf32>
      %i = arith.fptosi %n : f32 to i32
      %end = arith.index_cast %i : i32 to index
      scf.for %k = %c0 to %end step %c1 {
        gpu.barrier
        COLLECT
      }""",
    "a carried value that starts and goes on the same": """
      %last = scf.while (%k = %c16) : (index) -> index {
        %more = arith.cmpi ugt, %k, %c1 : index
        scf.condition(%more) %k : index
      } do {
      ^bb0(%k: index):
        gpu.barrier
        COLLECT
        %half = arith.divui %k, %c2 : index
        scf.yield %half : index
      }""",
    "shared memory that rests between barriers": f"""
      %s = memref.alloca() : memref<1xi32, {SHARED}>
      %two = arith.constant 2 : i32
      %zero = arith.constant 0 : i32
      %first = arith.cmpi eq, %t, %c0 : index
      scf.if %first {{
        memref.store %two, %s[%c0] : memref<1xi32, {SHARED}>
      }}
      gpu.barrier
      %n = memref.load %s[%c0] : memref<1xi32, {SHARED}>
      %some = arith.cmpi ne, %n, %zero : i32
      scf.if %some {{
        gpu.barrier
        COLLECT
      }}""",
}
COLLECT = """
        %flag = arith.cmpi slt, %t, %c8 : index
        %votes = gpu.ballot %flag : i64
        %f = arith.sitofp %votes : i64 to f32
        memref.store %f, %out[%t] : memref<192xf32>
"""


for _name, _body in UNIFORM.items():
    case(_name.replace(" ", "_"), _body.replace("COLLECT", COLLECT), *["192xf32"] * 2, threads=128)


@needs_cxx
@pytest.mark.parametrize("name", UNIFORM)
def test_collectives_stand_where_threads_surely_come_together(
    feature: Callable[..., Array], name: str
) -> None:
    got = feature(name.replace(" ", "_"), np.full(192, 2, np.float32))
    np.testing.assert_array_equal(got[:64], np.full(64, 255, np.float32))


def test_the_docs_list_the_subset() -> None:
    page = (Path(__file__).parents[2] / "docs" / "maca.md").read_text()
    table = page.partition("## The subset that is printed")[2].partition("Rules of the printed source")[0]
    listed = set(re.findall(r"\w+", table))
    ends = {"gpu.return", "scf.condition", "scf.yield", "ub.poison"}  # parts of others, and any value
    assert {op for op in SUBSET if op.partition(".")[2] not in listed} == ends
