"""Prints kernels of the ``gpu`` dialect as MACA C++, from the subset that ``docs/maca.md`` lists.

Every function is checked before it is printed: an op outside the subset is refused with its name and place, and so
is a barrier or shuffle that part of a wave could miss. Memrefs are contiguous; one becomes a pointer plus the
dynamic sizes that its index arithmetic needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from spikingbrain.backend_maca.kernels import WAVE, source_of
from spikingbrain.errors import UnsupportedOp
from torch_mlir import ir

MAX_THREADS = 1024
MAX_SHARED_BYTES = 64 << 10
INLINE_LENGTH = 60  # a value used once is written where it is used, up to this many characters

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
STORAGE_ONLY = {"f16": ("__half2float", "__float2half"), "bf16": ("__bfloat162float", "__float2bfloat16")}

FLOAT_OPS = {"arith.addf": "{0} + {1}", "arith.subf": "{0} - {1}", "arith.mulf": "{0} * {1}",
             "arith.divf": "{0} / {1}", "arith.negf": "-{0}"}  # fmt: skip
FLOAT_CALLS = {
    "arith.remf": "fmod", "arith.maxnumf": "fmax", "arith.minnumf": "fmin", "math.absf": "fabs", "math.ceil": "ceil",
    "math.copysign": "copysign", "math.cos": "cos", "math.erf": "erf", "math.exp": "exp", "math.exp2": "exp2",
    "math.expm1": "expm1", "math.floor": "floor", "math.fma": "fma", "math.log": "log", "math.log1p": "log1p",
    "math.log2": "log2", "math.powf": "pow", "math.round": "round", "math.roundeven": "rint", "math.sin": "sin",
    "math.sqrt": "sqrt", "math.tanh": "tanh", "math.trunc": "trunc",
}  # fmt: skip
# Signed overflow is undefined in C++ and wraps in MLIR, so these go through the unsigned type.
WRAPPING_OPS = {"arith.addi": "+", "arith.subi": "-", "arith.muli": "*", "arith.shli": "<<"}
SIGNED_OPS = {"arith.divsi": "{0} / {1}", "arith.remsi": "{0} % {1}", "arith.shrsi": "{0} >> {1}",
              "arith.maxsi": "{0} > {1} ? {0} : {1}", "arith.minsi": "{0} < {1} ? {0} : {1}"}  # fmt: skip
UNSIGNED_OPS = {"arith.divui": "/", "arith.remui": "%", "arith.shrui": ">>"}
BIT_OPS = {"arith.andi": ("&", "&&"), "arith.ori": ("|", "||"), "arith.xori": ("^", "!=")}
COMPARE_INTS = ["==", "!=", "<", "<=", ">", ">=", "u<", "u<=", "u>", "u>="]
COMPARE_FLOATS = ["false", "{0} == {1}", "{0} > {1}", "{0} >= {1}", "{0} < {1}", "{0} <= {1}",
                  "{0} < {1} || {0} > {1}", "{0} == {0} && {1} == {1}", "!({0} < {1} || {0} > {1})", "!({0} <= {1})",
                  "!({0} < {1})", "!({0} >= {1})", "!({0} > {1})", "{0} != {1}", "{0} != {0} || {1} != {1}",
                  "true"]  # fmt: skip
CONVERSIONS = ("arith.extsi", "arith.extui", "arith.trunci", "arith.extf", "arith.truncf", "arith.sitofp",
               "arith.uitofp", "arith.fptosi", "arith.index_cast")  # fmt: skip
STATEMENTS = ("arith.constant", "arith.cmpi", "arith.cmpf", "arith.select", "arith.maximumf", "arith.minimumf",
              "math.rsqrt", "memref.load", "memref.store", "memref.dim", "scf.for", "scf.if", "scf.yield",
              "gpu.block_id", "gpu.thread_id", "gpu.shuffle", "gpu.barrier", "gpu.return")  # fmt: skip
SUBSET = frozenset([*FLOAT_OPS, *FLOAT_CALLS, *WRAPPING_OPS, *SIGNED_OPS, *UNSIGNED_OPS, *BIT_OPS, *CONVERSIONS,
                    *STATEMENTS])  # fmt: skip
COLLECTIVES = ("gpu.shuffle", "gpu.barrier")
MOVES_VALUES = ("arith.select", "arith.constant", "arith.extf", "arith.truncf", "memref.load", "memref.store",
                "memref.dim", "scf.for", "scf.if", "scf.yield")  # fmt: skip

_EXTREME = """\
// Propagates NaN and orders zeros, as the model's {word} does.
static __device__ __forceinline__ float sb_{word}(float a, float b) {{
  if (a != a || b != b) return a + b;
  return a == b ? (signbit(a) ? {zeros}) : (a {sign} b ? a : b);
}}
"""
PRELUDE = {
    "<maca_fp16.h>": "#include <maca_fp16.h>\n",
    "<maca_bfloat16.h>": "#include <maca_bfloat16.h>\n",
    "SB_FULL_WAVE": "#define SB_FULL_WAVE 0xffffffffffffffffULL\n",
    "sb_maximum": _EXTREME.format(word="maximum", zeros="b : a", sign=">"),
    "sb_minimum": _EXTREME.format(word="minimum", zeros="a : b", sign="<"),
}


@dataclass
class Kernel:
    """One printed kernel.

    ``arguments`` says what each C++ parameter is: (argument of the function, None) for a pointer or scalar, and
    (argument, axis) for a size of a memref. ``written`` lists the memref arguments that are stored to.
    """

    name: str
    threads: int
    shared_bytes: int
    arguments: list[tuple[int, int | None]]
    written: set[int]
    parameters: str
    body: str
    needs: set[str]
    places: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        comment = "".join(f"// {place}\n" for place in self.places)
        head = f'extern "C" __global__ void __launch_bounds__({self.threads})\n{self.name}({self.parameters})'
        return f"{comment}{head} {{\n{self.body}}}\n"


def print_kernels(module: ir.Module) -> tuple[str, dict[str, Kernel]]:
    """Returns the MACA C++ of a module's kernels, and the kernel that serves each kernel function."""
    kernels: dict[str, Kernel] = {}
    unique: dict[tuple[str, int, str], Kernel] = {}
    for function in _kernel_functions(module):
        verify(function)
        kernel = _Printer(function).print()
        kernel = unique.setdefault((kernel.parameters, kernel.threads, kernel.body), kernel)
        where = source_of(function.location)
        label = f"{function.location.name_str}, " if isinstance(function.location, ir.NameLoc) else ""
        place = label + (f"at {where}" if not isinstance(where, str) else "place unknown")
        kernel.places += [place] if place not in kernel.places else []
        kernels[_name(function)] = kernel
    needs = {n for kernel in unique.values() for n in kernel.needs}
    head = "// Generated by SpikingBrain for MetaX GPUs (waves of 64 lanes). Compile with -ffp-contract=off.\n"
    head += "#include <mc_runtime.h>\n" + "".join(t for n, t in PRELUDE.items() if n in needs and n[0] == "<")
    head += "#include <stdint.h>\n"
    helpers = ["\n" + t for n, t in PRELUDE.items() if n in needs and n[0] != "<"]
    return head + "".join(helpers) + "".join(f"\n{k.text}" for k in unique.values()), kernels


def verify(function: ir.Operation) -> None:
    """Raises UnsupportedOp for the first op of a kernel that cannot be printed faithfully."""
    attributes = function.attributes
    size = list(attributes["known_block_size"]) if "known_block_size" in attributes else []
    threads = size[0] if len(size) == 3 and size[1:] == [1, 1] else 0
    if not 0 < threads <= MAX_THREADS:
        why = f"blocks must be one-dimensional with 1 to {MAX_THREADS} threads known at compile time, not {size}"
        raise UnsupportedOp(f"kernel '{_name(function)}' cannot be launched", where=source_of(function.location), why=why)

    def refuse(op: ir.Operation, why: str) -> None:
        hint = "docs/maca.md lists the subset; lower the op to it, or keep this part off the 'maca' target"
        raise UnsupportedOp(f"'{op.name}' has no form in MACA C++", where=source_of(op.location), why=why, hint=hint)

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name == function.name:
            return ir.WalkResult.ADVANCE
        if op.name not in SUBSET:
            refuse(op, "it is outside the printed subset")
        for value in [*op.operands, *op.results]:
            kind = value.type.element_type if isinstance(value.type, ir.MemRefType) else value.type
            if str(kind) not in TYPES:
                refuse(op, f"type {value.type} is not supported")
            if isinstance(value.type, ir.MemRefType) and not isinstance(value.type.layout, ir.AffineMapAttr):
                refuse(op, f"{value.type} is not contiguous")
            if str(kind) in STORAGE_ONLY and op.name not in MOVES_VALUES:
                refuse(op, f"{kind} is for storage; extend to f32 first")
        if op.name.startswith("math.") or op.name in ("arith.maximumf", "arith.minimumf"):
            kinds = ("f32",) if "imumf" in op.name else ("f32", "f64")
            if str(op.results[0].type) not in kinds:
                refuse(op, f"it works on {' or '.join(kinds)}, not {op.results[0].type}")
        if op.name == "gpu.shuffle":
            if "xor" not in str(op.attributes["mode"]) or _constant(op.operands[2]) != WAVE:
                refuse(op, f"shuffles are xor butterflies over {WAVE} lanes")
            if str(op.results[0].type) not in ("f32", "i32"):
                refuse(op, f"a lane shuffles 4 bytes, not {op.results[0].type}")
            if list(op.results[1].uses) or threads % WAVE:
                refuse(op, "whole waves are needed: blocks of a multiple of 64 threads, the validity unused")
        if op.name in COLLECTIVES and not _uniform_place(op, function):
            refuse(op, "part of a wave could miss it: it stands under a condition that depends on the thread")
        return ir.WalkResult.ADVANCE

    function.walk(visit)


def _kernel_functions(module: ir.Module) -> list[ir.Operation]:
    modules = [v.operation for v in module.body.operations if v.operation.name == "gpu.module"]
    inner = [v.operation for m in modules for v in m.regions[0].blocks[0].operations]
    return [op for op in inner if op.name == "gpu.func"]


def _name(function: ir.Operation) -> str:
    return str(ir.StringAttr(function.attributes["sym_name"]).value)


def _constant(value: ir.Value) -> int | float | None:
    op = value.owner
    if isinstance(op, ir.Block) or op.name != "arith.constant":
        return None
    number: int | float = op.attributes["value"].value
    return number


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
        return parent.name == "gpu.func"
    if owner.name in ("gpu.block_id", "memref.dim", "arith.constant"):
        return True
    return owner.name.startswith("arith.") and all(map(_uniform, owner.operands))


class _Printer:
    """Prints one kernel function."""

    def __init__(self, function: ir.Operation):
        self.function = function
        self.entry = function.regions[0].blocks[0]
        self.lines: list[str] = []
        self.depth = 1
        self.text: dict[ir.Value, str] = {}
        self.counts: dict[str, int] = {}
        self.sizes: dict[tuple[int, int], str] = {}
        self.needs: set[str] = set()
        self.number = {a: i for i, a in enumerate(self.entry.arguments)}
        self.inputs_count = len(ir.FunctionType(function.attributes["function_type"].value).inputs)
        self.stored = self._stored()

    def print(self) -> Kernel:
        arguments = list(self.entry.arguments)
        buffers, shared = arguments[: self.inputs_count], arguments[self.inputs_count :]
        for value in buffers:
            if not isinstance(value.type, ir.MemRefType):
                self._new(value, "n")
            else:
                self._new(value, "out" if self.number[value] in self.stored else "in")
        shared_bytes = sum(self._shared(value) for value in shared)
        self._block(self.entry)
        parameters: list[str] = []
        layout: list[tuple[int, int | None]] = []
        for value in buffers:
            number, name = self.number[value], self.text[value]
            layout.append((number, None))
            if isinstance(value.type, ir.MemRefType):
                const = "" if number in self.stored else "const "
                parameters.append(f"{const}{self._type(value.type.element_type)}* __restrict__ {name}")
            else:
                parameters.append(f"{self._type(value.type)} {name}")
            for (owner, axis), size in sorted(self.sizes.items()):
                if owner == number:
                    layout.append((number, axis))
                    parameters.append(f"int64_t {size}")
        threads = list(self.function.attributes["known_block_size"])[0]
        body = "".join(f"{line}\n" for line in self.lines)
        return Kernel(_name(self.function), threads, shared_bytes, layout, self.stored, ", ".join(parameters), body,
                      self.needs)  # fmt: skip

    def _stored(self) -> set[int]:
        found: set[int] = set()

        def visit(op: ir.Operation) -> ir.WalkResult:
            if op.name == "memref.store":
                found.add(self.number[op.operands[1]])
            return ir.WalkResult.ADVANCE

        self.function.walk(visit)
        return found

    def _shared(self, value: ir.Value) -> int:
        count = int(np.prod(value.type.shape))
        kind = str(value.type.element_type)
        total = count * TYPES[kind][1]
        if total > MAX_SHARED_BYTES:
            raise UnsupportedOp("a kernel needs too much shared memory", where=source_of(self.function.location),
                                why=f"{total} bytes asked for, {MAX_SHARED_BYTES} there")  # fmt: skip
        self._line(f"__shared__ {self._type(value.type.element_type)} {self._new(value, 'shared')}[{count}];")
        return total

    # Names and lines.

    def _line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text)

    def _new(self, value: ir.Value, prefix: str) -> str:
        number = self.counts[prefix] = self.counts.get(prefix, -1) + 1
        self.text[value] = f"{prefix}{number}"
        return self.text[value]

    def _type(self, kind: ir.Type) -> str:
        self.needs |= {"f16": {"<maca_fp16.h>"}, "bf16": {"<maca_bfloat16.h>"}}.get(str(kind), set())
        return TYPES[str(kind)][0]

    def _use(self, value: ir.Value) -> str:
        """Returns the text of a value as an operand: in parentheses unless it is one word or one call."""
        text = self.text[value]
        return text if re.fullmatch(r"\w+(\([^()]*\))?|\w[\w.+]*", text) else f"({text})"

    def _define(self, value: ir.Value, text: str, *, pure: bool = True) -> None:
        uses = list(value.uses)
        if not uses and pure:
            return
        if pure and len(uses) == 1 and uses[0].owner.operation.block == value.owner.operation.block:
            inside_region = uses[0].owner.operation.name in ("scf.for",)
            if len(text) <= INLINE_LENGTH and not inside_region:
                self.text[value] = text
                return
        kind = self._type(value.type)
        self._line(f"const {kind} {self._new(value, 'i' if str(value.type) == 'index' else 'v')} = {text};")

    # Statements.

    def _block(self, block: ir.Block) -> None:
        for view in block.operations:
            self._op(view.operation)

    def _op(self, op: ir.Operation) -> None:
        name = op.name
        special: dict[str, Callable[[ir.Operation], None]] = {
            "memref.load": lambda o: self._define(o.results[0], self._element(o.operands[0], o.operands[1:]), pure=False),
            "memref.store": self._store,
            "memref.dim": lambda o: self.text.__setitem__(o.results[0], self._size(o.operands[0], _constant(o.operands[1]))),
            "scf.for": self._for,
            "scf.if": self._if,
            "gpu.shuffle": self._shuffle,
            "gpu.block_id": self._id,
            "gpu.thread_id": self._id,
            "gpu.barrier": lambda _: self._line("__syncthreads();"),
            "arith.constant": lambda o: self.text.__setitem__(o.results[0], self._literal(o)),
        }
        if name in ("scf.yield", "gpu.return"):
            return
        if name in special:
            special[name](op)
        else:
            self._define(op.results[0], self._expression(op))

    def _element(self, buffer: ir.Value, at: list[ir.Value]) -> str:
        """Returns the access to one element of a row-major buffer."""
        index = ""
        for axis, value in enumerate(at):
            if not index or index == "0":
                index = self.text[value]
            else:
                index = index if re.fullmatch(r"\w+", index) or " " not in index else f"({index})"
                index = f"{index} * {self._size(buffer, axis)} + {self._use(value)}"
        return f"{self.text[buffer]}[{index or '0'}]"

    def _size(self, buffer: ir.Value, axis: int | float | None) -> str:
        axis = int(axis or 0)
        size = buffer.type.shape[axis]
        if size != ir.ShapedType.get_dynamic_size():
            return str(size)
        return self.sizes.setdefault((self.number[buffer], axis), f"{self.text[buffer]}_size{axis}")

    def _store(self, op: ir.Operation) -> None:
        value, buffer, *at = op.operands
        self._line(f"{self._element(buffer, at)} = {self.text[value]};")

    def _id(self, op: ir.Operation) -> None:
        word = op.name[4:-3]  # block or thread; widened at once, so that no product of ids overflows
        axis = re.sub(r".*([xyz])>?$", r"\1", str(op.attributes["dimension"]))
        self._line(f"const int64_t {self._new(op.results[0], word)} = {word}Idx.{axis};")

    def _shuffle(self, op: ir.Operation) -> None:
        self.needs.add("SB_FULL_WAVE")
        value, distance, _ = op.operands
        call = f"__shfl_xor_sync(SB_FULL_WAVE, {self.text[value]}, {self.text[distance]}, {WAVE})"
        self._define(op.results[0], call, pure=False)

    def _for(self, op: ir.Operation) -> None:
        low, high, step, *initial = op.operands
        body = op.regions[0].blocks[0]
        counter, *carried = body.arguments
        for value, start, result in zip(carried, initial, op.results, strict=True):
            name = self._new(value, "acc")
            self.text[result] = name
            self._line(f"{self._type(value.type)} {name} = {self.text[start]};")
        k = self._new(counter, "k")
        advance = f"++{k}" if self.text[step] == "1" else f"{k} += {self.text[step]}"
        kind = self._type(counter.type)
        self._line(f"for ({kind} {k} = {self.text[low]}; {k} < {self._use(high)}; {advance}) {{")
        self._region(body, [self.text[v] for v in carried])

    def _if(self, op: ir.Operation) -> None:
        names = [self._new(result, "v") for result in op.results]
        for name, result in zip(names, op.results, strict=True):
            self._line(f"{self._type(result.type)} {name};")
        self._line(f"if ({self.text[op.operands[0]]}) {{")
        then, *other = [region.blocks[0] for region in op.regions if len(region.blocks)]
        self._region(then, names, close="} else {" if other else "}")
        if other:
            self._region(other[0], names)

    def _region(self, block: ir.Block, targets: list[str], close: str = "}") -> None:
        """Prints a nested block; what it yields is assigned to ``targets``, all at once."""
        self.depth += 1
        self._block(block)
        *_, terminator = (v.operation for v in block.operations)
        values = [self.text[v] for v in terminator.operands]
        if len(targets) > 1:
            kinds = [self._type(v.type) for v in terminator.operands]
            fresh = [f"next_{target}" for target in targets]
            for kind, name, value in zip(kinds, fresh, values, strict=True):
                self._line(f"const {kind} {name} = {value};")
            values = fresh
        for target, value in zip(targets, values, strict=True):
            self._line(f"{target} = {value};")
        self.depth -= 1
        self._line(close)

    # Expressions.

    def _literal(self, op: ir.Operation) -> str:
        kind, value = str(op.results[0].type), op.attributes["value"].value
        if kind == "i1":
            return "true" if value else "false"
        if kind in ("index", "i32", "i16", "i8"):
            return str(value)
        if kind == "i64":
            return f"INT64_C({value})" if value > -(1 << 63) else "INT64_MIN"
        if np.isnan(value) or np.isinf(value):
            text = "NAN" if np.isnan(value) else "INFINITY" if value > 0 else "-INFINITY"
        else:
            text = str(value) if kind == "f64" else f"{np.float32(value)}f"
        return f"{STORAGE_ONLY[kind][1]}({text})" if kind in STORAGE_ONLY else text

    def _expression(self, op: ir.Operation) -> str:
        name, operands = op.name, [self._use(v) for v in op.operands]
        kind = str(op.operands[0].type) if len(op.operands) else ""
        if name in FLOAT_OPS:
            return FLOAT_OPS[name].format(*operands)
        if name in FLOAT_CALLS:
            return f"{FLOAT_CALLS[name]}{'f' if kind == 'f32' else ''}({', '.join(self.text[v] for v in op.operands)})"
        if name in WRAPPING_OPS:
            return self._wrapping(kind, f" {WRAPPING_OPS[name]} ".join(self._unsigned(kind, o) for o in operands))
        if name in SIGNED_OPS:
            return self._narrow(kind, SIGNED_OPS[name].format(*operands))
        if name in UNSIGNED_OPS:
            return self._wrapping(kind, f" {UNSIGNED_OPS[name]} ".join(self._unsigned(kind, o, force=True) for o in operands))
        if name in BIT_OPS:
            return self._narrow(kind, f" {BIT_OPS[name][kind == 'i1']} ".join(operands))
        if name == "arith.cmpi":
            sign = COMPARE_INTS[op.attributes["predicate"].value]
            force = sign[0] == "u"
            return f" {sign.lstrip('u')} ".join(self._unsigned(kind, o, force=True) if force else o for o in operands)
        if name == "arith.cmpf":
            return COMPARE_FLOATS[op.attributes["predicate"].value].format(*operands)
        if name == "arith.select":
            return "{0} ? {1} : {2}".format(*operands)
        if name in ("arith.maximumf", "arith.minimumf"):
            self.needs.add(f"sb_{name[6:-1]}")
            return f"sb_{name[6:-1]}({', '.join(self.text[v] for v in op.operands)})"
        if name == "math.rsqrt":
            return f"1.0f / sqrtf({self.text[op.operands[0]]})" if kind == "f32" else f"1.0 / sqrt({self.text[op.operands[0]]})"
        return self._conversion(name, kind, str(op.results[0].type), operands[0])

    def _unsigned(self, kind: str, operand: str, *, force: bool = False) -> str:
        plain = kind == "index" and not force
        return operand if plain else f"(u{TYPES[kind][0]}){operand}"

    def _wrapping(self, kind: str, text: str) -> str:
        return text if kind == "index" else f"({TYPES[kind][0]})({text})"

    def _narrow(self, kind: str, text: str) -> str:
        return f"({TYPES[kind][0]})({text})" if kind in ("i8", "i16") else text

    def _conversion(self, name: str, source: str, target: str, operand: str) -> str:
        if name == "arith.extf" and source in STORAGE_ONLY:
            text = f"{STORAGE_ONLY[source][0]}({operand})"
            return text if target == "f32" else f"(double){text}"
        if name == "arith.truncf" and target in STORAGE_ONLY:
            return f"{STORAGE_ONLY[target][1]}({operand if source == 'f32' else f'(float){operand}'})"
        if name == "arith.trunci" and target == "i1":
            return f"({operand} & 1) != 0"
        if source == "i1" and name in ("arith.extsi", "arith.sitofp", "arith.index_cast"):
            return f"({TYPES[target][0]})(-(int){operand})"
        if source == target or {source, target} == {"index", "i64"}:
            return operand
        unsigned = name in ("arith.extui", "arith.uitofp") and source != "i1"
        return f"({TYPES[target][0]}){self._unsigned(source, operand, force=True) if unsigned else operand}"
