"""Backends with a mistake on purpose, for the tests that the harness finds it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd

aten = torch.ops.aten


def _replacing(op: Any, change: Callable[[fx.Graph, fx.Node], fx.Node]) -> Callable[..., Any]:
    def compiler(module: fx.GraphModule, _: Any) -> Any:
        for node in module.graph.find_nodes(op="call_function", target=op):
            with module.graph.inserting_after(node):
                new = change(module.graph, node)
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        module.graph.eliminate_dead_code()
        module.recompile()
        return module

    return aot_autograd(fw_compiler=compiler)


def _failing(action: Callable[[], Any]) -> Callable[..., Any]:
    def change(graph: fx.Graph, node: fx.Node) -> fx.Node:
        action()
        return node

    return _replacing(aten.relu.default, change)


def _raise() -> None:
    raise NotImplementedError("relu")


def _plus(distance: float) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    return lambda graph, node: graph.call_function(aten.add.Tensor, (node, distance))


relu_is_identity = _replacing(aten.relu.default, lambda graph, node: node.args[0])
relu_crashes = _failing(os.abort)
relu_raises = _failing(_raise)
hangs = _failing(lambda: time.sleep(3600))

# Three and a little less are one unit in the last place apart.
rounds_differently = _replacing(aten.sum.dim_IntList, _plus(-5e-7))
rounds_wrongly = _replacing(aten.sum.dim_IntList, _plus(-0.6))
