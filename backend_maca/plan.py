"""The launch plan: what the host does to run an entry point, as JSON.

A plan names the buffers of an entry (inputs, weights, constants, temporaries), the checks on their sizes, the
kernel launches in order, and which buffers are results. A size is a number or a formula over the sizes of the
inputs: ``["dim", buffer, axis]`` or ``[operation, operand, ...]`` with the operations of ``OPERATIONS``.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np

from spikingbrain.errors import UnsupportedOp

if TYPE_CHECKING:
    from torch_mlir import ir

    from spikingbrain.backend_maca.printer import Kernel

FORMAT = 1
Size: TypeAlias = int | list[Any]

OPERATIONS: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),  # towards zero, as in C
    "ceildiv": lambda a, b: -(-a // b),
    "floordiv": lambda a, b: a // b,
    "rem": lambda a, b: a - b * OPERATIONS["div"](a, b),
    "max": max,
    "min": min,
    "select": lambda c, a, b: a if c else b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "eq": lambda a, b: int(a == b),
    "ne": lambda a, b: int(a != b),
    "lt": lambda a, b: int(a < b),
    "le": lambda a, b: int(a <= b),
    "gt": lambda a, b: int(a > b),
    "ge": lambda a, b: int(a >= b),
}
HOST_OPS = {
    "arith.addi": "add",
    "arith.subi": "sub",
    "arith.muli": "mul",
    "arith.divsi": "div",
    "arith.divui": "div",
    "arith.ceildivsi": "ceildiv",
    "arith.floordivsi": "floordiv",
    "arith.remsi": "rem",
    "arith.remui": "rem",
    "arith.maxsi": "max",
    "arith.minsi": "min",
    "arith.select": "select",
    "arith.andi": "and",
    "arith.ori": "or",
}
PREDICATES = ["eq", "ne", "lt", "le", "gt", "ge"]
DTYPES = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "i1": "bool",
}


def evaluate(size: Size, shapes: Mapping[int, Sequence[int]]) -> int:
    """Returns the value of a formula, given the shapes of the input buffers."""
    if isinstance(size, int):
        return size
    name, *operands = size
    if name == "dim":
        return int(shapes[operands[0]][operands[1]])
    return OPERATIONS[name](*(evaluate(o, shapes) for o in operands))


def build_plan(module: ir.Module, kernels: Mapping[str, Kernel], target: str) -> dict[str, Any]:
    """Returns the plan of a module whose functions only compute sizes and launch ``kernels``."""
    functions = [v.operation for v in module.body.operations if v.operation.name == "func.func"]
    entries = {f.attributes["sym_name"].value: _Entry(f, kernels).plan() for f in functions}
    used = {
        k.name: {"threads": k.threads, "shared_bytes": k.shared_bytes, "dynamic_bytes": k.dynamic_bytes}
        for k in kernels.values()
    }
    return {"format": FORMAT, "target": target, "kernels": used, "entries": entries}


def providers(plan: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Returns for every entry how many steps each provider has; a product whose rows decide counts for both."""
    counts: dict[str, dict[str, int]] = {}
    for name, entry in plan["entries"].items():
        calls = sum("library" in step for step in entry["launches"])
        counts[name] = {"own": len(entry["launches"]) - calls, "mcblas": calls}
    return counts


class _Entry:
    """Reads one host function; values become formulas, memrefs become (buffer, shape)."""

    def __init__(self, function: ir.Operation, kernels: Mapping[str, Kernel]):
        self.function, self.kernels = function, kernels
        self.buffers: list[dict[str, Any]] = []
        self.sizes: dict[ir.Value, Size] = {}
        self.memrefs: dict[ir.Value, tuple[int, list[Size]]] = {}
        self.checks: list[list[Any]] = []
        self.launches: list[dict[str, Any]] = []
        self.outputs: list[dict[str, Any]] = []

    def plan(self) -> dict[str, Any]:
        entry = self.function.regions[0].blocks[0]
        for argument, attributes in zip(entry.arguments, self.function.opview.arg_attrs, strict=True):
            self._add_argument(argument, attributes)
        for view in entry.operations:
            self._add(view.operation)
        return {
            "buffers": self.buffers,
            "checks": self.checks,
            "launches": self.launches,
            "outputs": self.outputs,
        }

    def _add_argument(self, value: ir.Value, attributes: ir.DictAttr) -> None:
        number = len(self.buffers)
        record: dict[str, Any] = {"role": "input"}
        if "spikingbrain.weight" in attributes:
            record = {"role": "weight", "key": attributes["spikingbrain.weight"].value}
        elif "spikingbrain.constant" in attributes:
            elements = attributes["spikingbrain.constant"]
            values = np.array(elements).astype(DTYPES[str(value.type.element_type)], copy=False).reshape(-1)
            values = values[:1] if elements.is_splat else values
            record = {"role": "constant", "data": base64.b64encode(values.tobytes()).decode()}
        self._add_buffer(value, record, lambda axis: ["dim", number, axis])

    def _add_buffer(self, value: ir.Value, record: dict[str, Any], dynamic: Callable[[int], Size]) -> None:
        kind = str(value.type.element_type)
        if kind not in DTYPES:
            self._refuse(value.owner, f"buffers of {kind} are not supported")
        shape = [size if size >= 0 else dynamic(axis) for axis, size in enumerate(value.type.shape)]
        self.memrefs[value] = (len(self.buffers), shape)
        self.buffers.append({**record, "dtype": DTYPES[kind], "shape": shape})

    def _refuse(self, op: Any, why: str) -> NoReturn:
        from spikingbrain.backend_maca.mlir import source_of

        location = getattr(op, "location", self.function.location)
        raise UnsupportedOp(
            f"'{getattr(op, 'name', 'argument')}' cannot run between kernels",
            where=source_of(location),
            why=why,
        )

    def _add(self, op: ir.Operation) -> None:
        name = op.name
        if name == "arith.constant":
            self.sizes[op.results[0]] = int(op.attributes["value"].value)
        elif name == "memref.dim":
            self.sizes[op.results[0]] = self._shape_of(op)[self._known(op, 1)]
        elif name in HOST_OPS:
            self.sizes[op.results[0]] = [HOST_OPS[name], *(self._known_size(op, v) for v in op.operands)]
        elif name in ("arith.index_cast", "arith.extui"):
            self.sizes[op.results[0]] = self._known_size(op, op.operands[0])
        elif name == "arith.cmpi" and op.attributes["predicate"].value < len(PREDICATES):
            predicate = PREDICATES[op.attributes["predicate"].value]
            self.sizes[op.results[0]] = [predicate, *(self._known_size(op, v) for v in op.operands)]
        elif name == "cf.assert":
            self.checks.append([self._known_size(op, op.operands[0]), op.attributes["msg"].value])
        elif name == "memref.alloc":
            sizes = iter([self._known_size(op, v) for v in op.operands])
            self._add_buffer(op.results[0], {"role": "temporary"}, lambda _: next(sizes))
        elif name in ("memref.expand_shape", "memref.collapse_shape", "memref.cast", "memref.subview"):
            self._add_view(op)
        elif name == "gpu.launch_func":
            self._add_launch(op)
        elif name == "maca.product":
            self._add_product(op)
        elif name == "func.return":
            self.outputs = [dict(zip(("buffer", "shape"), self.memrefs[v], strict=True)) for v in op.operands]
        else:
            self._refuse(op, "the host only computes sizes and launches kernels")

    def _shape_of(self, op: ir.Operation) -> list[Size]:
        return self.memrefs[op.operands[0]][1]

    def _known_size(self, op: ir.Operation, value: ir.Value) -> Size:
        if value not in self.sizes:
            self._refuse(op, "it depends on a value that only the device knows")
        return self.sizes[value]

    def _known(self, op: ir.Operation, operand: int) -> int:
        size = self._known_size(op, op.operands[operand])
        if not isinstance(size, int):
            self._refuse(op, "an axis must be known at compile time")
        return size

    def _add_view(self, op: ir.Operation) -> None:
        """Gives a buffer another shape."""
        buffer, shape = self.memrefs[op.operands[0]]
        if op.name == "memref.expand_shape":
            given = iter(list(op.operands)[1:])
            sizes = op.results[0].type.shape
            shape = [size if size >= 0 else self._known_size(op, next(given)) for size in sizes]
        elif op.name == "memref.collapse_shape":
            groups = [[shape[axis.value] for axis in group] for group in op.attributes["reassociation"]]
            shape = [reduce(lambda a, b: ["mul", a, b], group) for group in groups]
        elif op.name == "memref.subview":
            shape = self._prefix(op)
        self.memrefs[op.results[0]] = (buffer, shape)

    def _prefix(self, op: ir.Operation) -> list[Size]:
        """Returns the shape of a view that begins where its buffer does and has no gaps."""
        kind = op.results[0].type
        strides, offset = kind.get_strides_and_offset()
        gapless = [int(np.prod(kind.shape[axis + 1 :])) for axis in range(kind.rank)]
        if offset or list(strides) != gapless:
            self._refuse(op, "a kernel takes whole buffers")
        _, offsets_count, sizes_count, _ = op.attributes["operandSegmentSizes"]
        given = iter(list(op.operands)[1 + offsets_count :][:sizes_count])
        return [size if size >= 0 else self._known_size(op, next(given)) for size in kind.shape]

    def _add_launch(self, op: ir.Operation) -> None:
        launch = op.opview
        kernel = self.kernels[op.attributes["kernel"].value[-1]]
        grid = [self._known_size(op, v) for v in (launch.gridSizeX, launch.gridSizeY, launch.gridSizeZ)]
        operands = list(launch.kernelOperands)
        arguments: list[dict[str, Any]] = []
        for number, axis in kernel.arguments:
            value = operands[number]
            if value in self.memrefs:
                buffer, shape = self.memrefs[value]
                arguments.append({"buffer": buffer} if axis is None else {"value": shape[axis]})
            else:
                arguments.append({"value": self._known_size(op, value)})
        self._check_aliases(op, kernel, operands)
        self.launches.append({"kernel": kernel.name, "grid": grid, "arguments": arguments})

    def _add_product(self, op: ir.Operation) -> None:
        """Adds a call of the library: sizes and leading dimensions as it counts them, in columns."""
        a, b, c, *sizes = op.operands
        m, n, k, batch = (self._known_size(op, v) for v in sizes)
        transposed, batched = ([f.value for f in op.attributes[name]] for name in ("transposed", "batched"))
        a_rows, a_columns = (k, m) if transposed[0] else (m, k)
        b_rows, b_columns = (n, k) if transposed[1] else (k, n)
        dtype = self.buffers[self.memrefs[a][0]]["dtype"]
        sums = self.buffers[self.memrefs[c][0]]["dtype"]
        strides = [
            ["mul", a_rows, a_columns] if batched[0] else 0,
            ["mul", b_rows, b_columns] if batched[1] else 0,
            ["mul", m, n],
        ]
        self.launches.append(
            {
                "library": "mcblasGemmEx" if batch == 1 else "mcblasGemmStridedBatchedEx",
                "arguments": [{"buffer": self.memrefs[v][0]} for v in (b, a, c)],
                "operations": ["T" if t else "N" for t in reversed(transposed)],
                "sizes": [n, m, k],
                "types": [dtype, dtype, sums],
                "leading": [b_columns, a_columns, n],
                "batch": batch,
                "strides": [strides[1], strides[0], strides[2]],
                "compute": "int32" if sums == "int32" else "float32",
                "adds": op.attributes["adds"].value,
            }
        )

    def _check_aliases(self, op: ir.Operation, kernel: Kernel, operands: list[ir.Value]) -> None:
        """Kernels declare their pointers unaliased: a written buffer must not be passed twice."""
        passed = [self.memrefs[v][0] if v in self.memrefs else -1 for v in operands]
        if any(passed.count(passed[number]) > 1 for number in kernel.written):
            self._refuse(op, "it would write a buffer that it also reads under another shape")
