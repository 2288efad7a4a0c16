"""The part of MLIR that has a form in MACA C++, and the check that a kernel stays inside it.

Besides ops and types, two rules of the machine are checked: f16 and bf16 are for storage only, and no part
of a wave may miss a barrier or a shuffle. ``docs/maca.md`` shows the subset to users.
"""

from __future__ import annotations

from typing import NoReturn

from torch_mlir import ir

from spikingbrain.backend_maca.generic import WAVE
from spikingbrain.backend_maca.mlir import nested, place_of
from spikingbrain.errors import UnsupportedOp

MAX_THREADS = 1024

# MLIR element type -> (C++ type, bytes).
TYPES = {
    "index": ("int64_t", 8),
    "i64": ("int64_t", 8),
    "i32": ("int32_t", 4),
    "i16": ("int16_t", 2),
    "i8": ("int8_t", 1),
    "i1": ("bool", 1),
    "f64": ("double", 8),
    "f32": ("float", 4),
    "f16": ("half", 2),
    "bf16": ("maca_bfloat16", 2),
}
# Storage type -> (to float, from float with rounding to nearest even).
STORAGE_ONLY = {"f16": ("__half2float", "__float2half"), "bf16": ("__bfloat162float", "__float2bfloat16")}

FLOAT_OPS = {
    "arith.addf": "{0} + {1}",
    "arith.subf": "{0} - {1}",
    "arith.mulf": "{0} * {1}",
    "arith.divf": "{0} / {1}",
    "arith.negf": "-{0}",
}
_SAME_NAME = "ceil copysign cos erf exp exp2 expm1 floor fma log log1p log2 round sin sqrt tanh trunc"
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
    "arith.maxsi": "{0} > {1} ? {0} : {1}",
    "arith.minsi": "{0} < {1} ? {0} : {1}",
}
UNSIGNED_OPS = {"arith.divui": "/", "arith.remui": "%", "arith.shrui": ">>"}
BIT_OPS = {"arith.andi": ("&", "&&"), "arith.ori": ("|", "||"), "arith.xori": ("^", "!=")}  # integers, i1
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
    for n in ["extsi", "extui", "trunci", "extf", "truncf", "sitofp", "uitofp", "fptosi", "index_cast"]
]
MOVES = [
    "arith.constant",
    "arith.select",
    "memref.load",
    "memref.store",
    "memref.dim",
    "scf.for",
    "scf.if",
    "scf.yield",
]
COLLECTIVES = ["gpu.shuffle", "gpu.barrier"]
OTHERS = [
    "arith.cmpi",
    "arith.cmpf",
    "math.rsqrt",
    "gpu.block_id",
    "gpu.thread_id",
    "gpu.return",
    "cf.assert",
]
_TABLES = (FLOAT_OPS, FLOAT_CALLS, EXTREMES, WRAPPING_OPS, SIGNED_OPS, UNSIGNED_OPS, BIT_OPS)
SUBSET = frozenset([*CONVERSIONS, *MOVES, *COLLECTIVES, *OTHERS]).union(*_TABLES)


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
        if op.name == "gpu.shuffle":
            _verify_shuffle(op, threads=size[0])
        if op.name in COLLECTIVES and not _uniform_place(op, function):
            _refuse(
                op, "part of a wave could miss it: it stands under a condition that depends on the thread"
            )


def constant(value: ir.Value) -> int | float | None:
    """Returns the number that a value surely is, or None."""
    op = value.owner
    if isinstance(op, ir.Block) or op.name != "arith.constant":
        return None
    number: int | float = op.attributes["value"].value
    return number


def _refuse(op: ir.Operation, why: str) -> NoReturn:
    what = f"'{op.name}' has no form in MACA C++"
    hint = "docs/maca.md lists the subset; lower the op to it, or keep this part off the 'maca' target"
    raise UnsupportedOp(what, where=place_of(op), why=why, hint=hint)


def _verify_types(op: ir.Operation) -> None:
    for value in [*op.operands, *op.results]:
        kind = value.type.element_type if isinstance(value.type, ir.MemRefType) else value.type
        if str(kind) not in TYPES:
            _refuse(op, f"type {value.type} is not supported")
        if isinstance(value.type, ir.MemRefType) and not isinstance(value.type.layout, ir.AffineMapAttr):
            _refuse(op, f"{value.type} is not contiguous")
        if str(kind) in STORAGE_ONLY and op.name not in [*MOVES, "arith.extf", "arith.truncf"]:
            _refuse(op, f"{kind} is for storage; extend to f32 first")
    first = str(op.operands[0].type) if len(op.operands) else ""
    allowed = {"f32", "f64"} if op.name in FLOAT_CALLS or op.name == "math.rsqrt" else {"f32"}
    if (op.name in FLOAT_CALLS or op.name in EXTREMES or op.name == "math.rsqrt") and first not in allowed:
        _refuse(op, f"it works on {' or '.join(sorted(allowed))}, not {first}")
    orders = op.name == "arith.cmpi" and op.attributes["predicate"].value > 1
    if first == "i1" and (orders or op.name in {*WRAPPING_OPS, *SIGNED_OPS, *UNSIGNED_OPS}):
        _refuse(op, "i1 has no arithmetic and no order")


def _verify_shuffle(op: ir.Operation, threads: int) -> None:
    if "xor" not in str(op.attributes["mode"]) or constant(op.operands[2]) != WAVE:
        _refuse(op, f"shuffles are xor butterflies over {WAVE} lanes")
    if str(op.results[0].type) not in ("f32", "i32"):
        _refuse(op, f"a lane shuffles 4 bytes, not {op.results[0].type}")
    if list(op.results[1].uses) or threads % WAVE:
        _refuse(op, f"whole waves are needed: blocks of a multiple of {WAVE} threads, the validity unused")


def _uniform_place(op: ir.Operation, function: ir.Operation) -> bool:
    """Returns whether all threads of a block reach an op together."""
    parent = op.operation.parent
    while parent.operation != function:
        bounds = list(parent.operation.operands)[: 1 if parent.operation.name == "scf.if" else 3]
        if not all(map(_uniform, bounds)):
            return False
        parent = parent.operation.parent
    return True


def _uniform(value: ir.Value) -> bool:
    """Returns whether a value is surely the same in all threads of a block."""
    owner = value.owner
    if isinstance(owner, ir.Block):
        parent = owner.owner.operation
        if parent.name == "scf.for":  # the induction variable; carried values may differ between threads
            return value == owner.arguments[0] and all(map(_uniform, list(parent.operands)[:3]))
        return str(parent.name) == "gpu.func"
    if owner.name in ("gpu.block_id", "memref.dim", "arith.constant"):
        return True
    return str(owner.name).startswith("arith.") and all(map(_uniform, owner.operands))
