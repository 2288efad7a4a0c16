"""A region as a graph of its own: what goes in, what comes out, in which memory layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from spikingbrain.frontend.dynamo.layout import inverse, memory_order
from spikingbrain.frontend.dynamo.loops import body_of, graphs, own_body
from spikingbrain.frontend.dynamo.ops import Kind, Verdict, packet_name
from spikingbrain.frontend.dynamo.partition import Region

aten = torch.ops.aten


@dataclass
class RegionGraph:
    """A region ready for import.

    Attributes:
        graph: placeholders for ``inputs``, ``get_attr`` nodes for ``weights`` and bodies of loops, and the region's ops.
        inputs: nodes of the whole graph that are its arguments, tensors and sizes.
        weights: nodes of the whole graph whose tensors are packed once; named ``w0``, ``w1``, ... inside.
        outputs: nodes of the whole graph that it computes for others.
        input_orders, output_orders: for each, the order of axes in memory (see ``layout.memory_order``).
        key: text that is equal for regions that compute the same, such as the layers of a model.
    """

    graph: fx.Graph
    module: fx.GraphModule
    inputs: list[fx.Node]
    weights: list[fx.Node]
    outputs: list[fx.Node]
    input_orders: list[tuple[int, ...]] = field(default_factory=list)
    output_orders: list[tuple[int, ...] | None] = field(default_factory=list)
    key: str = ""


def outputs_of(region: Region, verdicts: Mapping[fx.Node, Verdict]) -> list[fx.Node]:
    """Returns the nodes of a region that something outside reads, directly or through views."""
    inside = set(region.nodes)

    def escapes(node: fx.Node) -> bool:
        for user in node.users:
            if user in inside:
                continue
            if user in verdicts and verdicts[user].kind is Kind.VIEW:
                if escapes(user):
                    return True
            else:
                return True
        return False

    return [n for n in region.nodes if escapes(n)]


def build(region: Region, verdicts: Mapping[fx.Node, Verdict], frozen: set[fx.Node]) -> RegionGraph:
    """Copies a region into a graph of its own."""
    inside = set(region.nodes)
    views: list[fx.Node] = []
    inputs: list[fx.Node] = []
    seen: set[fx.Node] = set()
    bodies: list[fx.Node] = []

    def visit(node: fx.Node) -> None:
        if node in seen or node in inside:
            return
        seen.add(node)
        if body_of(node):
            bodies.append(node)
            return
        if node in verdicts and verdicts[node].kind is Kind.VIEW:
            for source in node.all_input_nodes:
                visit(source)
            views.append(node)
        else:
            inputs.append(node)

    packed: dict[fx.Node, None] = {}
    for node in region.nodes:
        weights = _frozen_weights(node, frozen)
        packed.update(dict.fromkeys(weights))
        for source in node.all_input_nodes:
            if source not in weights:
                visit(source)
    outputs = outputs_of(region, verdicts)

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, Any] = {}
    orders: list[tuple[int, ...]] = []
    placeholders = [graph.placeholder(f"a{i}") for i in range(len(inputs))]
    for node, made in zip(inputs, placeholders, strict=True):
        value = node.meta["val"]
        order = (memory_order(value) or ()) if isinstance(value, torch.Tensor) else ()
        made.meta["val"] = value.permute(order) if order else value
        orders.append(order)
        copies[node] = made
        if order:
            back = inverse(order)
            copies[node] = graph.call_function(aten.permute.default, (made, back))
            copies[node].meta = {"val": value, "stack_trace": node.meta.get("stack_trace")}
    for i, node in enumerate(bodies):
        attributes[f"body{i}"] = own_body(node)
        copies[node] = graph.create_node("get_attr", f"body{i}")
    stored: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(packed):
        attributes[f"w{i}"] = node.meta["val"]
        stored[node] = graph.create_node("get_attr", f"w{i}")
        stored[node].meta["val"] = node.meta["val"]

    # views of inputs first where they are needed, in the order of the whole graph
    position = {n: i for i, n in enumerate(next(iter(inside)).graph.nodes)}
    for node in sorted([*views, *region.nodes], key=position.__getitem__):
        weights = _frozen_weights(node, frozen)
        copies[node] = graph.node_copy(node, lambda n, w=weights: stored[n] if n in w else copies[n])
    results: list[fx.Node] = []
    out_orders: list[tuple[int, ...] | None] = []
    for node in outputs:
        value = node.meta["val"]
        in_memory = memory_order(value)
        result = copies[node]
        if in_memory:
            result = graph.call_function(aten.permute.default, (result, list(in_memory)))
            result.meta = {"val": value.permute(in_memory), "stack_trace": node.meta.get("stack_trace")}
        results.append(result)
        out_orders.append(in_memory)
    graph.output(tuple(results))
    module = fx.GraphModule(attributes, graph, class_name="Region")
    made_region = RegionGraph(module.graph, module, inputs, list(packed), outputs, orders, out_orders)
    made_region.key = "\n\n".join(map(_key, graphs(module)))
    return made_region


_WEIGHTS = {  # and their scales, among the arguments of a projection
    "linear": slice(1, 2),
    "grouped_linear": slice(1, 2),
    "spike_linear": slice(2, 4),
    "spike_grouped_linear": slice(2, 4),
}


def _frozen_weights(node: fx.Node, frozen: set[fx.Node]) -> list[fx.Node]:
    """Returns the frozen tensors that are the weight of a projection, with its scale if it is one of spikes."""
    weights = node.args[_WEIGHTS.get(packet_name(node.target), slice(0))]
    given = [w for w in weights if w is not None]  # integers may have no scale
    return given if all(w in frozen for w in given) else []


def _key(graph: fx.Graph) -> str:
    lines = []
    names = {n: f"v{i}" for i, n in enumerate(graph.nodes)}
    for node in graph.nodes:
        shapes = _shape_text(node.meta.get("val"))
        arguments = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _Name(names[n]))
        lines.append(
            f"{names[node]} = {node.op} {node.target if node.op != 'placeholder' else ''} {arguments} {shapes}"
        )
    return "\n".join(lines)


class _Name(str):
    def __repr__(self) -> str:
        return str(self)


def _shape_text(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return "".join(map(_shape_text, value))
    return type(value).__name__ + (str(value) if isinstance(value, torch.SymInt) else "")
