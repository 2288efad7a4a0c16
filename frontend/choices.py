"""What a top-k chooses along a short axis, such as experts: in order, and written back by comparison with positions.

A scatter keeps apart what is before it and behind it; comparisons are computed together with their neighbours.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

MOST_CHOSEN = 8  # each is a comparison for every element
_CHOOSES = (aten.topk.default, aten.sort.default)


def sort_choices(graph: fx.Graph) -> int:
    """Lets every top-k give its elements in order, as it may; returns how many did not have to. torch-mlir lowers no other."""
    changed = 0
    for node in graph.find_nodes(op="call_function", target=aten.topk.default):
        defaults: list[Any] = [-1, True, True]
        x, count, dim, largest, is_sorted = list(node.args) + defaults[len(node.args) - 2 :]
        if not node.kwargs.get("sorted", is_sorted):
            kept = {name: value for name, value in node.kwargs.items() if name != "sorted"}
            node.args = (x, count, kept.pop("dim", dim), kept.pop("largest", largest), True)
            node.kwargs = kept
            changed += 1
    return changed


def compare_with_choices(graph: fx.Graph) -> int:
    """Turns ``scatter(x, dim, chosen, value)`` into ``where(arange == chosen_j, value_j, x)`` for each j; returns how many.

    Only where ``chosen`` are up to 8 places of an axis as long as that of x: then none is outside, which a scatter would report.
    """
    changed = 0
    for target in (aten.scatter.value, aten.scatter.src):
        for node in graph.find_nodes(op="call_function", target=target):
            if _can_compare(node):
                with graph.inserting_before(node):
                    made = _compared(graph, node)
                node.replace_all_uses_with(made)
                graph.erase_node(node)
                changed += 1
    return changed


def _can_compare(node: fx.Node) -> bool:
    base, dim, chosen, value = node.args
    whole, where = base.meta["val"], chosen.meta["val"]
    dim %= max(whole.dim(), 1)
    given = value.meta["val"] if isinstance(value, fx.Node) else None
    if node.kwargs or whole.dim() != where.dim() or not isinstance(size := whole.shape[dim], int):
        return False
    if chosen.target is not operator.getitem or chosen.args[1] != 1 or chosen.args[0].target not in _CHOOSES:
        return False
    others = [(s, w) for d, (s, w) in enumerate(zip(whole.shape, where.shape, strict=True)) if d != dim]
    few = isinstance(where.shape[dim], int) and where.shape[dim] <= MOST_CHOSEN
    if not few or any(s != w for s, w in others) or _axis_of(chosen.args[0]) != (dim, size):
        return False
    return given is None or (given.shape == where.shape and given.dtype == whole.dtype)


def _axis_of(choice: fx.Node) -> tuple[int, Any]:
    """Returns the axis along which is chosen, and its length."""
    x = choice.args[0].meta["val"]
    number = 2 if choice.target == aten.topk.default else 1
    dim = choice.args[number] if len(choice.args) > number else choice.kwargs.get("dim", -1)
    return dim % x.dim(), x.shape[dim]


def _compared(graph: fx.Graph, node: fx.Node) -> fx.Node:
    base, dim, chosen, value = node.args
    whole, where = base.meta["val"], chosen.meta["val"]
    dim %= whole.dim()

    def made(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = graph.call_function(target, args, kwargs)
        with node.meta["val"].fake_mode:
            fake = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            new.meta["val"] = target(*fake[0], **fake[1])
        new.meta["stack_trace"] = node.meta.get("stack_trace")
        return new

    options = {"dtype": where.dtype, "device": where.device, "pin_memory": False}
    shape = [1] * whole.dim()
    shape[dim] = whole.shape[dim]
    places = made(aten.view.default, made(aten.arange.start_step, 0, whole.shape[dim], 1, **options), shape)
    scalars = {"dtype": whole.dtype, "device": whole.device}
    result = base
    for j in range(where.shape[dim]):
        same = made(aten.eq.Tensor, places, made(aten.slice.Tensor, chosen, dim, j, j + 1))
        is_node = isinstance(value, fx.Node)
        new = (
            made(aten.slice.Tensor, value, dim, j, j + 1)
            if is_node
            else made(aten.full.default, [], value, **scalars)
        )
        result = made(aten.where.self, same, new, result)
    return result
