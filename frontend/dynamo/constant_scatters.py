"""Writes into constant tensors, as in the gradients of slices and losses, as elementwise ops.

Such a write fuses with nothing; a padding or a comparison with positions does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def fuse_constant_scatters(graph: fx.Graph, indices_are_checked: bool) -> int:
    """Turns writes into constant tensors, as in the gradients of slices and losses, into elementwise ops; returns how many.

    ``slice_scatter(c, x)`` becomes a padding of x with c, and ``scatter(c, index, x)`` of one element per row becomes
    ``where(arange == index, x, c)``. Both fuse with their neighbours, where a write would keep them apart. The second does
    not raise where an index is outside, so it is for graphs whose indices torch has checked: a backward's, by the forward.
    """
    rewrites = _SCATTERS_OF_ONE if indices_are_checked else {aten.slice_scatter.default: _pad}
    changed = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in rewrites:
            continue
        base = node.args[0]
        if base.op != "call_function" or base.target not in (aten.full.default, aten.full_like.default):
            continue
        if not isinstance(base.args[1], (int, float)):
            continue
        with graph.inserting_before(node):
            made = rewrites[node.target](graph, node, base.args[1])
        if made is not None:
            made.meta.setdefault("stack_trace", node.meta.get("stack_trace"))
            node.replace_all_uses_with(made)
            graph.erase_node(node)
            changed += 1
    if changed:
        graph.eliminate_dead_code()
    return changed


def _pad(graph: fx.Graph, node: fx.Node, fill: float) -> fx.Node | None:
    source = node.args[1]
    defaults: tuple[Any, ...] = (0, None, None, 1)
    given: tuple[Any, ...] = tuple(node.args[2:])
    dim, start, _, step = given + defaults[len(given) :]
    whole, part = node.meta["val"], source.meta["val"]
    dim %= whole.dim()
    size, count = whole.shape[dim], part.shape[dim]
    if step != 1 or node.kwargs or not all(isinstance(v, int) for v in (size, count, start or 0)):
        return None
    start = start or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    if part.dtype != whole.dtype:
        return None
    padding = [0, 0] * (whole.dim() - 1 - dim) + [start, size - start - count]
    return _made(graph, node, aten.constant_pad_nd.default, (source, padding, fill))


def _compare(graph: fx.Graph, node: fx.Node, fill: float) -> fx.Node | None:
    _, dim, index, value = node.args
    whole, where = node.meta["val"], index.meta["val"]
    dim %= whole.dim()
    others = [s for d, s in enumerate(whole.shape) if d != dim]
    if node.kwargs or where.shape[dim] != 1 or [s for d, s in enumerate(where.shape) if d != dim] != others:
        return None
    if isinstance(value, fx.Node) and value.meta["val"].shape != where.shape:
        return None
    size = whole.shape[dim]
    if not isinstance(size, int):
        return None
    options = {"dtype": where.dtype, "device": where.device, "pin_memory": False}
    steps = _made(graph, node, aten.arange.start_step, (0, size, 1), **options)
    shape = [1] * whole.dim()
    shape[dim] = size
    row = _made(graph, node, aten.view.default, (steps, shape))
    same = _made(graph, node, aten.eq.Tensor, (row, index))
    scalars = {"dtype": whole.dtype, "device": whole.device}
    new = (
        value if isinstance(value, fx.Node) else _made(graph, node, aten.full.default, ([], value), **scalars)
    )
    old = _made(graph, node, aten.full.default, ([], fill), **scalars)
    return _made(graph, node, aten.where.self, (same, new, old))


def _made(graph: fx.Graph, like: fx.Node, target: Any, args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
    """Adds a node, with its value computed on fake tensors."""
    node = graph.call_function(target, args, kwargs)
    mode = like.meta["val"].fake_mode
    with mode:
        fake = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*fake[0], **fake[1])
    node.meta["stack_trace"] = like.meta.get("stack_trace")
    return node


_SCATTERS_OF_ONE = {
    aten.slice_scatter.default: _pad,
    aten.scatter.value: _compare,
    aten.scatter.src: _compare,
}
