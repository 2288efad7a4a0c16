"""What an autograd.Function computes forwards, as ATen ops beside it: so that counts made in one are recognised."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from spikingbrain.frontend.recurrences.expand import Expander, NotExpandable
from spikingbrain.frontend.spikes.neuron import FORWARD, OUTSIDE


def is_function(node: fx.Node) -> bool:
    """Tells whether a node is what Dynamo makes of a call of an autograd.Function."""
    return getattr(node.target, "__name__", "") == "autograd_function_apply"


def body_of(node: fx.Node) -> fx.GraphModule | None:
    """Returns what a function computes forwards: a graph of ((results), (what is saved))."""
    owner, held = node.graph.owning_module, node.args[0]
    if owner is None or not isinstance(held, fx.Node) or held.op != "get_attr":
        return None
    found = owner.get_submodule(str(held.target))
    return found if isinstance(found, fx.GraphModule) else None


def write_forwards(module: fx.GraphModule, mode: FakeTensorMode | None) -> list[fx.Node]:
    """Writes what functions compute forwards before them, where that is ATen ops; returns the results that have it.

    A result's meta holds the node that computes the same (``FORWARD``), and that node's the result (``OUTSIDE``). Nothing
    reads the new ops: values and gradients stay those of the function until counts in it are raised.
    """
    expander = Expander(module.graph, mode)
    found: list[fx.Node] = []
    for node in module.graph.nodes:
        body = body_of(node) if is_function(node) and not node.meta.get("opaque") else None
        if body is None:
            continue
        meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        args = tuple(node.args[2:])
        if not all(isinstance(a, fx.Node) and isinstance(a.meta.get("val"), torch.Tensor) for a in args):
            continue
        try:
            with module.graph.inserting_before(node):
                results = expander.call(_Forward(body).run, args, {}, meta, ("forward", id(body)))
        except NotExpandable:
            continue
        for user in list(node.users):
            index = user.args[1] if getattr(user.target, "__name__", "") == "getitem" else None
            if isinstance(index, int) and isinstance(results[index], fx.Node):
                made = results[index]
                user.meta[FORWARD] = made
                made.meta.setdefault(OUTSIDE, user)
                user.meta.setdefault("val", made.meta["val"])
                found.append(user)
    return found


def forget(results: list[fx.Node]) -> None:
    """Removes the marks of ``write_forwards``."""
    for node in results:
        node.meta.pop(FORWARD).meta.pop(OUTSIDE, None)


class _Forward(fx.Interpreter):  # type: ignore[misc]
    """Runs a function's forward without its switches of the gradient mode, and returns its results."""

    def run_node(self, n: fx.Node) -> Any:
        return None if n.target is torch._C._set_grad_enabled else super().run_node(n)

    def run(self, *args: Any) -> Any:
        return super().run(*args)[0]
