"""Recognises forward substitution, the triangular solve of chunked delta rules, and writes it as one op.

People write it as `solve_triangular`, or as a loop that rewrites the rows of a matrix in order, each from those above it:
``A[..., i, :i] += (A[..., i, :i, None] * A[..., :i, :i]).sum(-2)``. The loop grows with i, so it is no step that repeats. But
all of it is a polynomial of one matrix, and two polynomials that agree at random points are the same (Schwartz-Zippel): so
it is run on random matrices in float64, and compared with the inverse that it should be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from spikingbrain.frontend.checks import user_line
from spikingbrain.frontend.ops.unit_lower_inverse import inverse
from spikingbrain.frontend.recurrences.emit import Emitter
from spikingbrain.frontend.recurrences.report import RecurrenceReport

aten = torch.ops.aten
_OP = torch.ops.spikingbrain.unit_lower_inverse.default

_FEWEST = 3  # rows that must be rewritten for a loop to be looked at
_SCATTERS = (aten.select_scatter.default, aten.slice_scatter.default)
_MASKING = "neg clone masked_fill tril mul where"
_ARITHMETIC = (
    "add sub sum matmul select slice unsqueeze squeeze transpose select_scatter slice_scatter copy alias"
)
_MASKS = "ones zeros full eye arange triu tril ge gt le lt eq logical_not bitwise_not unsqueeze"
_LINEAR = frozenset(_MASKING.split())  # from the matrix that is masked, to what the loop begins with
_POLYNOMIAL = _LINEAR | frozenset(_ARITHMETIC.split())
_CONSTANT = frozenset(_MASKS.split())
# what the loop may compute from a matrix, with L = its strictly lower triangle
_KNOWN = {  # name: sign of L, is I subtracted
    "(I - L)^-1 - I": (-1, True),
    "(I + L)^-1 - I": (1, True),
    "(I - L)^-1": (-1, False),
    "(I + L)^-1": (1, False),
}


def may_invert(graph: fx.Graph) -> bool:
    """Tells whether a graph, functional or not, may hold forward substitution."""
    names = [_name(n) for n in graph.nodes if n.op == "call_function"]
    return "linalg_solve_triangular" in names or names.count("copy_") >= _FEWEST


def raise_inverses(module: fx.GraphModule) -> list[RecurrenceReport]:
    """Raises in place, in a functional graph of ATen ops; returns what was found."""
    reports = []
    for node in list(module.graph.nodes):
        if node.target is aten.linalg_solve_triangular.default:
            reports += _raise_solve(node)
        elif node.target in _SCATTERS and not any(_continues(node, user) for user in node.users):
            reports += _raise_loop(node)
    if reports:
        module.graph.eliminate_dead_code()
        module.recompile()
    return reports


def _emitter(node: fx.Node) -> Emitter:
    emit = Emitter(node.graph, getattr(node.meta["val"], "fake_mode", None))
    emit.trace = node.meta.get("stack_trace")
    return emit


def _report(node: fx.Node, reason: str, rows: int) -> RecurrenceReport:
    return RecurrenceReport("raised", "unit_lower_inverse", str(user_line(node) or ""), reason, rows)


# solve_triangular


def _raise_solve(node: fx.Node) -> list[RecurrenceReport]:
    """Writes A X = B or X A = B with a unit triangular A as a product with the inverse."""
    matrix, right = node.args[:2]
    given = {"left": True, "unitriangular": False, **node.kwargs}
    if not given["unitriangular"] or not node.meta["val"].is_floating_point():
        return []
    emit = _emitter(node)
    with node.graph.inserting_before(node):
        lower = emit.op(aten.transpose.int, matrix, -1, -2) if given["upper"] else matrix
        found = emit.op(_OP, lower)
        found = emit.op(aten.transpose.int, found, -1, -2) if given["upper"] else found
        result = emit.op(aten.matmul.default, *((found, right) if given["left"] else (right, found)))
    node.replace_all_uses_with(result)
    return [_report(result, "solve_triangular with ones on the diagonal", matrix.meta["val"].shape[-1])]


# Loops over rows


def _continues(node: fx.Node, user: fx.Node) -> bool:
    """Tells whether ``user`` writes further into the matrix that ``node`` is."""
    return user.target in _SCATTERS and user.args[0] is node


def _raise_loop(last: fx.Node) -> list[RecurrenceReport]:
    value = last.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim < 2 or not value.is_floating_point():
        return []
    start, rows = last, 0
    while start.target in _SCATTERS:
        start, rows = start.args[0], rows + 1
    if value.shape[-1] != value.shape[-2] or rows < _FEWEST:
        return []
    for source in _sources(start):
        name = _computed(source, last)
        if name is None:
            continue
        sign, without_eye = _KNOWN[name]
        emit = _emitter(last)
        with last.graph.inserting_before(last):
            result = emit.op(_OP, source if sign > 0 else emit.op(aten.neg.default, source))
            if without_eye:
                eye = emit.op(aten.eye.default, value.shape[-1], dtype=value.dtype, device=value.device)
                result = emit.op(aten.sub.Tensor, result, eye)
        last.replace_all_uses_with(result)
        return [_report(result, f"a loop over rows that computes {name}", rows + 1)]
    return []


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "_schema", None) and node.target._schema.name.removeprefix("aten::"))


def _sources(start: fx.Node) -> Iterator[fx.Node]:
    """Yields the matrix that the loop begins with, and then what masks and signs were applied to."""
    yield start
    while start.op == "call_function" and _name(start) in _LINEAR:
        varying = [n for n in start.all_input_nodes if not _is_constant(n)]
        if len(varying) != 1:
            return
        (start,) = varying
        yield start


def _is_constant(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and _name(node) in _CONSTANT
        and all(_is_constant(n) for n in node.all_input_nodes)
    )


def _computed(source: fx.Node, last: fx.Node) -> str | None:
    """Returns which of the known polynomials of ``source`` the node ``last`` is, if any."""
    steps = _between(source, last)
    if steps is None or source.meta["val"].shape != last.meta["val"].shape:
        return None
    generator = torch.Generator().manual_seed(0)
    *leading, _, size = last.meta["val"].shape
    if not all(_is_constant(n) or _acts_on_matrices(n, len(leading)) for n in steps):
        return None
    shape = [*(1 if n == 1 else 2 for n in leading), size, size]
    names = list(_KNOWN)
    for _ in range(2):
        matrix = (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5) * 2 / size**0.5
        try:
            found = _run(steps, source, matrix)
        except (IndexError, RuntimeError):  # a constant of the full size
            return None
        eye = torch.eye(size, dtype=torch.float64)
        known = {n: inverse(_KNOWN[n][0] * matrix) - (eye if _KNOWN[n][1] else 0.0) for n in names}
        names = [
            n for n in names if found.shape == matrix.shape and torch.allclose(found, known[n], 1e-9, 1e-9)
        ]
    return names[0] if names else None


def _acts_on_matrices(node: fx.Node, leading: int) -> bool:
    """Tells whether an op leaves the first ``leading`` dimensions alone, so that what holds for two matrices holds for all."""
    name, args = _name(node), node.args
    first = {"select_scatter": 2, "slice_scatter": 2}.get(name, 1)
    count = 2 if name == "transpose" else 1
    if name not in (
        "select",
        "slice",
        "select_scatter",
        "slice_scatter",
        "unsqueeze",
        "squeeze",
        "transpose",
        "sum",
    ):
        return True
    given = [d for a in args[first : first + count] for d in (a if isinstance(a, (list, tuple)) else [a])]
    rank = args[0].meta["val"].ndim + (name == "unsqueeze")
    return bool(given) and all(isinstance(d, int) and d % rank >= leading for d in given)


def _between(source: fx.Node, last: fx.Node) -> list[fx.Node] | None:
    """Returns the nodes that compute ``last`` from ``source``; None if it is no polynomial of ``source`` alone."""
    needed, steps = {last}, []
    for node in reversed(last.graph.nodes):
        if node not in needed or node is source:
            continue
        if node.op != "call_function" or not (_name(node) in _POLYNOMIAL or _is_constant(node)):
            return None
        steps.append(node)
        needed.update(node.all_input_nodes)
    return steps[::-1]


def _run(steps: Sequence[fx.Node], source: fx.Node, matrix: Tensor) -> Tensor:
    """Computes the last of the steps in float64."""
    values = {source: matrix}
    for node in steps:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        result = node.target(*args, **kwargs)
        values[node] = result.double() if result.is_floating_point() else result
    return values[steps[-1]]
