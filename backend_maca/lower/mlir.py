"""Reading, walking and rewriting modules: what every stage of this backend needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch_mlir import ir
from torch_mlir.passmanager import PassManager

from spikingbrain.errors import PassFailed, SourceLine, UnsupportedOp
from spikingbrain.passes.wave_kernels.builders import THREADS


def source_of(location: ir.Location) -> SourceLine | str:
    """Returns the innermost line of the user's own code behind a location, or else a text that says where."""
    lines: list[SourceLine] = []

    def collect(node: Any) -> None:
        if isinstance(node, ir.FileLineColLoc):
            lines.append(SourceLine(node.filename, node.start_line))
        elif isinstance(node, ir.NameLoc):
            collect(node.child_loc)
        elif isinstance(node, ir.CallSiteLoc):
            collect(node.callee)
            collect(node.caller)
        elif isinstance(node, ir.FusedLoc):
            for part in node.locations:
                collect(part)

    collect(location)
    foreign = ("<", "-", "torch/")  # generated code, the module's own text, the tracer
    own = [s for s in lines if not s.file.startswith(foreign) and "site-packages" not in s.file]
    if own:
        return own[0]
    return f"line {lines[0].line} of the module" if lines else "an unknown place"


def sources_of(location: ir.Location) -> list[SourceLine | str]:
    """Returns the lines behind a location that stands for several places."""
    inner = location.child_loc if isinstance(location, ir.NameLoc) else location
    parts = list(inner.locations) if isinstance(inner, ir.FusedLoc) else [location]
    return list(dict.fromkeys(map(source_of, parts)))


def place_of(op: ir.Operation) -> SourceLine | str:
    """Returns the user's line of an op, or of the closest op around it that has one."""
    where = source_of(op.location)
    parent = op.operation.parent
    if isinstance(where, SourceLine) or parent is None or parent.operation.name == "gpu.module":
        return where
    return place_of(parent)


def nested(root: ir.Operation) -> list[ir.Operation]:
    """Returns the operations inside an operation, outer ones first."""
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        found.append(op.operation)
        return ir.WalkResult.ADVANCE

    root.walk(visit, ir.WalkOrder.PRE_ORDER)
    return found[1:]


def constant(value: ir.Value) -> int | float | None:
    """Returns the number that a value surely is, or None."""
    op = value.owner
    if isinstance(op, ir.Block) or op.name != "arith.constant":
        return None
    number: int | float = op.attributes["value"].value
    return number


def is_natural(index: ir.Value) -> bool:
    """Tells whether an index is surely not negative, so that signed and unsigned arithmetic agree on it."""
    number = constant(index)
    if number is not None:
        return number >= 0
    if isinstance(index.owner, ir.Block):
        loop = index.owner.owner.operation
        return loop.name == "scf.for" and index == index.owner.arguments[0] and is_natural(loop.operands[0])
    op = index.owner
    if op.name in ("gpu.thread_id", "gpu.block_id", "gpu.grid_dim", "memref.dim", "arith.index_castui"):
        return True
    if op.name == "arith.select":
        return is_natural(op.operands[1]) and is_natural(op.operands[2])
    keeps = [
        *("arith.addi", "arith.muli", "arith.minsi", "arith.divsi", "arith.remsi"),
        "arith.divui",
        "arith.remui",
    ]
    return op.name in keeps and all(map(is_natural, op.operands))


def is_shared(buffer: ir.Value) -> bool:
    """Tells whether a buffer is memory that the threads of a block share."""
    return "workgroup" in str(buffer.type.memory_space)


def parse(text: str, context: ir.Context) -> ir.Module:
    """Parses a module, with errors of our own kind."""
    try:
        return ir.Module.parse(text, context)
    except ir.MLIRError as error:
        unknown = re.search(r"not found for custom op '([\w.]+)'", str(error))
        if unknown:
            raise UnsupportedOp(f"'{unknown[1]}' has no kernel for MetaX GPUs") from error
        raise PassFailed("the module does not parse", why=str(error)) from error


def run_passes(module: ir.Module, passes: Sequence[str]) -> None:
    """Runs upstream passes one by one, so that a failure names the pass."""
    for name in passes:
        try:
            PassManager.parse(f"builtin.module({name})").run(module.operation)
        except ir.MLIRError as error:
            where = source_of(error.error_diagnostics[0].location) if error.error_diagnostics else None
            raise PassFailed(f"pass '{name}' failed", where=where, why=str(error)) from error


def functions(module: ir.Module) -> list[ir.Operation]:
    """Returns the entry points: functions with a body that are no hand-scheduled kernels."""
    found = [view.operation for view in module.body.operations if view.operation.name == "func.func"]
    return [f for f in found if len(f.regions[0].blocks) and THREADS not in f.attributes]


def host_ops(root: ir.Operation) -> list[ir.Operation]:
    """Returns the operations that run between kernels: a function's own and those of its loops and branches."""
    found = []
    for region in root.regions:
        for view in region.blocks[0].operations if len(region.blocks) else ():
            found.append(view.operation)
            if view.operation.name in ("scf.for", "scf.if", "scf.while"):
                found += host_ops(view.operation)
    return found
