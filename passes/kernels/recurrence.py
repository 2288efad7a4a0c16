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

from collections.abc import Sequence
from typing import Any

from torch_mlir import ir

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes.dialect_fused import OPERANDS, SUM, FusedRecurrence, Part, Read
from spikingbrain.passes.kernels import recurrence_blocked, recurrence_sequential
from spikingbrain.passes.kernels.builders import index
from spikingbrain.passes.kernels.recurrence_base import Problem, fused_problem_of, problem_of
from spikingbrain.passes.kernels.recurrence_launch import Result, cast, is_read_once, launch_kernel, size_of
from spikingbrain.passes.wave_kernels import recurrence_blocks, recurrence_steps
from spikingbrain.target import Target


def emit_recurrence_launch(op: Any, target: Target) -> None:
    """Replaces a ``spikingbrain.linear_recurrence`` op by the launch of a kernel for ``target``, or of two.

    The kernel function is created in the module unless an equal one exists. A state that nothing else reads is updated in
    place; any other, and zeros, the kernel writes to new memory first. (Two launches tied to one value are not safe: with
    dynamic sizes IREE 3.13 lets the second read what the first wrote; ``test_states_that_others_read`` fails if a state
    is tied regardless.) Raises UnsupportedOp, with the module
    unchanged, when the target has neither vectors nor waves, or the op is of a kind that the kernels do not handle.
    """
    named = {name: value for name in OPERANDS if (value := getattr(op, name)) is not None}
    with op.operation.context:
        of_bonus = ir.AffineMap.get(4, 0, [ir.AffineDimExpr.get(2), ir.AffineDimExpr.get(3)])
    parts = [
        Part(name, [Read(value, of_bonus if name == "bonus" else None)]) for name, value in named.items()
    ]
    _emit(op.operation, problem_of(op), parts, op.state, target)


def emit_fused_launch(fused: FusedRecurrence, target: Target) -> None:
    """Replaces a ``fused_recurrence`` op by the launch of a kernel, as ``emit_recurrence_launch`` does."""
    _emit(fused.op, fused_problem_of(fused), fused.parts, fused.state, target)


def blocks_of(problem: Problem, target: Target) -> int:
    """Returns how many workgroups share a state. Raises UnsupportedOp where there is no kernel."""
    blocks: int = _schedule(problem, target).blocks(problem)
    return blocks


def _schedule(problem: Problem, target: Target) -> Any:
    return _kind(problem, target).plan(problem, target)


def _kind(problem: Problem, target: Target) -> Any:
    """Returns the module of the kernels that serve a recurrence."""
    if target.wave_kernels:
        return recurrence_blocks if recurrence_blocks.serves(problem) else recurrence_steps
    return recurrence_sequential if problem.rank_one else recurrence_blocked


def _emit(
    operation: ir.Operation, problem: Problem, parts: Sequence[Part], state: ir.Value | None, target: Target
) -> None:
    kind, schedule = _kind(problem, target), _schedule(problem, target)
    if schedule.blocks(problem) > 1 and any(part.name == SUM for part in parts):
        raise UnsupportedOp(
            "no recurrence kernel that sums over rows of its outputs here",
            why=f"{schedule.blocks(problem)} workgroups share a row",
            hint="the sums apart",
        )
    y, final = (r.type for r in operation.results)
    reads = [(read.value, read.map) for part in parts for read in part.reads]
    in_place = state is not None and state not in [value for value, _ in reads] and is_read_once(state)
    with operation.context, operation.location, ir.InsertionPoint(operation):
        batch, time = (size_of(reads, y, axis) for axis in (0, 1))
        if state is not None:
            state = cast(state, final)
        made = Result(final, [batch], in_place)
        outputs = Result(y, [batch, time])
        if kind is recurrence_blocks:
            results = recurrence_blocks.launch(problem, schedule, parts, state, outputs, made)
        else:
            grid = [index(schedule.blocks(problem)), index(problem.states), batch]
            threads = schedule.threads if target.wave_kernels else 0
            results = launch_kernel(
                problem, schedule, kind.Kernel, parts, state, [outputs, made], grid, threads
            )
        for old, new in zip(operation.results, results, strict=True):
            old.replace_all_uses_with(new)
        operation.erase()
