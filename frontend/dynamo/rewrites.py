"""Rewrites on the graph that AOTAutograd hands over, before it is partitioned."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy import functions as sizes

from spikingbrain.frontend.dynamo.ops import VIEWS, packet_name

aten = torch.ops.aten


def raise_linears(graph: fx.Graph, frozen: set[fx.Node]) -> list[fx.Node]:
    """Turns products with a transposed frozen weight into ``aten.linear``, whose weight is packed once; returns them.

    ``mm(x, w.t())`` becomes ``linear(x, w)``, ``addmm(b, x, w.t())`` becomes ``linear(x, w, b)``.
    """
    raised = []
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default):
            continue
        bias, (x, transposed) = (
            (None, node.args) if node.target == aten.mm.default else (node.args[0], node.args[1:])
        )
        weight = _transposed(transposed)
        if weight is None or weight not in frozen or node.kwargs:
            continue
        if bias is not None and bias.meta["val"].shape != (weight.meta["val"].shape[0],):
            continue
        if {n.meta["val"].dtype for n in (x, weight, node)} != {torch.float32}:
            continue
        with graph.inserting_before(node):
            linear = graph.call_function(aten.linear.default, (x, weight, bias))
        linear.meta = dict(node.meta)
        node.replace_all_uses_with(linear)
        graph.erase_node(node)
        raised.append(linear)
    graph.eliminate_dead_code()
    return raised


def frozen_experts(graph: fx.Graph, frozen: set[fx.Node]) -> list[fx.Node]:
    """Returns the projections by experts whose weights are packed once."""
    nodes = graph.find_nodes(op="call_function", target=torch.ops.spikingbrain.grouped_linear.default)
    return [n for n in nodes if n.args[1] in frozen and n.meta["val"].dtype == torch.float32]


def _transposed(node: Any) -> fx.Node | None:
    """Returns w where ``node`` is w transposed."""
    if node.op != "call_function":
        return None
    plain = node.target == aten.t.default
    permuted = node.target == aten.permute.default and list(node.args[1]) in ([1, 0], [-1, -2])
    swapped = node.target == aten.transpose.int and {d % 2 for d in node.args[1:]} == {0, 1}
    return node.args[0] if plain or permuted or swapped else None


def drop_noop_copies(graph: fx.Graph) -> int:
    """Removes ``clone`` and ``detach`` of values that nothing else can see; returns how many.

    A copy of an input stays, since the caller holds the input; so does one that changes the memory's layout, and one
    that is returned. Views of any of them count like the tensor itself.
    """
    dropped = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (
            aten.clone.default,
            aten.detach.default,
            aten.alias.default,
        ):
            continue
        source = node.args[0]
        a, b = source.meta.get("val"), node.meta.get("val")
        if (
            not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor))
            or _base(source).op != "call_function"
        ):
            continue
        if a.stride() != b.stride() or _is_returned(node):
            continue
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        dropped += 1
    return dropped


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and (
        node.target is operator.getitem or packet_name(node.target) in VIEWS
    )


def _base(node: fx.Node) -> fx.Node:
    """Returns the node whose memory ``node`` shows."""
    while _is_view(node):
        node = node.args[0]
    return node


def _is_returned(node: fx.Node) -> bool:
    """Returns whether the graph returns a node or a view of it."""
    return any(u.op == "output" or (_is_view(u) and _is_returned(u)) for u in node.users)


def gather_results(graph: fx.Graph) -> None:
    """Moves each ``getitem`` behind the op whose result it takes, so that no cut falls between them."""
    for node in list(graph.nodes):
        if node.op == "call_function" and not isinstance(node.meta.get("val"), (torch.Tensor, type(None))):
            last = node
            for user in list(node.users):
                if user.target is operator.getitem:
                    last.append(user)
                    last = user


_PYTHON: dict[Any, Callable[..., Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sizes.FloorDiv: operator.floordiv,
    sizes.CleanDiv: operator.floordiv,
    sizes.Mod: operator.mod,
    sizes.PythonMod: operator.mod,
    sizes.Max: torch.sym_max,
    sizes.Min: torch.sym_min,
}


class _Sizes:
    """Makes nodes that compute sizes from the graph's inputs."""

    def __init__(self, graph: fx.Graph):
        self._graph = graph
        self._known: dict[sympy.Expr, fx.Node] = {}
        tensors: list[fx.Node] = []
        self._last = None
        for node in graph.find_nodes(op="placeholder"):
            self._last = node
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                self._known.setdefault(value.node.expr, node)
            elif isinstance(value, torch.Tensor):
                tensors.append(node)
        for node in tensors:
            for axis, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr not in self._known:
                    self._known[size.node.expr] = self._add(aten.sym_size.int, (node, axis), size)

    def _add(self, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
        assert self._last is not None
        with self._graph.inserting_after(self._last):
            made = self._graph.call_function(target, args)
        made.meta["val"] = value
        self._last = made
        return made

    def node(self, value: torch.SymInt) -> fx.Node | None:
        """Returns a node that computes ``value`` from inputs, or None where that takes an op unknown here."""
        made = self._build(value.node.expr, value)
        return made if isinstance(made, fx.Node) else None

    def _build(self, expr: sympy.Expr, like: torch.SymInt) -> Any:
        if expr in self._known:
            return self._known[expr]
        if expr.is_Integer:
            return int(expr)
        if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and 0 < int(expr.exp) <= 4:
            return self._fold(operator.mul, [expr.base] * int(expr.exp), expr, like)
        function = next((f for cls, f in _PYTHON.items() if isinstance(expr, cls)), None)
        return None if function is None else self._fold(function, list(expr.args), expr, like)

    def _fold(self, function: Any, terms: list[Any], expr: sympy.Expr, like: torch.SymInt) -> Any:
        parts = [self._build(t, like) for t in terms]
        if any(p is None for p in parts):
            return None
        environment = like.node.shape_env
        total, made = terms[0], parts[0]
        for term, part in zip(terms[1:], parts[1:], strict=True):
            total = expr.func(total, term)
            hint = environment.create_symintnode(total, hint=None) if total.free_symbols else int(total)
            made = self._add(function, (made, part), hint)
        self._known[expr] = made
        return made


def lift_sizes(graph: fx.Graph) -> int:
    """Computes every size from the graph's inputs alone; returns how many nodes changed.

    A size read off an intermediate tensor would keep the ops before and after it out of one region.
    """
    if not any(isinstance(n.meta.get("val"), torch.SymInt) for n in graph.nodes):
        return 0
    maker, changed = _Sizes(graph), 0
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.SymInt):
            continue
        if all(isinstance(a, fx.Node) and a.op == "placeholder" for a in node.all_input_nodes):
            continue
        lifted = maker.node(value)
        if lifted is not None and lifted is not node:
            node.replace_all_uses_with(lifted)
            graph.erase_node(node)
            changed += 1
    return changed
