"""lower-time-loop: ``time_loop`` becomes ``scf.for`` over tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import arith, scf, tensor

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext, source_line
from spikingbrain.passes.scan_invariants import hoist, outer_size, unstack

# IREE copies a tensor that a loop carries once in every iteration. Steps are therefore stacked in chunks, and the chunks
# in the whole: a row then costs copies of about two roots of the length in rows, instead of the length. Chunks are of static
# shape: with dynamic sizes in nested loops IREE 3.13 asks for sizes it cannot find, or, told them, takes one stack for another.
SHORT = 16  # steps; below this there is nothing to gain
CHUNK = 32  # steps, where the length is not known


@dataclass(frozen=True)
class LowerTimeLoop:
    """Lowers the general scan to loops that slice their inputs and insert their stacked results.

    In: ``spikingbrain_control.time_loop`` on builtin tensors, its body in any dialect. Out: scf and tensor. On a CPU
    through IREE each iteration costs one or two dispatches; recurrences of a known form should have been raised
    before. Raises UnsupportedOp where the size of a stacked result is only known once a step has run.
    """

    name: ClassVar[str] = "lower-time-loop"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in reversed(
            torch_ir.operations(module, "spikingbrain_control.time_loop")
        ):  # inner loops first
            hoist(op)
            op = unstack(op)
            with ir.InsertionPoint(op), op.location:
                results = _Loop(op).emit()
            for old, new in zip(op.results, results, strict=True):
                old.replace_all_uses_with(new)
            context.record(self, "lowered", op, "scf.for")
            op.erase()


class _Loop:
    """One loop on its way to scf."""

    def __init__(self, op: ir.Operation):
        self.op = op
        self.carried = op.attributes["carried"].value
        self.initial, self.scanned = list(op.operands)[: self.carried], list(op.operands)[self.carried :]
        self.reverse = op.attributes["reverse"].value
        self.block = op.regions[0].blocks[0]
        self.terminator = self.block.operations[len(self.block.operations) - 1].operation
        self.stacked = [ir.RankedTensorType(r.type) for r in list(op.results)[self.carried :]]
        self.steps = build.size(self.scanned[0], 0)
        self.zero, self.one = build.constant_index(0), build.constant_index(1)

    def emit(self) -> list[ir.Value]:
        """Emits the loops; returns the final and the stacked values."""
        rows = [self._row_sizes(i) for i in range(len(self.stacked))]
        stacks = [
            build.empty(type_, [*([self.steps] if type_.shape[0] < 0 else []), *sizes])
            for type_, sizes in zip(self.stacked, rows, strict=True)
        ]
        known = ir.RankedTensorType(self.scanned[0].type).shape[0]
        if not stacks or 0 <= known <= SHORT or any(rows):
            return self._steps(self.zero, self.steps, self.initial, stacks, self.zero)
        length = _chunk(known)
        even = known >= 0 and known % length == 0
        chunks = [ir.RankedTensorType.get([length, *list(t.shape)[1:]], t.element_type) for t in self.stacked]
        outer = scf.ForOp(self.zero, self.steps, build.constant_index(length), [*self.initial, *stacks])
        with ir.InsertionPoint(outer.body):
            first, values = outer.induction_variable, list(outer.inner_iter_args)
            count = build.constant_index(length)
            if not even:
                count = arith.minsi(count, arith.subi(self.steps, first))
            begin = first
            if self.reverse:
                begin = arith.subi(arith.subi(self.steps, first), count)
            emptied = [build.empty(type_, []) for type_ in chunks]
            made = self._steps(first, count, values[: self.carried], emptied, begin)
            for i in range(self.carried, len(made)):
                chunk = made[i] if even else _first_rows(made[i], count)
                made[i] = _insert(chunk, values[i], begin, [] if even else [count])
            scf.YieldOp(made)
        return list(outer.results)

    def _steps(
        self,
        first: ir.Value,
        count: ir.Value,
        carried: list[ir.Value],
        stacks: list[ir.Value],
        begin: ir.Value,
    ) -> list[ir.Value]:
        """Emits ``count`` steps from step ``first`` on; row 0 of ``stacks`` is that of time ``begin``."""
        loop = scf.ForOp(self.zero, count, self.one, [*carried, *stacks])
        with ir.InsertionPoint(loop.body):
            t = arith.addi(first, loop.induction_variable)
            if self.reverse:
                t = arith.subi(arith.subi(self.steps, self.one), t)
            row = arith.subi(t, begin)
            values = list(loop.inner_iter_args)
            arguments = values[: self.carried]
            arguments += [
                _slice(v, t, a.type)
                for v, a in zip(self.scanned, list(self.block.arguments)[self.carried :], strict=True)
            ]
            for argument, value in zip(self.block.arguments, arguments, strict=True):
                argument.replace_all_uses_with(value)
            anchor = scf.YieldOp([]).operation  # placeholder that keeps the block's end while ops move in
            for inner in [o.operation for o in self.block.operations][:-1]:
                inner.move_before(anchor)
            with ir.InsertionPoint(anchor):
                kept = list(self.terminator.operands)
                for i in range(self.carried, len(kept)):
                    kept[i] = _insert(kept[i], values[i], row, build.dynamic_sizes(kept[i]))
                scf.YieldOp(kept)
            anchor.erase()
        return list(loop.results)

    def _row_sizes(self, number: int) -> list[ir.Value]:
        """Emits the dynamic sizes of one step of a stacked result, in front of the loop."""
        value, sizes = self.terminator.operands[self.carried + number], []
        for axis, n in enumerate(ir.RankedTensorType(value.type).shape):
            if n < 0:
                size = outer_size(value, axis, self.op)
                if size is None:
                    raise UnsupportedOp(
                        f"scan stacks results of type {value.type} whose sizes are unknown before the first step",
                        where=source_line(self.op.location),
                        hint="make these sizes static, or those of a carried or scanned tensor",
                    )
                sizes.append(size)
        return sizes


def _chunk(steps: int) -> int:
    """Returns how many steps are stacked at a time: about the root of all, if possible a divisor."""
    if steps < 0:
        return CHUNK
    root = math.isqrt(steps - 1) + 1
    near = sorted(range(-(-root // 2), 2 * root + 1), key=lambda n: abs(n - root))
    return next((n for n in near if steps % n == 0), root)


def _slice(value: ir.Value, t: ir.Value, type_: ir.Type) -> ir.Value:
    """Emits the part of a scanned tensor at one time."""
    shape, dynamic = ir.RankedTensorType(value.type).shape, ir.ShapedType.get_dynamic_size()
    sizes = [1, *list(shape)[1:]]
    wanted = [build.size(value, d) for d, n in enumerate(sizes) if n == dynamic]
    offsets = [dynamic] + [0] * (len(sizes) - 1)
    return tensor.ExtractSliceOp(type_, value, [t], wanted, [], offsets, sizes, [1] * len(sizes)).result


def _first_rows(value: ir.Value, count: ir.Value) -> ir.Value:
    ranked, dynamic = ir.RankedTensorType(value.type), ir.ShapedType.get_dynamic_size()
    sizes = [dynamic, *list(ranked.shape)[1:]]
    type_ = ir.RankedTensorType.get(sizes, ranked.element_type)
    zeros, ones = [0] * len(sizes), [1] * len(sizes)
    return tensor.ExtractSliceOp(type_, value, [], [count], [], zeros, sizes, ones).result


def _insert(piece: ir.Value, stack: ir.Value, at: ir.Value, sizes: list[ir.Value]) -> ir.Value:
    """Emits the stack with a step, or a chunk of steps, written from ``at`` on; ``sizes`` are its dynamic ones."""
    rank, dynamic = len(ir.RankedTensorType(stack.type).shape), ir.ShapedType.get_dynamic_size()
    shape = list(ir.RankedTensorType(piece.type).shape)
    shape = [1] * (rank - len(shape)) + shape
    offsets = [dynamic] + [0] * (rank - 1)
    return tensor.InsertSliceOp(piece, stack, [at], sizes, [], offsets, shape, [1] * rank).result
