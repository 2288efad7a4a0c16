"""The part of MLIR that has a form in MACA C++, and the check that a kernel stays inside it.

Besides ops and types, the rules of the machine are checked: f16 and bf16 are for storage only, no part of a block
may miss a barrier and no part of a wave a shuffle, vote or matrix builtin, and arrays of a thread stay in registers.
``docs/maca.md`` shows the subset to users.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, inf, prod
from typing import NoReturn

from torch_mlir import ir

from spikingbrain.backend_maca.lower.mlir import constant, is_shared, nested, place_of
from spikingbrain.backend_maca.source import vectors
from spikingbrain.backend_maca.source.types import STORAGE_ONLY, TYPES
from spikingbrain.backend_maca.source.uniform import is_reached_together
from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes.wave_kernels.builders import MAX_THREADS, WAVE

MAX_REGISTER_BYTES = 1024  # of one array of a thread: 256 registers
MAX_UNROLLED = 64  # rounds of a loop over a register array

FLOAT_OPS = {
    "arith.addf": "{0} + {1}",
    "arith.subf": "{0} - {1}",
    "arith.mulf": "{0} * {1}",
    "arith.divf": "{0} / {1}",
    "arith.negf": "-{0}",
}
_SAME_NAME = (
    "acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp2 expm1 floor fma"
    " log log10 log1p log2 round sin sinh sqrt tan tanh trunc"
)
FLOAT_CALLS = {f"math.{name}": name for name in _SAME_NAME.split()} | {
    "math.absf": "fabs",
    "math.powf": "pow",
    "math.roundeven": "rint",
    "arith.remf": "fmod",
    "arith.maxnumf": "fmax",
    "arith.minnumf": "fmin",
}
EXTREMES = {"arith.maximumf": "sb_maximum", "arith.minimumf": "sb_minimum"}
# Signed overflow is undefined in C++ and wraps in MLIR, so these go through the unsigned type.
WRAPPING_OPS = {"arith.addi": "+", "arith.subi": "-", "arith.muli": "*", "arith.shli": "<<"}
SIGNED_OPS = {
    "arith.divsi": "{0} / {1}",
    "arith.remsi": "{0} % {1}",
    "arith.shrsi": "{0} >> {1}",
}
UNSIGNED_OPS = {
    "arith.divui": "{0} / {1}",
    "arith.remui": "{0} % {1}",
    "arith.shrui": "{0} >> {1}",
}
LARGER_AND_SMALLER = {
    "arith.maxsi": "sb_larger",
    "arith.minsi": "sb_smaller",
    "arith.maxui": "sb_larger",
    "arith.minui": "sb_smaller",
}
BIT_OPS = {"arith.andi": ("&", "&&"), "arith.ori": ("|", "||"), "arith.xori": ("^", "!=")}  # integers, i1
# Arithmetic on i1, modulo 2; as a signed number true is -1.
ONE_BIT_OPS = {
    "arith.addi": "!=",
    "arith.subi": "!=",
    "arith.muli": "&&",
    "arith.maxui": "||",
    "arith.minui": "&&",
    "arith.maxsi": "&&",
    "arith.minsi": "||",
}
# By the number of the predicate; a leading u compares as unsigned.
COMPARE_INTS = ["==", "!=", "<", "<=", ">", ">=", "u<", "u<=", "u>", "u>="]
COMPARE_FLOATS = [
    "false",
    "{0} == {1}",
    "{0} > {1}",
    "{0} >= {1}",
    "{0} < {1}",
    "{0} <= {1}",
    "{0} < {1} || {0} > {1}",
    "{0} == {0} && {1} == {1}",
    "!({0} < {1} || {0} > {1})",
    "!({0} <= {1})",
    "!({0} < {1})",
    "!({0} >= {1})",
    "!({0} > {1})",
    "{0} != {1}",
    "{0} != {0} || {1} != {1}",
    "true",
]
CONVERSIONS = [
    f"arith.{n}"
    for n in [
        *("extsi", "extui", "trunci", "extf", "truncf", "sitofp", "uitofp", "fptosi", "fptoui"),
        *("index_cast", "index_castui", "bitcast"),
    ]
]
MOVES = [
    *("arith.constant", "arith.select", "ub.poison"),
    *("memref.load", "memref.store", "memref.dim", "memref.alloca"),
    *("scf.for", "scf.if", "scf.while", "scf.condition", "scf.yield"),
]
VECTOR_OPS = [
    f"vector.{n}"
    for n in ["load", "store", "extract", "insert", "from_elements", "to_elements", "broadcast", "bitcast"]
]
# Matrix builtins of a wave -> (types of the operands, type of the result); facts of the machine, not ours to choose.
MATRIX_BUILTINS = {
    "__builtin_mxc_mma_16x16x16i8": (["i32", "i32", "vector<4xi32>"], "vector<4xi32>"),
    "__builtin_mxc_mma_16x16x16f16": (["vector<4xf16>", "vector<4xf16>", "vector<4xf32>"], "vector<4xf32>"),
    "__builtin_mxc_mma_16x16x16bf16": (
        ["vector<4xbf16>", "vector<4xbf16>", "vector<4xf32>"],
        "vector<4xf32>",
    ),
    "__builtin_mxc_mma_16x16x4f32": (["f32", "f32", "vector<4xf32>"], "vector<4xf32>"),
}
WAVE_COLLECTIVES = ["gpu.shuffle", "gpu.ballot", "func.call"]
COLLECTIVES = [*WAVE_COLLECTIVES, "gpu.barrier"]
OTHERS = [
    *("arith.cmpi", "arith.cmpf", "math.rsqrt", "math.ctpop"),
    *("gpu.block_id", "gpu.grid_dim", "gpu.thread_id", "gpu.return", "cf.assert"),
]
_INTEGER_TABLES = (WRAPPING_OPS, SIGNED_OPS, UNSIGNED_OPS, LARGER_AND_SMALLER)
_TABLES = (FLOAT_OPS, FLOAT_CALLS, EXTREMES, *_INTEGER_TABLES, BIT_OPS)
SUBSET = frozenset([*CONVERSIONS, *MOVES, *VECTOR_OPS, *COLLECTIVES, *OTHERS]).union(*_TABLES)


def verify(function: ir.Operation) -> None:
    """Raises UnsupportedOp for the first op of a kernel that cannot be printed faithfully."""
    attributes = function.attributes
    size = list(attributes["known_block_size"]) if "known_block_size" in attributes else []
    if len(size) != 3 or size[1:] != [1, 1] or not 0 < size[0] <= MAX_THREADS:
        why = f"blocks are one-dimensional, with 1 to {MAX_THREADS} threads known at compile time, not {size}"
        what = f"kernel {attributes['sym_name']} cannot be launched"
        raise UnsupportedOp(what, where=place_of(function), why=why)
    for op in nested(function):
        if op.name not in SUBSET:
            _refuse(op, "it is outside the printed subset")
        _verify_types(op)
        if op.name in RULES:
            RULES[op.name](op)
        if op.name in COLLECTIVES:
            _verify_collective(op, function, threads=size[0])


def _refuse(op: ir.Operation, why: str) -> NoReturn:
    what = f"'{op.name}' has no form in MACA C++"
    hint = "docs/maca.md lists the subset; lower the op to it, or keep this part off the 'maca' target"
    raise UnsupportedOp(what, where=place_of(op), why=why, hint=hint)


def _verify_types(op: ir.Operation) -> None:
    for value in [*op.operands, *op.results]:
        kind = value.type.element_type if isinstance(value.type, ir.MemRefType) else value.type
        if isinstance(kind, ir.VectorType):
            _verify_vector(op, kind)
            continue
        if str(kind) not in TYPES:
            _refuse(op, f"type {value.type} is not supported")
        if isinstance(value.type, ir.MemRefType) and not isinstance(value.type.layout, ir.AffineMapAttr):
            _refuse(op, f"{value.type} is not contiguous")
        stores = [*MOVES, *VECTOR_OPS, "arith.extf", "arith.truncf", "arith.bitcast"]
        if str(kind) in STORAGE_ONLY and op.name not in stores:
            _refuse(op, f"{kind} is for storage; extend to f32 first")
    first = str(op.operands[0].type) if len(op.operands) else ""
    functions = op.name in FLOAT_CALLS or op.name in EXTREMES or op.name == "math.rsqrt"
    if functions and first not in ("f32", "f64"):
        _refuse(op, f"it works on f32 or f64, not {first}")
    if first == "i1" and op.name not in ONE_BIT_OPS and any(op.name in table for table in _INTEGER_TABLES):
        _refuse(op, "one bit is not divided or shifted")


def _verify_vector(op: ir.Operation, kind: ir.VectorType) -> None:
    if op.name not in [*MOVES, *VECTOR_OPS, "func.call"]:
        _refuse(op, "vectors have no arithmetic; take their elements")
    if why := vectors.refusal(kind):
        _refuse(op, why)


def _verify_position(op: ir.Operation) -> None:
    position = list(op.attributes["static_position"])
    if len(position) != 1 or position[0] < 0:
        _refuse(op, "the element of a vector is known at compile time")


def _verify_broadcast(op: ir.Operation) -> None:
    if isinstance(op.operands[0].type, ir.VectorType):
        _refuse(op, "only a single value is spread over a vector")


def _verify_choice(op: ir.Operation) -> None:
    if isinstance(op.operands[0].type, ir.VectorType):
        _refuse(op, "vectors have no arithmetic; take their elements")


def _verify_count(op: ir.Operation) -> None:
    if str(op.operands[0].type) not in ("i32", "i64"):
        _refuse(op, f"bits are counted in i32 and i64, not {op.operands[0].type}")


def _verify_array(op: ir.Operation) -> None:
    """Verifies a ``memref.alloca``: shared memory, or an array that the compiler can keep in a thread's registers."""
    buffer = op.results[0]
    if len(op.operands):
        _refuse(op, "its size is not known at compile time")
    if is_shared(buffer):
        return
    if buffer.type.memory_space is not None:
        _refuse(
            op, f"memory is shared ('#gpu.address_space<workgroup>') or the thread's own, not {buffer.type}"
        )
    size = register_bytes(buffer)
    if size > MAX_REGISTER_BYTES:
        _refuse(
            op, f"{size} bytes are more than the {MAX_REGISTER_BYTES} that an array of one thread may have"
        )
    for use in buffer.uses:
        user = use.owner.operation
        loads, stores = (
            user.name in ("memref.load", "vector.load"),
            user.name in ("memref.store", "vector.store"),
        )
        if not loads and not stores:
            _refuse(op, f"an array of one thread is only loaded and stored, not used by '{user.name}'")
        if not all(known_when_unrolled(v) for v in list(user.operands)[1 if loads else 2 :]):
            _refuse(
                user, "it indexes an array of one thread by a value that unrolling loops does not make known"
            )


def register_bytes(buffer: ir.Value) -> int:
    """Returns the size of an array."""
    return int(prod(buffer.type.shape)) * TYPES[str(buffer.type.element_type)][1]


def known_when_unrolled(value: ir.Value) -> bool:
    """Tells whether a value is a constant once the loops of known length around it are unrolled."""
    owner = value.owner
    if isinstance(owner, ir.Block):
        loop = owner.owner.operation
        return bool(loop.name == "scf.for" and value == owner.arguments[0] and rounds(loop) <= MAX_UNROLLED)
    arithmetic = str(owner.name).startswith("arith.") and all(map(known_when_unrolled, owner.operands))
    return owner.name == "arith.constant" or arithmetic


def rounds(loop: ir.Operation) -> float:
    """Returns how often an ``scf.for`` runs; infinity where that is not known at compile time."""
    low, high, step = (constant(v) for v in list(loop.operands)[:3])
    return inf if low is None or high is None or not step else max(0, ceil((high - low) / step))


def _verify_collective(op: ir.Operation, function: ir.Operation, threads: int) -> None:
    wave = op.name in WAVE_COLLECTIVES
    if wave and threads % WAVE:
        _refuse(op, f"whole waves are needed: blocks of a multiple of {WAVE} threads")
    if not is_reached_together(op, function, wave=wave):
        part = "wave" if wave else "block"
        _refuse(op, f"part of a {part} could miss it: it stands under a condition that depends on the thread")


def _verify_shuffle(op: ir.Operation) -> None:
    if "xor" not in str(op.attributes["mode"]) or constant(op.operands[2]) != WAVE:
        _refuse(op, f"shuffles are xor butterflies over {WAVE} lanes")
    if str(op.results[0].type) not in ("f32", "i32"):
        _refuse(op, f"a lane shuffles 4 bytes, not {op.results[0].type}")
    if list(op.results[1].uses):
        _refuse(op, "the lane that is read is always there: do not use the second result")


def _verify_ballot(op: ir.Operation) -> None:
    if str(op.results[0].type) != "i64":
        _refuse(op, f"a vote of {WAVE} lanes is an i64, not {op.results[0].type}")


def _verify_call(op: ir.Operation) -> None:
    name = ir.FlatSymbolRefAttr(op.attributes["callee"]).value
    if name not in MATRIX_BUILTINS:
        _refuse(op, f"'{name}' is none of the matrix builtins {', '.join(MATRIX_BUILTINS)}")
    wanted, result = MATRIX_BUILTINS[name]
    if [str(v.type) for v in op.operands] != wanted or [str(v.type) for v in op.results] != [result]:
        _refuse(op, f"'{name}' takes ({', '.join(wanted)}) and returns {result}")


RULES: dict[str, Callable[[ir.Operation], None]] = {
    "memref.alloca": _verify_array,
    "vector.extract": _verify_position,
    "vector.insert": _verify_position,
    "vector.broadcast": _verify_broadcast,
    "arith.select": _verify_choice,
    "math.ctpop": _verify_count,
    "gpu.shuffle": _verify_shuffle,
    "gpu.ballot": _verify_ballot,
    "func.call": _verify_call,
}
