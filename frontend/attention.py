"""Finds softmax attention over a window and writes it as ``spikingbrain::window_attention``, where the target has kernels for it.

Two ways of writing are known: `F.scaled_dot_product_attention`, and by hand, products of queries and keys, scaled, masked, a
softmax and products with values. What the mask lets a query see is read off its ops (`frontend.masks`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

import spikingbrain.frontend.ops  # noqa: F401  (registers the op)
from spikingbrain.frontend.checks import user_line
from spikingbrain.frontend.masks.reader import Reader, is_written
from spikingbrain.frontend.masks.values import BLOCKED, Affine, Condition, NotShown, Number, opposite
from spikingbrain.frontend.masks.window import Window, window_of
from spikingbrain.frontend.recurrences.emit import Emitter

aten = torch.ops.aten
_WINDOWED = torch.ops.spikingbrain.window_attention.default
_FUSED = aten.scaled_dot_product_attention.default
_SOFTMAXES = (aten.softmax.int, aten._softmax.default)
_COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default)
_CASTS = (aten.to.dtype, aten._to_copy.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
_HEADS_FIRST = "bhtd"

Refuse = Callable[..., "str | None"]
_Arranged = tuple[fx.Node, str]  # a tensor and its axes


@dataclass(frozen=True)
class AttentionReport:
    """What became of one attention.

    Attributes:
        status: "raised", or "torch's" where torch's kernels compute it.
        op: "window_attention", or "" where it stays.
        where: the user's line.
        reason: the window that was recognised, or why none was.
    """

    status: str
    op: str
    where: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Attention:
    """``softmax(scale * q . k over what is seen) v``.

    Attributes:
        node: the result.
        q, k, v: nodes, whose axes are ``axes``: of q, k, v and the result, letters b, h, t or n, d or e.
        seen: what the masks let a query see.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    axes: tuple[str, str, str, str]
    scale: float
    seen: tuple[Condition, ...]


def may_attend(graph: fx.Graph) -> bool:
    """Tells whether a graph, functional or not, may hold attention."""
    names = (str(getattr(n.target, "__name__", n.target)) for n in graph.nodes)
    return any("softmax" in name or "scaled_dot_product_attention" in name for name in names)


def raise_attention(module: fx.GraphModule, refuse: Refuse, any_size: bool = False) -> list[AttentionReport]:
    """Raises in place, in a functional graph of ATen ops; returns what was found.

    Args:
        refuse: returns why the target's kernels do not take the arguments of the op, or None.
        any_size: the sizes of the graph stand for others.
    """
    reader, reports = Reader(), []
    _drop_no_dropout(module.graph)
    for node in list(module.graph.nodes):
        fused = node.target in (_FUSED, F.scaled_dot_product_attention)
        if not fused and (node.target not in _SOFTMAXES or node.meta.get("opaque")):
            continue
        try:
            found = _fused(node, reader) if fused else _by_hand(node, reader)
            if found is not None:
                reports.append(_raise(module.graph, found, refuse, any_size))
        except NotShown as why:
            reports.append(AttentionReport("torch's", "", str(user_line(node) or ""), str(why)))
    if any(r.status == "raised" for r in reports):
        module.graph.eliminate_dead_code(
            lambda n: bool(n.meta.get("opaque")) or n.op in ("placeholder", "output")
        )
        module.graph.lint()
        module.recompile()
    return reports


# The two ways of writing


def _fused(node: fx.Node, reader: Reader) -> _Attention:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    q, k, v, mask = (given.get(name) for name in names[:4])
    if given.get("dropout_p"):
        raise NotShown("dropout")
    if node.meta.get("opaque"):
        raise NotShown("it is inside autocast or another mode")
    steps, keys = _val(q).shape[-2], _val(k).shape[-2]
    if given.get("is_causal"):
        if steps != keys:
            raise NotShown("is_causal counts from the first key, and there are more keys than queries")
        shape = (steps, keys)
        causal = Condition.of(shape, [[Affine(shape, (int(steps > 1), -int(keys > 1)), 0)]])
        seen: tuple[Condition, ...] = (causal,)
    else:
        seen = () if mask is None else (reader.condition(mask),)
    scale = given.get("scale")
    scale = _val(q).shape[-1] ** -0.5 if scale is None else float(scale)
    return _Attention(node, q, k, v, (_HEADS_FIRST, "bhnd", "bhne", "bhte"), scale, seen)


def _by_hand(softmax: fx.Node, reader: Reader) -> _Attention | None:
    """Returns the attention around a softmax; None if it multiplies nothing, as that of a router."""
    scores = _val(softmax.args[0])
    if scores.ndim != 4 or softmax.args[1] not in (3, -1):
        return None
    weights, users = softmax, list(softmax.users)
    while len(users) == 1 and (users[0].target in (*_COPIES, *_CASTS)):
        weights, users = users[0], list(users[0].users)
    if len(users) != 1:
        return None
    product = _product(users[0])
    if product is None or product[0] is not weights:
        return None
    _, v, (of_weights, of_v, of_result) = product

    masks: list[Condition] = []
    node, scale = softmax.args[0], 1.0
    while _product(node) is None:
        if node.op != "call_function" or node.meta.get("opaque"):
            return None
        first = node.args[0] if node.args else None
        if node.target in (*_CASTS, *_COPIES):
            node = first
        elif node.target is aten.masked_fill.Scalar and node.args[2] <= BLOCKED:
            masks.append(opposite(reader.condition(node.args[1])))
            node = first
        elif node.target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
            seen = reader.condition(node.args[0])
            if _is_blocked(reader, node.args[2]):
                node = node.args[1]
            elif _is_blocked(reader, node.args[1]):
                node, seen = node.args[2], opposite(seen)
            else:
                raise NotShown("scores that are not seen are not set far below")
            masks.append(seen)
        elif node.target is aten.add.Tensor and isinstance(node.args[1], fx.Node) and not node.kwargs:
            masks.append(reader.condition(node.args[1]))
            node = first
        elif node.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(node.args[1], (int, float)):
            scale, node = scale * node.args[1], first
        elif node.target in (aten.div.Tensor, aten.div.Scalar) and isinstance(node.args[1], (int, float)):
            scale, node = scale / node.args[1], first
        else:
            return None
        if not isinstance(node, fx.Node):
            return None
    q, k, (of_q, of_k, of_scores) = _product(node)  # type: ignore[misc]
    if not scale > 0:
        raise NotShown(f"scores times {scale}")
    return _Attention(
        users[0], q, k, v, _lettered(of_q, of_k, of_scores, of_weights, of_v, of_result), scale, tuple(masks)
    )


def _is_blocked(reader: Reader, given: Any) -> bool:
    """Returns whether a number, or a tensor of one number, is far below all scores."""
    if isinstance(given, fx.Node):
        try:
            given = reader.value(given)
        except NotShown:
            return False
    value = given.value if isinstance(given, Number) else given
    return isinstance(value, (int, float)) and value <= BLOCKED


def _drop_no_dropout(graph: fx.Graph) -> None:
    """Removes dropout that drops nothing, as in evaluation."""
    for node in graph.find_nodes(op="call_function", target=F.dropout):
        given = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
        if not given.get("training", True) or given.get("p", 0.5) == 0:
            node.replace_all_uses_with(given["input"])
            graph.erase_node(node)


def _product(node: Any) -> tuple[fx.Node, fx.Node, tuple[str, str, str]] | None:
    """Returns the factors of a batched product, and it as an einsum of ranks 4."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.meta.get("opaque"):
        return None
    if node.target is aten.matmul.default:
        left, right = node.args
        letters = ("abij", "abjk", "abik")
    elif node.target is aten.einsum.default and len(node.args[1]) == 2:
        left, right = node.args[1]
        inputs, arrow, result = node.args[0].replace(" ", "").partition("->")
        if not arrow or "." in inputs:
            return None
        first, _, second = inputs.partition(",")
        letters = (first, second, result)
    else:
        return None
    if any(len(letter) != 4 or len(set(letter)) != 4 for letter in letters):
        return None
    if _val(left).ndim != 4 or _val(right).ndim != 4:
        return None
    return left, right, letters


def _lettered(
    of_q: str, of_k: str, of_scores: str, of_weights: str, of_v: str, of_result: str
) -> tuple[str, str, str, str]:
    """Returns the axes of q, k, v and the result as b, h, t or n, d or e, from two einsums that share the scores."""
    names = dict(zip(of_scores, "bhtn", strict=True))
    summed = (set(of_q) & set(of_k)) - set(of_scores)
    if len(summed) != 1:
        raise NotShown("products of queries and keys do not sum over one axis")
    names[summed.pop()] = "d"
    later = dict(zip(of_weights, "bhtn", strict=True))
    new = set(of_v) - set(of_weights)
    if len(new) != 1:
        raise NotShown("weights and values are multiplied in another way")
    later[new.pop()] = "e"
    try:
        axes = tuple(
            "".join(table[letter] for letter in letters)
            for table, letters in ((names, of_q), (names, of_k), (later, of_v), (later, of_result))
        )
    except KeyError:
        raise NotShown("products that are not those of attention") from None
    if [set(a) for a in axes] != [set("bhtd"), set("bhnd"), set("bhne"), set("bhte")]:
        raise NotShown("products that are not those of attention")
    return axes  # type: ignore[return-value]


# Emission


def _raise(graph: fx.Graph, found: _Attention, refuse: Refuse, any_size: bool) -> AttentionReport:
    node = found.node
    q, k, v = found.q, found.k, found.v
    if any(_val(x).ndim != 4 for x in (q, k, v)):
        raise NotShown("queries, keys and values have other axes than batch, heads, time and channels")
    sizes = {
        a: n
        for x, axes in zip((q, k, v), found.axes, strict=False)
        for a, n in zip(axes, _val(x).shape, strict=True)
    }
    if len({_val(x).dtype for x in (q, k, v, node)}) != 1:
        raise NotShown("queries, keys, values and the result differ in dtype")
    if len({_val(x).shape[axes.index("b")] for x, axes in zip((q, k, v), found.axes, strict=False)}) != 1:
        raise NotShown("keys of one batch serve several")
    heads, of_keys, of_values = (
        _val(x).shape[axes.index("h")] for x, axes in zip((q, k, v), found.axes, strict=False)
    )
    if of_keys != of_values or heads % of_keys:
        raise NotShown(f"{heads} heads read {of_keys} of keys and {of_values} of values")
    if sizes["t"] > sizes["n"]:
        raise NotShown("there are more queries than keys")
    window = window_of(found.seen, sizes["t"], sizes["n"], any_size)
    options = (window.window, window.sinks, found.scale)
    emit = Emitter(graph, getattr(_val(node), "fake_mode", None))
    emit.trace = node.meta.get("stack_trace")
    of_q, of_k, of_v = (_untwisted(x, axes) for x, axes in zip((q, k, v), found.axes, strict=False))
    of_k, of_v = _ungrouped(of_k, of_v)
    with graph.inserting_before(node):
        given = [
            _arranged(emit, *x, wanted) for x, wanted in ((of_q, "bthd"), (of_k, "bnhd"), (of_v, "bnhe"))
        ]
        positions: list[fx.Node | None] = [None, None]
        if window.query is not None and window.key is not None:
            positions = [
                _positions(emit, x, sizes["b"], sizes[axis])
                for x, axis in ((window.query, "t"), (window.key, "n"))
            ]
        values = [_val(x) for x in given], [None if x is None else _val(x) for x in positions]
        if reason := refuse(*values[0], *options, *values[1]):
            raise NotShown(reason)
        both = emit.op(_WINDOWED, *given, *options, *positions)
        o = emit.op(operator.getitem, both, 0)
        o = _arranged(emit, o, "bthe", found.axes[3])
    node.replace_all_uses_with(o)
    return AttentionReport("raised", "window_attention", str(user_line(node) or ""), _told(window))


def _positions(emit: Emitter, given: Affine, batch: int, length: int) -> fx.Node:
    """Emits positions [batch, length] that a mask compares; ``given`` is a function of [batch, 1, queries, keys]."""
    places = emit.op(aten.arange.default, length)
    factor = given.factors[2] + given.factors[3]
    total = emit.op(aten.add.Tensor, emit.op(aten.mul.Tensor, places, factor), given.constant)
    total = emit.op(aten.unsqueeze.default, total, 0)
    for data, factor in given.data:
        x, axes = data.node, list(data.axes)
        for i in reversed([i for i, a in enumerate(axes) if a is None]):
            x = emit.op(aten.squeeze.dim, x, i)
            del axes[i]
        if axes and axes[0] != -4:  # the same for all of the batch
            x = emit.op(aten.unsqueeze.default, x, 0)
        elif len(axes) < 2:
            x = emit.op(aten.unsqueeze.default, x, -1)
        total = emit.op(aten.add.Tensor, total, emit.op(aten.mul.Tensor, x, factor))
    return emit.op(aten.expand.default, total, [batch, length])


def _told(window: Window) -> str:
    seen = f"a window of {window.window}" if window.window else "all positions before"
    of_data = "" if window.key is None else ", positions as data"
    return f"{seen}{f' and {window.sinks} sinks' if window.sinks else ''}{of_data}"


def _arranged(emit: Emitter, x: fx.Node, axes: str, wanted: str) -> fx.Node:
    return x if axes == wanted else emit.op(aten.permute.default, x, [axes.index(a) for a in wanted])


def _untwisted(x: fx.Node, axes: str) -> _Arranged:
    """Returns what a tensor is a view or copy of, whose axes are the same in another order."""
    while x.op == "call_function" and not x.meta.get("opaque"):
        order = list(range(4))
        if x.target in (aten.transpose.int, aten.mT.default):
            i, j = x.args[1:] or (-2, -1)
            order[i], order[j] = order[j], order[i]
        elif x.target is aten.permute.default:
            order = [d % 4 for d in x.args[1]]
        elif x.target not in _COPIES or is_written(x.args[0]):
            break
        x, axes = x.args[0], "".join(axes[order.index(d)] for d in range(4))
    return x, axes


def _ungrouped(k: _Arranged, v: _Arranged) -> tuple[_Arranged, _Arranged]:
    """Returns keys and values before each was repeated for a group of heads, where both were."""
    narrow = [_unrepeated(x, axes.index("h")) for x, axes in (k, v)]
    if narrow[0] is None or narrow[1] is None or any(map(is_written, narrow)):
        return k, v
    states = {_val(x).shape[axes.index("h")] for x, (_, axes) in zip(narrow, (k, v), strict=True)}
    return (_untwisted(narrow[0], k[1]), _untwisted(narrow[1], v[1])) if len(states) == 1 else (k, v)


def _unrepeated(x: fx.Node, axis: int) -> fx.Node | None:
    """Returns what was repeated along an axis, entry by entry, to give ``x``."""
    if x.target is aten.repeat_interleave.self_int:
        source, times, *dim = x.args
        return source if isinstance(times, int) and dim and dim[0] % 4 == axis else None
    if x.target not in _VIEWS:
        return None
    wide = x.args[0]
    while isinstance(wide, fx.Node) and wide.target in _COPIES:
        wide = wide.args[0]
    if not isinstance(wide, fx.Node) or wide.target is not aten.expand.default:
        return None
    narrow = wide.args[0]
    if not isinstance(narrow, fx.Node) or narrow.target is not aten.unsqueeze.default:
        return None
    source, place = narrow.args[0], narrow.args[1] % 5
    before, after = list(_val(source).shape), list(_val(x).shape)
    grown = list(_val(wide).shape)
    if _val(source).ndim != 4 or place != axis + 1 or grown[:place] + grown[place + 1 :] != before:
        return None
    return source if after == [*before[:axis], before[axis] * grown[place], *before[axis + 1 :]] else None


def _val(node: Any) -> Tensor:
    value: Tensor = node.meta["val"]
    return value
