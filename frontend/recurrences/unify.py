"""Graphs of one program at several sizes, as one graph in which the sizes are expressions."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from spikingbrain.frontend.checks import user_line

aten = torch.ops.aten

SHORTEST = 6  # enough positions for an axis to be taken for time

Dims = Sequence[Mapping[int, Any] | None]


class NotUnified(Exception):
    """Raised where programs of several lengths are not one program; says what differs, in the user's words."""


def step_of(dim: Any) -> int | None:
    """Returns by how much a dimension grows at least: 1, or C for ``C * Dim(...)``; None for what has no name."""
    if not hasattr(dim, "__name__") or isinstance(dim, int):
        return None
    if hasattr(dim, "root"):  # derived: its function tells the step, without an offset
        at = [dim.fn(i) for i in (0, 1, 2)]
        return int(at[1]) if at[0] == 0 and at[2] == 2 * at[1] else None
    return 1


def root_of(dim: Any) -> str:
    return str(getattr(dim, "root", dim).__name__)


@dataclass
class Sizes:
    """The dynamic dimensions of an entry, by the name of their root.

    Attributes:
        counts: three short sizes of each, in steps.
        steps: the smallest multiple of each dimension that is the size of an argument.
        places: the first (argument, axis) of that size; no axis where the argument itself is the number.
    """

    counts: dict[str, list[int]]
    steps: dict[str, int]
    places: dict[str, tuple[int, int | None]]

    @staticmethod
    def of(tensors: Sequence[torch.Tensor], dims: Dims) -> Sizes:
        """Chooses sizes that the dimensions allow and that no other size equals, so that sizes tell what they are of."""
        steps: dict[str, int] = {}
        places: dict[str, tuple[int, int | None]] = {}
        lowest: dict[str, int] = {}
        taken: set[int] = set()
        for i, (tensor, by_axis) in enumerate(zip(tensors, dims, strict=True)):
            for axis, size in enumerate(tensor.shape):
                dim = (by_axis or {}).get(axis)
                step = step_of(dim)
                if step is None:
                    taken.add(size)
                    continue
                name = root_of(dim)
                lowest[name] = max(
                    lowest.get(name, 0), int(getattr(getattr(dim, "root", dim), "min", 0) or 0)
                )
                if step < steps.get(name, step + 1):
                    steps[name], places[name] = step, (i, axis)
        counts: dict[str, list[int]] = {}
        for name, step in steps.items():
            found: list[int] = []
            count = max(SHORTEST, lowest[name])
            while len(found) < 3:
                if count * step not in taken:
                    found.append(count)
                    taken.add(count * step)
                    count += len(found)
                else:
                    count += 1
            counts[name] = found
        return Sizes(counts, steps, places)

    def points(self) -> list[dict[str, int]]:
        """Returns the sizes to trace at: all corners of two sizes each, and one further size of each dimension."""
        names = list(self.counts)
        corners = [
            dict(zip(names, c, strict=True)) for c in itertools.product(*[self.counts[n][:2] for n in names])
        ]
        return corners + [{**corners[0], n: self.counts[n][2]} for n in names]


def unify(
    graphs: Sequence[fx.GraphModule], sizes: Sizes, points: Sequence[Mapping[str, int]]
) -> fx.GraphModule:
    """Returns the first graph with every number that differs between the graphs as an expression of the sizes."""
    listed = [list(g.graph.nodes) for g in graphs]
    if len({len(nodes) for nodes in listed}) != 1:
        counts = ", ".join(f"{len(n)} ops at {_told(p, sizes)}" for n, p in zip(listed, points, strict=True))
        raise NotUnified(f"the traced programs differ in size: {counts}")
    first = graphs[0]
    order = [{n: i for i, n in enumerate(nodes)} for nodes in listed]
    writer = _Expressions(first.graph, sizes, points)
    for nodes in zip(*listed, strict=True):
        node = nodes[0]
        if len({(n.op, str(n.target) if n.op == "call_function" else n.op) for n in nodes}) != 1:
            others = next(n for n in nodes if str(n.target) != str(node.target))
            raise NotUnified(f"at {_line(node)} one length runs {node.target}, another {others.target}")
        if node.op == "get_attr":
            _same_attribute(graphs, nodes)
        if node.op not in ("call_function", "output"):
            continue
        flat, spec = pytree.tree_flatten((tuple(node.args), dict(node.kwargs)))
        others = [pytree.tree_flatten((tuple(n.args), dict(n.kwargs))) for n in nodes[1:]]
        if any(s != spec for _, s in others):
            raise NotUnified(f"at {_line(node)} the arguments of {node.target} differ in number")
        new, changed = [], False
        for values in zip(flat, *[o for o, _ in others], strict=True):
            if isinstance(values[0], fx.Node):
                if len({order[i].get(v, -1) for i, v in enumerate(values)}) != 1:
                    raise NotUnified(f"at {_line(node)} {node.target} reads other values at other lengths")
                new.append(values[0])
            elif all(type(v) is type(values[0]) and v == values[0] for v in values):
                new.append(values[0])
            else:
                new.append(writer.expression(values, node))
                changed = True
        if changed:
            node.args, node.kwargs = pytree.tree_unflatten(new, spec)
    first.graph.lint()
    first.recompile()
    return first


def _told(point: Mapping[str, int], sizes: Sizes) -> str:
    return ", ".join(f"{n} = {c * sizes.steps[n]}" for n, c in point.items())


class _Expressions:
    """Writes numbers that depend on the sizes at the head of a graph: sums of products of sizes."""

    def __init__(self, graph: fx.Graph, sizes: Sizes, points: Sequence[Mapping[str, int]]):
        self.graph, self.sizes, self.points = graph, sizes, points
        self.inputs = [n for n in graph.nodes if n.op == "placeholder"]
        names = list(sizes.counts)
        self.monomials = [c for k in range(len(names) + 1) for c in itertools.combinations(names, k)]
        self.rows = [
            [Fraction(math.prod(p[n] * sizes.steps[n] for n in m)) for m in self.monomials] for p in points
        ]
        self._made: dict[Any, fx.Node] = {}
        self._end = self.inputs[-1]

    def expression(self, values: Sequence[Any], node: fx.Node) -> fx.Node:
        """Returns the node of a number that is ``values[i]`` at the i-th point."""
        if not all(type(v) is int for v in values):
            raise NotUnified(
                f"at {_line(node)} {node.target} is given {values[0]} or {values[-1]}, by the length"
            )
        count = len(self.monomials)
        weights = _solved(self.rows[:count], [Fraction(v) for v in values[:count]])
        for row, v, point in zip(self.rows, values, self.points, strict=True):
            if sum(w * r for w, r in zip(weights, row, strict=True)) != v:
                raise NotUnified(
                    f"at {_line(node)} a number of {node.target} does not grow evenly with the sizes: it is "
                    f"{v} at {_told(point, self.sizes)}"
                )
        common = math.lcm(*[w.denominator for w in weights])
        key = (tuple(int(w * common) for w in weights), common)
        if key not in self._made:
            self._made[key] = self._sum(*key)
        return self._made[key]

    def _sum(self, weights: Sequence[int], common: int) -> fx.Node:
        total: Any = None
        for weight, monomial in zip(weights, self.monomials, strict=True):
            if weight:
                term: Any = weight
                for name in monomial:
                    size = self._size(name)
                    term = size if term == 1 else self._call(operator.mul, size, term)
                total = term if total is None else self._call(operator.add, total, term)
        return total if common == 1 else self._call(operator.floordiv, total, common)

    def _size(self, name: str) -> fx.Node:
        if name not in self._made:
            tensor, axis = self.sizes.places[name]
            whole = self.inputs[tensor]
            self._made[name] = whole if axis is None else self._call(aten.sym_size.int, whole, axis)
        return self._made[name]

    def _call(self, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_before(self._end.next):
            self._end = self.graph.call_function(target, args)
        return self._end


def _solved(rows: Sequence[Sequence[Fraction]], values: Sequence[Fraction]) -> list[Fraction]:
    """Solves a small system of linear equations exactly."""
    table = [[*row, v] for row, v in zip(rows, values, strict=True)]
    for i in range(len(table)):
        pivot = next(k for k in range(i, len(table)) if table[k][i] != 0)
        table[i], table[pivot] = table[pivot], table[i]
        table[i] = [x / table[i][i] for x in table[i]]
        for k in range(len(table)):
            if k != i:
                table[k] = [x - table[k][i] * y for x, y in zip(table[k], table[i], strict=True)]
    return [row[-1] for row in table]


def _same_attribute(graphs: Sequence[fx.GraphModule], nodes: Sequence[fx.Node]) -> None:
    held = [operator.attrgetter(str(n.target))(g) for g, n in zip(graphs, nodes, strict=True)]
    if isinstance(held[0], fx.GraphModule):
        if len({h.code for h in held}) != 1:
            raise NotUnified("the body of a loop depends on the length")
    elif any(h is not held[0] and (h.shape != held[0].shape or not torch.equal(h, held[0])) for h in held):
        raise NotUnified("a constant tensor depends on the length")


def _line(node: fx.Node) -> str:
    return str(user_line(node) or "a line of the model")
