"""Prints kernels of the ``gpu`` dialect as MACA C++.

Memrefs are contiguous; one becomes a pointer plus the dynamic sizes that its index arithmetic needs. A value
that is used once is written where it is used; loads, vectors and long expressions get a name. Kernels that come
out alike are printed once, with every place that asked for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch_mlir import ir

from spikingbrain.backend_maca.lower.mlir import constant, is_shared, nested, source_of, sources_of
from spikingbrain.backend_maca.source import vectors
from spikingbrain.backend_maca.source.butterflies import Butterfly, butterflies
from spikingbrain.backend_maca.source.expressions import PRODUCT, SUM, WORD, Expressions
from spikingbrain.backend_maca.source.subset import MAX_UNROLLED, WAVE_COLLECTIVES, rounds, verify
from spikingbrain.backend_maca.source.types import TYPES
from spikingbrain.backend_maca.source.uniform import STORES
from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes.wave_kernels.builders import MAX_THREADS, SHARED_BYTES, WAVE

MAX_SHARED_BYTES = 64 << 10
SHARED_ALIGNMENT = 16
MAX_PARAMETERS = 512  # 4 KiB of addresses and sizes
MAX_PLACES = 8  # lines of the model that a kernel's comment lists
MAX_LINE = 100  # of a list of parameters; a longer one has a line for each
INLINE_LENGTH = 60  # a value used once is written where it is used, up to this many characters

_EXTREME = """\
// Propagates NaN and orders zeros, as the model's {word} does.
template <class T>
static __device__ __forceinline__ T sb_{word}(T a, T b) {{
  if (a != a || b != b) return a + b;
  return a == b ? (signbit(a) ? {zeros}) : (a {sign} b ? a : b);
}}
"""
_COMPARED = """\
template <class T>
static __device__ __forceinline__ T sb_{word}(T a, T b) {{
  return a {sign} b ? a : b;
}}
"""
PRELUDE = {
    "<maca_fp16.h>": "#include <maca_fp16.h>\n",
    "<maca_bfloat16.h>": "#include <maca_bfloat16.h>\n",
    "SB_FULL_WAVE": "#define SB_FULL_WAVE 0xffffffffffffffffULL\n",
    "SB_CHECK": "#ifndef SB_CHECK  // for the emulator\n#define SB_CHECK(condition, message)\n#endif\n",
    "sb_maximum": _EXTREME.format(word="maximum", zeros="b : a", sign=">"),
    "sb_minimum": _EXTREME.format(word="minimum", zeros="a : b", sign="<"),
    "sb_larger": _COMPARED.format(word="larger", sign=">"),
    "sb_smaller": _COMPARED.format(word="smaller", sign="<"),
    "SB_DYNAMIC_SHARED": """\
#ifndef SB_DYNAMIC_SHARED  // shared memory whose size the launch tells
#define SB_DYNAMIC_SHARED(type, name) extern __shared__ __attribute__((aligned(16))) type name[]
#endif
""",
    "SB_SIXTEEN_WAVES": """\
#ifndef SB_SIXTEEN_WAVES  // where a wave is two warps, the last of 16 needs a barrier beyond those of the hardware
#define SB_SIXTEEN_WAVES()
#endif
""",
    **vectors.HELPERS,
}


@dataclass
class Kernel:
    """One printed kernel.

    ``arguments`` says what each C++ parameter is: (argument of the function, None) for a pointer or scalar,
    and (argument, axis) for a size of a memref. ``written`` lists the memref arguments that are stored to.
    ``dynamic_bytes`` of shared memory are asked for at the launch, beside the ``shared_bytes`` that are part of it.
    """

    name: str
    threads: int
    shared_bytes: int
    dynamic_bytes: int
    arguments: list[tuple[int, int | None]]
    written: set[int]
    parameters: str
    body: str
    needs: set[str]
    places: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        more = [f"and {len(self.places) - MAX_PLACES} more"] if len(self.places) > MAX_PLACES else []
        comment = "".join(f"// {place}\n" for place in [*self.places[:MAX_PLACES], *more])
        parameters = self.parameters
        if len(parameters) > MAX_LINE:
            parameters = "\n    " + parameters.replace(", ", ",\n    ")
        head = f'extern "C" __global__ void __launch_bounds__({self.threads})\n{self.name}({parameters})'
        return f"{comment}{head} {{\n{self.body}}}\n"


def print_kernels(module: ir.Module) -> tuple[str, dict[str, Kernel]]:
    """Returns the MACA C++ of a module's kernels, and the kernel that serves each kernel function."""
    kernels: dict[str, Kernel] = {}
    unique: dict[tuple[Any, ...], Kernel] = {}
    for function in _kernel_functions(module):
        verify(function)
        kernel = _Printer(function).print()
        key = (kernel.parameters, kernel.threads, kernel.body, *kernel.arguments)
        kernel = unique.setdefault(key, kernel)
        known = isinstance(function.location, ir.NameLoc)
        label = function.location.name_str if known else re.sub(r"_\d+$", "", kernel.name)
        for source in sources_of(function.location):
            place = f"{label}, at {source}"
            kernel.places += [place] if place not in kernel.places else []
        kernels[_name(function)] = kernel
    needs = {n for kernel in unique.values() for n in kernel.needs}
    needs |= {n for need in needs for n in vectors.NEEDS.get(need, ())}
    typedefs = "".join(sorted(n for n in needs if n.startswith("typedef")))
    head = "// Generated by SpikingBrain for MetaX GPUs, waves of 64 lanes. Compile with -ffp-contract=off.\n"
    head += "#include <mc_runtime.h>\n" + "".join(t for n, t in PRELUDE.items() if n in needs and n[0] == "<")
    head += "#include <stdint.h>\n" + (f"\n{typedefs}" if typedefs else "")
    helpers = ["\n" + t for n, t in PRELUDE.items() if n in needs and n[0] != "<"]
    return head + "".join(helpers) + "".join(f"\n{k.text}" for k in unique.values()), kernels


def _kernel_functions(module: ir.Module) -> list[ir.Operation]:
    modules = [v.operation for v in module.body.operations if v.operation.name == "gpu.module"]
    inner = [v.operation for m in modules for v in m.regions[0].blocks[0].operations]
    return [op for op in inner if op.name == "gpu.func"]


def _name(function: ir.Operation) -> str:
    return str(ir.StringAttr(function.attributes["sym_name"]).value)


class _Printer(Expressions):
    """Prints one kernel function."""

    def __init__(self, function: ir.Operation):
        super().__init__()
        self.function = function
        self.entry = function.regions[0].blocks[0]
        self.lines: list[str] = []
        self.depth = 1
        self.counts: dict[str, int] = {}
        self.sizes: dict[tuple[int, int], str] = {}
        self.number = {a: i for i, a in enumerate(self.entry.arguments)}
        self.inputs_count = len(ir.FunctionType(function.attributes["function_type"].value).inputs)
        self.stored = self._stored()
        self.unrolled = _indices_of_registers(function)
        self.static_bytes = self.dynamic_bytes = 0
        self.following: ir.Operation | None = None  # the op behind the one that is printed
        self.butterflies = {b.last[1].results[0]: b for b in butterflies(function)}
        steps = [step for b in self.butterflies.values() for pair in b.steps for step in pair]
        self.within = {
            step.results[0] for step in steps
        } - self.butterflies.keys()  # printed with the last step

    def print(self) -> Kernel:
        arguments = list(self.entry.arguments)
        buffers, shared = arguments[: self.inputs_count], arguments[self.inputs_count :]
        for value in buffers:
            if not isinstance(value.type, ir.MemRefType):
                self._new(value, "n")
            else:
                self._new(value, "out" if self.number[value] in self.stored else "in")
        shared += [
            op.results[0] for op in nested(self.function) if op.name == "memref.alloca" and _is_shared(op)
        ]
        for value in shared:
            self._shared(value)
        threads = next(iter(self.function.attributes["known_block_size"]))
        if threads == MAX_THREADS and any(op.name in WAVE_COLLECTIVES for op in nested(self.function)):
            self.needs.add("SB_SIXTEEN_WAVES")
            self._line("SB_SIXTEEN_WAVES();")
        self._block(self.entry)
        body = "".join(f"{line}\n" for line in self.lines)
        parameters: list[str] = []
        layout: list[tuple[int, int | None]] = []
        for value in buffers:
            number, name = self.number[value], self.text[value]
            if not isinstance(value.type, ir.MemRefType) and not re.search(rf"\b{name}\b", body):
                continue
            layout.append((number, None))
            if isinstance(value.type, ir.MemRefType):
                const = "" if number in self.stored else "const "
                parameters.append(f"{const}{self.type_name(value.type.element_type)}* __restrict__ {name}")
            else:
                parameters.append(f"{self.type_name(value.type)} {name}")
            for (owner, axis), size in sorted(self.sizes.items()):
                if owner == number:
                    layout.append((number, axis))
                    parameters.append(f"int64_t {size}")
        if len(parameters) > MAX_PARAMETERS:
            raise UnsupportedOp(
                f"a kernel of {len(parameters)} parameters cannot be launched",
                where=source_of(self.function.location),
                why=f"a launch takes {MAX_PARAMETERS}",
            )
        return Kernel(
            _name(self.function),
            threads,
            self.static_bytes,
            self.dynamic_bytes,
            layout,
            self.stored,
            ", ".join(parameters),
            body,
            self.needs,
        )

    def _stored(self) -> set[int]:
        buffers = [op.operands[STORES[op.name]] for op in nested(self.function) if op.name in STORES]
        return {self.number[buffer] for buffer in buffers if buffer in self.number}

    def _shared(self, value: ir.Value) -> None:
        """Declares an array that the block shares: static while there is room for it, else asked for at the launch."""
        count, kind = int(np.prod(value.type.shape)), str(value.type.element_type)
        size = -(-count * TYPES[kind][1] // SHARED_ALIGNMENT) * SHARED_ALIGNMENT
        name, word = self._new(value, "shared"), self.type_name(value.type.element_type)
        if self.static_bytes + size <= SHARED_BYTES:
            self.static_bytes += size
            vectors_meet = any(use.owner.operation.name.startswith("vector.") for use in value.uses)
            aligned = f"alignas({SHARED_ALIGNMENT}) " if vectors_meet else ""
            self._line(f"{aligned}__shared__ {word} {name}[{count}];")
        else:
            if not self.dynamic_bytes:
                self.needs.add("SB_DYNAMIC_SHARED")
                self._line("SB_DYNAMIC_SHARED(uint8_t, dynamic);")
            self._line(f"{word}* const {name} = ({word}*)(dynamic + {self.dynamic_bytes});")
            self.dynamic_bytes += size
        if (total := self.static_bytes + self.dynamic_bytes) > MAX_SHARED_BYTES:
            raise UnsupportedOp(
                "a kernel needs too much shared memory",
                where=source_of(self.function.location),
                why=f"{total} bytes asked for, {MAX_SHARED_BYTES} there",
            )

    # Names and lines.

    def _line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text)

    def _new(self, value: ir.Value, prefix: str) -> str:
        number = self.counts[prefix] = self.counts.get(prefix, -1) + 1
        self.text[value] = f"{prefix}{number}"
        return self.text[value]

    def _define(self, value: ir.Value, text: str, *, pure: bool = True) -> None:
        """Gives a value a text: the expression itself where it may stand in the place of its use, else a name."""
        if pure and not list(value.uses):
            return
        if pure and re.fullmatch(
            r"[a-z]+\d+", text
        ):  # another name's value, which does not change before its last use
            self.text[value] = text
            return
        if self._stays_in_place(value, text) if pure else self._is_taken_at_once(value, text):
            self.text[value] = text
            return
        kind = self.type_name(value.type)
        self._line(f"const {kind} {self._new(value, 'i' if str(value.type) == 'index' else 'v')} = {text};")

    def _stays_in_place(self, value: ir.Value, text: str) -> bool:
        if isinstance(value.type, ir.VectorType):
            return False  # its elements are reached by its name
        if re.fullmatch(r"\w+\[\d+\]", text):
            return True  # an element of a vector is as good as a name
        users = [use.owner.operation for use in value.uses]
        same_block = len(users) == 1 and users[0].block == value.owner.operation.block
        # a loop evaluates its bound in every round
        return same_block and len(text) <= INLINE_LENGTH and users[0].name != "scf.for"

    def _is_taken_at_once(self, value: ir.Value, text: str) -> bool:
        """Tells whether the next statement, and nothing else, takes what was read from memory or other lanes."""
        users = [use.owner.operation for use in value.uses]
        takes = (
            len(users) == 1 and users[0] == self.following and users[0].name in ("scf.yield", "memref.store")
        )
        return takes and len(text) <= INLINE_LENGTH

    # Statements.

    def _block(self, block: ir.Block) -> None:
        operations = [view.operation for view in block.operations]
        for op, self.following in zip(operations, [*operations[1:], None], strict=True):
            self._op(op)

    def _op(self, op: ir.Operation) -> None:
        name = op.name
        special: dict[str, Callable[[ir.Operation], None]] = {
            "memref.load": self._load,
            "memref.store": self._store,
            "memref.dim": self._dim,
            "scf.for": self._for,
            "scf.if": self._if,
            "scf.while": self._while,
            "func.call": self._call,
            "memref.alloca": self._array,
            "vector.load": self._load_vector,
            "vector.store": self._store_vector,
            "vector.insert": self._insert,
            "vector.to_elements": self._elements,
            "gpu.shuffle": self._shuffle,
            "gpu.ballot": self._ballot,
            "gpu.block_id": self._id,
            "gpu.grid_dim": self._id,
            "gpu.thread_id": self._id,
            "cf.assert": self._assert,
            "gpu.barrier": lambda _: self._line("__syncthreads();"),
            "arith.constant": self._literal,
        }
        if name in ("scf.yield", "scf.condition", "gpu.return"):
            return
        result = op.results[0] if len(op.results) else None
        if result in self.within:
            return
        if result in self.butterflies:
            self._butterfly(self.butterflies[result])
        elif name in special:
            special[name](op)
        else:
            self._define(op.results[0], self.expression(op))

    def _element(self, buffer: ir.Value, at: list[ir.Value]) -> str:
        """Returns the access to one element of a row-major buffer."""
        index, binding = "0", WORD
        for axis, value in enumerate(at):
            if index == "0":
                index, binding = self.text[value], self.binding(value)
                continue
            if (size := self._size(buffer, axis)) != "1":
                row = index if binding >= PRODUCT else f"({index})"
                index, binding = f"{row} * {size}", PRODUCT
            if self.text[value] != "0":
                index, binding = f"{index} + {self.operand(value, SUM)}", SUM
        return f"{self.text[buffer]}[{index}]"

    def _size(self, buffer: ir.Value, axis: int | float | None) -> str:
        axis = int(axis or 0)
        size = buffer.type.shape[axis]
        if size != ir.ShapedType.get_dynamic_size():
            return str(size)
        return self.sizes.setdefault((self.number[buffer], axis), f"{self.text[buffer]}_size{axis}")

    def _load(self, op: ir.Operation) -> None:
        buffer, *at = op.operands
        self._define(op.results[0], self._element(buffer, at), pure=False)

    def _dim(self, op: ir.Operation) -> None:
        self.text[op.results[0]] = self._size(op.operands[0], constant(op.operands[1]))

    def _store(self, op: ir.Operation) -> None:
        value, buffer, *at = op.operands
        self._line(f"{self._element(buffer, at)} = {self.text[value]};")

    def _id(self, op: ir.Operation) -> None:
        word = {"gpu.block_id": "blockIdx", "gpu.thread_id": "threadIdx", "gpu.grid_dim": "gridDim"}[op.name]
        axis = re.sub(r".*([xyz])>?$", r"\1", str(op.attributes["dimension"]))
        name = self._new(op.results[0], word.removesuffix("Idx").removesuffix("Dim"))
        self._line(f"const int64_t {name} = {word}.{axis};")  # widened, so that no product of ids overflows

    def _shuffle(self, op: ir.Operation) -> None:
        self.needs.add("SB_FULL_WAVE")
        value, distance, _ = op.operands
        call = f"__shfl_xor_sync(SB_FULL_WAVE, {self.text[value]}, {self.text[distance]}, {WAVE})"
        self._define(op.results[0], call, pure=False)

    def _butterfly(self, found: Butterfly) -> None:
        """Prints all steps as one loop over the distance."""
        self.needs.add("SB_FULL_WAVE")
        shuffle, op = found.last
        name, kind = self._new(op.results[0], "v"), self.type_name(op.results[0].type)
        self._line(f"{kind} {name} = {self.text[found.first]};")
        self.text[shuffle.operands[0]] = name
        self.text[shuffle.results[0]] = f"__shfl_xor_sync(SB_FULL_WAVE, {name}, d, {WAVE})"
        self._line("#pragma unroll")
        self._line(f"{found.loop} {name} = {self.expression(op)};")

    def _ballot(self, op: ir.Operation) -> None:
        self.needs.add("SB_FULL_WAVE")
        call = f"(int64_t)__ballot_sync(SB_FULL_WAVE, {self.text[op.operands[0]]})"
        self._define(op.results[0], call, pure=False)

    def _call(self, op: ir.Operation) -> None:
        name = ir.FlatSymbolRefAttr(op.attributes["callee"]).value
        self._define(op.results[0], f"{name}({', '.join(self.text[v] for v in op.operands)})", pure=False)

    def _array(self, op: ir.Operation) -> None:
        buffer = op.results[0]
        if not is_shared(buffer):
            count = int(np.prod(buffer.type.shape))
            self._line(f"{self.type_name(buffer.type.element_type)} {self._new(buffer, 'own')}[{count}];")

    def _assert(self, op: ir.Operation) -> None:
        self.needs.add("SB_CHECK")
        message = json.dumps(op.attributes["msg"].value)
        self._line(f"SB_CHECK({self.text[op.operands[0]]}, {message});")

    def _for(self, op: ir.Operation) -> None:
        low, high, step, *initial = op.operands
        body = op.regions[0].blocks[0]
        counter, *carried = body.arguments
        for value, start, result in zip(carried, initial, op.results, strict=True):
            name = self._new(value, "acc")
            self.text[result] = name
            self._line(f"{self.type_name(value.type)} {name} = {self.text[start]};")
        k = self._new(counter, "k")
        advance = f"++{k}" if self.text[step] == "1" else f"{k} += {self.text[step]}"
        kind = self.type_name(counter.type)
        if counter in self.unrolled and rounds(op) <= MAX_UNROLLED:
            self._line("#pragma unroll")
        self._line(f"for ({kind} {k} = {self.text[low]}; {k} < {self.operand(high)}; {advance}) {{")
        self._region(body, [self.text[v] for v in carried])

    def _if(self, op: ir.Operation) -> None:
        names = [self._new(result, "v") for result in op.results]
        for name, result in zip(names, op.results, strict=True):
            self._line(f"{self.type_name(result.type)} {name};")
        self._line(f"if ({self.text[op.operands[0]]}) {{")
        then, *other = [region.blocks[0] for region in op.regions if len(region.blocks)]
        self._region(then, names, close="} else {" if other else "}")
        if other:
            self._region(other[0], names)

    def _while(self, op: ir.Operation) -> None:
        before, after = (region.blocks[0] for region in op.regions)
        for value, start in zip(before.arguments, op.operands, strict=True):
            self._line(f"{self.type_name(value.type)} {self._new(value, 'acc')} = {self.text[start]};")
        for result, value in zip(op.results, after.arguments, strict=True):
            self.text[value] = self._new(result, "v")
            self._line(f"{self.type_name(result.type)} {self.text[value]};")
        self._line("for (;;) {")
        self.depth += 1
        self._block(before)
        *_, condition = (v.operation for v in before.operations)
        goes_on, *forwarded = condition.operands
        for result, value in zip(op.results, forwarded, strict=True):
            self._line(f"{self.text[result]} = {self.text[value]};")
        self._line(f"if (!{self.operand(goes_on)}) break;")
        self.depth -= 1
        self._region(after, [self.text[v] for v in before.arguments])

    def _region(self, block: ir.Block, targets: list[str], close: str = "}") -> None:
        """Prints a nested block; what it yields is assigned to ``targets``, all at once where one is read behind another."""
        self.depth += 1
        self._block(block)
        *_, terminator = (v.operation for v in block.operations)
        values = [self.text[v] for v in terminator.operands]
        if any(
            re.search(rf"\b{name}\b", later) for i, name in enumerate(targets) for later in values[i + 1 :]
        ):
            kinds = [self.type_name(v.type) for v in terminator.operands]
            fresh = [f"next_{target}" for target in targets]
            for kind, name, value in zip(kinds, fresh, values, strict=True):
                self._line(f"const {kind} {name} = {value};")
            values = fresh
        for target, value in zip(targets, values, strict=True):
            self._line(f"{target} = {value};")
        self.depth -= 1
        self._line(close)

    # Vectors.

    def _place(self, buffer: ir.Value, at: list[ir.Value]) -> str:
        return f"&{self._element(buffer, at)}"

    def _load_vector(self, op: ir.Operation) -> None:
        buffer, *at = op.operands
        helper = "sb_load" if vectors.is_aligned(op) else "sb_gather"
        self.needs.add(helper)
        call = f"{helper}<{self.type_name(op.results[0].type)}>({self._place(buffer, at)})"
        self._define(op.results[0], call, pure=False)

    def _store_vector(self, op: ir.Operation) -> None:
        value, buffer, *at = op.operands
        helper = "sb_store" if vectors.is_aligned(op) else "sb_scatter"
        self.needs.add(helper)
        self._line(f"{helper}({self._place(buffer, at)}, {self.text[value]});")

    def _elements(self, op: ir.Operation) -> None:
        for position, result in enumerate(op.results):
            self._define(result, self.element(op.operands[0], position))

    def _insert(self, op: ir.Operation) -> None:
        value, vector = op.operands
        (position,), kind = op.attributes["static_position"], op.results[0].type
        name = self._new(op.results[0], "v")
        self._line(f"{self.type_name(kind)} {name} = {self.text[vector]};")
        count = vectors.per_word(kind)
        first = position // count * count
        group = [self.element(vector, i) for i in range(first, first + count)]
        group[position - first] = self.text[value]
        word = ir.VectorType.get([count], kind.element_type)
        part = vectors.part(kind, name, position // count)
        self._line(f"{part} = {self.vector(word, group) if count > 1 else group[0]};")

    def _literal(self, op: ir.Operation) -> None:
        kind, attribute = op.results[0].type, op.attributes["value"]
        if not isinstance(kind, ir.VectorType):
            self.text[op.results[0]] = self.constant_text(kind, attribute.value)
            return
        numbers = (
            [attribute.get_splat_value().value] * kind.shape[0] if attribute.is_splat else list(attribute)
        )
        texts = [self.constant_text(kind.element_type, number) for number in numbers]
        self._define(op.results[0], self.vector(kind, texts))


def _is_shared(op: ir.Operation) -> bool:
    return is_shared(op.results[0])


def _indices_of_registers(function: ir.Operation) -> set[ir.Value]:
    """Returns the loop counters that index a thread's own arrays: their loops are unrolled."""
    found: set[ir.Value] = set()

    def collect(value: ir.Value) -> None:
        if isinstance(value.owner, ir.Block):
            found.add(value)
        else:
            for operand in value.owner.operands:
                collect(operand)

    for op in nested(function):
        if op.name == "memref.alloca" and not _is_shared(op):
            for use in op.results[0].uses:
                at = [v for v in use.owner.operation.operands if isinstance(v.type, ir.IndexType)]
                for index in at:
                    collect(index)
    return found
