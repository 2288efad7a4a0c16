"""Recurrences written as cumulative sums.

``cumsum(k v^T)`` over time, contracted with queries, is a linear recurrence without decay. ``a * cumsum(b / a)``, with a a
cumulative product or the exponential of a running sum, is an elementwise scan; written so it overflows, as a scan it does not.
"""

from __future__ import annotations

from collections.abc import Iterator

from spikingbrain.passes.recurrence.algebra import RELABELS, Algebra, NonAffine
from spikingbrain.passes.recurrence.form import Factor, Form, Product, Verdict
from spikingbrain.passes.recurrence.graph import Graph, Value, argument
from spikingbrain.passes.recurrence.monomials import Monomial
from spikingbrain.passes.recurrence.quadratic import SHORTEST
from spikingbrain.passes.recurrence.terms import Contraction, contraction_of

NEAR = RELABELS | {"mul", "sum", "einsum", "matmul", "bmm", "mm", "neg", "div", "cast"}


def find_cumulative(graph: Graph) -> Iterator[Verdict]:
    """Yields a verdict for each cumulative sum of a normalised graph that is a recurrence."""
    users = graph.users()
    for v in graph.values:
        if (
            v.op != "cumsum"
            or v.shape is None
            or v.dtype not in ("float32", "float64", "bfloat16", "float16")
        ):
            continue
        time = argument(v, 1, "dim", 0) % max(1, len(v.shape))
        if v.shape[time] < SHORTEST:
            continue
        form = _outer(v, time, users, set(graph.outputs)) or _rescaled(v, time, users)
        if form is not None:
            yield Verdict("raised", form.kind, [form.result], form=form)


def _outer(v: Value, time: int, users: dict[Value, list[Value]], outputs: set[Value]) -> Form | None:
    """Returns the recurrence of a running sum of outer products that is only read along one of its axes."""
    moving, todo = {v}, [v]
    while todo:
        x = todo.pop()
        for u in users[x]:
            if u not in moving and u.op in NEAR and len(moving) < 32:
                moving.add(u)
                todo.append(u)
    algebra = Algebra([v], moving, set(), {})
    reads: list[Contraction] = []
    for x in sorted(moving, key=lambda u: -u.number):
        try:
            read = contraction_of(algebra, x)
        except NonAffine:
            continue
        if len(read.query) == 1 and not read.extra:
            reads.append(read)
    covered = [r for r in reads if not _feeds_only(r.value, {x.value for x in reads}, users, outputs)]
    if len(covered) != 1 or not _only_through(v, covered[0].value, users, outputs):
        return None
    return _outer_form(v, time, covered[0])


def _feeds_only(v: Value, others: set[Value], users: dict[Value, list[Value]], outputs: set[Value]) -> bool:
    """Whether a read is but a part of another one."""
    return v not in outputs and bool(users[v]) and all(u in others for u in users[v])


def _only_through(v: Value, read: Value, users: dict[Value, list[Value]], outputs: set[Value]) -> bool:
    """Whether everything that depends on ``v`` does so by way of ``read``."""
    seen, todo = {v}, [v]
    while todo:
        x = todo.pop()
        if x in outputs:
            return False
        for u in users[x]:
            if u is read or u in seen:
                continue
            if u.op not in NEAR:
                return False
            seen.add(u)
            todo.append(u)
    return True


def _outer_form(v: Value, time: int, read: Contraction) -> Form | None:
    shape = v.shape or ()
    query = read.query[0]
    tied = query.held()
    free = [i for i, size in enumerate(shape) if i not in (read.axis, time) and i not in tied and size != 1]
    if not free or read.axis == time or time not in read.axes:
        return None
    value = free[-1]
    update = _split(v.inputs[0], read.axis, value)
    if update is None:
        return None
    names: dict[int, str] = {read.axis: "k", value: "v", time: "t"}
    for i in range(len(shape)):
        names.setdefault(i, f"b{len(names) - 3}")

    def name(axis: int | str | None) -> str | None:
        return names[axis] if isinstance(axis, int) else axis

    labels = {x: names[i] for i, x in enumerate(update.out) if x is not None}
    factors = []
    for f in update.factors:
        if f.value is None or any(x is not None and x not in labels for x in f.labels):
            return None
        factors.append(Factor(f.value, tuple(None if x is None else labels[x] for x in f.labels), f.power))
    keys = tuple(f for f in factors if "k" in f.axes)
    values = tuple(f for f in factors if "k" not in f.axes)
    queries = tuple(Factor(p.value, tuple(name(a) for a in p.axes), p.power) for p in query.pieces)
    return Form(
        result=read.value,
        axes=tuple(name(a) for a in read.axes),
        kind="linear_recurrence",
        length=shape[time],
        query=Product(query.scalar, queries),
        key=Product(1.0, keys),
        value=Product(update.coefficient, values),
    )


def _split(x: Value, key: int, value: int) -> Monomial | None:
    """Returns a product with no factor that has both axes; None when it is no product of the two."""
    opened = {x}
    while True:
        algebra = Algebra([], set(), opened, {})
        terms = algebra.terms(x)
        if len(terms) != 1:
            return None
        m = terms[0]
        if m.out[key] is None or m.out[value] is None:
            return None
        dense = [
            f.value for f in m.factors if f.value is not None and {m.out[key], m.out[value]} <= set(f.labels)
        ]
        if not dense:
            return m
        if not algebra.can_open(dense[0]):
            return None
        opened.add(dense[0])


def _rescaled(v: Value, time: int, users: dict[Value, list[Value]]) -> Form | None:
    """Returns the scan of ``a * cumsum(b / a)``."""
    for u in users[v]:
        if u.op != "mul" or len(u.inputs) != 2 or u.inputs[0].shape != u.inputs[1].shape:
            continue
        growth = u.inputs[1] if u.inputs[0] is v else u.inputs[0]
        decay = _decay_of(growth, time)
        if decay is None:
            continue
        update = _without(v.inputs[0], growth)
        if update is None:
            continue
        names = {i: "t" if i == time else f"b{i - (i > time)}" for i in range(len(v.shape or ()))}
        axes = tuple(names[i] for i in range(len(names)))

        def whole(x: Value, axes: tuple[str, ...] = axes) -> Factor:
            return Factor(x, tuple(a if s != 1 else None for a, s in zip(axes, x.shape or (), strict=True)))

        form = Form(u, axes, "linear_scan", (v.shape or ())[time])
        kind, source = decay
        setattr(form, kind, Product(1.0, (whole(source),)))
        labels = {x: axes[i] for i, x in enumerate(update.out) if x is not None}
        if any(
            f.value is None or any(x is not None and x not in labels for x in f.labels)
            for f in update.factors
        ):
            continue
        factors = tuple(
            Factor(f.value, tuple(None if x is None else labels[x] for x in f.labels), f.power)
            for f in update.factors
            if f.value is not None
        )
        form.update = [Product(update.coefficient, factors)]
        return form
    return None


def _decay_of(growth: Value, time: int) -> tuple[str, Value] | None:
    """Returns what a running product is the product of, as a factor or as a logarithm."""
    if growth.op == "cumprod" and argument(growth, 1, "dim", 0) % len(growth.shape or ()) == time:
        return "decay", growth.inputs[0]
    if growth.op == "exp":
        c = growth.inputs[0]
        if c.op == "cumsum" and argument(c, 1, "dim", 0) % len(c.shape or ()) == time:
            return "decay_log", c.inputs[0]
    return None


def _without(x: Value, growth: Value) -> Monomial | None:
    """Returns ``x * growth`` where x is something divided by growth."""
    terms = Algebra([], set(), {x}, {}).terms(x)
    if len(terms) != 1:
        return None
    m = terms[0]
    for i, f in enumerate(m.factors):
        if f.labels == m.out and f.value is not None and _is_inverse(f.value, f.power, growth):
            return Monomial(m.coefficient, m.factors[:i] + m.factors[i + 1 :], m.out)
    return None


def _is_inverse(value: Value, power: int, growth: Value) -> bool:
    if value is growth:
        return power == -1
    if growth.op == "exp" and value.op == "exp" and power == 1:
        inner = value.inputs[0]
        return inner.op == "neg" and inner.inputs[0] is growth.inputs[0]
    return value.op == "reciprocal" and power == 1 and value.inputs[0] is growth
