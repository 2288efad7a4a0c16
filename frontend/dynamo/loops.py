"""Loops over time in a graph: ``scan``, a higher-order op whose body is a graph of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

SCAN = torch.ops.higher_order.scan


def body_of(node: Any) -> fx.GraphModule | None:
    """Returns the graph that a ``get_attr`` node names, as the first argument of a loop does."""
    if not isinstance(node, fx.Node) or node.op != "get_attr" or node.graph.owning_module is None:
        return None
    found = getattr(node.graph.owning_module, node.target, None)
    return found if isinstance(found, fx.GraphModule) else None


def own_body(node: fx.Node) -> fx.GraphModule:
    """Returns a copy of the graph that a node names, and of those within; its nodes may be rewritten."""
    body = body_of(node)
    assert body is not None
    made = fx.GraphModule(body, copy.deepcopy(body.graph))
    for inner in made.graph.find_nodes(op="get_attr"):
        if body_of(inner):
            setattr(made, inner.target, own_body(inner))
    return made


def graphs(module: fx.GraphModule) -> Iterator[fx.Graph]:
    """Yields the graph of a module and those of the loops in it."""
    yield module.graph
    for node in module.graph.find_nodes(op="get_attr"):
        if body := body_of(node):
            yield from graphs(body)
