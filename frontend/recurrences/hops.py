"""torch's ``scan`` as a loop for the analysis: its body is one step, already rolled up."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from spikingbrain.frontend.recurrences.adapter import adapt
from spikingbrain.frontend.recurrences.functional import NotFunctional, functionalise
from spikingbrain.passes.recurrence.form import Carry, Loop, Stacked, Token
from spikingbrain.passes.recurrence.graph import Value
from spikingbrain.passes.recurrence.normalise import normalise


class NotALoop(Exception):
    """Raised where a scan is not read as a loop; says why."""


def scans(graph: fx.Graph) -> list[fx.Node]:
    """Returns the calls of ``scan`` in a graph."""
    return [n for n in graph.nodes if n.target is torch.ops.higher_order.scan]


def loop_of_scan(module: fx.GraphModule, node: fx.Node, keep_detach: bool) -> Loop:
    """Returns a ``scan`` of a functional graph as a loop whose joined and final values are its results."""
    refuse_autocast(node)
    body_node, initial, sequences, outside = node.args
    body = getattr(module, str(body_node.target))
    if not sequences:
        raise NotALoop("it reads no sequence")
    given = [*initial, *sequences, *outside]
    numbers = {i: n for i, n in enumerate(given) if type(n) in (int, float)}
    body = with_numbers(body, numbers)
    outside = [n for i, n in enumerate(outside, len(given) - len(outside)) if i not in numbers]
    if not all(isinstance(n, fx.Node) for n in [*initial, *outside]):
        raise NotALoop("it closes over symbols")
    if any(isinstance(s, torch.SymInt) for n in [*initial, *outside] for s in _shape(n)):
        raise NotALoop("sizes that are symbols")
    values, results = _body(body, keep_detach)

    count = len(initial)
    place = {v.literals: v for v in values if v.op == "input"}
    new: dict[Value, Value] = {}
    before, tokens, invariants = [], {}, []
    for i, placeholder in enumerate(body.graph.find_nodes(op="placeholder")):
        v = place.get((placeholder.name,))
        value = placeholder.meta.get("example_value", placeholder.meta.get("val"))
        shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        if i < count:
            stand_in = Value("carried", [], (), shape, dtype, ())
            before.append(stand_in)
        elif i < count + len(sequences):
            stand_in = Value("token", [], (), shape, dtype, ())
            tokens[stand_in] = Token(outer(sequences[i - count]), 0)
        else:
            stand_in = outer(outside[i - count - len(sequences)])
            invariants.append(stand_in)
        if v is not None:
            new[v] = stand_in
    copied = []
    for v in values:
        if v not in new:
            new[v] = Value(v.op, [new[i] for i in v.inputs], v.literals, v.shape, v.dtype, v.origin)
            copied.append(new[v])
    for number, v in enumerate([*before, *tokens, *copied]):
        v.number = number

    taken = {n.args[1]: n for n in node.users if n.target is operator.getitem}
    after = [new[r] for r in results[:count]]
    carried = [
        Carry(b, a, outer(start), outer(taken[i]) if i in taken else None)
        for i, (b, a, start) in enumerate(zip(before, after, initial, strict=True))
    ]
    stacked = [
        Stacked(new[r], outer(taken[i]), 0)
        for i, r in enumerate(results[count:], count)
        if i in taken and taken[i].users
    ]
    return Loop(
        set(), [*tokens, *copied], tokens, 0, 0, _length(sequences), False, carried, stacked, invariants
    )


def with_numbers(body: fx.GraphModule, numbers: Mapping[int, float]) -> fx.GraphModule:
    """Returns a body without some of its arguments, by position, which are known numbers."""
    if not numbers:
        return body
    graph = fx.Graph()
    new: dict[fx.Node, Any] = {}
    for i, node in enumerate(body.graph.nodes):
        new[node] = numbers[i] if i in numbers else graph.node_copy(node, new.__getitem__)
    return fx.GraphModule(body, graph)


def refuse_autocast(node: fx.Node) -> None:
    """Raises NotALoop where autocast is on around a node, which would have to be on when its body is traced."""
    depth = 0
    for before in node.graph.nodes:
        if before is node:
            break
        name = str(getattr(before.target, "__name__", before.target))
        depth += {"_enter_autocast": 1, "_exit_autocast": -1}.get(name, 0)
    if depth:
        raise NotALoop("inside autocast")


def _body(body: fx.GraphModule, keep_detach: bool) -> tuple[list[Value], list[Value]]:
    functional = body
    if any("example_value" in n.meta for n in body.graph.nodes):  # as Dynamo writes it
        try:
            functional = functionalise(body)
        except NotFunctional as stop:
            raise NotALoop(str(stop)) from None
    neutral, values = adapt(functional, keep_detach)
    results = pytree.tree_leaves(functional.graph.output_node().args[0])
    if not all(isinstance(r, fx.Node) for r in results):
        raise NotALoop("its body returns what is no tensor")
    neutral.outputs = [values[r] for r in results]
    normal = normalise(neutral)
    return normal.values, normal.outputs


def _length(sequences: Sequence[fx.Node]) -> int:
    size = _shape(sequences[0])[0]
    if type(size) is not int:
        raise NotALoop("its length is a symbol")
    return size


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val", node.meta.get("example_value"))
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def outer(node: fx.Node) -> Value:
    """Returns a value that stands for a node of the graph around the loop."""
    value = node.meta.get("val", node.meta.get("example_value"))
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else None
    dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else ""
    raw = Value("input", [], (node.name,), shape, dtype, node)
    return Value("input", [], (node.name,), shape, dtype, (raw,))
