"""Writing ATen ops into an FX graph, each with a fake tensor of what it gives; one step of a loop for all steps at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from spikingbrain.passes.recurrence.form import Loop, Token
from spikingbrain.passes.recurrence.graph import Slot, Value

aten = torch.ops.aten


_MOST_NUMBERS = 256  # of a constant table, which is written as ops


class NotEmitted(Exception):
    """Raised where a value of the analysis cannot be written as ATen ops; says which."""


class Emitter:
    """Emits at the insertion point of ``graph``; ``trace`` is the user's line that the new nodes stand for."""

    def __init__(self, graph: fx.Graph, mode: FakeTensorMode | None):
        self.graph = graph
        self.mode = mode
        self.trace: str | None = None
        self.device = next(
            (
                v.device
                for n in graph.find_nodes(op="placeholder")
                if isinstance(v := n.meta.get("val"), torch.Tensor)
            ),
            torch.device("cpu"),
        )

    def op(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Emits one call and computes its fake result. What is made of numbers alone is made where the graph's tensors are."""
        values, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        if self.device.type != "cpu" and _makes_tensors(target) and not any(map(_holds_tensors, values)):
            named = {"device": self.device} | dict(named)
            kwargs = {"device": self.device} | kwargs
        node = self.graph.call_function(target, args, kwargs)
        with self.faking():
            node.meta["val"] = target(*values, **named)
        if self.trace:
            node.meta["stack_trace"] = self.trace
        return node

    @contextlib.contextmanager
    def faking(self) -> Iterator[None]:
        with self.mode or contextlib.nullcontext(), torch.no_grad():
            yield

    # Values of the analysis

    def value(self, value: Value, known: dict[Value, fx.Node]) -> fx.Node:
        """Returns a node for a value from outside the loops: its own, or ops that compute it anew."""
        if value in known:
            return known[value]
        for node in nodes_of(value):
            return node
        known[value] = self.copy(value, [self.value(v, known) for v in value.inputs])
        return known[value]

    def copy(self, value: Value, inputs: Sequence[fx.Node]) -> fx.Node:
        """Emits the op of ``value`` on other inputs."""
        target, args, kwargs = call_of(value, inputs)
        return self.op(target, *args, **kwargs)

    def constant(self, numbers: torch.Tensor) -> fx.Node:
        """Returns a small table of numbers."""
        if numbers.numel() > _MOST_NUMBERS:
            raise NotEmitted(f"a table of {numbers.numel()} constants")
        flat = [self.op(aten.full.default, [1], x, dtype=numbers.dtype) for x in numbers.flatten().tolist()]
        whole = flat[0] if len(flat) == 1 else self.op(aten.cat.default, flat)
        return self.op(aten.reshape.default, whole, list(numbers.shape))

    def inline(self, traced: fx.GraphModule, inputs: Sequence[fx.Node]) -> list[fx.Node]:
        """Emits a traced graph; returns its results."""
        new: dict[fx.Node, fx.Node] = {}
        given = iter(inputs)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                new[node] = next(given)
            elif node.op == "output":
                return [new[n] for n in node.args[0]]
            elif node.op == "get_attr":
                raise NotEmitted(f"a constant tensor, {node.target}")
            elif node.target is aten._to_copy.default and not isinstance(node.args[0], fx.Node):
                # vmap's promotion of a number that meets one number of each step
                new[node] = self.op(aten.full.default, [], node.args[0], dtype=node.kwargs["dtype"])
            else:
                made = self.graph.node_copy(node, lambda n: new[n])
                made.meta = {"val": node.meta.get("val")}
                if self.trace:
                    made.meta["stack_trace"] = self.trace
                new[node] = made
        raise NotEmitted("a graph without results")

    # All steps at once

    def sequence(self, token: Token, first: int, steps: int, source: fx.Node) -> fx.Node:
        """Returns what a token is at times ``first .. first + steps - 1``, stacked on a new first axis."""
        dim = token.dim
        if token.width:
            size = source.meta["val"].shape[dim]
            if size % token.width:  # the last window is shorter, and none of these
                source = self.op(aten.slice.Tensor, source, dim, 0, size - size % token.width)
            source = self.op(aten.unflatten.int, source, dim, [size // token.width, token.width])
        start = first * token.stride + token.offset
        stop = start + (steps - 1) * token.stride + 1
        if start < 0 or stop > source.meta["val"].shape[dim]:
            raise NotEmitted(f"positions {start} to {stop} of an axis of {source.meta['val'].shape[dim]}")
        if (start, stop, token.stride) != (0, source.meta["val"].shape[dim], 1):
            source = self.op(aten.slice.Tensor, source, dim, start, stop, token.stride)
        return self.op(aten.movedim.int, source, dim, 0) if dim else source

    def vectorised(
        self,
        wanted: Sequence[Value],
        loop: Loop,
        known: Mapping[Value, fx.Node],
        outside: dict[Value, fx.Node],
    ) -> list[fx.Node]:
        """Returns values of the body for all steps at once, time first.

        ``known`` holds what is there already in that form (tokens, reads). A value that no step changes comes without
        the time axis if nothing it depends on is in ``known``; see ``varies``.
        """
        wanted = list(wanted)
        missing = [v for v in dict.fromkeys(wanted) if v not in known]
        found: dict[Value, fx.Node] = {v: known[v] for v in wanted if v in known}
        changing = [v for v in missing if self.varies(v, loop, known)]
        for v in missing:
            if v not in changing:
                found[v] = self._constant(v, loop, outside)
        if changing:
            found.update(zip(changing, self._mapped(changing, loop, known, outside), strict=True))
        return [found[v] for v in wanted]

    def varies(self, value: Value, loop: Loop, known: Mapping[Value, fx.Node]) -> bool:
        """Tells whether a body value depends on anything that changes from step to step."""
        return any(v in known for v in _within([value], loop, known))

    def _constant(self, value: Value, loop: Loop, outside: dict[Value, fx.Node]) -> fx.Node:
        for v in _within([value], loop, {}):
            if v not in outside and v in _body(loop):
                outside[v] = self.copy(v, [self.value(i, outside) for i in v.inputs])
        return self.value(value, outside)

    def _mapped(
        self,
        wanted: Sequence[Value],
        loop: Loop,
        known: Mapping[Value, fx.Node],
        outside: dict[Value, fx.Node],
    ) -> list[fx.Node]:
        values = _within(wanted, loop, known)
        if any(v.op == "pointwise_function" for v in values):
            raise NotEmitted("a function with a gradient of its own, for all steps at once")
        mapped = [v for v in values if v in known]
        body = _body(loop)
        fixed = [v for v in values if v not in known and v not in body and v.op != "module"]
        step = step_graph([*mapped, *fixed], [v for v in values if v not in known and v in body], wanted)
        inputs = [known[v] for v in mapped] + [self.value(v, outside) for v in fixed]
        axes = (0,) * len(mapped) + (None,) * len(fixed)
        with self.faking():
            traced = make_fx(torch.vmap(step, in_dims=axes))(*[n.meta["val"] for n in inputs])
        return self.inline(traced, inputs)


# The normal forms of passes/recurrence/normalise.py
_CALLS: dict[str, Any] = {
    "select": aten.select.int,
    "slice": aten.slice.Tensor,
    "stack": aten.stack.default,
    "cat": aten.cat.default,
    "view": aten.reshape.default,
    "permute": aten.permute.default,
    "squeeze": aten.squeeze.dims,
    "unsqueeze": aten.unsqueeze.default,
    "expand": aten.expand.default,
}

# Ops that the analysis adds by itself; where it found them they may be other overloads.
_SYNTHETIC: dict[str, Any] = {
    "add": aten.add.Tensor,
    "sub": aten.sub.Tensor,
    "mul": aten.mul.Tensor,
    "div": aten.div.Tensor,
    "neg": aten.neg.default,
    "exp": aten.exp.default,
    "log": aten.log.default,
    "rsub": aten.rsub.Scalar,
    "reciprocal": aten.reciprocal.default,
    "logical_not": aten.logical_not.default,
    "pow": aten.pow.Tensor_Scalar,
    "where": aten.where.self,
    "select_scatter": aten.select_scatter.default,
    "slice_scatter": aten.slice_scatter.default,
}


def nodes_of(value: Value) -> list[fx.Node]:
    """Returns the graph's nodes that compute a value of the normalised graph."""
    return [raw.origin for raw in value.origin or () if isinstance(raw.origin, fx.Node)]


def call_of(value: Value, inputs: Sequence[Any]) -> tuple[Any, list[Any], dict[str, Any]]:
    """Returns the call that computes ``value``, with ``inputs`` in the places of its own."""

    def fill(x: Any) -> Any:
        if isinstance(x, Slot):
            return inputs[x.index]
        return [fill(y) for y in x] if isinstance(x, tuple) else x

    if value.op == "cast":
        return aten.to.dtype, [inputs[0], getattr(torch, value.dtype)], {}
    if value.op == "full":
        number = value.literals[1]
        return aten.full.default, [list(value.shape or ()), number], {"dtype": getattr(torch, value.dtype)}
    nodes = [n for n in nodes_of(value) if n.op == "call_function" and _name(n.target) == value.op]
    target = _CALLS.get(value.op) or (nodes[0].target if nodes else _SYNTHETIC.get(value.op))
    if target is None:
        raise NotEmitted(value.op)
    if value.op == "slice":
        inputs_and_rest = [fill(x) for x in value.literals]
        return target, inputs_and_rest, {}
    keywords = [x for x in value.literals if _is_keyword(x)]
    args = [fill(x) for x in value.literals if not _is_keyword(x)]
    return target, args, {name: fill(x) for name, x in keywords}


def _name(target: Any) -> str:
    """Returns what the adapter calls an op."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::")
    name = str(getattr(target, "__name__", target))
    return "pointwise_function" if name == "autograd_function_apply" else name


def _is_keyword(literal: Any) -> bool:
    return isinstance(literal, tuple) and len(literal) == 2 and isinstance(literal[0], str)


def step_graph(inputs: Sequence[Value], body: Iterable[Value], results: Sequence[Value]) -> fx.GraphModule:
    """Returns a module that computes ``results`` of one step from ``inputs``."""
    graph = fx.Graph()
    root: dict[str, Any] = {}
    made: dict[Value, Any] = {v: graph.placeholder(f"x{i}") for i, v in enumerate(inputs)}
    for v in body:
        for function in v.inputs:
            if function.op == "module" and function not in made:
                root[name := f"function_{len(root)}"] = module_of(function)
                made[function] = graph.get_attr(name)
        target, args, kwargs = call_of(v, [made[i] for i in v.inputs])
        made[v] = graph.call_function(target, tuple(args), kwargs)
    graph.output([made[v] for v in results])
    return fx.GraphModule(root, graph, class_name="Step")


def module_of(value: Value) -> fx.GraphModule:
    """Returns the body of an autograd.Function that a value stands for."""
    node = nodes_of(value)[0]
    owner = node.graph.owning_module
    if owner is None:
        raise NotEmitted("a function without a module")
    found = owner.get_submodule(str(node.target))
    assert isinstance(found, fx.GraphModule)
    return found


def _body(loop: Loop) -> set[Value]:
    return set(loop.body) - set(loop.tokens)


def _within(roots: Sequence[Value], loop: Loop, known: Mapping[Value, fx.Node]) -> list[Value]:
    """Returns what roots need, down to ``known`` and to values outside the body, in order."""
    body, seen, order = _body(loop), set(), []
    stack = [(v, False) for v in reversed(roots)]
    while stack:
        v, done = stack.pop()
        if done:
            order.append(v)
            continue
        if v in seen:
            continue
        seen.add(v)
        stack.append((v, True))
        if v in body and v not in known:
            stack += [(i, False) for i in reversed(v.inputs)]
    return order


def _makes_tensors(target: Any) -> bool:
    """Returns whether an op takes the device of its result."""
    schema = getattr(target, "_schema", None)
    return schema is not None and any(a.name == "device" for a in schema.arguments)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (list, tuple)) and any(map(_holds_tensors, value))
    )
