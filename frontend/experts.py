"""Finds products of rows with the weights of experts and writes them as ``spikingbrain::grouped_linear``: the road of both doors.

Plain PyTorch gathers weights first, ``torch.bmm(weight[expert], x.unsqueeze(-1))``: a copy of the weight for each row, which a
gradient keeps. What is meant is a linear layer chosen by each row. Every axis of the gathered weights has a label (a row's,
"a" or "b" of weight [N, A, B]) that is followed through views into a product; the labels tell which axis is summed over.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

import spikingbrain.frontend.ops  # noqa: F401  (registers the op)
from spikingbrain.frontend.checks import user_line
from spikingbrain.frontend.recurrences.emit import Emitter
from spikingbrain.passes.spike_forms import form

aten = torch.ops.aten
_GROUPED = torch.ops.spikingbrain.grouped_linear.default
_SPIKING = torch.ops.spikingbrain.spike_grouped_linear.default

Label = Any  # an int: that axis of the experts; "a" or "b": an axis of a weight; None: an axis of size 1


@dataclass(frozen=True)
class ExpertReport:
    """What became of one product with gathered weights.

    Attributes:
        status: "raised", or "gathered" where weights are copied for each row.
        op: "grouped_linear" or "spike_grouped_linear", or "" where it stays.
        where: the user's line.
        reason: what it was recognised as, or why it was not.
        experts, inputs, outputs: its sizes, 0 where unknown.
        silent: of spiking experts, the share of counts that are 0, 0 where nobody has measured it.
        form: how a CPU computes few rows of spiking experts: "dense", all channels, or "events", those that fire.
    """

    status: str
    op: str
    where: str
    reason: str
    experts: int = 0
    inputs: int = 0
    outputs: int = 0
    silent: float = 0.0

    @property
    def form(self) -> str:
        return form(self.silent) if self.op == "spike_grouped_linear" else ""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "form": self.form}


class _NotGrouped(Exception):
    """Raised where a product with gathered weights is not one linear layer per row; says why."""


@dataclass(frozen=True)
class _Gathered:
    """A value made of gathered weights by views alone; ``labels`` has one entry for each of its axes."""

    node: fx.Node
    weight: fx.Node
    expert: fx.Node
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class _Product:
    """A sum over one axis of weights times something.

    Attributes:
        node: its result, whose axes are ``results``.
        weights: the factor made of weights.
        x: the other factor, whose axes are ``inputs``.
        summed: "a" or "b".
    """

    node: fx.Node
    weights: _Gathered
    x: fx.Node
    inputs: tuple[Label, ...]
    results: tuple[Label, ...]
    summed: str


def may_route(graph: fx.Graph) -> bool:
    """Tells whether a graph, functional or not, may gather weights of experts."""
    return any(_may_gather(node) for node in graph.nodes)


def _may_gather(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    source = node.args[0]
    value = source.meta.get("example_value", source.meta.get("val")) if isinstance(source, fx.Node) else None
    if not isinstance(value, Tensor) or value.ndim != 3:
        return False
    if node.target is operator.getitem:
        return isinstance(node.args[1], fx.Node)
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0] in ("index_select", "index")


def raise_experts(module: fx.GraphModule) -> list[ExpertReport]:
    """Raises in place, in a functional graph of ATen ops; returns what was found."""
    reports = []
    for node in list(module.graph.nodes):
        gathered = None if node.meta.get("opaque") else _gathered(node)
        if gathered is None:
            continue
        for view in _views(gathered):
            for user in list(view.node.users):
                try:
                    product = _product(user, view)
                except _NotGrouped as why:
                    reports.append(ExpertReport("gathered", "", str(user_line(user) or ""), str(why)))
                    continue
                if product is not None:
                    reports.append(_raise(module.graph, product))
    if any(r.status == "raised" for r in reports):
        module.graph.eliminate_dead_code(
            lambda n: bool(n.meta.get("opaque")) or n.op in ("placeholder", "output")
        )
        module.graph.lint()
        module.recompile()
    return reports


def note_spiking(graph: fx.Graph, weights: Mapping[fx.Node, Tensor]) -> list[ExpertReport]:
    """Returns what a graph whose ``weights`` are fixed calls by the spiking op; codes that fit 4 bits are given 4."""
    reports = []
    for node in graph.find_nodes(op="call_function", target=_SPIKING):
        names = [argument.name for argument in node.target._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        codes, bits, silent = given["weight"], 8, float(given.get("silent", 0.0))
        if codes in weights and weights[codes].numel():
            low, high = weights[codes].aminmax()
            bits = 4 if -8 <= int(low) <= int(high) < 8 else 8
        node.args, node.kwargs = (*(given[name] for name in names[:5]), bits, silent), {}
        experts, outputs, inputs = codes.meta["val"].shape
        where = str(user_line(node) or "")
        way = ", added for the channels that fire" if form(silent) == "events" else ""
        reason = "a spiking layer of this package" + way
        reports.append(
            ExpertReport("raised", "spike_grouped_linear", where, reason, experts, inputs, outputs, silent)
        )
    return reports


# Gathered weights, and views of them


def _gathered(node: fx.Node) -> _Gathered | None:
    """Returns ``weight[expert]`` of weights [N, A, B], if a node is that."""
    if node.op != "call_function":
        return None
    if node.target == aten.index.Tensor:
        weight, (expert, *more) = node.args
        if any(more):
            return None
    elif node.target == aten.index_select.default and node.args[1] == 0:
        weight, _, expert = node.args
    else:
        return None
    if not isinstance(expert, fx.Node):
        return None
    weights, index = weight.meta["val"], expert.meta["val"]
    if weights.ndim != 3 or not index.ndim or index.dtype not in (torch.int64, torch.int32):
        return None
    if not weights.is_floating_point():
        return None
    return _Gathered(node, weight, expert, (*range(index.ndim), "a", "b"))


def _views(gathered: _Gathered) -> Iterator[_Gathered]:
    """Yields gathered weights and every view of them whose axes are known."""
    yield gathered
    for user in gathered.node.users:
        labels = _labels_of_view(user, gathered)
        if labels is not None:
            yield from _views(_Gathered(user, gathered.weight, gathered.expert, labels))


def _labels_of_view(view: fx.Node, source: _Gathered) -> tuple[Label, ...] | None:
    """Returns the axes of a node if it is a view of ``source`` that splits and joins none."""
    if view.op != "call_function" or view.args[:1] != (source.node,) or view.meta.get("opaque"):
        return None
    labels, target, rest = list(source.labels), view.target, view.args[1:]
    rank = len(labels)
    if target in (aten.transpose.int, aten.swapaxes.default):
        i, j = rest
        labels[i], labels[j] = labels[j], labels[i]
    elif target in (aten.mT.default, aten.numpy_T.default) and (rank == 3 or target == aten.mT.default):
        order = [*range(rank - 2), rank - 1, rank - 2] if target == aten.mT.default else [2, 1, 0]
        labels = [labels[d] for d in order]
    elif target == aten.permute.default:
        labels = [labels[d] for d in rest[0]]
    elif target == aten.unsqueeze.default:
        labels.insert(rest[0] % (rank + 1), None)
    elif target in (aten.clone.default, aten.contiguous.default, aten.alias.default):
        pass
    elif target in (
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.expand.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
    ):
        return _labels_by_size(source.labels, source.node.meta["val"].shape, view.meta["val"].shape)
    else:
        return None
    return tuple(labels)


def _labels_by_size(
    labels: Sequence[Label], before: Sequence[Any], after: Sequence[Any]
) -> tuple[Label, ...] | None:
    """Returns the axes of a view that has the same sizes in the same order, apart from axes of size 1; None of another."""
    kept = [(label, size) for label, size in zip(labels, before, strict=True) if label is not None]
    found: list[Label] = []
    for size in after:
        if kept and _equal(kept[0][1], size):
            found.append(kept.pop(0)[0])
        elif _equal(size, 1):
            found.append(None)
        else:
            return None
    return None if kept else tuple(found)


def _equal(a: Any, b: Any) -> bool:
    """Compares sizes without learning anything about symbols."""
    return (isinstance(a, int) and isinstance(b, int) and a == b) or str(a) == str(b)


# Products


def _product(node: fx.Node, weights: _Gathered) -> _Product | None:
    """Returns the product that a node is of ``weights`` and something else; None if it is none.

    Raises _NotGrouped for a product of another kind than one linear layer per row.
    """
    if node.op != "call_function" or node.meta.get("opaque"):
        return None
    if node.target in (aten.bmm.default, aten.matmul.default):
        left, right = node.args
        letters = _matrix_letters(left.meta["val"].ndim, right.meta["val"].ndim)
        if letters is None:
            return None
    elif node.target == aten.einsum.default and len(node.args[1]) == 2:
        left, right = node.args[1]
        letters = _einsum_letters(node.args[0])
    elif node.target == aten.mul.Tensor and isinstance(node.args[1], fx.Node):
        left, right = node.args
        ranks = [n.meta["val"].ndim for n in (left, right)]
        (node, letters) = _summed_letters(node, *ranks)
        if letters is None:
            return None
    else:
        return None
    if (left is weights.node) == (right is weights.node):
        return None
    of_left, of_right, of_result = letters
    if left is weights.node:
        return _labelled(node, weights, right, of_left, of_right, of_result)
    return _labelled(node, weights, left, of_right, of_left, of_result)


_Letters = tuple[str, str, str]


def _matrix_letters(left: int, right: int) -> _Letters | None:
    """Returns a product of stacks of matrices as an einsum; axes are matched from the end. None for a single matrix or vector."""
    rank = max(left, right)
    if min(left, right) < 3:
        return None
    stack = "".join(chr(ord("A") + i) for i in range(rank - 2))
    return stack[rank - left :] + "mk", stack[rank - right :] + "kn", stack + "mn"


def _summed_letters(node: fx.Node, left: int, right: int) -> tuple[fx.Node, _Letters | None]:
    """Returns the sum over one axis of an elementwise product, and both as an einsum; None for letters where it is not that."""
    users = list(node.users)
    if len(users) != 1 or users[0].target != aten.sum.dim_IntList:
        return node, None
    total, rank = users[0], max(left, right)
    _, axes, *keep = total.args
    if len(axes) != 1 or any(keep) or total.kwargs:
        return node, None
    every = [chr(ord("A") + i) for i in range(rank)]
    of_left, of_right = "".join(every[rank - left :]), "".join(every[rank - right :])
    del every[axes[0]]
    return total, (of_left, of_right, "".join(every))


def _einsum_letters(equation: str) -> _Letters:
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation:
        raise _NotGrouped(f"an einsum {equation!r} that does not name every axis of its result")
    left, right = inputs.split(",")
    return left, right, result


def _labelled(
    node: fx.Node, weights: _Gathered, x: fx.Node, of_weights: str, of_x: str, of_result: str
) -> _Product:
    """Returns an einsum with labels for its letters."""
    sizes = dict(zip(of_x, x.meta["val"].shape, strict=True))
    labels: dict[str, Label] = dict(zip(of_weights, weights.labels, strict=True))
    if len(labels) < len(of_weights) or len(set(of_x)) < len(of_x):
        raise _NotGrouped("a diagonal is read")
    for letter, size in sizes.items():
        if labels.get(letter) is None:
            if not _equal(size, 1):
                raise _NotGrouped("several rows for each expert")
            labels[letter] = None
    summed = [label for letter, label in labels.items() if letter not in of_result and label is not None]
    if len(summed) != 1 or summed[0] not in ("a", "b"):
        raise _NotGrouped("it does not sum over one axis of the weights alone")
    inputs = [labels[letter] for letter in of_x]
    for i, (letter, label) in enumerate(zip(of_x, inputs, strict=True)):
        whole = isinstance(label, int) and _equal(sizes[letter], weights.expert.meta["val"].shape[label])
        if label == summed[0] or label is None or whole:
            continue
        if not _equal(sizes[letter], 1):
            rows = isinstance(label, int)
            why = "several rows for each expert" if rows else "the other factor has an axis of the outputs"
            raise _NotGrouped(why)
        inputs[i] = None  # one for all of that axis
    if summed[0] not in inputs:
        raise _NotGrouped("the other factor has no axis that is summed over")
    value, weight = x.meta["val"], weights.weight.meta["val"]
    if value.dtype != weight.dtype or node.meta["val"].dtype != weight.dtype:
        raise _NotGrouped(f"{value.dtype} times {weight.dtype}")
    results = [labels[letter] for letter in of_result]
    return _Product(node, weights, x, tuple(inputs), tuple(results), summed[0])


# Emission


def _raise(graph: fx.Graph, product: _Product) -> ExpertReport:
    node, expert = product.node, product.weights.expert
    emit = Emitter(graph, getattr(node.meta["val"], "fake_mode", None))
    emit.trace = node.meta.get("stack_trace")
    axes = expert.meta["val"].ndim
    with graph.inserting_before(node):
        x = _arranged(emit, product.x, product.inputs, [*range(axes), product.summed])
        sizes = list(expert.meta["val"].shape)
        if any(label not in product.inputs for label in range(axes)):
            x = emit.op(aten.expand.default, x, [*_size_nodes(emit, expert, sizes), -1])
        if axes > 1:
            x = emit.op(aten.flatten.using_ints, x, 0, axes - 1)
            expert = emit.op(aten.flatten.using_ints, expert, 0, axes - 1)
        if expert.meta["val"].dtype != torch.int64:
            expert = emit.op(aten.to.dtype, expert, torch.int64)
        y = emit.op(_GROUPED, x, product.weights.weight, expert, product.summed == "a")
        if axes > 1:
            like = product.weights.expert
            y = emit.op(aten.reshape.default, y, [*_size_nodes(emit, like, sizes), -1])
        y = _arranged(emit, y, [*range(axes), "b" if product.summed == "a" else "a"], product.results)
    node.replace_all_uses_with(y)
    weight = product.weights.weight.meta["val"]
    experts, a, b = (s if isinstance(s, int) else 0 for s in weight.shape)
    inputs, outputs = (a, b) if product.summed == "a" else (b, a)
    where = str(user_line(node) or "")
    reason = "gathered weights of experts times rows"
    return ExpertReport("raised", "grouped_linear", where, reason, experts, inputs, outputs)


def _arranged(emit: Emitter, value: fx.Node, labels: Sequence[Label], wanted: Sequence[Label]) -> fx.Node:
    """Returns a value whose axes are ``labels`` with those that are ``wanted``, of size 1 where it has none."""
    ones = [i for i, label in enumerate(labels) if label is None]
    for i in reversed(ones):
        value = emit.op(aten.squeeze.dim, value, i)
    present = [label for label in labels if label is not None]
    order = [present.index(label) for label in wanted if label in present]
    if order != sorted(order):
        value = emit.op(aten.permute.default, value, order)
    for i, label in enumerate(wanted):
        if label not in present:
            value = emit.op(aten.unsqueeze.default, value, i)
    return value


def _size_nodes(emit: Emitter, source: fx.Node, sizes: Sequence[Any]) -> list[Any]:
    """Returns sizes as numbers, or as nodes where they are symbols."""
    return [
        s if isinstance(s, int) else emit.op(aten.sym_size.int, source, axis) for axis, s in enumerate(sizes)
    ]
