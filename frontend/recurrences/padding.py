"""Takes away padding behind the last step that is cut off again: ``pad(x) + pad(y)``, cut to the length of x, is ``x + y``.

Code in chunks fills up the last one. Where the chunks became one op over all steps, nothing needs the zeros any more, and without
them the graph is the same for every length.
"""

from __future__ import annotations

from typing import Any

from torch import fx, ops

from spikingbrain.frontend.recurrences.emit import Emitter

aten = ops.aten

_EACH = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
_ALONE = {aten.clone.default, aten.contiguous.default, aten.to.dtype, aten._to_copy.default, aten.neg.default}
_VIEWS = {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints}
_PADS = (aten.pad.default, aten.constant_pad_nd.default)


def cut_padding(emit: Emitter) -> None:
    """Rewrites in place each slice of the first steps whose padding is known all the way, and what changes nothing."""
    for node in list(emit.graph.find_nodes(op="call_function", target=aten.slice.Tensor)):
        given: list[Any] = [*node.args, *(None, 0, 0, None, 1)[len(node.args) :]]
        x, dim, start, end, step = given
        if not isinstance(x, fx.Node) or not isinstance(dim, int) or start not in (0, None) or step != 1:
            continue
        rank = x.meta["val"].dim()
        if isinstance(end, int) and 0 < end < _size(x, dim % rank) and _is_padded(x, dim % rank, end):
            with emit.graph.inserting_before(node):
                emit.trace = node.meta.get("stack_trace")
                node.replace_all_uses_with(_cut(emit, x, dim % rank, end, {}))
    for node in emit.graph.nodes:
        source = _source_of_nothing(node) if node.target in _PADS else _unviewed(node)
        if source is not node and not any(u.op == "output" or u.meta.get("opaque") for u in node.users):
            node.replace_all_uses_with(source)


def _source_of_nothing(x: fx.Node) -> fx.Node:
    """Returns what a padding by nothing pads."""
    source, widths = x.args[:2]
    assert isinstance(source, fx.Node) and isinstance(widths, (list, tuple))
    return x if any(widths) else source


def _is_padded(x: fx.Node, dim: int, end: int) -> bool:
    """Whether the first ``end`` entries along ``dim`` can be had without a slice."""
    if x.target in _ALONE:
        return _is_padded(x.all_input_nodes[0], dim, end)
    if x.target in _EACH:
        return all(
            _of_operand(y, x, dim) is None or _is_padded(y, dim - _lacks(y, x), end)
            for y in x.all_input_nodes
        )
    source = _unviewed(x)
    if source is not x:
        return _is_padded(source, dim, end)
    return _unpadded(x, dim, end) is not None


def _cut(emit: Emitter, x: fx.Node, dim: int, end: int, known: dict[fx.Node, fx.Node]) -> fx.Node:
    if x not in known:
        source, bare = _unviewed(x), _unpadded(x, dim, end)
        if bare is not None:
            known[x] = bare
        elif source is not x:
            known[x] = _cut(emit, source, dim, end, known)
        else:
            args = [
                _cut(emit, y, dim - _lacks(y, x), end, known)
                if isinstance(y, fx.Node) and _of_operand(y, x, dim) is not None
                else y
                for y in x.args
            ]
            known[x] = emit.op(x.target, *args, **x.kwargs)
    return known[x]


def _of_operand(y: fx.Node, x: fx.Node, dim: int) -> int | None:
    """Returns the axis of an operand that is ``dim`` of the result; None where it is broadcast along it."""
    own = dim - _lacks(y, x)
    return own if own >= 0 and _size(y, own) != 1 else None


def _lacks(y: fx.Node, x: fx.Node) -> int:
    return int(x.meta["val"].dim() - y.meta["val"].dim())


def _size(x: fx.Node, dim: int) -> int:
    size = x.meta["val"].shape[dim]
    return size if isinstance(size, int) else -1


def _unviewed(x: fx.Node) -> fx.Node:
    """Returns what a view of a view was before, if it is in that shape again."""
    inner = x.args[0] if x.target in _VIEWS else None
    if not isinstance(inner, fx.Node) or inner.target not in _VIEWS:
        return x
    source = inner.args[0]
    assert isinstance(source, fx.Node)
    return source if source.meta["val"].shape == x.meta["val"].shape else x


def _unpadded(x: fx.Node, dim: int, end: int) -> fx.Node | None:
    """Returns what was filled up with zeros to become ``x``, if it ends at ``end``."""
    if x.target not in _PADS:
        return None
    source, widths, *rest = x.args
    if x.target is aten.pad.default and rest[:1] not in ([], ["constant"]):
        return None
    before = [i for i, w in enumerate(widths) if w and i != 2 * (x.meta["val"].dim() - 1 - dim) + 1]
    assert isinstance(source, fx.Node)
    return source if not before and _size(source, dim) == end else None
