"""Small words for building wave kernels; each emits at the insertion point. Index arithmetic and loops: ``kernels.builders``.

A wave kernel is a private function of the module that ``spikingbrain_control.launch`` calls as it calls a CPU kernel:
three block ids, then memrefs. Its attribute ``spikingbrain.threads`` is the number of threads of a block. Barriers and shuffles
stand where all threads of the block, or of the wave, come by: no thread returns early, values are predicated instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, func, gpu, math, memref, scf, vector

from spikingbrain.passes.kernels.builders import (
    Index,
    compare,
    f32,
    folded,
    i32,
    i32_type,
    index,
    less,
    root_module,
)

WAVE = 64  # lanes of a wave
TILE = 16  # rows and columns of what a matrix instruction works on
SHARED_BYTES = 36 << 10  # static shared memory that a kernel may ask for
MAX_THREADS = 1024
THREADS = "spikingbrain.threads"

# Matrix instructions by type of what is multiplied: name, k of one instruction, type of the sums.
MATRIX_INSTRUCTIONS = {
    "f32": ("__builtin_mxc_mma_16x16x4f32", 4, "f32"),
    "f16": ("__builtin_mxc_mma_16x16x16f16", 16, "f32"),
    "bf16": ("__builtin_mxc_mma_16x16x16bf16", 16, "f32"),
    "i8": ("__builtin_mxc_mma_16x16x16i8", 16, "i32"),
}


def kernel(
    name: str,
    memrefs: Sequence[ir.Type],
    threads: int,
    body: Callable[[list[ir.Value], list[ir.Value]], None],
) -> None:
    """Adds a kernel to the module around the insertion point, unless it has one of that name.

    ``body(block, buffers)`` fills it, given the three block ids and the memrefs. ``threads`` is a multiple of 64.
    """
    module = root_module()
    if name in ir.SymbolTable(module.operation):
        return
    with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]):
        types = [ir.IndexType.get()] * 3 + list(memrefs)
        function = func.FuncOp(name, (types, []), visibility="private")
        set_threads(function, threads)
        entry = function.add_entry_block()
    with ir.InsertionPoint(entry):
        arguments = list(entry.arguments)
        body(arguments[:3], arguments[3:])
        func.ReturnOp([])


def set_threads(function: func.FuncOp, threads: int) -> None:
    """Makes a function a wave kernel of blocks of so many threads."""
    if threads % WAVE or not 0 < threads <= MAX_THREADS:
        raise ValueError(f"a block has whole waves of {WAVE}, {MAX_THREADS} threads at most, not {threads}")
    function.attributes[THREADS] = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), threads)


def memref_of(tensor_type: ir.Type) -> ir.MemRefType:
    """Returns the memref of a kernel's argument for a tensor."""
    ranked = ir.RankedTensorType(tensor_type)
    return ir.MemRefType.get(ranked.shape, ranked.element_type)


# Threads


def thread() -> ir.Value:
    """Returns the thread's number in its block."""
    return gpu.thread_id(gpu.Dimension.x)


def barrier() -> None:
    """Waits for all threads of the block; what they wrote to shared and device memory is seen behind it."""
    gpu.BarrierOp()


def from_lane_xor(value: ir.Value, distance: int) -> ir.Value:
    """Returns the value of the lane whose number differs in the bits of ``distance``; f32 or i32."""
    op = gpu.ShuffleOp(value, i32(distance), i32(WAVE), ir.Attribute.parse("#gpu<shuffle_mode xor>"))
    return op.results[0]


def over_lanes(
    combine: Callable[[ir.Value, ir.Value], ir.Value], value: ir.Value, lanes: int = WAVE, stride: int = 1
) -> ir.Value:
    """Returns, in every lane, the values of ``lanes`` lanes combined, which are ``stride`` apart; powers of two."""
    distance = lanes * stride // 2
    while distance >= stride:
        value = combine(value, from_lane_xor(value, distance))
        distance //= 2
    return value


def votes(condition: ir.Value) -> ir.Value:
    """Returns the lanes of the wave in which a condition holds, as bits of an i64; the same for all of them."""
    return gpu.BallotOp(ir.IntegerType.get_signless(64), condition).result


def any_lane(condition: ir.Value) -> ir.Value:
    """Returns whether a condition holds in some lane of the wave; the same for all of them."""
    found = votes(condition)
    return compare("ne", found, arith.constant(found.type, 0))


def any_infinite(values: Sequence[ir.Value]) -> ir.Value:
    """Returns whether some lane of the wave has an infinity or NaN among its f32; the same for all of them."""
    finite = [less(math.absf(value), f32(float("inf"))) for value in values]
    return any_lane(arith.xori(folded(arith.andi, finite), arith.constant(ir.IntegerType.get_signless(1), 1)))


# Memory


def shared(shape: Sequence[int], element: ir.Type) -> ir.Value:
    """Returns memory that the threads of a block share; what is in it at first is not known."""
    space = ir.Attribute.parse("#gpu.address_space<workgroup>")
    return memref.alloca(ir.MemRefType.get(shape, element, memory_space=space), [], [])


def registers(count: int, element: ir.Type) -> ir.Value:
    """Returns a few elements of the thread's own; indices are constants, so that they stay in registers."""
    return memref.alloca(ir.MemRefType.get([count], element), [], [])


# Values


def choose(
    condition: ir.Value, body: Callable[[], Sequence[ir.Value]], otherwise: Sequence[ir.Value]
) -> list[ir.Value]:
    """Returns the results of ``body``, which only runs where the condition holds, else ``otherwise``."""
    branch = scf.IfOp(condition, [v.type for v in otherwise], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.YieldOp(list(body()))
    with ir.InsertionPoint(branch.else_block):
        scf.YieldOp(list(otherwise))
    return list(branch.results)


def zero(element: ir.Type) -> ir.Value:
    """Returns 0 of a type of numbers."""
    floating = isinstance(element, ir.FloatType)
    return arith.constant(element, 0.0 if floating else 0)


# Matrix instructions


def matrix_zero(kind: str = "f32") -> ir.Value:
    """Returns a lane's part of a tile of sums, all 0."""
    sums = i32(0) if MATRIX_INSTRUCTIONS[kind][2] == "i32" else f32(0.0)
    return vector.broadcast(ir.VectorType.get([4], sums.type), sums)


def matrix_multiply(kind: str, x: ir.Value, y: ir.Value, sums: ir.Value) -> ir.Value:
    """Returns ``sums[i][j] + sum_k x[i][k] * y[j][k]`` of 16 x 16 tiles; all lanes of the wave come by.

    Lane l holds ``x[l % 16]`` and ``y[l % 16]`` at the k/4 columns from ``(l // 16) * k/4`` on: one f32, a vector of four
    halves, or four i8 in an i32. Of the sums it holds rows ``4 * (l // 16) + 0..3`` in column ``l % 16``.
    """
    name, _, _ = MATRIX_INSTRUCTIONS[kind]
    module = root_module()
    if name not in ir.SymbolTable(module.operation):
        with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]):
            func.FuncOp(name, ([x.type, y.type, sums.type], [sums.type]), visibility="private")
    return func.CallOp([sums.type], name, [x, y, sums]).results[0]


def element_at(value: ir.Value, position: int) -> ir.Value:
    """Returns one element of a vector."""
    return vector.extract(value, [], [position])


def as_i32(value: Index) -> ir.Value:
    """Returns an index as an i32."""
    return arith.index_cast(i32_type(), index(value))
