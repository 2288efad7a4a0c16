"""Export of a Python loop over time as one program for every length.

Tracing unrolls ``for t in range(T)`` and so fixes T. But the loop is written anew as one op, and then programs traced at several
short lengths differ in nothing but numbers. Where these numbers grow evenly with the length, they are replaced by
expressions of it, and the program holds for any length; that is checked against the model at the user's own length.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from spikingbrain.frontend.recurrences.raising import promising, raise_recurrences
from spikingbrain.frontend.recurrences.report import RecurrenceReport

aten = torch.ops.aten

_MULTIPLES = (6, 7, 9)  # of a dimension's step: short, and long enough for an axis to be taken for time
_LONG = 48  # an example longer than this is first tried at a short length

Dims = Sequence[Mapping[int, Any] | None]


class NotUnified(Exception):
    """Raised where programs of several lengths are not one program; says what differs, in the user's words."""


@dataclass
class AnyLength:
    """A program in which looped dimensions are sizes of its inputs.

    Attributes:
        module: takes the tensors of the entry, like the model does.
        tensors: short examples of them.
        recurrences: what was raised.
        verified: for each looped dimension the lengths at which the program was compared with the model.
    """

    module: nn.Module
    tensors: tuple[torch.Tensor, ...]
    recurrences: list[RecurrenceReport] = field(default_factory=list)
    verified: dict[str, list[int]] = field(default_factory=dict)


def looped_dimensions(error: Exception) -> list[str]:
    """Returns the names of dimensions that tracing fixed, by the words of torch.export's refusal."""
    found = re.findall(
        r"You marked (\w+) as dynamic but your code specialized it to be a constant", str(error)
    )
    return list(dict.fromkeys(found))


def shortened(tensors: Sequence[torch.Tensor], dims: Dims) -> tuple[torch.Tensor, ...]:
    """Returns the examples with every long dynamic axis cut to a short one; tracing does not depend on the example's length."""
    wanted: dict[str, int] = {}
    for tensor, by_axis in zip(tensors, dims, strict=True):
        for axis, dim in (by_axis or {}).items():
            if (step := _step(dim)) and tensor.shape[axis] > _LONG:
                wanted[_root(dim)] = _lengths(dim, step, tensors, dims)[1] // step
    return resized(tensors, dims, wanted)


def resized(
    tensors: Sequence[torch.Tensor], dims: Dims, counts: Mapping[str, int]
) -> tuple[torch.Tensor, ...]:
    """Returns the examples with the named dimensions at other lengths (in their steps), shortened or repeated."""
    found = []
    for tensor, by_axis in zip(tensors, dims, strict=True):
        for axis, dim in (by_axis or {}).items():
            step = _step(dim)
            if step and _root(dim) in counts:
                length = counts[_root(dim)] * step
                while tensor.shape[axis] < length:
                    tensor = torch.cat([tensor, tensor], axis)
                tensor = tensor.narrow(axis, 0, length)
        found.append(tensor.contiguous())
    return tuple(found)


def export_any_length(
    model: nn.Module,
    tensors: Sequence[torch.Tensor],
    dims: Dims,
    looped: Sequence[str],
    progress: Callable[[str], None] = lambda _: None,
) -> AnyLength:
    """Returns one program for all lengths of the ``looped`` dimensions (one of them).

    Raises NotUnified where the programs of short lengths are not the same but for numbers that grow evenly with the length, or
    where the program does not compute what the model does at the length of the example.
    """
    if len(looped) != 1:
        raise NotUnified(f"the code loops over {', '.join(looped)} at once")
    name = looped[0]
    dim, place = _find(name, dims)
    step = _step(dim)
    assert step is not None
    lengths = _lengths(dim, step, tensors, dims)
    fixed = tuple({a: d for a, d in (by or {}).items() if _root(d) != _root(dim)} for by in dims)
    graphs: list[fx.GraphModule] = []
    reports: list[RecurrenceReport] = []
    for length in lengths:
        progress(f"trace {name} = {length}")
        short = resized(tensors, dims, {_root(dim): length // step})
        module, reports = _traced(model, short, fixed)
        graphs.append(module)
    unrolled = [r for r in reports if r.status == "unrolled"]
    try:
        unified = _unify(graphs, lengths, place)
    except NotUnified as stop:
        why = "".join(f"; the loop at {r.where} is not raised: {r.reason}" for r in unrolled[:1])
        raise NotUnified(f"{stop}{why}") from None
    own = tensors[place[0]].shape[place[1]]
    progress(f"check {name} = {own}")
    _verify(model, unified, tensors, own, name)
    short = resized(tensors, dims, {_root(dim): lengths[1] // step})
    return AnyLength(unified, short, reports, {name: sorted({*lengths, own})})


def _traced(
    model: nn.Module, tensors: tuple[torch.Tensor, ...], dims: Any
) -> tuple[fx.GraphModule, list[RecurrenceReport]]:
    """Returns the model as a functional graph of ATen ops with its recurrences raised."""
    program = torch.export.export(model, tensors, dynamic_shapes=(dims,), strict=False).run_decompositions({})
    reports = raise_recurrences(program.graph_module, False) if promising(program.graph) else []
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module, reports


# Which lengths


def _step(dim: Any) -> int | None:
    """Returns by how much a dimension grows at least: 1, or C for ``C * Dim(...)``; None for what has no name."""
    if not hasattr(dim, "__name__") or isinstance(dim, int):
        return None
    if hasattr(dim, "root"):  # derived: its function tells the step, without an offset
        at = [dim.fn(i) for i in (0, 1, 2)]
        return int(at[1]) if at[0] == 0 and at[2] == 2 * at[1] else None
    return 1


def _root(dim: Any) -> str:
    return str(getattr(dim, "root", dim).__name__)


def _find(name: str, dims: Dims) -> tuple[Any, tuple[int, int]]:
    """Returns a dimension by name, and the first (tensor, axis) that has it."""
    for i, by_axis in enumerate(dims):
        for axis, dim in (by_axis or {}).items():
            if _step(dim) and name in (dim.__name__, _root(dim)):
                return dim, (i, axis)
    raise NotUnified(f"{name} is not the size of an argument")


def _lengths(dim: Any, step: int, tensors: Sequence[torch.Tensor], dims: Dims) -> list[int]:
    """Returns short lengths that the dimension allows and that no other size equals, so that sizes tell what they are of."""
    others = {
        s for t, by in zip(tensors, dims, strict=True) for a, s in enumerate(t.shape) if a not in (by or {})
    }
    lowest = max(
        int(getattr(dim, "min", 0) or 0), int(getattr(getattr(dim, "root", dim), "min", 0) or 0) * step
    )
    start = max(0, -(-lowest // step) - _MULTIPLES[0])
    found: list[int] = []
    count = start + _MULTIPLES[0]
    while len(found) < len(_MULTIPLES):
        if count * step not in others:
            found.append(count * step)
            count += len(found)
        else:
            count += 1
    return found


# One program from several


def _unify(
    graphs: Sequence[fx.GraphModule], lengths: Sequence[int], place: tuple[int, int]
) -> fx.GraphModule:
    """Returns the first graph with every number that differs between the graphs as an expression of the length."""
    listed = [list(g.graph.nodes) for g in graphs]
    if len({len(nodes) for nodes in listed}) != 1:
        counts = ", ".join(f"{len(n)} ops at length {t}" for n, t in zip(listed, lengths, strict=True))
        raise NotUnified(f"the traced programs differ in size: {counts}")
    first = graphs[0]
    order = [{n: i for i, n in enumerate(nodes)} for nodes in listed]
    inputs = [n for n in listed[0] if n.op == "placeholder"]
    writer = _Lengths(first.graph, inputs, place)
    for nodes in zip(*listed, strict=True):
        node = nodes[0]
        if len({(n.op, str(n.target) if n.op == "call_function" else n.op) for n in nodes}) != 1:
            raise NotUnified(
                f"at {_line(node)} one length runs {nodes[0].target}, another {nodes[-1].target}"
            )
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
                new.append(writer.expression(values, lengths, node))
                changed = True
        if changed:
            node.args, node.kwargs = pytree.tree_unflatten(new, spec)
    first.graph.lint()
    first.recompile()
    return first


class _Lengths:
    """Writes sizes that depend on the length at the head of a graph."""

    def __init__(self, graph: fx.Graph, inputs: Sequence[fx.Node], place: tuple[int, int]):
        self.graph, self.place, self.inputs = graph, place, inputs
        self._made: dict[Any, fx.Node] = {}

    def expression(self, values: Sequence[Any], lengths: Sequence[int], node: fx.Node) -> fx.Node:
        """Returns ``a * T + b``, the node of a number that is ``values[i]`` at ``lengths[i]``."""
        if not all(type(v) is int for v in values):
            raise NotUnified(
                f"at {_line(node)} {node.target} is given {values[0]} or {values[-1]}, by the length"
            )
        slope = Fraction(values[1] - values[0], lengths[1] - lengths[0])
        base = values[0] - slope * lengths[0]
        if any(slope * t + base != v for v, t in zip(values, lengths, strict=True)):
            listed = ", ".join(f"{v} at {t}" for v, t in zip(values, lengths, strict=True))
            raise NotUnified(
                f"at {_line(node)} a number of {node.target} does not grow evenly with the length: {listed}"
            )
        common = Fraction(slope).limit_denominator().denominator
        p, q, r = int(slope * common), base * common, common
        if q.denominator != 1:
            raise NotUnified(f"at {_line(node)} a number of {node.target} is no whole number at every length")
        return self._write(p, int(q), r)

    def _write(self, p: int, q: int, r: int) -> fx.Node:
        if (p, q, r) not in self._made:
            last = self.inputs[-1]
            if "length" not in self._made:
                with self.graph.inserting_before(last.next):
                    size = self.graph.call_function(
                        aten.sym_size.int, (self.inputs[self.place[0]], self.place[1])
                    )
                self._made["length"] = size
                self._end = size
            made = self._made["length"]
            for op, number, idle in ((operator.mul, p, 1), (operator.add, q, 0), (operator.floordiv, r, 1)):
                if number != idle:
                    with self.graph.inserting_before(self._end.next):
                        made = self.graph.call_function(op, (made, number))
                    self._end = made
            self._made[(p, q, r)] = made
        return self._made[(p, q, r)]


def _same_attribute(graphs: Sequence[fx.GraphModule], nodes: Sequence[fx.Node]) -> None:
    held = [operator.attrgetter(str(n.target))(g) for g, n in zip(graphs, nodes, strict=True)]
    if isinstance(held[0], fx.GraphModule):
        if len({h.code for h in held}) != 1:
            raise NotUnified("the body of a loop depends on the length")
    elif any(h is not held[0] and (h.shape != held[0].shape or not torch.equal(h, held[0])) for h in held):
        raise NotUnified("a constant tensor depends on the length")


def _line(node: fx.Node) -> str:
    from spikingbrain.frontend.checks import user_line

    return str(user_line(node) or "a line of the model")


# The check


def _verify(
    model: nn.Module, unified: nn.Module, tensors: Sequence[torch.Tensor], length: int, name: str
) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point() or t.any():
            return t
        return torch.rand(t.shape, generator=generator, dtype=torch.float32).to(t.dtype)  # zeros show nothing

    given = [drawn(t) for t in tensors]
    with torch.no_grad():
        expected, found = pytree.tree_leaves(model(*given)), pytree.tree_leaves(unified(*given))
    for e, f in zip(expected, found, strict=True):
        if e.shape != f.shape or e.dtype != f.dtype:
            gives, makes = (f"{t.dtype} {list(t.shape)}" for t in (e, f))
            raise NotUnified(
                f"at {name} = {length} the model gives {gives}, the program of short lengths {makes}"
            )
        bound = 0.05 if e.dtype in (torch.bfloat16, torch.float16) else 1e-3
        if e.is_floating_point():
            scale = e.abs().max().clamp(min=1e-6) if e.numel() else torch.tensor(1.0)
            same = torch.allclose(e.float(), f.float(), rtol=bound, atol=float(bound * scale), equal_nan=True)
        else:
            same = torch.equal(e, f)
        if not same:
            raise NotUnified(
                f"at {name} = {length} the model computes other numbers than the program of short lengths"
            )
