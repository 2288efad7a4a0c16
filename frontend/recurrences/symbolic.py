"""Raising in a Dynamo graph some of whose sizes are symbols: at several sizes, and then for all.

The analysis wants numbers. So the graph is taken at a few sizes of every symbol, raised at each, and the results, which differ in
nothing but numbers, become one graph again, as in the export of loops at any length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from spikingbrain.frontend.recurrences.functional import refuse_transforms
from spikingbrain.frontend.recurrences.unify import SHORTEST, NotUnified, Sizes

_MOST_SYMBOLS = 3


def is_symbolic(graph: fx.Graph) -> bool:
    """Tells whether an argument is a symbolic size or has one."""
    return any(_symbols_of(n) for n in graph.find_nodes(op="placeholder"))


def sizes_of(graph: fx.Graph) -> Sizes:
    """Returns the symbols of a graph with three values each, that no known size equals, and where each can be read.

    Raises NotUnified where there are many, or one is not to be had from a single argument; NotFunctional inside a
    transform of torch.func.
    """
    refuse_transforms(graph)
    placeholders = graph.find_nodes(op="placeholder")
    symbols = list(dict.fromkeys(s for n in placeholders for s in _symbols_of(n)))
    if len(symbols) > _MOST_SYMBOLS:
        raise NotUnified(f"{len(symbols)} sizes are symbols")
    places: dict[str, tuple[int, int | None]] = {}
    taken: set[int] = set()
    for i, node in enumerate(placeholders):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
            places[str(value.node.expr)] = (i, None)
        elif isinstance(value, torch.Tensor):
            for axis, size in enumerate(value.shape):
                if not isinstance(size, torch.SymInt):
                    taken.add(int(size))
                elif size.node.expr.is_Symbol:
                    places.setdefault(str(size.node.expr), (i, axis))
    counts: dict[str, list[int]] = {}
    for symbol in map(str, symbols):
        if symbol not in places:
            raise NotUnified(f"the size {symbol} is not that of an argument")
        found: list[int] = []
        count = SHORTEST
        while len(found) < 3:
            if count not in taken:
                found.append(count)
                taken.add(count)
            count += 1
        counts[symbol] = found
    return Sizes(counts, dict.fromkeys(counts, 1), places)


def at_sizes(module: fx.GraphModule, point: Mapping[str, int]) -> fx.GraphModule:
    """Returns a copy of the graph in which every symbol has a value: sizes are numbers, values have known shapes."""
    return _Concrete(module, point).copy()


class _Concrete(fx.Interpreter):  # type: ignore[misc]
    """Runs a graph on fake tensors of known sizes, and copies it on the way."""

    def __init__(self, module: fx.GraphModule, point: Mapping[str, int]):
        super().__init__(module, garbage_collect_values=False)
        self.point = dict(point)
        self.graph_copy = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.mode = FakeTensorMode(shape_env=ShapeEnv())  # while_loop draws symbols from it
        self.bodies: dict[str, fx.GraphModule] = {}

    def copy(self) -> fx.GraphModule:
        with self.mode, torch.no_grad():
            given = [self._argument(n) for n in self.module.graph.find_nodes(op="placeholder")]
            return self._run_on(given)

    def _run_on(self, given: Sequence[Any]) -> fx.GraphModule:
        self.run(*given)
        made = fx.GraphModule(self.module, self.graph_copy)
        for name, body in self.bodies.items():
            setattr(made, name, body)
        return made

    def _argument(self, node: fx.Node) -> Any:
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt):
            return self._number(value)
        if not isinstance(value, torch.Tensor):
            return value
        shape, strides = [[self._number(s) for s in sizes] for sizes in (value.shape, value.stride())]
        made = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
        return made.requires_grad_(value.requires_grad)

    def _number(self, size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        return int(expression.subs({s: self.point[str(s)] for s in expression.free_symbols}))

    def fetch_attr(self, target: str) -> Any:
        held = super().fetch_attr(target)
        return self.mode.from_tensor(held) if isinstance(held, torch.Tensor) else held

    def run_node(self, n: fx.Node) -> Any:
        known = n.meta.get("example_value")
        if n.target is torch.ops.higher_order.scan:
            self._step(n)
        is_float = isinstance(known, torch.SymFloat) and known.node.has_hint()
        value = self._symbol(n.name, known.node.hint) if is_float else super().run_node(n)
        made = self.graph_copy.node_copy(n, self._copied)
        made.meta = {k: v for k, v in n.meta.items() if k in ("stack_trace", "nn_module_stack", "custom")}
        if value is not None and n.op != "output":
            made.meta["example_value"] = value
        self.new[n] = made
        return value

    def _step(self, n: fx.Node) -> None:
        """Gives the body of a ``scan`` the sizes of its arguments."""
        (body, initial, sequences, outside), _ = self.fetch_args_kwargs_from_env(n)
        inner = _Concrete(body, self.point)
        inner.mode = self.mode
        name = str(n.args[0].target)
        self.bodies[name] = inner._run_on([*initial, *(x.select(0, 0) for x in sequences), *outside])

    def _symbol(self, name: str, hint: float) -> Any:
        """Returns a number that stays a symbol, such as the eps of a norm where every number may change from call to call."""
        shapes, source = self.mode.shape_env, ConstantSource(name)
        assert shapes is not None
        symbol = shapes.create_unspecified_symbol(hint, source, DimDynamic.DYNAMIC)
        return shapes.create_symfloatnode(symbol, hint=hint, source=source)

    def _copied(self, node: fx.Node) -> Any:
        value = self.env[node]
        return value if type(value) in (int, float, bool) else self.new[node]


def _symbols_of(node: fx.Node) -> list[Any]:
    value = node.meta.get("example_value")
    sizes = (
        [value]
        if isinstance(value, torch.SymInt)
        else [*value.shape]
        if isinstance(value, torch.Tensor)
        else []
    )
    return [s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols]
