"""What is known of the integers of a counted loop's step: those that grow evenly from step to step.

The graph is one step in functional ATen ops. A counter is known at every step, and so is what is computed of it: positions,
index tensors that hold one position everywhere, and masks that are true at one position.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Position:
    """``stride * n + offset`` at step n; a tensor that is a position holds it in every element."""

    stride: int
    offset: int

    def range(self, steps: int) -> tuple[int, int]:
        """Returns the least and the greatest value over all steps."""
        ends = (self.offset, self.stride * (steps - 1) + self.offset)
        return min(ends), max(ends)


@dataclass(frozen=True)
class Ramp:
    """A tensor that counts up from ``start`` along its only axis longer than 1."""

    start: int


@dataclass(frozen=True)
class Spot:
    """A mask that is true at one position of its only axis longer than 1."""

    position: Position


Known = (
    Position | Ramp | Spot | bool
)  # bool: a question about positions that has the same answer at every step


def tensor_of(node: fx.Node) -> torch.Tensor:
    """Returns the fake tensor of a node."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


# What is known of a step's integers

_MOVES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten._to_copy.default,
        aten.to.dtype,
        aten.item.default,
        aten._local_scalar_dense.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.clone.default,
    }
)
# Ops that give one number everywhere: which of their arguments it is, or the number.
_FILLS: Mapping[Any, int] = {
    torch.tensor: 0,  # as Dynamo writes it
    aten.scalar_tensor.default: 0,
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
}
_NUMBERS: Mapping[Any, int] = {
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
}
_SUMS: Mapping[Any, int] = {
    aten.add.Tensor: 1,
    aten.add.Scalar: 1,
    operator.add: 1,
    aten.sub.Tensor: -1,
    aten.sub.Scalar: -1,
    operator.sub: -1,
}
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar, operator.mul)
_NEGATIONS = (aten.neg.default, operator.neg)
_REVERSED = (aten.rsub.Scalar, aten.rsub.Tensor)
_RAMPS = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_EQUAL = (aten.eq.Tensor, aten.eq.Scalar)
_QUESTIONS: Mapping[Any, Callable[[int], bool]] = {  # of the difference of two integers
    operator.lt: lambda x: x < 0,
    operator.le: lambda x: x <= 0,
    operator.gt: lambda x: x > 0,
    operator.ge: lambda x: x >= 0,
    operator.eq: lambda x: x == 0,
    operator.ne: lambda x: x != 0,
}


def positions(graph: fx.Graph, given: Mapping[fx.Node, Known], steps: int = 0) -> dict[fx.Node, Known]:
    """Returns what is known of the nodes of a step's graph, from what is known of its arguments.

    ``steps``: the number of steps, 0 where it is not known.
    """
    known = dict(given)
    for node in graph.nodes:
        if node.op == "call_function":
            found = _known(node, known)
            if found is None:
                found = _answered(node, known, steps)
            if found is not None:
                known[node] = found
    return known


def constant(tensor: torch.Tensor) -> Position | None:
    """Returns what a tensor of one integer is at every step."""
    if tensor.numel() != 1 or tensor.dtype not in (torch.int32, torch.int64):
        return None
    return Position(0, int(tensor.item()))


def number(value: Any, known: Mapping[fx.Node, Known]) -> Position | None:
    """Returns an argument of an op as a position, None where it is none."""
    if type(value) is int:
        return Position(0, value)
    found = known.get(value) if isinstance(value, fx.Node) else None
    return found if isinstance(found, Position) else None


def _known(node: fx.Node, known: Mapping[fx.Node, Known]) -> Known | None:
    target, args = node.target, node.args
    held = known.get(args[0]) if args and isinstance(args[0], fx.Node) else None
    if target in _MOVES and held is None:
        return None
    if target in _MOVES:
        whole = isinstance(held, Position) or count(node) == count(args[0])
        return held if whole and (_whole_number(node) or isinstance(held, Spot)) else None
    if target in _FILLS or target in _NUMBERS:
        value = _NUMBERS[target] if target in _NUMBERS else args[_FILLS[target]]
        return number(value, known) if _whole_number(node) else None
    if target in _RAMPS:
        start, _, step = (0, *args, 1) if len(args) == 1 else (*args, 1)[:3]
        return Ramp(start) if type(start) is int and step == 1 and _whole_number(node) else None
    if target in _EQUAL:
        return _spot(node, args[0], args[1], known) or _spot(node, args[1], args[0], known)
    return _computed(node, known)


def _answered(node: fx.Node, known: Mapping[fx.Node, Known], steps: int) -> Known | None:
    """Returns the answer to a question about integers; torch asks whether a slice is counted from the end."""
    target, args = node.target, node.args
    if target in (operator.and_, operator.or_):
        answers = [known.get(a) if isinstance(a, fx.Node) else None for a in args]
        strong = target is operator.or_
        if strong in answers:
            return strong
        return None if None in answers else not strong
    if target is torch.sym_ite:
        answer = known.get(args[0])
        return number(args[1 if answer else 2], known) if isinstance(answer, bool) else None
    if target not in _QUESTIONS:
        return None
    a, b = (number(x, known) for x in args)
    if a is None or b is None or (a.stride != b.stride and not steps):
        return None
    difference = Position(a.stride - b.stride, a.offset - b.offset)
    if target in (operator.eq, operator.ne) and difference.stride:
        low, high = difference.range(steps)
        return target is operator.ne if low > 0 or high < 0 else None
    first, last = (_QUESTIONS[target](x) for x in difference.range(max(steps, 1)))
    return first if first == last else None


def _spot(node: fx.Node, ramp: Any, at: Any, known: Mapping[fx.Node, Known]) -> Spot | None:
    held, position = known.get(ramp) if isinstance(ramp, fx.Node) else None, number(at, known)
    if not isinstance(held, Ramp) or position is None or count(node) != count(ramp):
        return None
    return Spot(Position(position.stride, position.offset - held.start))


def _computed(node: fx.Node, known: Mapping[fx.Node, Known]) -> Position | None:
    target = node.target
    operands = [number(a, known) for a in node.args]
    if not operands or None in operands or node.kwargs or not _whole_number(node):
        return None
    a, *rest = [x for x in operands if x is not None]
    if target in _NEGATIONS:
        return Position(-a.stride, -a.offset)
    if len(rest) != 1:
        return None
    b = rest[0]
    if target in _SUMS:
        sign = _SUMS[target]
        return Position(a.stride + sign * b.stride, a.offset + sign * b.offset)
    if target in _REVERSED:
        return Position(b.stride - a.stride, b.offset - a.offset)
    if target in _PRODUCTS and 0 in (a.stride, b.stride):
        return Position(a.stride * b.offset + b.stride * a.offset, a.offset * b.offset)
    return None


def count(node: Any) -> int:
    """Returns how many elements a node has; 1 for a number."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.numel() if isinstance(value, torch.Tensor) else 1


def _whole_number(node: fx.Node) -> bool:
    """Tells whether a node is an integer, or a tensor of such as can be positions."""
    value = node.meta.get("val", node.meta.get("example_value"))
    return not isinstance(value, torch.Tensor) or value.dtype in (torch.int32, torch.int64)
