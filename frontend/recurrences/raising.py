"""Finds recurrences in a graph before autograd and writes them as ops of their own: the one road of both doors.

``torch.compile`` sends Dynamo's graph, ``export`` the exported program's; both arrive as functional graphs of ATen ops. What
``passes/recurrence`` recognises there is replaced: affine loops by ``spikingbrain::linear_recurrence`` and its kin, other
loops by one ``scan``. Every loop that was found is recorded, with the user's line and the reason.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode

import spikingbrain.frontend.ops  # noqa: F401  (registers the ops)
from spikingbrain.frontend.checks import user_line
from spikingbrain.frontend.recurrences.adapter import adapt
from spikingbrain.frontend.recurrences.associative import associative_scans, raise_associative_scans
from spikingbrain.frontend.recurrences.counted import WHILE_LOOP
from spikingbrain.frontend.recurrences.counted_scan import raise_counted_loops
from spikingbrain.frontend.recurrences.emit import Emitter, NotEmitted, nodes_of
from spikingbrain.frontend.recurrences.forms import emit_form
from spikingbrain.frontend.recurrences.hops import NotALoop, loop_of_scan, scans
from spikingbrain.frontend.recurrences.inverses import raise_inverses
from spikingbrain.frontend.recurrences.linear import Steps, emit_recurrence
from spikingbrain.frontend.recurrences.loops import emit_scan
from spikingbrain.frontend.recurrences.padding import cut_padding
from spikingbrain.frontend.recurrences.report import RecurrenceReport
from spikingbrain.passes.recurrence.analysis import analyse
from spikingbrain.passes.recurrence.classify import classify
from spikingbrain.passes.recurrence.form import Form, Loop, Recurrence, Stacked, Verdict
from spikingbrain.passes.recurrence.graph import Value

aten = torch.ops.aten

_FEWEST = 4  # positions at which an axis must be read to be taken for time


def raise_recurrences(module: fx.GraphModule, keep_detach: bool) -> list[RecurrenceReport]:
    """Raises in place, in a functional graph of ATen ops; returns what was found."""
    inverses = raise_inverses(module)
    emit = Emitter(module.graph, _fake_mode(module))
    left = raise_counted_loops(module, emit, keep_detach)
    left += raise_associative_scans(module, emit, keep_detach)
    neutral, _ = adapt(module, keep_detach)
    trees = associative_scans(module)
    written = [n for n in scans(module.graph) if n not in trees]
    called = calls(module.graph)
    reports = [_carry_out(module, verdict, i) for i, verdict in enumerate(analyse(neutral, forms=True))]
    reports += [_carry_out_scan(module, node, keep_detach) for node in written]
    reports += left + called + inverses
    if any(r.status != "unrolled" for r in reports):
        cut_padding(emit)
        _sort(module.graph)
        for view in module.graph.find_nodes(op="call_function", target=aten.view.default):
            view.target = aten.reshape.default  # what was raised may lie otherwise in memory
        module.graph.eliminate_dead_code(
            lambda n: bool(n.meta.get("opaque")) or n.op in ("placeholder", "output")
        )
        module.graph.lint()
        module.recompile()
    return reports


_OPS = ("linear_recurrence", "linear_scan", "selective_scan")
_CALLED = "the op, or a function that stands for it in the table of substitutions"


def calls(graph: fx.Graph) -> list[RecurrenceReport]:
    """Returns a report for each call of a recurrence op that a graph has from the beginning."""
    found = [n for n in graph.nodes if n.op == "call_function" and _op_name(n) in _OPS]
    return [RecurrenceReport("raised", _op_name(n), str(user_line(n) or ""), _CALLED) for n in found]


def _op_name(node: fx.Node) -> str:
    name = str(node.target)
    return name.removeprefix("spikingbrain.").partition(".")[0] if name.startswith("spikingbrain.") else ""


def would_raise(module: fx.GraphModule) -> bool:
    """Tells whether a graph with symbolic sizes would have something raised if they were known."""
    if scans(module.graph) or module.graph.find_nodes(op="call_function", target=WHILE_LOOP):
        return True
    neutral, _ = adapt(module, False, by_hints=True)
    return any(v.status == "raised" for v in analyse(neutral, forms=True))


def _sort(graph: fx.Graph) -> None:
    """Puts every node after what it reads, and leaves the order as it is otherwise; nodes that must keep their place do."""
    placed: dict[fx.Node, None] = {}
    fixed: fx.Node | None = None
    before: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.meta.get("opaque") or node.op in ("placeholder", "output"):
            if fixed is not None:
                before[node] = fixed
            fixed = node
    for root in list(graph.nodes):
        todo = [(root, False)]
        while todo:
            node, ready = todo.pop()
            if ready:
                placed[node] = None
            elif node not in placed:
                todo.append((node, True))
                wanted = [*node.all_input_nodes, *([before[node]] if node in before else [])]
                todo += [(n, False) for n in reversed(wanted) if n not in placed]
    last: fx.Node | None = None
    for node in placed:
        if last is not None and last.next is not node:
            last.append(node)
        last = node


def promising(graph: fx.Graph) -> bool:
    """Tells whether a graph may hold a recurrence: an axis read at several positions, a scan, or a causal form."""
    reads: Counter[Any] = Counter()
    for node in graph.nodes:
        name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
        if name in _TELLING or _op_name(node) in _OPS:
            return True
        if name in ("getitem", "select", "slice", "narrow") and node.args:
            reads[node.args[0]] += 1
            if reads[node.args[0]] >= _FEWEST:
                return True
    return False


_TELLING_TEXT = (
    "unbind split chunk scan while_loop tril triu cumsum cumprod logcumsumexp where masked_fill ge gt le lt "
    "solve_triangular linalg_solve_triangular"
)
_TELLING = frozenset(_TELLING_TEXT.split())


def _carry_out(module: fx.GraphModule, verdict: Verdict, number: int) -> RecurrenceReport:
    where = _where(verdict.values)
    if verdict.form is not None:
        return _carry_out_form(module, verdict, verdict.form, where)
    if verdict.status == "unrolled" or verdict.loop is None:
        return RecurrenceReport("unrolled", "", where, verdict.reason)
    loop = verdict.loop
    try:
        with _undone_on_failure(module.graph):
            steps = _emit(module, verdict, loop, f"_time_loop_{number}")
    except NotEmitted as stop:
        return RecurrenceReport(
            "unrolled", "", where, f"{verdict.reason}; not written anew: {stop}", loop.steps
        )
    _replace(steps, loop)
    if verdict.status == "raised":
        op = ", ".join(dict.fromkeys(r.kind for r in verdict.recurrences))
        return RecurrenceReport("raised", op, where, verdict.reason, loop.steps)
    op = "pointwise_scan" if verdict.status == "pointwise" else "time_loop"
    return RecurrenceReport("loop", op, where, verdict.reason, loop.steps)


def _carry_out_form(module: fx.GraphModule, verdict: Verdict, form: Form, where: str) -> RecurrenceReport:
    nodes = nodes_of(form.result)
    if not nodes:
        return RecurrenceReport(
            "unrolled", "", where, f"{verdict.reason}; its result is no value of the graph"
        )
    emit = Emitter(module.graph, _fake_mode(module))
    emit.trace = nodes[0].meta.get("stack_trace")
    try:
        with _undone_on_failure(module.graph), module.graph.inserting_before(nodes[0]):
            made, last = emit_form(emit, form)
    except NotEmitted as stop:
        reason = f"{verdict.reason}; not written anew: {stop}"
        return RecurrenceReport("unrolled", "", where, reason, form.length)
    for node in nodes:
        node.replace_all_uses_with(made)
    for node in nodes_of(form.final.value) if form.final is not None and last is not None else []:
        node.replace_all_uses_with(last)
    return RecurrenceReport("raised", form.kind, where, verdict.reason, form.length)


def _carry_out_scan(module: fx.GraphModule, node: fx.Node, keep_detach: bool) -> RecurrenceReport:
    """Raises a ``scan`` that the user wrote, or leaves it as the loop that it is."""
    where, length = str(user_line(node) or ""), 0
    try:
        loop = loop_of_scan(module, node, keep_detach)
        length = loop.steps
        verdict = classify(loop)
    except NotALoop as why:
        return RecurrenceReport("loop", "time_loop", where, f"a scan; {why}")
    op, reason = "pointwise_scan" if verdict.status == "pointwise" else "time_loop", verdict.reason
    if verdict.status == "raised":
        try:
            with _undone_on_failure(module.graph):
                _replace(_emit(module, verdict, loop, "", node), loop)
            for user in [*node.users, node]:
                if not user.users:
                    module.graph.erase_node(user)
            op = ", ".join(dict.fromkeys(r.kind for r in verdict.recurrences))
            return RecurrenceReport("raised", op, where, reason, length)
        except NotEmitted as stop:
            op, reason = "time_loop", f"{reason}; not written anew: {stop}"
    return RecurrenceReport("loop", op, where, reason, length)


@contextlib.contextmanager
def _undone_on_failure(graph: fx.Graph) -> Iterator[None]:
    """Removes the nodes made inside if they come to nothing."""
    before = set(graph.nodes)
    try:
        yield
    except NotEmitted:
        for node in reversed([n for n in graph.nodes if n not in before]):
            graph.erase_node(node)
        raise


def _emit(
    module: fx.GraphModule, verdict: Verdict, loop: Loop, name: str, last: fx.Node | None = None
) -> Steps:
    """Emits what takes a loop's place, after ``last``: by default the last node of its last step."""
    if last is None:
        position = {n: i for i, n in enumerate(module.graph.nodes)}
        nodes = [n for v in _last_values(loop) for n in _nearest(v)]
        if not nodes:
            raise NotEmitted("its values are not in the graph")
        last = max(nodes, key=position.__getitem__)
    emit = Emitter(module.graph, _fake_mode(module))
    emit.trace = last.meta.get("stack_trace")
    steps = Steps(emit, loop)
    with module.graph.inserting_before(last.next):
        steps.start()
        if verdict.status == "raised":
            _emit_in_turn(steps, verdict.recurrences)
            wanted = [s.value for s in loop.stacked]
            steps.known.update(zip(wanted, steps.values(wanted), strict=True))
        else:
            emit_scan(steps, module, name)
    return steps


def _emit_in_turn(steps: Steps, recurrences: Sequence[Recurrence]) -> None:
    """Emits recurrences so that one whose steps read another's state comes after it."""
    waiting = list(recurrences)
    while waiting:
        later, stop = [], NotEmitted("")
        for recurrence in waiting:
            try:
                emit_recurrence(steps, recurrence)
            except NotEmitted as why:
                later.append(recurrence)
                stop = why
        if len(later) == len(waiting):
            raise stop
        waiting = later


def _nearest(value: Value) -> list[fx.Node]:
    """Returns the node of a value, or of what it is made from where the analysis made it."""
    own = nodes_of(value)
    return own[:1] if own or value.op == "input" else [n for v in value.inputs for n in _nearest(v)]


def _last_values(loop: Loop) -> list[Value]:
    """Returns what the last re-rolled step gives: final values and the last pieces that are joined."""
    found = [c.final for c in loop.carried if c.final]
    for s in loop.stacked:
        pieces = s.joined.inputs
        found += pieces[len(s.leading) : len(pieces) - len(s.trailing)]
    return found


def _replace(steps: Steps, loop: Loop) -> None:
    """Lets everything outside the loop read the new values."""
    emit = steps.emit
    inside = {n for v in loop.values for n in nodes_of(v)}
    for carry in loop.carried:
        for node in nodes_of(carry.final) if carry.final else []:
            node.replace_all_uses_with(steps.finals[carry], lambda user: user not in inside)
    for stacked in loop.stacked:
        nodes = nodes_of(stacked.joined)
        if not nodes:
            continue
        with emit.graph.inserting_before(nodes[0]):
            joined = _joined(steps, stacked)
        for node in nodes:
            node.replace_all_uses_with(joined)


def _joined(steps: Steps, stacked: Stacked) -> fx.Node:
    """Returns the values of all steps as the graph had joined them, with what other steps add before and after."""
    emit, node, dim = steps.emit, steps.known[stacked.value], stacked.dim
    if stacked.reversed:
        node = emit.op(aten.flip.default, node, [0])
    if dim or stacked.keeps_dim:
        node = emit.op(aten.movedim.int, node, 0, dim)
    if stacked.keeps_dim:
        node = emit.op(aten.flatten.using_ints, node, dim, dim + 1)
    pieces = [emit.value(v, steps.outside) for v in (*stacked.leading, *stacked.trailing)]
    if stacked.joined.op != "cat":
        pieces = [emit.op(aten.unsqueeze.default, p, dim) for p in pieces]
    before, after = pieces[: len(stacked.leading)], pieces[len(stacked.leading) :]
    return emit.op(aten.cat.default, [*before, node, *after], dim) if pieces else node


def _where(values: Sequence[Value]) -> str:
    """Returns the user's line of the first value that has one."""
    for value in values:
        for node in nodes_of(value) if isinstance(value.origin, tuple) else []:
            if line := user_line(node):
                return str(line)
    return ""


def _fake_mode(module: fx.GraphModule) -> FakeTensorMode | None:
    values = (n.meta.get("val") for n in module.graph.nodes)
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
