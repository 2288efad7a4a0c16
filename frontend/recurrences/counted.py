"""torch's ``while_loop`` over a counter, read as a loop over time.

Where the condition bounds a counter that grows by the same number at each step, the number of steps is known. Then what a
step reads at the counter is a token, and what it writes there, into an output that it hands on, is a value joined over
time. Everything else that is carried is a state.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from spikingbrain.frontend.checks import draws_random_numbers
from spikingbrain.frontend.recurrences.accesses import Access, read, write
from spikingbrain.frontend.recurrences.hops import NotALoop, refuse_autocast
from spikingbrain.frontend.recurrences.positions import (
    Known,
    Position,
    constant,
    number,
    positions,
    tensor_of,
)

aten = torch.ops.aten
WHILE_LOOP = torch.ops.higher_order.while_loop

_CONSTANT = "constant"  # in a placeholder's meta: the tensor that a constant of an exported program is

_COMPARISONS: Mapping[Any, str] = {
    getattr(aten, name).Scalar: name for name in ("lt", "le", "gt", "ge", "ne")
} | {getattr(operator, name): name for name in ("lt", "le", "gt", "ge", "ne")}
_WRAPPED = (aten.view.default, aten.reshape.default, aten.squeeze.default, aten.all.default, aten.any.default)


def note_constants(program: ExportedProgram) -> None:
    """Notes which placeholders of an exported program are constants, such as the number at which a counter starts."""
    held = program.graph_signature.inputs_to_lifted_tensor_constants
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in held:
            node.meta[_CONSTANT] = program.constants[held[node.name]]


@dataclass
class Counted:
    """A counted loop: its step as a graph of functional ATen ops, and what each of its arguments is.

    Attributes:
        outer: what the arguments are before the first step, nodes or numbers; the carried ones come first.
        given, results: the arguments and the next values of those carried.
        known: positions of the step's graph, by node.
        counters: the carried values that count.
        kept: arguments that no step changes.
        written: carried outputs, with the write into each.
        reads: the nodes that read a token.
    """

    step: fx.GraphModule
    mode: FakeTensorMode
    outer: list[Any]
    given: list[fx.Node]
    results: list[Any]
    steps: int
    counters: dict[int, Position]
    kept: set[int] = field(default_factory=set)
    known: dict[fx.Node, Known] = field(default_factory=dict)
    written: dict[int, Access] = field(default_factory=dict)
    reads: dict[fx.Node, Access] = field(default_factory=dict)

    @property
    def states(self) -> list[int]:
        other = {*self.counters, *self.kept, *self.written}
        return [i for i in range(len(self.results)) if i not in other]


def counted_loop(module: fx.GraphModule, node: fx.Node, keep_detach: bool) -> Counted:
    """Reads a ``while_loop``; raises NotALoop where its steps are not counted."""
    refuse_autocast(node)
    condition, body, carried, closed_over = node.args
    if node.kwargs:
        raise NotALoop("it writes into what it closes over")
    outer = [*carried, *closed_over]
    test, step = (getattr(module, str(f.target)) for f in (condition, body))
    if keep_detach and _has_gradients_of_its_own(step):
        raise NotALoop("a function with a gradient of its own inside it")
    around = _outside(module)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    test, step = (_traced(f, outer, len(carried), mode, keep_detach) for f in (test, step))
    if any(_writes(n) or draws_random_numbers(n) for n in step.graph.nodes):
        raise NotALoop("its step writes into what it closes over, or draws random numbers")

    given = step.graph.find_nodes(op="placeholder")
    results = list(step.graph.output_node().args[0])
    counters = {}
    for i, result in enumerate(results):
        position = _counter(step.graph, given[i], result, number(outer[i], around))
        if position is not None:
            counters[i] = position
    loop = Counted(step, mode, outer, given, results, _steps(test, counters), counters)
    loop.kept = {i for i, r in enumerate(results) if r is given[i]} | set(range(len(results), len(given)))
    known: dict[fx.Node, Known] = {given[i]: p for i, p in counters.items()}
    known |= {given[i]: around[outer[i]] for i in loop.kept if outer[i] in around}
    loop.known = positions(step.graph, known, loop.steps)
    _find_accesses(loop)
    if not loop.states:
        raise NotALoop("it carries no state")
    return loop


# The step as ATen ops


def _traced(
    function: fx.GraphModule, outer: Sequence[Any], carried: int, mode: FakeTensorMode, keep_detach: bool
) -> fx.GraphModule:
    """Returns condition or body as functional ATen ops on tensors of known sizes; carried integers come as tensors."""
    counts = [i for i in range(carried) if type(outer[i]) is int]
    with mode:
        examples = [
            torch.zeros((), dtype=torch.int64) if i in counts else _example(x) for i, x in enumerate(outer)
        ]

    def run(*arguments: Any) -> Any:
        return function(*(a.item() if i in counts else a for i, a in enumerate(arguments)))

    try:
        with mode, torch.no_grad():
            traced = make_fx(run, pre_dispatch=True)(*examples)
            if any(map(_writes, traced.graph.nodes)):
                traced = make_fx(functionalize(run))(*examples)
    except Exception as stop:  # whatever stops torch: the loop stays as it is, and torch runs it
        raise NotALoop(f"its step is not traced: {type(stop).__name__}") from None
    _simplify(traced.graph, keep_detach)
    return traced


def _example(value: Any) -> Any:
    if isinstance(value, fx.Node):
        value = value.meta.get("val", value.meta.get("example_value"))
    sizes = [*value.shape, *value.stride()] if isinstance(value, torch.Tensor) else [value]
    if any(isinstance(size, torch.SymInt) for size in sizes):
        raise NotALoop("sizes that are symbols")
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


_COPIES = (aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default)


def _simplify(graph: fx.Graph, keep_detach: bool) -> None:
    """Removes what only copies, or takes or writes a whole tensor as a slice of itself."""
    for node in list(graph.nodes):
        same = None
        if (
            node.target in _COPIES
            or (node.target is aten.detach.default and not keep_detach)
            or (node.target is aten.slice.Tensor and _same_shape(node, node.args[0]))
        ):
            same = node.args[0]
        elif node.target is aten.slice_scatter.default and _same_shape(node, node.args[1]):
            same = node.args[1] if tensor_of(node.args[1]).dtype == tensor_of(node).dtype else None
        if same is not None:
            node.replace_all_uses_with(same)
    graph.eliminate_dead_code()


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    shapes = [tensor_of(n).shape for n in (a, b)]  # the size of a slice at a counter may be a symbol
    return all(type(size) is int for shape in shapes for size in shape) and shapes[0] == shapes[1]


def _has_gradients_of_its_own(function: fx.GraphModule) -> bool:
    names = {str(getattr(n.target, "__name__", n.target)) for n in function.graph.nodes}
    return bool(names & {"autograd_function_apply", "_set_grad_enabled"})


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


# Counters and the number of steps


def _counter(graph: fx.Graph, before: fx.Node, after: Any, start: Position | None) -> Position | None:
    """Returns a carried value as a position, if it starts at a number and grows by another at each step."""
    if start is None:
        return None
    value = number(after, positions(graph, {before: Position(1, 0)}))
    return Position(value.offset, start.offset) if value and value.stride == 1 and value.offset else None


def _outside(module: fx.GraphModule) -> dict[fx.Node, Known]:
    """Returns what is known of the integers around the loop."""
    given: dict[fx.Node, Known] = {}
    for node in module.graph.nodes:
        held = node.meta.get(_CONSTANT)
        if node.op == "get_attr":
            held = getattr(module, str(node.target), None)
        found = constant(held) if type(held) is torch.Tensor else None
        if found:
            given[node] = found
    return positions(module.graph, given)


def _steps(test: fx.GraphModule, counters: Mapping[int, Position]) -> int:
    """Returns after how many steps the condition is false."""
    arguments = test.graph.find_nodes(op="placeholder")
    known = positions(test.graph, {arguments[i]: p for i, p in counters.items()})
    condition = test.graph.output_node().args[0]
    while isinstance(condition, fx.Node) and condition.target in _WRAPPED:
        condition = condition.args[0]
    name = _COMPARISONS.get(condition.target) if isinstance(condition, fx.Node) else None
    sides = [number(x, known) for x in condition.args] if name else []
    if name is None or len(sides) != 2 or sides[0] is None or sides[1] is None:
        raise NotALoop("its condition is more than a counter held against a number")
    stride, offset = sides[0].stride - sides[1].stride, sides[0].offset - sides[1].offset
    if name in ("gt", "ge"):
        stride, offset = -stride, -offset
    if name == "ne":
        steps, rest = divmod(-offset, stride) if stride else (-1, 0)
        if rest or steps < 0:
            raise NotALoop("its condition never fails")
        return steps
    offset -= name in ("le", "ge")  # whole numbers: a <= b is a - 1 < b
    if offset < 0 and stride <= 0:
        raise NotALoop("its condition never fails")
    return max(0, -(offset // stride)) if offset < 0 else 0


# What the steps read and write


def _find_accesses(loop: Counted) -> None:
    if not loop.steps:
        raise NotALoop("it makes no step")
    for i, result in enumerate(loop.results):
        if i in loop.counters or i in loop.kept or not isinstance(result, fx.Node):
            continue
        place = write(result, loop.known)
        used = [*loop.given[i].users, *result.users]
        only = loop.results.count(result) == 1 and used == [result, loop.step.graph.output_node()]
        if place and place.tensor is loop.given[i] and only:
            loop.written[i] = _inside(place, loop.steps, "writes")
    kept = {loop.given[i] for i in loop.kept}
    for node in loop.step.graph.nodes:
        place = read(node, loop.known)
        if place and place.tensor in kept:
            loop.reads[node] = _inside(place, loop.steps, "reads")


def _inside(place: Access, steps: int, what: str) -> Access:
    """Returns an access whose positions are counted from the front; raises NotALoop where they leave the axis."""
    size = tensor_of(place.tensor).shape[place.dim]
    low, high = place.position.range(steps)
    if -size <= low and high < 0 and place.width == 1:
        position = Position(place.position.stride, place.position.offset + size)
        place, low, high = replace(place, position=position), low + size, high + size
    if low < 0 or high + place.width > size:
        raise NotALoop(f"it {what} positions {low} to {high + place.width - 1} of an axis of {size}")
    if place.width > 1 and abs(place.position.stride) != place.width:
        raise NotALoop(f"it {what} {place.width} entries at once and moves on by {place.position.stride}")
    return place
