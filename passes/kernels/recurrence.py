"""CPU kernels for ``spikingbrain.linear_recurrence``, built over scf, vector and memref.

This module chooses between schedules, plans their blocks and replaces the op by a launch:

* ``recurrence_blocked``, without a rank-one part. Time is cut into short chunks, whose keys, queries and values are
  copied to scratch. Tiles of the state stay in registers for a whole chunk: two multiplications per entry of the state
  and token are all the arithmetic, whatever the chunk's length, and there is no tail of time. Decays are moved from the
  state to keys and queries where their products can be inverted, as a check at run time tells; elsewhere the
  state is multiplied by each of them.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import func

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes import linalg_build
from spikingbrain.passes.kernels.builders import LINE_BYTES, has_fma, index, launch, size
from spikingbrain.passes.kernels.recurrence_base import SCRATCH_BYTES
from spikingbrain.passes.kernels.recurrence_blocked import BlockedKernel, scratch_shapes
from spikingbrain.target import Target

INPUTS = ("q", "k", "v", "decay", "erase", "predict", "bonus")


@dataclass(frozen=True)
class Problem:
    """The static facts of a recurrence."""

    heads: int
    states: int
    key_size: int
    value_size: int
    decay_axis: str
    log_decay: bool
    exclusive: bool
    reverse: bool
    rank_one: bool
    bonus: bool
    time: int | None

    @property
    def group(self) -> int:
        return self.heads // self.states


@dataclass(frozen=True)
class Schedule:
    """How one recurrence is blocked for one target.

    Attributes:
        lanes: values per vector.
        rows: rows of the state held in registers.
        vectors: vectors of each of them.
        tokens: steps that one such tile takes at a time.
        columns: value columns of a workgroup; divides the value size.
        fused: whether the target multiplies and adds in one instruction.
    """

    lanes: int
    rows: int
    vectors: int
    tokens: int
    columns: int
    fused: bool


def emit_recurrence_launch(op: Any, target: Target) -> ir.Operation:
    """Replaces a ``spikingbrain.linear_recurrence`` op by the launch of a kernel for ``target``; returns the launch.

    The kernel function is created at the end of the module unless an equal one exists. The final state is tied to the
    state: written in its memory where nothing uses it afterwards, else in a copy. Raises UnsupportedOp, with the module
    unchanged, when the target has no vectors or the op is of a kind that the kernels do not handle.
    """
    problem = _problem_of(op)
    schedule = plan(problem, target)
    operation = op.operation
    module = operation
    while module.name != "builtin.module":
        module = module.parent.operation
    with operation.context, operation.location:
        with ir.InsertionPoint(operation):
            batch, time = (size(op.q, axis) for axis in (0, 1))
            sizes = linalg_build.dynamic_sizes(op.q)
            state = op.state
            if state is None:
                kind = ir.RankedTensorType(op.final_state.type)
                state = linalg_build.filled(kind, [batch] if kind.is_dynamic_dim(0) else [], 0.0)
        operands = {name: value for name in INPUTS if (value := getattr(op, name)) is not None}
        operands |= {"state": state, "o": op.o}
        types = [ir.IndexType.get()] * 3 + [
            ir.MemRefType.get(t.shape, t.element_type)
            for t in (ir.RankedTensorType(v.type) for v in operands.values())
        ]
        name = _kernel_name(problem, schedule, types)
        if name not in ir.SymbolTable(module):
            with ir.InsertionPoint(module.regions[0].blocks[0]):
                kernel = func.FuncOp(name, (types, []), visibility="private")
            with ir.InsertionPoint(kernel.add_entry_block()):
                (*workgroup,) = kernel.arguments[:3]
                memrefs = dict(zip(operands, list(kernel.arguments)[3:], strict=True))
                BlockedKernel(problem, schedule, workgroup, memrefs).build()
                func.ReturnOp([])
        with ir.InsertionPoint(operation):
            grid = [index(problem.value_size // schedule.columns), index(problem.states), batch]
            inputs = list(operands.values())[:-1]
            dynamic = ir.RankedTensorType(op.o.type).is_dynamic_dim
            sizes = [s for axis, s in enumerate((batch, time)) if dynamic(axis)]
            types = [op.o.type, state.type]
            result = launch(name, types, grid, inputs, sizes, tied=[-1, len(inputs) - 1])
        op.o.replace_all_uses_with(result.results[0])
        op.final_state.replace_all_uses_with(result.results[1])
        operation.erase()
    return result


def plan(problem: Problem, target: Target) -> Schedule:
    """Returns the blocking for an op. Raises UnsupportedOp when the kernels cannot serve it or the target."""
    lanes = target.vector_lanes_f32
    if lanes < 4:
        raise UnsupportedOp(
            f"no recurrence kernel for target {target.name!r}",
            why="it has no vector registers",
            hint="the portable form",
        )
    many = target.vector_registers >= 32
    tokens = min(16, problem.time or 16)
    for parts in (n for n in range(1, problem.value_size + 1) if problem.value_size % n == 0):
        columns = problem.value_size // parts
        if parts > 1 and columns < lanes:
            break
        fitting = next(
            (n for n in (16, 12, 8, 6, 4, 2, 1) if n <= max(tokens, 1) and _fits(problem, n, columns)), 0
        )
        if fitting >= min(tokens, 4):
            return Schedule(
                lanes=lanes,
                rows=4,
                vectors=4 if many else 2,
                tokens=fitting,
                columns=columns,
                fused=has_fma(target),
            )
    raise UnsupportedOp(
        f"no recurrence kernel for states of {problem.key_size}x{problem.value_size}",
        why=f"a few tokens exceed {SCRATCH_BYTES} bytes of scratch",
        hint="the portable form",
    )


def _fits(problem: Problem, tokens: int, columns: int) -> bool:
    shapes = scratch_shapes(problem, tokens, columns).values()
    return sum(math.prod(shape) * 4 + LINE_BYTES for shape in shapes) + LINE_BYTES <= SCRATCH_BYTES - 4096


def _problem_of(op: Any) -> Problem:
    q, v = (ir.RankedTensorType(value.type) for value in (op.q, op.v))
    if str(q.element_type) != "f32":
        raise UnsupportedOp(
            "no recurrence kernel for this element type",
            why=f"values must be f32, not {q.element_type}",
            hint="the portable form",
        )
    states = ir.RankedTensorType(op.k.type).shape[2]
    sizes = [q.shape[2], states, q.shape[3], v.shape[3]]
    if ir.ShapedType.get_dynamic_size() in sizes or 0 in sizes:
        raise UnsupportedOp("no recurrence kernel for a dynamic number or size of heads", hint="static sizes")
    if op.erase is not None:
        raise UnsupportedOp("no recurrence kernel for a rank-one part", hint="the portable form")
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


def _kernel_name(problem: Problem, schedule: Schedule, types: list[ir.Type]) -> str:
    facts = f"{problem} {schedule} {', '.join(map(str, types))}"
    digest = hashlib.sha256(facts.encode()).hexdigest()[:10]
    sizes = f"{problem.heads}x{problem.states}x{problem.key_size}x{problem.value_size}"
    return f"recurrence_{sizes}_{digest}"
