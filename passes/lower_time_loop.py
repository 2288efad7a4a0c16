"""lower-time-loop: ``time_loop`` becomes ``scf.for`` over tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import arith, scf, tensor

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext


@dataclass(frozen=True)
class LowerTimeLoop:
    """Lowers the general scan to a loop that slices its inputs and inserts its stacked results.

    In: ``spikingbrain_control.time_loop`` on builtin tensors, its body in any dialect. Out: scf and tensor. On a CPU
    through IREE each iteration costs one or two dispatches; recurrences of a known form should have been raised
    before.
    """

    name: ClassVar[str] = "lower-time-loop"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in reversed(
            torch_ir.operations(module, "spikingbrain_control.time_loop")
        ):  # inner loops first
            with ir.InsertionPoint(op), op.location:
                results = _loop(op)
            for old, new in zip(op.results, results, strict=True):
                old.replace_all_uses_with(new)
            context.record(self, "lowered", op, "scf.for")
            op.erase()


def _loop(op: ir.Operation) -> list[ir.Value]:
    carried = op.attributes["carried"].value
    initial, scanned = list(op.operands)[:carried], list(op.operands)[carried:]
    steps = build.size(scanned[0], 0)
    zero, one = build.constant_index(0), build.constant_index(1)
    stacks = [_stack(result, steps, scanned) for result in list(op.results)[carried:]]
    loop = scf.ForOp(zero, steps, one, [*initial, *stacks])
    body = op.regions[0].blocks[0]
    with ir.InsertionPoint(loop.body):
        t = loop.induction_variable
        if op.attributes["reverse"].value:
            t = arith.SubIOp(arith.SubIOp(steps, one).result, t).result
        arguments = list(loop.inner_iter_args)[:carried]
        arguments += [
            _slice(v, t, a.type) for v, a in zip(scanned, list(body.arguments)[carried:], strict=True)
        ]
        for argument, value in zip(body.arguments, arguments, strict=True):
            argument.replace_all_uses_with(value)
        operations = [o.operation for o in body.operations]
        terminator = operations.pop()
        anchor = scf.YieldOp([]).operation  # placeholder that keeps the block's end while ops move in
        for inner in operations:
            inner.move_before(anchor)
        with ir.InsertionPoint(anchor):
            yielded = list(terminator.operands)
            kept = yielded[:carried]
            for piece, current in zip(yielded[carried:], list(loop.inner_iter_args)[carried:], strict=True):
                kept.append(_insert(piece, current, t))
            scf.YieldOp(kept)
        anchor.erase()
    return list(loop.results)


def _stack(result: ir.Value, steps: ir.Value, scanned: list[ir.Value]) -> ir.Value:
    """Emits the empty stack of one result; sizes that are dynamic beyond time are those of the first scanned tensor."""
    shape, dynamic = ir.RankedTensorType(result.type).shape, ir.ShapedType.get_dynamic_size()
    sizes = []
    for d, n in enumerate(shape):
        if n == dynamic:
            sizes.append(steps if d == 0 else build.size(scanned[0], d))
    return build.empty(result.type, sizes)


def _slice(value: ir.Value, t: ir.Value, type_: ir.Type) -> ir.Value:
    offsets, sizes, dynamic_sizes = _row(value)
    return tensor.ExtractSliceOp(
        type_, value, [t], dynamic_sizes, [], offsets, sizes, [1] * len(sizes)
    ).result


def _insert(piece: ir.Value, stack: ir.Value, t: ir.Value) -> ir.Value:
    offsets, sizes, dynamic_sizes = _row(stack)
    return tensor.InsertSliceOp(piece, stack, [t], dynamic_sizes, [], offsets, sizes, [1] * len(sizes)).result


def _row(stack: ir.Value) -> tuple[list[int], list[int], list[ir.Value]]:
    """Returns the offsets, sizes and dynamic sizes of one step of ``stack``."""
    shape, dynamic = list(ir.RankedTensorType(stack.type).shape), ir.ShapedType.get_dynamic_size()
    sizes = [1, *shape[1:]]
    return (
        [dynamic] + [0] * (len(shape) - 1),
        sizes,
        [build.size(stack, d) for d, n in enumerate(sizes) if n == dynamic],
    )
