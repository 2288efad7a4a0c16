"""CPU kernels for ``spikingbrain.linear_recurrence``, built over scf, vector and memref.

This module chooses between two schedules and replaces the op by a launch:

* ``recurrence_blocked``, without a rank-one part. Time is cut into short chunks, whose keys, queries and values are
  copied to scratch. Tiles of the state stay in registers for a whole chunk: two multiplications per entry of the state
  and step are all the arithmetic, whatever the chunk's length, and time has no tail. Decays are moved from the
  state to keys and queries where their products can be inverted, as a check at run time tells; elsewhere the
  state is multiplied by each of them.
* ``recurrence_sequential``, with one. A step needs all rows of the state before it can change the first, so that
  registers hold no part of the state for longer than a step. Columns are independent: a workgroup takes as many as keep
  its part of the state in the first cache, and passes over them once per step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import func, tensor

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes.dialect_fused import OPERANDS, SUM, FusedRecurrence, Part, Read, linear
from spikingbrain.passes.kernels import recurrence_blocked, recurrence_sequential
from spikingbrain.passes.kernels.builders import index, launch, size
from spikingbrain.passes.kernels.recurrence_base import Operands, Problem, fused_problem_of, problem_of
from spikingbrain.passes.kernels.recurrence_operands import Computed, Memory
from spikingbrain.target import Target


def emit_recurrence_launch(op: Any, target: Target) -> ir.Operation:
    """Replaces a ``spikingbrain.linear_recurrence`` op by the launch of a kernel for ``target``; returns the launch.

    The kernel function is created in the module unless an equal one exists. A state that nothing else reads is updated in
    place; any other, and zeros, the kernel writes to new memory first. (Two launches tied to one value are not safe: with
    dynamic sizes IREE 3.13 lets the second read what the first wrote; ``test_states_that_others_read`` fails if a state
    is tied regardless.) Raises UnsupportedOp, with the module
    unchanged, when the target has no vectors or the op is of a kind that the kernels do not handle.
    """
    named = {name: value for name in OPERANDS if (value := getattr(op, name)) is not None}
    with op.operation.context:
        of_bonus = ir.AffineMap.get(4, 0, [ir.AffineDimExpr.get(2), ir.AffineDimExpr.get(3)])
    parts = [
        Part(name, [Read(value, of_bonus if name == "bonus" else None)]) for name, value in named.items()
    ]
    return _emit(op.operation, problem_of(op), parts, op.state, target)


def emit_fused_launch(fused: FusedRecurrence, target: Target) -> ir.Operation:
    """Replaces a ``fused_recurrence`` op by the launch of a kernel, as ``emit_recurrence_launch`` does."""
    return _emit(fused.op, fused_problem_of(fused), fused.parts, fused.state, target)


def blocks_of(problem: Problem, target: Target) -> int:
    """Returns how many workgroups share a state. Raises UnsupportedOp where there is no kernel."""
    blocks: int = _schedule(problem, target).blocks(problem)
    return blocks


def _schedule(problem: Problem, target: Target) -> Any:
    return _kind(problem).plan(problem, target)


def _kind(problem: Problem) -> Any:
    return recurrence_sequential if problem.rank_one else recurrence_blocked


def _emit(
    operation: ir.Operation, problem: Problem, parts: Sequence[Part], state: ir.Value | None, target: Target
) -> ir.Operation:
    schedule = _schedule(problem, target)
    if schedule.blocks(problem) > 1 and any(part.name == SUM for part in parts):
        raise UnsupportedOp(
            "no recurrence kernel that sums over rows of its outputs here",
            why=f"{schedule.blocks(problem)} workgroups share a row",
            hint="the sums apart",
        )
    y, final = (r.type for r in operation.results)
    inputs: list[ir.Value] = []
    for read in (read for part in parts for read in part.reads):
        if read.value not in inputs:
            inputs.append(read.value)
    in_place = state is not None and state not in inputs and _is_read_once(state)
    with operation.context, operation.location:
        with ir.InsertionPoint(operation):
            reads = [(read.value, read.map) for part in parts for read in part.reads]
            batch, time = (size_of(reads, y, axis) for axis in (0, 1))
            if state is not None:
                inputs.append(_as(state, final))
        fresh = [y] if in_place else [y, final]
        types = [ir.IndexType.get()] * 3 + [
            ir.MemRefType.get(t.shape, t.element_type)
            for t in map(ir.RankedTensorType, [*(v.type for v in inputs), *fresh])
        ]
        name = _kernel_name(problem, schedule, types, in_place, _text(parts, inputs))
        module = _module_of(operation)
        if name not in ir.SymbolTable(module):
            with ir.InsertionPoint(module.regions[0].blocks[0]):
                kernel = func.FuncOp(name, (types, []), visibility="private")
            with ir.InsertionPoint(kernel.add_entry_block()):
                workgroup, memrefs = list(kernel.arguments)[:3], list(kernel.arguments)[3:]
                initial = memrefs[len(inputs) - 1] if state is not None else None
                computed = [
                    Computed(part, [Memory(memrefs[inputs.index(r.value)], r.map) for r in part.reads])
                    for part in parts
                ]
                memory = [(m.memref, m.map) for c in computed for m in c.memory]
                final_state = initial if in_place else memrefs[-1]
                o = memrefs[len(inputs)]
                operands = Operands(computed, o, final_state, initial, size_of(memory, y, 1))
                _kind(problem).Kernel(problem, schedule, workgroup, operands).build()
                func.ReturnOp([])
        with ir.InsertionPoint(operation):
            grid = [index(schedule.blocks(problem)), index(problem.states), batch]
            dynamic = ir.RankedTensorType(y).is_dynamic_dim
            sizes = [s for axis, s in enumerate((batch, time)) if dynamic(axis)]
            if not in_place and ir.RankedTensorType(final).is_dynamic_dim(0):
                sizes.append(batch)
            tied = [-1, len(inputs) - 1 if in_place else -1]
            made = launch(name, [y, final], grid, inputs, sizes, tied)
        for old, new in zip(operation.results, made.results, strict=True):
            old.replace_all_uses_with(new)
        operation.erase()
    return made


def _is_read_once(value: ir.Value) -> bool:
    """Tells whether one op reads a value; its sizes may be asked for besides."""
    readers = [use for use in value.uses if use.owner.operation.name != "tensor.dim"]
    return len(readers) == 1


def _as(value: ir.Value, kind: ir.Type) -> ir.Value:
    return value if value.type == kind else tensor.CastOp(kind, value).result


def size_of(reads: Sequence[tuple[ir.Value, ir.AffineMap | None]], y: ir.Type, axis: int) -> ir.Value:
    """Returns the size of the batch (axis 0) or of time (1): static if anything tells, else that of a tensor that is read."""
    ranked = ir.RankedTensorType(y)
    if not ranked.is_dynamic_dim(axis):
        return index(ranked.shape[axis])
    unit = ([int(i == axis) for i in range(4)], 0)
    found = []
    for value, map_ in reads:
        forms = [unit if i == axis else None for i in range(2)] if map_ is None else map(linear, map_.results)
        found += [(value, at) for at, form in enumerate(forms) if form == unit]
    known = [(v, at) for v, at in found if not ir.ShapedType(v.type).is_dynamic_dim(at)]
    return size(*(known or found)[0])


def _module_of(operation: ir.Operation) -> ir.Operation:
    while operation.name != "builtin.module":
        operation = operation.parent.operation
    return operation


def _text(parts: Sequence[Part], inputs: Sequence[ir.Value]) -> str:
    """Returns what tells kernels apart that differ only in what they compute."""
    read = [(part.name, [(inputs.index(r.value), str(r.map)) for r in part.reads]) for part in parts]
    return f"{read} {[_body_text(part.body) for part in parts if part.body is not None]}"


def _body_text(body: ir.Block) -> str:
    """Returns what a block computes; printing it would number and verify the whole module, each time."""
    numbers = {hash(argument): i for i, argument in enumerate(body.arguments)}
    lines = []
    for op in (view.operation for view in body.operations):
        assert not len(op.regions), "bodies are scalar ops"
        operands = [numbers[hash(value)] for value in op.operands]
        attributes = [f"{name} = {op.attributes[name]}" for name in op.attributes]
        lines.append(f"{op.name} {operands} {attributes} {[str(r.type) for r in op.results]}")
        numbers |= {hash(r): len(numbers) + i for i, r in enumerate(op.results)}
    return "; ".join(lines)


def _kernel_name(problem: Problem, schedule: Any, types: list[ir.Type], in_place: bool, parts: str) -> str:
    facts = f"{problem} {schedule} {in_place} {', '.join(map(str, types))} {parts}"
    digest = hashlib.sha256(facts.encode()).hexdigest()[:10]
    sizes = f"{problem.heads}x{problem.states}x{problem.key_size}x{problem.value_size}"
    return f"recurrence_{sizes}_{digest}"
