"""The launch plan: what the host does to run an entry point, as JSON.

A plan names the buffers of an entry (inputs, weights, constants, temporaries), long formulas that others hold
(``sizes``), the checks on sizes, the steps in order (``launches``), and which buffers are results. A size is a number
or a formula over the sizes of the inputs: ``["dim", buffer, axis]``, ``["value", n]`` for a value of the host, such as the
counter of a loop, ``["size", n]`` for the entry's n-th long formula, ``["select", condition, size, size]`` or
``[operation, operand, ...]`` with the operations of ``OPERATIONS``. A step is one of

- ``{"kernel": name, "grid": sizes, "arguments": [{"buffer": n} or {"value": size}]}``, an
  argument that is no int64 with its ``"dtype"``;
- ``{"library": function, ...}``, a matrix product;
- ``{"loop": value, "from": size, "to": size, "by": size, "steps": steps}``: the counter is that value of the host;
- ``{"while": condition, "before": steps, "steps": steps}``: before, and if the condition holds, steps, and again;
- ``{"if": condition, "then": steps, "else": steps}``;
- ``{"read": value, "buffer": n, "at": sizes}``: the host waits for one element of a buffer;
- ``{"set": [[value, size], ...]}``, all at once;
- ``{"check": condition, "message": text}``.

Steps of an entry may have a ``"stream"``, 0 unless given, and ``"after"``, the numbers of steps of other streams that have to
be done first (``streams.py``, ``order.py``). In the order of the list they may always run.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np

from spikingbrain.errors import CallError, UnsupportedOp

if TYPE_CHECKING:
    from torch_mlir import ir

    from spikingbrain.backend_maca.source.printer import Kernel

FORMAT = 4
LONG = 12  # operands of a formula that is written once and named
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
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
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
    "arith.xori": "xor",
}
VIEWS = ("memref.expand_shape", "memref.collapse_shape", "memref.cast", "memref.subview")
FLOAT_PREDICATES = {
    1: "eq",
    2: "gt",
    3: "ge",
    4: "lt",
    5: "le",
    13: "ne",
}  # Python's comparisons treat NaN alike
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


def evaluate(
    size: Size,
    shapes: Mapping[int, Sequence[int]],
    values: Mapping[int, int] | None = None,
    sizes: Sequence[int] = (),
) -> int:
    """Returns the value of a formula, given the shapes of the input buffers, the values of the host and the entry's sizes.

    Raises CallError where a size of 0 or a value from the data makes it divide by 0.
    """
    if not isinstance(size, list):
        return size
    name, *operands = size
    if name == "dim":
        return int(shapes[operands[0]][operands[1]])
    if name == "value":
        return (values or {})[operands[0]]
    if name == "size":
        return sizes[operands[0]]
    if name == "select":  # what is not chosen may divide by 0
        chosen = operands[1] if evaluate(operands[0], shapes, values, sizes) else operands[2]
        return evaluate(chosen, shapes, values, sizes)
    found = [evaluate(o, shapes, values, sizes) for o in operands]
    try:
        return OPERATIONS[name](*found)
    except ZeroDivisionError:
        told = ", ".join(str(list(shape)) for shape in shapes.values())
        raise CallError("a size cannot be computed", why=f"it divides by 0 for arguments of {told}") from None


def every_step(steps: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yields the steps of a plan and those nested in them."""
    for step in steps:
        yield step
        for inner in ("before", "steps", "then", "else"):
            yield from every_step(step.get(inner, ()))


def build_plan(module: ir.Module, kernels: Mapping[str, Kernel], target: str) -> dict[str, Any]:
    """Returns the plan of a module whose functions only compute sizes and launch ``kernels``."""
    from spikingbrain.backend_maca.lower.mlir import functions

    entries = {f.attributes["sym_name"].value: _Entry(f, kernels).plan() for f in functions(module)}
    used = {
        k.name: {"threads": k.threads, "shared_bytes": k.shared_bytes, "dynamic_bytes": k.dynamic_bytes}
        for k in kernels.values()
    }
    return {"format": FORMAT, "target": target, "kernels": used, "entries": entries}


def providers(plan: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Returns for every entry how many steps each provider has; a product whose rows decide counts for both."""
    counts: dict[str, dict[str, int]] = {}
    for name, entry in plan["entries"].items():
        steps = list(every_step(entry["launches"]))
        calls, own = (sum(kind in step for step in steps) for kind in ("library", "kernel"))
        counts[name] = {"own": own, "mcblas": calls}
    return counts


class _Entry:
    """Reads one host function; values become formulas, memrefs become (buffer, shape)."""

    def __init__(self, function: ir.Operation, kernels: Mapping[str, Kernel]):
        self.function, self.kernels = function, kernels
        self.buffers: list[dict[str, Any]] = []
        self.sizes: dict[ir.Value, Size] = {}
        self.named: dict[str, int] = {}  # a long formula, as JSON -> its number
        self.memrefs: dict[ir.Value, tuple[int, list[Size]]] = {}
        self.checks: list[list[Any]] = []
        self.launches: list[dict[str, Any]] = []  # where steps are added: those of the entry or of a loop
        self.depth = self.values = 0
        self.outputs: list[dict[str, Any]] = []

    def plan(self) -> dict[str, Any]:
        entry = self.function.regions[0].blocks[0]
        for argument, attributes in zip(entry.arguments, self.function.opview.arg_attrs, strict=True):
            self._add_argument(argument, attributes)
        self._add_all(entry)
        return {
            "buffers": self.buffers,
            "sizes": [json.loads(formula) for formula in self.named],
            "checks": self.checks,
            "launches": self.launches,
            "outputs": self.outputs,
            # whether sizes alone decide what is launched, so that a call can be recorded as a graph
            "static": not any("read" in step for step in every_step(self.launches)),
        }

    def _add_argument(self, value: ir.Value, attributes: ir.DictAttr) -> None:
        number = len(self.buffers)
        record: dict[str, Any] = {"role": "input"}
        if "spikingbrain.state" in attributes:
            record["donated"] = True  # it may be written: a result lies there
        if "spikingbrain.weight" in attributes:
            record = {"role": "weight", "key": attributes["spikingbrain.weight"].value}
        elif "spikingbrain.constant" in attributes:
            elements = attributes["spikingbrain.constant"]
            kind = DTYPES[str(value.type.element_type)]
            stored = "int16" if kind == "bfloat16" else kind  # its bits
            values = np.array(elements).astype(stored, copy=False).reshape(-1)
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
        from spikingbrain.backend_maca.lower.mlir import source_of

        location = getattr(op, "location", self.function.location)
        raise UnsupportedOp(
            f"'{getattr(op, 'name', 'argument')}' cannot run between kernels",
            where=source_of(location),
            why=why,
        )

    def _add_all(self, block: ir.Block) -> None:
        for view in block.operations:
            self._add(view.operation)

    def _add(self, op: ir.Operation) -> None:
        name = op.name
        special: dict[str, Callable[[ir.Operation], None]] = {
            "cf.assert": self._add_check,
            "gpu.launch_func": self._add_launch,
            "maca.product": self._add_product,
            "memref.alloc": self._add_alloc,
            "memref.load": self._add_read,
            "scf.for": self._add_for,
            "scf.if": self._add_if,
            "scf.while": self._add_while,
        }
        if name in special:
            special[name](op)
        elif name in VIEWS:
            self._add_view(op)
        elif name in ("scf.yield", "scf.condition"):
            return
        elif name == "func.return":
            self.outputs = [dict(zip(("buffer", "shape"), self.memrefs[v], strict=True)) for v in op.operands]
        elif name == "memref.dim":
            self.sizes[op.results[0]] = self._shape_of(op)[self._known(op, 1)]
        else:
            self.sizes[op.results[0]] = self._short(self._formula(op))

    def _short(self, formula: Size) -> Size:
        """Returns a formula, or its name if it is long: sizes of a deep model would hold those before them many times over."""
        if weight(formula) <= LONG or has_value(formula) or not is_safe(formula):
            return formula
        return ["size", self.named.setdefault(json.dumps(formula), len(self.named))]

    def _formula(self, op: ir.Operation) -> Size:
        """Returns what the host computes for a scalar op."""
        name = op.name
        if name == "arith.constant":
            value = op.attributes["value"].value
            return float(value) if isinstance(value, float) else int(value)  # type: ignore[return-value]
        if name in HOST_OPS:
            return [HOST_OPS[name], *(self._known_size(op, v) for v in op.operands)]
        if name in ("arith.index_cast", "arith.extui", "arith.extsi", "arith.extf"):
            size = self._known_size(op, op.operands[0])
            signed = name == "arith.extsi" and str(op.operands[0].type) == "i1"
            return ["sub", 0, size] if signed else size
        predicate = op.attributes["predicate"].value if "predicate" in op.attributes else 0
        if name == "arith.cmpi" and predicate < len(PREDICATES):
            return [PREDICATES[predicate], *(self._known_size(op, v) for v in op.operands)]
        if name == "arith.cmpf" and predicate in FLOAT_PREDICATES:
            return [FLOAT_PREDICATES[predicate], *(self._known_size(op, v) for v in op.operands)]
        self._refuse(op, "the host only computes sizes and launches kernels")

    def _add_check(self, op: ir.Operation) -> None:
        condition, message = self._known_size(op, op.operands[0]), op.attributes["msg"].value
        if self.depth or has_value(condition):
            self.launches.append({"check": condition, "message": message})
        else:
            self.checks.append([condition, message])

    def _add_alloc(self, op: ir.Operation) -> None:
        sizes = iter([self._known_size(op, v) for v in op.operands])
        self._add_buffer(op.results[0], {"role": "temporary"}, lambda _: next(sizes))

    # Control flow.

    def _new_value(self) -> int:
        self.values += 1
        return self.values - 1

    def _add_read(self, op: ir.Operation) -> None:
        number = self._new_value()
        buffer, shape = self.memrefs[op.operands[0]]
        at = [self._known_size(op, v) for v in list(op.operands)[1:]]
        self.sizes[op.results[0]] = ["value", number]
        self.launches.append({"read": number, "buffer": buffer, "shape": shape, "at": at})

    def _block(self, block: ir.Block) -> list[dict[str, Any]]:
        """Returns the steps of a nested block."""
        outer, self.launches = self.launches, []
        self.depth += 1
        self._add_all(block)
        self.depth -= 1
        steps, self.launches = self.launches, outer
        return steps

    def _slots(
        self, op: ir.Operation, given: Sequence[ir.Value], *places: Sequence[ir.Value]
    ) -> list[int | None]:
        """Gives every carried scalar a value of the host; a carried buffer is the same one all along."""
        slots: list[int | None] = []
        for value, *same in zip(given, *places, strict=True):
            if value in self.memrefs:
                slots.append(None)
                for other in same:
                    self.memrefs[other] = self.memrefs[value]
            else:
                slots.append(self._new_value())
                for other in same:
                    self.sizes[other] = ["value", slots[-1]]
        return slots

    def _set(
        self,
        op: ir.Operation,
        slots: Sequence[int | None],
        values: Sequence[ir.Value],
        home: Sequence[ir.Value],
    ) -> dict[str, Any]:
        """Returns the step that carries values on; buffers must be those that were carried in."""
        pairs = []
        for slot, value, first in zip(slots, values, home, strict=True):
            if slot is not None:
                pairs.append([slot, self._known_size(op, value)])
            elif self.memrefs[value][0] != self.memrefs[first][0]:
                self._refuse(op, "a loop hands on another buffer than it was given")
        return {"set": pairs}

    def _add_for(self, op: ir.Operation) -> None:
        low, high, step, *initial = op.operands
        body = op.regions[0].blocks[0]
        counter, *carried = body.arguments
        slots = self._slots(op, initial, carried, list(op.results))
        self.launches.append(self._set(op, slots, initial, initial))
        number = self._new_value()
        self.sizes[counter] = ["value", number]
        bounds = [self._known_size(op, v) for v in (low, high, step)]
        steps = self._block(body)
        steps.append(self._set(op, slots, _terminator(body), carried))
        self.launches.append(
            {"loop": number, "from": bounds[0], "to": bounds[1], "by": bounds[2], "steps": steps}
        )

    def _add_while(self, op: ir.Operation) -> None:
        before, after = (region.blocks[0] for region in op.regions)
        initial = list(op.operands)
        slots = self._slots(op, initial, list(before.arguments))
        self.launches.append(self._set(op, slots, initial, initial))
        first = self._block(before)
        condition, *passed = _terminator(before)
        onward = self._slots(op, passed, list(after.arguments), list(op.results))
        first.append(self._set(op, onward, passed, passed))
        steps = self._block(after)
        steps.append(self._set(op, slots, _terminator(after), list(before.arguments)))
        self.launches.append({"while": self._known_size(op, condition), "before": first, "steps": steps})

    def _add_if(self, op: ir.Operation) -> None:
        blocks = [region.blocks[0] for region in op.regions if len(region.blocks)]
        condition = self._known_size(op, op.operands[0])
        made = [self._block(block) for block in blocks]
        results = list(op.results)
        if results:
            ends = [_terminator(block) for block in blocks]
            slots = self._slots(op, ends[0], results)
            for steps, values in zip(made, ends, strict=True):
                steps.append(self._set(op, slots, values, ends[0]))
        self.launches.append({"if": condition, "then": made[0], "else": made[1] if len(made) > 1 else []})

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
            shape = [self._short(reduce(lambda a, b: ["mul", a, b], group)) for group in groups]
        elif op.name == "memref.subview":
            shape = self._prefix(op)
        self.memrefs[op.results[0]] = (buffer, shape)

    def _prefix(self, op: ir.Operation) -> list[Size]:
        """Returns the shape of a view that begins where its buffer does and has no gaps."""
        kind = op.results[0].type
        strides, offset = kind.get_strides_and_offset()
        gapless = [int(np.prod(kind.shape[axis + 1 :])) for axis in range(kind.rank)]
        if 0 not in kind.shape and (offset or list(strides) != gapless):
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
                kind = str(value.type)
                other = {} if kind in ("index", "i64") else {"dtype": DTYPES[kind]}
                arguments.append({"value": self._known_size(op, value), **other})
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


def _terminator(block: ir.Block) -> list[ir.Value]:
    *_, last = block.operations
    return list(last.operation.operands)


def weight(size: Size) -> int:
    """Returns how many numbers and names a formula has."""
    return (
        1 if not isinstance(size, list) or size[0] in ("dim", "value", "size") else sum(map(weight, size[1:]))
    )


def is_safe(size: Size) -> bool:
    """Returns whether a formula is one of integers that can be computed for all arguments."""
    if not isinstance(size, list) or size[0] in ("dim", "value", "size"):
        return not isinstance(size, float)
    divides = size[0] in ("div", "rem", "ceildiv", "floordiv")
    return all(map(is_safe, size[1:])) and not (divides and (isinstance(size[2], list) or not size[2]))


def has_value(size: Size) -> bool:
    """Returns whether a formula depends on values of the host, which may change while a plan runs."""
    return isinstance(size, list) and (size[0] == "value" or any(map(has_value, size[1:])))
