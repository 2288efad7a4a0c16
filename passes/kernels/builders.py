"""Small words for building kernels over arith, scf, vector and memref; each emits at the insertion point.

Sizes and indices may be Python integers wherever an index value is meant.
"""

from __future__ import annotations

import array
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import arith, memref, scf, tensor, vector

from spikingbrain.target import Target

LINE_BYTES = 64  # of a cache line

# 2**r on [-1/2, 1/2] with relative error 1e-7, exact at 0; highest power first.
EXP2 = (0.0013264727, 0.0096715126, 0.055507337, 0.24022242, 0.69314698, 1.0)
ROUNDER = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits of a float
SMALLEST_EXPONENT = -127.0  # with an exponent field of 0, so that the result is exactly 0
LARGEST_EXPONENT = 128.0  # with the exponent field of infinity

Index = Any  # int or an index value


# Indices


def index(value: Index) -> ir.Value:
    """Returns an index value: a constant for an int."""
    return arith.constant(ir.IndexType.get(), value) if isinstance(value, int) else value


def add(a: Index, b: Index) -> ir.Value:
    return arith.addi(index(a), index(b))


def sub(a: Index, b: Index) -> ir.Value:
    return arith.subi(index(a), index(b))


def mul(a: Index, b: Index) -> ir.Value:
    return arith.muli(index(a), index(b))


def minimum(a: Index, b: Index) -> ir.Value:
    """Returns the smaller of two indices; signed."""
    return arith.minsi(index(a), index(b))


def floor_div(a: Index, b: Index) -> ir.Value:
    """Divides indices; unsigned, as are the functions below."""
    return arith.divui(index(a), index(b))


def rem(a: Index, b: Index) -> ir.Value:
    return arith.remui(index(a), index(b))


def round_down(a: Index, b: int) -> ir.Value:
    return mul(floor_div(a, b), b)


def ceil_div(a: Index, b: int) -> ir.Value:
    return floor_div(add(a, b - 1), b)


def round_up(a: Index, b: int) -> ir.Value:
    return mul(ceil_div(a, b), b)


def size(value: ir.Value, axis: int) -> ir.Value:
    """Returns a size of a tensor or memref, as a constant where it is static."""
    shaped = ir.ShapedType(value.type)
    if not shaped.is_dynamic_dim(axis):
        return index(shaped.get_dim_size(axis))
    dim = tensor.dim if isinstance(value.type, ir.RankedTensorType) else memref.dim
    return dim(value, index(axis))


# Values and memory


def f32(value: float) -> ir.Value:
    return arith.constant(ir.F32Type.get(), value)


def i32(value: int) -> ir.Value:
    return arith.constant(i32_type(), value)


def i32_type() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def splat(value: float | int | ir.Value, lanes: int) -> ir.Value:
    """Returns a vector of one value; a Python float is an f32, an int an i32."""
    if isinstance(value, float | int):
        value = f32(value) if isinstance(value, float) else i32(value)
    return vector.broadcast(ir.VectorType.get([lanes], value.type), value)


def load(source: ir.Value, at: Sequence[Index], lanes: int) -> ir.Value:
    """Returns the vector that begins at a place of a memref."""
    element = ir.MemRefType(source.type).element_type
    return vector.load(ir.VectorType.get([lanes], element), source, [index(i) for i in at])


def store(value: ir.Value, target: ir.Value, at: Sequence[Index]) -> None:
    """Stores a vector to the elements of a memref that begin at a place."""
    vector.store(value, target, [index(i) for i in at])


def get(source: ir.Value, at: Sequence[Index]) -> ir.Value:
    """Returns one element of a memref."""
    return memref.load(source, [index(i) for i in at])


def put(value: ir.Value, target: ir.Value, at: Sequence[Index]) -> None:
    """Stores one element of a memref."""
    memref.store(value, target, [index(i) for i in at])


def prefetch(source: ir.Value, at: Sequence[Index], write: bool = False) -> None:
    """Asks for the cache line of an element that is read, or written, soon; into the second cache."""
    memref.PrefetchOp(source, [index(i) for i in at], write, 2, True)


def scratch(shapes: Sequence[tuple[Sequence[int], ir.Type]]) -> list[ir.Value]:
    """Returns buffers on the stack, each at the start of a cache line: vectors across two lines cost double.

    The alignment attribute of ``memref.alloca`` is printed in a form that IREE 3.13 does not read, so the
    buffers are views of one block of bytes.
    """
    starts, total = [], 0
    for shape, _ in shapes:
        starts.append(total)
        total += -(-math.prod(shape) * 4 // LINE_BYTES) * LINE_BYTES
    byte = ir.IntegerType.get_signless(8)
    block = memref.alloca(ir.MemRefType.get([total + LINE_BYTES], byte), [], [])
    address = memref.extract_aligned_pointer_as_index(block)
    shift = arith.andi(sub(0, address), index(LINE_BYTES - 1))
    return [
        memref.view(ir.MemRefType.get(shape, element), block, add(shift, start), [])
        for (shape, element), start in zip(shapes, starts, strict=True)
    ]


# Control flow


def loop(
    low: Index,
    high: Index,
    step: Index,
    body: Callable[..., Sequence[ir.Value] | None],
    carried: Sequence[ir.Value] = (),
) -> list[ir.Value]:
    """Builds a loop; ``body(i, *carried)`` returns the next carried values. Returns the last ones."""
    op = scf.ForOp(index(low), index(high), index(step), list(carried))
    with ir.InsertionPoint(op.body):
        scf.YieldOp(list(body(op.induction_variable, *op.inner_iter_args) or []))
    return list(op.results)


def when(condition: ir.Value, body: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
    """Builds a branch without results."""
    branch = scf.IfOp(condition, [], has_else=otherwise is not None)
    with ir.InsertionPoint(branch.then_block):
        body()
        scf.YieldOp([])
    if otherwise is not None:
        with ir.InsertionPoint(branch.else_block):
            otherwise()
            scf.YieldOp([])


# Arithmetic on scalars and vectors


def compare(predicate: str, a: ir.Value, b: ir.Value) -> ir.Value:
    """Compares integers; ``predicate`` as in ``arith.cmpi``, such as "slt"."""
    return arith.cmpi(getattr(arith.CmpIPredicate, predicate), a, b)


def compressed(value: ir.Value, chosen: ir.Value) -> ir.Value:
    """Returns the chosen elements of a vector at its front, in their order; anything behind them."""
    attributes = {
        "intrin": ir.StringAttr.get("llvm.experimental.vector.compress"),
        "operandSegmentSizes": ir.DenseI32ArrayAttr.get([3, 0]),
        "op_bundle_sizes": ir.DenseI32ArrayAttr.get([]),
    }
    return ir.Operation.create("llvm.call_intrinsic", [value.type], [value, chosen, value], attributes).result


def greater(a: ir.Value, b: ir.Value) -> ir.Value:
    """Compares floats; False where one is NaN."""
    return arith.cmpf(arith.CmpFPredicate.OGT, a, b)


def less(a: ir.Value, b: ir.Value) -> ir.Value:
    """Compares floats; False where one is NaN."""
    return arith.cmpf(arith.CmpFPredicate.OLT, a, b)


def no_larger(a: ir.Value, b: ir.Value) -> ir.Value:
    """Compares floats, a <= b; False where one is NaN."""
    return arith.cmpf(arith.CmpFPredicate.OLE, a, b)


def larger(a: ir.Value, b: ir.Value) -> ir.Value:
    """Returns the larger of two floats; the pattern of one max instruction, without its rules for NaN."""
    return arith.select(greater(a, b), a, b)


def folded(combine: Callable[[ir.Value, ir.Value], ir.Value], values: Sequence[ir.Value]) -> ir.Value:
    """Returns one value from several, combined from left to right."""
    return functools.reduce(combine, values)


def reduced(kind: str, value: ir.Value) -> ir.Value:
    """Returns one scalar from all lanes of a vector; ``kind`` as in ``vector.reduction``."""
    element = ir.VectorType(value.type).element_type
    return vector.reduction(element, ir.Attribute.parse(f"#vector.kind<{kind}>"), value)


def reduced_float(combine: Callable[[ir.Value, ir.Value], ir.Value], value: ir.Value) -> ir.Value:
    """Returns one float from all lanes, in halves; ``vector.reduction`` keeps order, lane by lane."""
    width = ir.VectorType(value.type).shape[0]
    while width > 1:
        width //= 2
        value = combine(
            vector.shuffle(value, value, list(range(width))),
            vector.shuffle(value, value, list(range(width, 2 * width))),
        )
    return vector.extract(value, [], [0])


def lane_numbers(lanes: int, first: int) -> ir.Value:
    """Returns the vector first, first + 1, ... of i32."""
    kind = ir.VectorType.get([lanes], i32_type())
    return arith.constant(kind, array.array("i", range(first, first + lanes)))


def shuffled_halves(a: ir.Value, b: ir.Value, stride: int) -> tuple[ir.Value, ir.Value]:
    """Returns a and b after one transposition step, which swaps blocks of ``stride`` lanes."""
    lanes = ir.VectorType(a.type).shape[0]
    low = [i if not i & stride else lanes + i - stride for i in range(lanes)]
    high = [i + stride if not i & stride else lanes + i for i in range(lanes)]
    return vector.shuffle(a, b, low), vector.shuffle(a, b, high)


def transposed(rows: Sequence[ir.Value]) -> list[ir.Value]:
    """Returns the columns of a square of vectors."""
    rows, stride = list(rows), len(rows) // 2
    while stride:
        for i in range(len(rows)):
            if not i & stride:
                rows[i], rows[i + stride] = shuffled_halves(rows[i], rows[i + stride], stride)
        stride //= 2
    return rows


def lane_sums(vectors: Callable[[int], ir.Value], lanes: int, width: int) -> ir.Value:
    """Returns a vector of ``lanes`` sums: lane i sums the ``width`` lanes of ``vectors(i)``.

    Pairs are added along a tree, walked depth first so that few vectors live at a time.
    """

    def tree(base: int, first: int, stride: int) -> ir.Value:
        if stride == width:
            return vectors(base + first)
        a, b = tree(base, first, stride * 2), tree(base, first + stride, stride * 2)
        return arith.addf(*shuffled_halves(a, b, stride))

    parts = [tree(base, 0, 1) for base in range(0, lanes, width)]
    while len(parts) > 1:  # heads narrower than a vector of keys: join the pieces
        both = list(range(2 * ir.VectorType(parts[0].type).shape[0]))
        parts = [vector.shuffle(a, b, both) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def has_fma(target: Target) -> bool:
    """Tells whether the target multiplies and adds in one instruction."""
    return target.arch == "aarch64" or bool(target.features & {"fma", "avx512f"})


def converts_halves(target: Target) -> bool:
    """Tells whether the target makes f16 f32 in one instruction; elsewhere each is a call that nothing resolves."""
    return target.arch == "aarch64" or bool(target.features & {"f16c", "avx2", "avx512f"})


def multiply_add(a: ir.Value, b: ir.Value, c: ir.Value, fused: bool) -> ir.Value:
    """Returns a * b + c of vectors; ``fused`` where the target has the instruction.

    A processor without it would call the C library once per lane.
    """
    return vector.fma(a, b, c) if fused else arith.addf(arith.mulf(a, b), c)


def exp2(x: ir.Value, fused: bool) -> ir.Value:
    """Returns 2**x for a vector of x <= 0; exactly 0 below about -126.5."""
    return _exp2_in_range(larger(x, splat(SMALLEST_EXPONENT, _lanes(x))), fused)


def exp(x: ir.Value, fused: bool) -> ir.Value:
    """Returns e**x of a vector; 0 for -inf, infinity from about 88.7, NaN for NaN; no denormal results."""
    lanes = _lanes(x)
    low, high = splat(SMALLEST_EXPONENT, lanes), splat(LARGEST_EXPONENT, lanes)
    x = arith.mulf(x, splat(math.log2(math.e), lanes))
    x = arith.select(less(x, low), low, x)
    return _exp2_in_range(arith.select(greater(x, high), high, x), fused)


def _lanes(value: ir.Value) -> int:
    lanes: int = ir.VectorType(value.type).shape[0]
    return lanes


def _exp2_in_range(x: ir.Value, fused: bool) -> ir.Value:
    lanes = _lanes(x)
    rounded = arith.addf(x, splat(ROUNDER, lanes))
    r = arith.subf(x, arith.subf(rounded, splat(ROUNDER, lanes)))
    power = splat(EXP2[0], lanes)
    for coefficient in EXP2[1:]:
        power = multiply_add(power, r, splat(coefficient, lanes), fused)
    bits = arith.bitcast(ir.VectorType.get([lanes], i32_type()), rounded)
    bits = arith.addi(arith.shli(bits, splat(23, lanes)), splat(0x3F800000, lanes))
    return arith.mulf(power, arith.bitcast(x.type, bits))


# Launches


def root_module() -> Any:
    """Returns the outermost module around the insertion point."""
    module = ir.InsertionPoint.current.block.owner
    while module.operation.parent is not None:
        module = module.operation.parent
    return module


def launch(
    callee: str,
    results: ir.Type | Sequence[ir.Type],
    grid: Sequence[ir.Value],
    inputs: Sequence[ir.Value],
    sizes: Sequence[ir.Value] = (),
    tied: int | Sequence[int] = -1,
) -> ir.Operation:
    """Emits the launch of a kernel; ``sizes`` are the dynamic sizes of the results in new memory, in order.

    ``tied`` is, for each result, the number of the input in whose memory it is written, -1 for new memory.
    """
    i64 = ir.IntegerType.get_signless(64)
    numbers = [tied] if isinstance(tied, int) else tied
    return ir.Operation.create(
        "spikingbrain_control.launch",
        results=[results] if isinstance(results, ir.Type) else list(results),
        operands=[*grid, *inputs, *sizes],
        attributes={
            "callee": ir.FlatSymbolRefAttr.get(callee),
            "tied": ir.ArrayAttr.get([ir.IntegerAttr.get(i64, number) for number in numbers]),
        },
    )
