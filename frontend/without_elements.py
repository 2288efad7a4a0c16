"""Takes tensors without elements out of a graph: half of a rotation that turns all of a head, the first cache of a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from spikingbrain.frontend.checks import draws_random_numbers

aten = torch.ops.aten


def fold_tensors_without_elements(graph: fx.Graph) -> int:
    """Rewrites in place what reads a tensor of which a size is 0, a number and no symbol; returns how many ops changed.

    What joins it to others, or writes it into another, does without it. What has no elements itself is made anew, so that
    nothing is computed for it; views stay, as they are free.
    """
    changed = 0
    for node in list(graph.nodes):
        if not _is_plain(node):
            continue
        rewrite = _made if _is_empty(node) else _READERS.get(node.target)
        made = None
        if rewrite is not None:
            with graph.inserting_before(node):
                made = rewrite(graph, node)
        if made is not None:
            node.replace_all_uses_with(made)
            graph.erase_node(node)
            changed += 1
    if changed:
        graph.eliminate_dead_code()
    return changed


def _is_plain(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and not node.target._schema.is_mutable
        and not draws_random_numbers(node)
    )


def _is_empty(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and any(isinstance(s, int) and s == 0 for s in value.shape)


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Adds an op with the value of ``like``."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {key: like.meta[key] for key in ("val", "stack_trace") if key in like.meta}
    return node


def _full(graph: fx.Graph, node: fx.Node, fill: float) -> fx.Node | None:
    value = node.meta["val"]
    if not all(isinstance(s, int) for s in value.shape):
        return None
    number = float(fill) if value.is_floating_point() else int(fill)
    return _call(
        graph, node, aten.full.default, list(value.shape), number, dtype=value.dtype, device=value.device
    )


def _made(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    made_already = node.target == aten.full.default or node.target.is_view
    return None if made_already else _full(graph, node, 0)


def _cat(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The type of the result is that of all operands; one without elements may have any shape that torch takes."""
    parts = [p for p in node.args[0] if not _is_empty(p)]
    if len(parts) == len(node.args[0]):
        return None
    dtype = node.meta["val"].dtype
    for i, part in enumerate(parts):
        if part.meta["val"].dtype != dtype:
            parts[i] = _call(graph, part, aten._to_copy.default, part, dtype=dtype)
            parts[i].meta["val"] = part.meta["val"].to(dtype)
    alone = len(parts) == 1 and parts[0].meta["val"].stride() == node.meta["val"].stride()
    if alone:
        return _call(graph, node, aten.clone.default, parts[0])
    return _call(graph, node, node.target, parts, *node.args[1:], **node.kwargs)


def _written(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Of ``slice_scatter`` and the like: nothing is written."""
    return _call(graph, node, aten.clone.default, node.args[0]) if _is_empty(node.args[1]) else None


def _padded(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    fill = node.args[2] if len(node.args) > 2 else 0
    return _full(graph, node, fill) if _is_empty(node.args[0]) else None


def _summed(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    return _full(graph, node, 0) if _is_empty(node.args[0]) else None


def _multiplied(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """A product over an axis without elements is 0."""
    return _full(graph, node, 0) if any(map(_is_empty, node.args)) else None


_READERS: dict[Any, Callable[[fx.Graph, fx.Node], fx.Node | None]] = {
    aten.cat.default: _cat,
    aten.slice_scatter.default: _written,
    aten.diagonal_scatter.default: _written,
    aten.constant_pad_nd.default: _padded,
    aten.sum.default: _summed,
    aten.sum.dim_IntList: _summed,
    aten.mm.default: _multiplied,
    aten.bmm.default: _multiplied,
}
