"""A compiled graph as plain data: Python source, code of its regions, and how to call them.

Everything in it can be stored and loaded in another process; nothing refers to the graph it came from.
"""

from __future__ import annotations

import functools
import operator
import re
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _BoxedCodeGen, _custom_builtins

from spikingbrain.frontend.dynamo.call import RegionCall, region_function
from spikingbrain.frontend.dynamo.lowering import CodeUnit
from spikingbrain.frontend.dynamo.partition import Region
from spikingbrain.frontend.dynamo.plan import Compilation


@dataclass
class GraphProgram:
    """What runs one graph.

    Attributes:
        source: a function ``forward(self, args_list)`` that empties its list of arguments; calls regions by name.
        names: what the source refers to besides regions, by name.
        constants: tensors of the graph, read as ``self.NAME``.
        units: compiled modules.
        calls: for each region by name: its unit and how to call it.
        within: what makes the context that it runs in, if any.
    """

    source: str
    names: dict[str, Any]
    constants: dict[str, Any]
    units: list[CodeUnit]
    calls: dict[str, RegionCall]
    within: Callable[[], AbstractContextManager[None]] | None = None

    def load(self) -> Callable[[list[Any]], Any]:
        """Returns the boxed function: it takes one list, which it clears, and returns the graph's results."""
        executables = [unit.load() for unit in self.units]
        scope = {name: builtin.obj for name, builtin in _custom_builtins.items()} | self.names
        for op in set(_OP.findall(self.source)):
            scope[_alias(op)] = operator.attrgetter(op)(torch.ops)
        for name, call in self.calls.items():
            scope[name] = region_function(call, executables[call.unit], name)
        exec(compile(_OP.sub(lambda m: _alias(m[1]), self.source), "<spikingbrain graph>", "exec"), scope)
        run = functools.partial(scope["forward"], types.SimpleNamespace(**self.constants))
        if self.within is not None:
            run = functools.partial(_run_within, self.within, run)
        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _run_within(
    context: Callable[[], AbstractContextManager[None]], run: Callable[[list[Any]], Any], given: list[Any]
) -> Any:
    with context():
        return run(given)


# Ops are written out as paths, which takes six look-ups at each call; they get names of their own.
_OP = re.compile(r"\btorch\.ops\.(\w+\.\w+\.\w+)(?=\()")


def _alias(op: str) -> str:
    return "op_" + op.replace(".", "_")


def assemble(module: fx.GraphModule, done: Compilation) -> GraphProgram:
    """Writes the steps as straight-line Python, by FX's own code generator, which also frees values early."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    calls: dict[str, RegionCall] = {}
    units: dict[int, CodeUnit] = {}

    def value(node: fx.Node) -> fx.Node:
        if node not in made:  # a view, made where it is first read
            made[node] = graph.node_copy(node, value)
        return made[node]

    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            made[node] = graph.node_copy(node)
    for step in done.steps:
        if not isinstance(step, Region):
            made[step] = graph.node_copy(step, value)
            continue
        region = done.regions[id(step)]
        compiled = done.code[region.key]
        units.setdefault(id(compiled.unit), compiled.unit)
        name = f"region_{len(calls)}"
        calls[f"spikingbrain_{name}"] = RegionCall.of(region, compiled, list(units).index(id(compiled.unit)))
        arguments = [value(n) for n in region.inputs]
        for i, node in enumerate(region.inputs):
            held = node.meta["val"]
            if (
                isinstance(held, torch.Tensor) and held.is_neg()
            ):  # memory of the other sign, as of a conjugate's part
                arguments[i] = graph.call_function(torch.ops.aten.resolve_neg.default, (arguments[i],))
        called = graph.call_function(_stand_in(name), (*arguments, *map(value, region.weights)))
        for i, node in enumerate(region.outputs):
            made[node] = graph.call_function(operator.getitem, (called, i))
    graph.output(fx.node.map_arg(module.graph.output_node().args[0], value))
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:  # the body of a loop that a region runs
            graph.erase_node(node)
    graph.set_codegen(_BoxedCodeGen())
    text = graph.python_code("self")
    names = {k: v for k, v in text.globals.items() if k not in calls and k not in _custom_builtins}
    constants = {
        node.target: operator.attrgetter(node.target)(module) for node in graph.find_nodes(op="get_attr")
    }
    return GraphProgram(text.src, names, constants, list(units.values()), calls)


def _stand_in(name: str) -> Callable[..., Any]:
    """Returns a function that only lends its name to generated code."""

    def region(*_: Any) -> Any:
        """Never called: the function of the region takes its place when the program is loaded."""

    region.__name__ = region.__qualname__ = name
    region.__module__ = "spikingbrain"
    return region
