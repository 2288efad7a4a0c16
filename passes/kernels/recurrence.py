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
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import func, tensor

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes.kernels import recurrence_blocked, recurrence_sequential
from spikingbrain.passes.kernels.builders import index, launch, size
from spikingbrain.passes.kernels.recurrence_base import Problem
from spikingbrain.target import Target

OPERANDS = ("q", "k", "v", "decay", "erase", "predict", "bonus")


def emit_recurrence_launch(op: Any, target: Target) -> ir.Operation:
    """Replaces a ``spikingbrain.linear_recurrence`` op by the launch of a kernel for ``target``; returns the launch.

    The kernel function is created in the module unless an equal one exists. A state that nothing else reads is updated in
    place; any other, and zeros, the kernel writes to new memory first. (Two launches tied to one value are not safe: with
    dynamic sizes IREE 3.13 lets the second read what the first wrote; ``test_states_that_others_read`` fails if a state
    is tied regardless.) Raises UnsupportedOp, with the module
    unchanged, when the target has no vectors or the op is of a kind that the kernels do not handle.
    """
    problem = _problem_of(op)
    kind = recurrence_sequential if problem.rank_one else recurrence_blocked
    schedule: Any = kind.plan(problem, target)
    operation = op.operation
    module = operation
    while module.name != "builtin.module":
        module = module.parent.operation
    with operation.context, operation.location:
        with ir.InsertionPoint(operation):
            batch, time = (size(op.q, axis) for axis in (0, 1))
            operands = {name: value for name in OPERANDS if (value := getattr(op, name)) is not None}
            if op.state is not None:
                operands["initial"] = _initial_state(op)
            in_place = op.state is not None and _is_read_once(op.state)
        fresh = [op.o] if in_place else [op.o, op.final_state]
        types = [ir.IndexType.get()] * 3 + [
            ir.MemRefType.get(t.shape, t.element_type)
            for t in (ir.RankedTensorType(v.type) for v in [*operands.values(), *fresh])
        ]
        name = _kernel_name(problem, schedule, types, in_place)
        if name not in ir.SymbolTable(module):
            with ir.InsertionPoint(module.regions[0].blocks[0]):
                kernel = func.FuncOp(name, (types, []), visibility="private")
            with ir.InsertionPoint(kernel.add_entry_block()):
                workgroup, memrefs = list(kernel.arguments)[:3], list(kernel.arguments)[3:]
                names = [*operands, "o", "state"][: len(memrefs)]
                named = dict(zip(names, memrefs, strict=True))
                if in_place:
                    named["state"] = named.pop("initial")
                body = kind.Kernel(problem, schedule, workgroup, named)
                body.in_place = in_place
                body.build()
                func.ReturnOp([])
        with ir.InsertionPoint(operation):
            grid = [index(schedule.blocks(problem)), index(problem.states), batch]
            dynamic = ir.RankedTensorType(op.o.type).is_dynamic_dim
            sizes = [s for axis, s in enumerate((batch, time)) if dynamic(axis)]
            if not in_place and ir.RankedTensorType(op.final_state.type).is_dynamic_dim(0):
                sizes.append(batch)
            results = [op.o.type, op.final_state.type]
            tied = [-1, len(operands) - 1 if in_place else -1]
            made = launch(name, results, grid, list(operands.values()), sizes, tied)
        op.o.replace_all_uses_with(made.results[0])
        op.final_state.replace_all_uses_with(made.results[1])
        operation.erase()
    return made


def _is_read_once(value: ir.Value) -> bool:
    """Tells whether one op reads a value; its sizes may be asked for besides."""
    readers = [use for use in value.uses if use.owner.operation.name != "tensor.dim"]
    return len(readers) == 1


def _initial_state(op: Any) -> ir.Value:
    """Returns the op's state as the type of its result."""
    kind = ir.RankedTensorType(op.final_state.type)
    return op.state if op.state.type == kind else tensor.CastOp(kind, op.state).result


def _problem_of(op: Any) -> Problem:
    q, k, v = (ir.RankedTensorType(value.type) for value in (op.q, op.k, op.v))
    if str(q.element_type) != "f32":
        raise UnsupportedOp(
            "no recurrence kernel for this element type",
            why=f"values must be f32, not {q.element_type}",
            hint="the portable form",
        )
    sizes = [q.shape[2], k.shape[2], q.shape[3], v.shape[3]]
    if any(n <= 0 for n in sizes):
        raise UnsupportedOp(
            "no recurrence kernel for a dynamic or empty state",
            why=f"q is {q}, v is {v}",
            hint="static sizes of heads",
        )
    return Problem(
        heads=sizes[0],
        states=sizes[1],
        key_size=sizes[2],
        value_size=sizes[3],
        decay_axis=op.decay_axis.value,
        log_decay=bool(op.log_decay.value),
        exclusive=bool(op.exclusive.value),
        reverse=bool(op.reverse.value),
        rank_one=op.erase is not None,
        bonus=op.bonus is not None,
        time=None if q.is_dynamic_dim(1) else q.shape[1],
    )


def _kernel_name(problem: Problem, schedule: Any, types: list[ir.Type], in_place: bool) -> str:
    facts = f"{problem} {schedule} {in_place} {', '.join(map(str, types))}"
    digest = hashlib.sha256(facts.encode()).hexdigest()[:10]
    sizes = f"{problem.heads}x{problem.states}x{problem.key_size}x{problem.value_size}"
    return f"recurrence_{sizes}_{digest}"
