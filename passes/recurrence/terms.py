"""The monomials of a step or of a read, sorted by what they do to the state; axes are those of the state.

An axis of a factor is a number (of the state's axis), a string "g0", ... (an axis of a read that the state lacks), or None.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from spikingbrain.passes.recurrence.algebra import Algebra, NonAffine
from spikingbrain.passes.recurrence.graph import Value
from spikingbrain.passes.recurrence.monomials import Atom, Monomial

Axis = int | str | None


class Dense(Exception):
    """Raised where a factor ties two axes together that should be apart; ``value`` is that factor's tensor."""

    def __init__(self, value: Value, why: str) -> None:
        super().__init__(why)
        self.value = value


@dataclass(frozen=True)
class Piece:
    """A factor: a tensor, its axes, its power."""

    value: Value
    axes: tuple[Axis, ...]
    power: int = 1

    def held(self) -> set[Axis]:
        return {a for a in self.axes if a is not None}


@dataclass(frozen=True)
class Part:
    """A number times factors."""

    scalar: float
    pieces: tuple[Piece, ...] = ()

    def held(self) -> set[Axis]:
        return {a for p in self.pieces for a in p.held()}


@dataclass
class Step:
    """``S' = decay * S + sum of erase (predict^T S) along axis + update``."""

    decay: list[Part] = field(default_factory=list)
    rank_one: list[tuple[Part, Part]] = field(default_factory=list)  # (erase, predict)
    axis: int | None = None
    update: list[Part] = field(default_factory=list)


@dataclass
class Contraction:
    """``value = sum over axis of query * S + extra``; ``axes`` are those of the value."""

    value: Value
    of: Value
    axis: int
    axes: tuple[Axis, ...]
    query: list[Part]
    extra: list[Part]


def step_of(algebra: Algebra, before: Value, after: Value) -> Step:
    """Returns what a step does; raises ``NonAffine``, or ``Dense`` when a factor should be opened first."""
    step = Step()
    for m in algebra.terms(after):
        degree = algebra.degree(m)
        if degree > 1:
            raise NonAffine("mul", "a product of the state with itself")
        if degree == 0:
            step.update.append(
                _part(m, [f for f in m.factors], {x: i for i, x in enumerate(m.out) if x is not None})
            )
            continue
        state = next(f for f in m.factors if f.value in algebra.states)
        others = [f for f in m.factors if f is not state]
        if state.power != 1:
            raise NonAffine("div", "divides by a value of the state")
        names = {x: i for i, x in enumerate(state.labels) if x is not None}
        if state.labels == m.out:
            step.decay.append(_part(m, others, names))
        else:
            _rank_one(step, m, state, others)
    return step


def _rank_one(step: Step, m: Monomial, state: Atom, others: list[Atom]) -> None:
    moved = [i for i, (a, b) in enumerate(zip(state.labels, m.out, strict=True)) if a != b]
    gone = state.labels[moved[0]]
    if len(moved) != 1 or gone is None or gone in m.out or m.out[moved[0]] in state.labels:
        raise NonAffine("permute", "moves axes of the state")
    axis, new = moved[0], m.out[moved[0]]
    if step.axis not in (None, axis):
        raise NonAffine("matmul", "multiplies the state from two sides")
    step.axis = axis
    names: dict[int, Axis] = {x: i for i, x in enumerate(m.out) if x is not None and i != axis}
    erase: list[Atom] = []
    predict: list[Atom] = []
    for f in others:
        if gone in f.labels and new is not None and new in f.labels:
            assert f.value is not None
            raise Dense(f.value, "multiplies the state by a matrix")
        (predict if gone in f.labels else erase).append(f)
    first = _part(m, erase, names | ({new: axis} if new is not None else {}))
    second = _part(m, predict, names | {gone: axis})
    step.rank_one.append((first, Part(1.0, second.pieces)))


def _part(m: Monomial, factors: list[Atom], names: dict[int, Axis] | dict[int, int]) -> Part:
    pieces = []
    for f in factors:
        if f.value is None:
            raise NonAffine("eye", "an identity matrix where no matrix product is")
        axes: list[Axis] = []
        for x in f.labels:
            if x is not None and x not in names:
                raise NonAffine("sum", "sums over an axis that the state lacks")
            axes.append(None if x is None else names[x])
        pieces.append(Piece(f.value, tuple(axes), f.power))
    return Part(m.coefficient, tuple(pieces))


def contraction_of(algebra: Algebra, value: Value) -> Contraction:
    """Returns how a value reads the state; raises ``NonAffine`` when it is no sum over one of its axes."""
    of: Value | None = None
    axis: int | None = None
    queries: list[Part] = []
    extra: list[Monomial] = []
    axes: list[Axis] | None = None
    for m in algebra.terms(value):
        degree = algebra.degree(m)
        if degree == 0:
            extra.append(m)
            continue
        state = next(f for f in m.factors if f.value in algebra.states)
        gone = [i for i, x in enumerate(state.labels) if x is not None and x not in m.out]
        if (
            degree > 1
            or state.power != 1
            or len(gone) != 1
            or of not in (None, state.value)
            or axis not in (None, gone[0])
        ):
            raise NonAffine(value.op, "not one sum over an axis of the state")
        of, axis = state.value, gone[0]
        names, mine = _names_of_read(m, state, axis)
        if axes not in (None, mine):
            raise NonAffine(value.op, "reads that differ in their axes")
        axes = mine
        query = _part(m, [f for f in m.factors if f is not state], names)
        _check_query(query, axis)
        queries.append(query)
    if of is None or axis is None or axes is None:
        raise NonAffine(value.op, "does not read the state")
    return Contraction(value, of, axis, tuple(axes), queries, [_extra(m, axes, axis) for m in extra])


def _names_of_read(m: Monomial, state: Atom, axis: int) -> tuple[dict[int, Axis], list[Axis]]:
    names: dict[int, Axis] = {x: i for i, x in enumerate(state.labels) if x is not None}
    count = 0
    for x in m.out:
        if x is not None and x not in names:
            names[x] = f"g{count}"
            count += 1
    return names, [None if x is None else names[x] for x in m.out]


def _check_query(query: Part, axis: int) -> None:
    """Sees to it that factors beside the query (a gate on what was read) stay outside."""
    with_key = {a for p in query.pieces if axis in p.held() for a in p.held()}
    for p in query.pieces:
        if axis not in p.held() and not p.held() <= with_key:
            raise NonAffine("mul", "a factor of what was read")


def _extra(m: Monomial, axes: list[Axis], axis: int) -> Part:
    """Labels the state-free terms of a read by its axes; what is summed over gets names of its own."""
    names: dict[int, Axis] = {}
    for x, a in zip(m.out, axes, strict=True):
        if x is not None:
            if a is None:
                raise NonAffine("add", "is broadcast over what was read")
            names[x] = a
    inner = sorted({x for f in m.factors for x in f.labels if x is not None and x not in names})
    for n, label in enumerate(inner):
        names[label] = axis if len(inner) == 1 else f"s{n}"
    return _part(m, list(m.factors), names)
