"""From the linalg ops of a loop's body to scalar ops at one point of the space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes import torch_ir
from spikingbrain.passes.scan_axes import (
    BROADCAST,
    CONSTANT,
    EMPTY,
    FILL,
    GENERIC,
    RESHAPES,
    TRANSPOSE,
    Axes,
    NotPointwise,
    inputs_of,
    is_inside,
    name_of,
    uniform,
)

_SAME_POINT = (TRANSPOSE, BROADCAST, "tensor.cast", *RESHAPES)


@dataclass
class Invariants:
    """The tensors from outside that a body reads, each with its place in the space; one entry for all uses alike."""

    axes: Axes
    block: ir.Block
    entries: list[tuple[ir.Value, tuple[int | None, ...]]] = field(default_factory=list)

    def position(self, value: ir.Value, user: ir.Operation, operand: int) -> int:
        """Returns the number of the entry for a use."""
        entry = (value, tuple(self.axes.place((user, operand), value.type)))
        if entry not in self.entries:
            self.entries.append(entry)
        return self.entries.index(entry)


def reads(op: ir.Operation) -> list[int]:
    """Returns the numbers of the operands whose elements an op reads."""
    if op.name in (GENERIC, TRANSPOSE, BROADCAST):
        return list(range(len(inputs_of(op))))
    return [0] if op.name in _SAME_POINT else []


def find_invariants(axes: Axes, block: ir.Block) -> Invariants:
    """Returns what the body reads from outside, constants left out; raises NotPointwise for what it cannot read."""
    found = Invariants(axes, block)
    *ops, terminator = [o.operation for o in block.operations]
    for op in ops:
        _check(op, block)
        for i in reads(op):
            value = op.operands[i]
            if not is_inside(value, block) and uniform(value) is None:
                found.position(value, op, i)
        for result in op.results:
            if op.name not in (EMPTY, FILL, CONSTANT):
                axes.place(result, result.type)
    for i, value in enumerate(terminator.operands):
        if not is_inside(value, block) and uniform(value) is None:
            found.position(value, terminator, i)
        elif is_inside(value, block) and uniform(value) is None:
            axes.place(name_of(value, block, terminator, i), value.type)
    return found


def _check(op: ir.Operation, block: ir.Block) -> None:
    if op.name == FILL and uniform(op.results[0]) is None:
        raise NotPointwise("a tensor is filled with a value that is no constant")
    if op.name != GENERIC:
        return
    inner = op.regions[0].blocks[0]
    count = len(inputs_of(op))
    for i, argument in enumerate(list(inner.arguments)[count:]):
        if list(argument.uses) and uniform(op.operands[count + i]) is None:
            raise NotPointwise("an op reads what it writes")
    for scalar in inner.operations:
        scalar = scalar.operation
        if any(True for _ in scalar.regions) or scalar.name in ("linalg.index", "tensor.extract"):
            raise NotPointwise(f"{scalar.name} within an elementwise op")
        for value in scalar.operands:
            owner = value.owner
            local = owner == inner if isinstance(owner, ir.Block) else owner.operation.block == inner
            if not local and torch_ir.defining(value, CONSTANT) is None:
                raise NotPointwise("an elementwise op reads a number that is no constant")


def emit_body(
    block: ir.Block, arguments: Sequence[ir.Value], invariants: Invariants, first_invariant: int
) -> list[ir.Value]:
    """Emits the body at the insertion point on scalars; returns what it yields.

    ``arguments`` are scalars for the block's arguments, then for the invariants, which begin at ``first_invariant``.
    """
    values = dict(zip(block.arguments, arguments, strict=False))

    def read(value: ir.Value, user: ir.Operation, operand: int) -> ir.Value:
        if value in values:
            return values[value]
        if (constant := uniform(value)) is not None:
            return arith.ConstantOp(ir.RankedTensorType(value.type).element_type, constant).result
        return arguments[first_invariant + invariants.position(value, user, operand)]

    *ops, terminator = [o.operation for o in block.operations]
    for op in ops:
        if op.name == GENERIC:
            count, inner = len(inputs_of(op)), op.regions[0].blocks[0]
            used = [
                i for i, a in enumerate(inner.arguments) if i < count or list(a.uses)
            ]  # an initial result counts where it is read
            given = {inner.arguments[i]: read(op.operands[i], op, i) for i in used}
            values.update(zip(op.results, inline(inner, given), strict=True))
        elif op.name in _SAME_POINT:
            values[op.results[0]] = read(op.operands[0], op, 0)
    return [read(v, terminator, i) for i, v in enumerate(terminator.operands)]


def inline(block: ir.Block, values: dict[ir.Value, ir.Value]) -> list[ir.Value]:
    """Emits copies of scalar ops; constants from outside are made anew.

    Assertions stay behind: torch-mlir asserts that it takes no reciprocal of 0, which is infinite in torch.
    """

    def scalar(value: ir.Value) -> ir.Value:
        if value not in values:
            constant = torch_ir.defining(value, CONSTANT)
            assert constant is not None
            values[value] = constant.clone().results[0]
        return values[value]

    *ops, terminator = [o.operation for o in block.operations]
    for op in ops:
        if op.name == "cf.assert":
            continue
        operands = [scalar(v) for v in op.operands]
        made = op.clone()
        for i, operand in enumerate(operands):
            made.operands[i] = operand
        values.update(zip(op.results, made.results, strict=True))
    return [scalar(v) for v in terminator.operands]
