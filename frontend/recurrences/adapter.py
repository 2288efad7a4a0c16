"""From an FX graph of ATen ops to the neutral graph that ``passes/recurrence`` analyses."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from spikingbrain.frontend.checks import draws_random_numbers
from spikingbrain.passes.recurrence.classify import ELEMENTWISE
from spikingbrain.passes.recurrence.graph import Graph, Slot, Value

_SMALL = 1 << 20  # elements of a constant whose numbers the analysis may look at
_ACCESSES = {getattr(torch.ops.aten, name) for name in ("select", "slice", "select_scatter", "slice_scatter")}


def adapt(
    module: fx.GraphModule, keep_detach: bool, by_hints: bool = False
) -> tuple[Graph, dict[fx.Node, Value]]:
    """Returns the neutral graph of an FX graph whose tensors have known sizes, and the value of each node.

    Every node becomes one value whose ``origin`` is the node. Ops that must stay where they are (marked ``opaque``, random,
    writing, or on tensors of symbolic sizes) are values called ``"opaque"``, equal to nothing. Without ``keep_detach``, where no
    gradient is wanted, ``detach`` is left out. ``by_hints`` takes every symbol for the size it had in the example: enough to see
    what is there, not to rewrite it.
    """
    graph = Graph()
    values: dict[fx.Node, Value] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            graph.outputs = [values[n] for n in node.all_input_nodes]
        elif not keep_detach and node.target is torch.ops.aten.detach.default:
            values[node] = values[node.args[0]]
        else:
            values[node] = graph.add(_value(module, node, values, by_hints))
    return graph, values


def _value(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Value], by_hints: bool) -> Value:
    meta = node.meta.get("val", node.meta.get("example_value"))
    shape: tuple[Any, ...] | None = tuple(meta.shape) if isinstance(meta, torch.Tensor) else None
    if by_hints and shape is not None:
        shape = tuple(map(_hint, shape))
    if shape is not None and not _static(shape):  # the value will be opaque; symbols are no keys
        shape = tuple(s if type(s) is int else str(s) for s in shape)
    dtype = str(meta.dtype).removeprefix("torch.") if isinstance(meta, torch.Tensor) else ""
    if node.op == "placeholder":
        return Value("input" if _static(shape) else "opaque", [], (node.name,), shape, dtype, node)
    if node.op == "get_attr":
        held = _attribute(module, node)
        if type(held) is torch.Tensor and held.numel() <= _SMALL and not held.requires_grad and held.is_cpu:
            numbers = (held.float() if held.dtype == torch.bfloat16 else held).cpu().numpy()
            return Value("constant", [], (numbers,), shape, dtype, node)
        if isinstance(held, fx.GraphModule):  # of an autograd.Function: equal code is equal
            return Value("module", [], (_code(held.graph),), None, "", node)
        return Value("input", [], (node.target,), shape, dtype, node)
    inputs: list[Value] = []
    literals: list[Any] = []

    def literal(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            number = argument.meta.get("val")
            if by_hints and isinstance(number, torch.SymInt):
                return _hint(number)
            inputs.append(values[argument])
            return Slot(len(inputs) - 1)
        if isinstance(argument, (list, tuple)):
            return tuple(literal(a) for a in argument)
        if isinstance(argument, slice):
            return ("slice", literal(argument.start), literal(argument.stop), literal(argument.step))
        return argument

    for argument in node.args:
        literals.append(literal(argument))
    for name, argument in node.kwargs.items():
        if name not in ("device", "layout", "pin_memory", "memory_format"):
            literals.append((name, literal(argument)))
    known = all(_static(x.shape) for x in inputs) and not _at_a_symbol(node, by_hints)
    return Value(_name(node, shape) if known else "opaque", inputs, tuple(literals), shape, dtype, node)


def _at_a_symbol(node: fx.Node, by_hints: bool) -> bool:
    """Tells whether a place that only a call knows is read or written."""
    if getattr(node.target, "overloadpacket", None) not in _ACCESSES:
        return False
    numbers = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.SymInt)]
    return any(not (by_hints and type(_hint(number)) is int) for number in numbers)


def _name(node: fx.Node, shape: tuple[Any, ...] | None) -> str:
    target = node.target
    if node.meta.get("opaque") or not _static(shape):
        return "opaque"
    if not isinstance(target, torch._ops.OpOverload):
        name = getattr(target, "__name__", str(target))
        if name == "autograd_function_apply":
            return "pointwise_function" if all(map(_pointwise, node.args[:2])) else "autograd_function"
        return name if name == "getitem" else "opaque"
    if target._schema.is_mutable or draws_random_numbers(node):
        return "opaque"
    name = target._schema.name
    return name.removeprefix("aten::")


# What Dynamo writes down in other words than ATen's, or what only the gradient of a function computes.
_PYTHON_TEXT = """
and_ bfloat16 bool clone double erfc float half iadd imul invert isub itruediv ipow max min or_ tan to truediv type type_as xor
_set_grad_enabled
"""
_POINTWISE = frozenset(_PYTHON_TEXT.split()) | ELEMENTWISE - {"expand", "getitem", "squeeze", "unsqueeze"}


def _code(graph: fx.Graph) -> str:
    """Returns a graph as text in which the names of its values don't matter."""
    names = {n: f"%{i}" for i, n in enumerate(graph.nodes)}
    return "\n".join(
        f"{n.op} {n.target if n.op != 'placeholder' else ''} {fx.node.map_arg((n.args, dict(n.kwargs)), names.get)}"
        for n in graph.nodes
    )


def _pointwise(node: fx.Node) -> bool:
    """Tells whether the body of an autograd.Function computes each element from those in the same place."""
    body = _attribute(node.graph.owning_module, node) if node.graph.owning_module else None
    if not isinstance(body, fx.GraphModule):
        return False
    calls = [
        n for n in body.graph.nodes if n.op in ("call_function", "call_method", "call_module", "get_attr")
    ]
    names = [str(getattr(n.target, "__name__", n.target)) for n in calls]
    return all(name in _POINTWISE or name.removesuffix("_") in _POINTWISE for name in names)


def _hint(size: Any) -> Any:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _static(shape: tuple[Any, ...] | None) -> bool:
    return shape is None or all(type(s) is int for s in shape)


def _attribute(module: Any, node: fx.Node) -> Any:
    held: Any = module
    for part in str(node.target).split("."):
        held = getattr(held, part, None)
    return held
