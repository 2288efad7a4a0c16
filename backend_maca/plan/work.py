"""What kernels do, counted from their code: a record for each, from which ``cost.py`` tells the work of a launch of any sizes.

A record counts what one thread of the first block does: bytes of device memory that it reads and writes, bytes of shared
memory, arithmetic, barriers, and matrix instructions, which are a wave's. What all lanes of a wave read at one place counts
for the wave once. Loops and branches are kept, with bounds and conditions as formulas over the launch's arguments, in the
form that a plan has; None stands for what depends on data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch_mlir import ir

from spikingbrain.backend_maca.lower.mlir import is_shared, nested
from spikingbrain.backend_maca.plan.plan import HOST_OPS, PREDICATES, Size
from spikingbrain.passes.wave_kernels.builders import WAVE

if TYPE_CHECKING:
    from spikingbrain.backend_maca.source.printer import Kernel

# Which operand is the buffer, and whether it is written.
_ACCESSES = {
    "memref.load": (0, False),
    "vector.load": (0, False),
    "memref.store": (1, True),
    "vector.store": (1, True),
}
_ARITHMETIC = ("arith.", "math.", "gpu.shuffle")
_CASTS = ("arith.index_cast", "arith.index_castui", "arith.extui", "arith.extsi", "arith.trunci")


def work_of(module: ir.Module, kernels: Mapping[str, Kernel]) -> dict[str, dict[str, Any]]:
    """Returns the record of every printed kernel: ``arguments`` as the kernel has them, ``registers`` of a thread, ``body``."""
    found = {}
    for op in nested(module.operation):
        name = op.attributes["sym_name"].value if op.name == "gpu.func" else ""
        if name in kernels and kernels[name].name == name:
            entry = op.regions[0].blocks[0]
            arrays = [v.results[0].type for v in nested(op) if v.name == "memref.alloca"]
            arrays = [t for t in arrays if "workgroup" not in str(t.memory_space)]
            words = sum(_bytes(t.element_type) * math.prod(t.shape) for t in arrays) // 4
            found[name] = {
                "arguments": [list(argument) for argument in kernels[name].arguments],
                "registers": words + _live(entry),
                "body": _Counter(list(entry.arguments)).block(entry),
            }
    return found


class _Counter:
    """Walks one kernel."""

    def __init__(self, arguments: list[ir.Value]):
        self.number = {value: n for n, value in enumerate(arguments)}
        self.sizes: dict[ir.Value, Size | None] = {}
        self.differs: dict[ir.Value, bool] = {}  # whether a value differs from lane to lane

    def block(self, block: ir.Block) -> dict[str, Any]:
        """Returns what a block of ops does; what is 0 is left out."""
        found: dict[str, Any] = {}

        def add(what: str, amount: Any) -> None:
            found[what] = found.get(what, 0 if not isinstance(amount, list) else []) + amount

        for view in block.operations:
            op = view.operation
            if op.name in _ACCESSES:
                place, is_written = _ACCESSES[op.name]
                value = op.operands[0] if is_written else op.results[0]
                buffer = op.operands[place]
                size = _bytes(value.type)
                if is_shared(buffer):
                    add("shared", size)
                elif buffer in self.number:
                    each = any(map(self._differs, list(op.operands)[place + 1 :]))
                    add("written" if is_written else "read", size if each else size / WAVE)
            elif op.name == "scf.for":
                low, high, by, *_ = op.operands
                bounds = [self._size(v) for v in (low, high, by)]
                counter = op.regions[0].blocks[0].arguments[0]
                known = None not in bounds[:2]
                self.sizes[counter] = ["div", ["add", *bounds[:2]], 2] if known else None  # amid the rounds
                self.differs[counter] = self._differs(low)
                add("loops", [[*bounds, self.block(op.regions[0].blocks[0])]])
            elif op.name == "scf.while":
                before, after = (self.block(r.blocks[0]) for r in op.regions)
                add("loops", [[0, None, 1, {"branches": [[1, before, {}], [1, after, {}]]}]])
            elif op.name == "scf.if":
                ways = [self.block(r.blocks[0]) if len(r.blocks) else {} for r in op.regions]
                add("branches", [[self._size(op.operands[0]), *ways]])
            elif op.name == "func.call" and "__builtin_mxc_mma" in op.attributes["callee"].value:
                kind = op.attributes["callee"].value.rpartition("x")[2].lstrip("0123456789")
                depth = int(op.attributes["callee"].value.rpartition("x")[2].removesuffix(kind))
                add(f"matrix {kind}", 2 * 16 * 16 * depth)
            elif op.name == "gpu.barrier":
                add("barriers", 1)
            elif op.name.startswith(_ARITHMETIC) and not isinstance(op.results[0].type, ir.IndexType):
                add("arithmetic", _lanes(op.results[0].type))
                if isinstance(op.results[0].type, ir.F64Type):
                    add("f64", 1)
        return found

    def _size(self, value: ir.Value) -> Size | None:
        if value not in self.sizes:
            self.sizes[value] = self._formula(value)
        return self.sizes[value]

    def _formula(self, value: ir.Value) -> Size | None:
        if isinstance(value.owner, ir.Block):
            is_scalar = value in self.number and isinstance(value.type, ir.IndexType | ir.IntegerType)
            return ["value", self.number[value]] if is_scalar else None
        op = value.owner.operation
        if op.name == "arith.constant":
            attribute = op.attributes["value"]
            return int(attribute.value) if isinstance(attribute, ir.IntegerAttr | ir.BoolAttr) else None
        if op.name in ("gpu.thread_id", "gpu.block_id"):
            return 0
        if op.name == "memref.dim" and op.operands[0] in self.number:
            axis = self._size(op.operands[1])
            return ["dim", self.number[op.operands[0]], axis]
        if op.name in _CASTS:
            return self._size(op.operands[0])
        operands = [self._size(v) for v in op.operands]
        if op.name == "arith.cmpi" and None not in operands:
            predicate = op.attributes["predicate"].value
            return [PREDICATES[predicate if predicate < 6 else predicate - 4], *operands]
        name = HOST_OPS.get(op.name)
        if name is None:
            return None
        known = [size for size in operands if size is not None]
        if name in ("min", "max") and len(known) == 1:
            return known[0]  # the bound that is known
        return [name, *known] if len(known) == len(operands) else None

    def _differs(self, value: ir.Value) -> bool:
        if value not in self.differs:
            if isinstance(value.owner, ir.Block):
                self.differs[value] = value not in self.number
            else:
                op = value.owner.operation
                inner = op.name.startswith("scf.") or op.name == "gpu.thread_id"
                self.differs[value] = inner or any(map(self._differs, op.operands))
        return self.differs[value]


def _live(block: ir.Block) -> int:
    """Returns the most words that are live at once, in the order of the code; a compiler may find a better one."""
    ops = [view.operation for view in block.operations]
    ends: dict[ir.Value, int] = {}
    for place, op in enumerate(ops):
        for inside in (op, *nested(op)):
            ends.update(dict.fromkeys(inside.operands, place))
    here = {value: _words(value.type) for op in ops for value in op.results}
    now = most = 0
    for place, op in enumerate(ops):
        own = sum(here[value] for value in op.results)  # of a loop, what its body carries
        inner = [_live(b) for region in op.regions for b in region.blocks]
        most = max(most, now + own + max(inner, default=0))
        now += sum(here[value] for value in op.results if value in ends)
        now -= sum(here[value] for value in set(op.operands) if value in here and ends[value] == place)
    return most


def _words(kind: ir.Type) -> int:
    """Returns the registers of 32 bits that a value takes; an index is small."""
    if isinstance(kind, ir.MemRefType):
        return 0
    return 1 if isinstance(kind, ir.IndexType) else -(-_bytes(kind) // 4)


def _bytes(kind: ir.Type) -> int:
    if isinstance(kind, ir.VectorType):
        return _lanes(kind) * _bytes(kind.element_type)
    width: int = 64 if isinstance(kind, ir.IndexType) else getattr(kind, "width", 32)
    return max(1, width // 8)


def _lanes(kind: ir.Type) -> int:
    lanes: int = math.prod(kind.shape) if isinstance(kind, ir.VectorType) else 1
    return lanes
