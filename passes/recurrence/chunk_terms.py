"""Terms of chunked code: what is summed over steps, and with which weights.

As in ``algebra.py`` a value is a sum of products. Here slices, joins, paddings and running sums of states are products too, with
a matrix of zeros and ones, so that all that ties two times together is a *table*: such a matrix, or the exponential of an
exponent that ``spans.py`` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spikingbrain.passes.recurrence.algebra import RELABELS, Algebra, NonAffine
from spikingbrain.passes.recurrence.constants import Array, Constants
from spikingbrain.passes.recurrence.graph import Value, argument
from spikingbrain.passes.recurrence.monomials import Atom, Label, Monomial, Sum, atom, fresh, product
from spikingbrain.passes.recurrence.spans import LARGEST, PADS, Table, padding_of

CONTRACTIONS = {"einsum", "sum", "matmul", "bmm", "mm"}
_WITHIN = {"slice", "select", "cat", "stack", "cumsum"} | PADS  # opened where they move states about
_PRODUCTS = CONTRACTIONS | RELABELS | {"mul", "tril", "triu", "where", "masked_fill", "cast"}
OPENED = _PRODUCTS | _WITHIN


class Refused(Exception):
    """Raised for chunks that are no recurrence, or where that doesn't show."""


class ChunkAlgebra(Algebra):
    """An algebra in which what moves entries along an axis is a product with a matrix of zeros and ones."""

    def __init__(self, opened: set[Value]) -> None:
        super().__init__([], set(), opened, {})

    def _compute(self, v: Value) -> Sum:
        if v in self.opened and v.op in _RULES:
            return _RULES[v.op](self, v)
        return super()._compute(v)


_RULES: dict[str, Callable[[ChunkAlgebra, Value], Sum]] = {}


def _rule(*ops: str) -> Callable[[Callable[[ChunkAlgebra, Value], Sum]], Any]:
    def keep(function: Callable[[ChunkAlgebra, Value], Sum]) -> Any:
        _RULES.update(dict.fromkeys(ops, function))
        return function

    return keep


def constant(numbers: Array) -> Value:
    return Value("constant", [], (np.asarray(numbers),), numbers.shape, "float64", ())


def moved(terms: Sum, dim: int, matrix: Array) -> Sum:
    """Returns ``y[..., o, ...] = sum over i of matrix[o, i] x[..., i, ...]`` along ``dim``."""
    table = constant(matrix)
    found = []
    for m in terms:
        m = m.fresh()
        new = fresh() if matrix.shape[0] > 1 else None
        old = m.out[dim]
        if old is None and matrix.shape[1] > 1:  # the same at every place
            old = fresh()
        factor = Atom(table, (new, old if matrix.shape[1] > 1 else None))
        found.append(Monomial(m.coefficient, (*m.factors, factor), (*m.out[:dim], new, *m.out[dim + 1 :])))
    return found


@_rule("slice")
def _slice(a: ChunkAlgebra, v: Value) -> Sum:
    dim, places = v.literals[1], slice(*v.literals[2:])
    return moved(a.terms(v.inputs[0]), dim, np.eye((v.inputs[0].shape or ())[dim])[places])


@_rule("select")
def _select(a: ChunkAlgebra, v: Value) -> Sum:
    dim, place = v.literals[1:3]
    terms = moved(a.terms(v.inputs[0]), dim, np.eye((v.inputs[0].shape or ())[dim])[[place]])
    return [m.shaped((*m.out[:dim], *m.out[dim + 1 :])) for m in terms]


@_rule("cumsum")
def _cumsum(a: ChunkAlgebra, v: Value) -> Sum:
    shape = v.shape or ()
    dim = argument(v, 1, "dim", 0) % len(shape)
    return moved(a.terms(v.inputs[0]), dim, np.tril(np.ones((shape[dim], shape[dim]))))


@_rule("cat", "stack")
def _join(a: ChunkAlgebra, v: Value) -> Sum:
    slots, dim = v.literals[:2]
    found: Sum = []
    start, size = 0, (v.shape or ())[dim]
    for slot in slots:
        x = v.inputs[slot.index]
        terms = a.terms(x)
        if v.op == "stack":
            terms = [m.shaped((*m.out[:dim], None, *m.out[dim:])) for m in terms]
        width = 1 if v.op == "stack" else (x.shape or ())[dim]
        found += moved(terms, dim, np.eye(size)[:, start : start + width])
        start += width
    return found


@_rule(*PADS)
def _pad(a: ChunkAlgebra, v: Value) -> Sum:
    widths = padding_of(v)
    if widths is None:
        raise NonAffine(v.op, "fills with something else than zeros")
    terms = a.terms(v.inputs[0])
    for dim, (before, behind) in enumerate(widths):
        if before or behind:
            size = (v.inputs[0].shape or ())[dim]
            terms = moved(terms, dim, np.eye(before + size + behind)[:, before : before + size])
    return terms


@_rule("tril", "triu")
def _triangle(a: ChunkAlgebra, v: Value) -> Sum:
    ones = np.ones((v.shape or ())[-2:])
    diagonal = argument(v, 1, "diagonal", 0)
    mask = np.tril(ones, diagonal) if v.op == "tril" else np.triu(ones, diagonal)
    return product(a.terms(v.inputs[0]), atom(constant(mask)), len(v.shape or ()))


def holds_sums(v: Value, known: dict[Value, bool]) -> bool:
    """Whether a value is made, by ops that are opened, of something that is summed."""
    if v not in known:
        if v.op in CONTRACTIONS:
            known[v] = True
        else:
            known[v] = _may_open(v) and any(holds_sums(x, known) for x in v.inputs)
    return known[v]


def _may_open(v: Value) -> bool:
    """Whether to look into a value; what splits or merges axes is a whole."""
    if v.op == "view":
        return [s for s in v.inputs[0].shape or () if s != 1] == [s for s in v.shape or () if s != 1]
    return v.op in OPENED


@dataclass
class Term:
    """One product: tensors that change with the tokens, and tables over times.

    ``data`` are (value, labels, power); ``tables`` have for each of their labels one axis; ``batch`` are the labels that stand
    for the axes of the gates that are no times.
    """

    coefficient: float
    out: tuple[Label, ...]
    data: list[tuple[Value, tuple[Label, ...], int]] = field(default_factory=list)
    tables: list[Weights] = field(default_factory=list)
    batch: dict[int, Label] = field(default_factory=dict)

    def times(self) -> set[int]:
        return {x for t in self.tables for x in t.labels}


@dataclass
class Weights:
    """``exp(numbers)`` where ``keep``, else 0; one axis for each label."""

    labels: tuple[int, ...]
    numbers: Array
    keep: Array

    def over(self, order: Sequence[int]) -> Weights:
        """Returns the same with the axes ``order``, of size 1 where it has none."""
        if not set(self.labels) <= set(order):
            raise Refused("weights of another axis")
        axes = [self.labels.index(x) for x in order if x in self.labels]
        sizes = iter([self.numbers.shape[a] for a in axes])
        shape = [next(sizes) if x in self.labels else 1 for x in order]
        return Weights(
            tuple(order),
            self.numbers.transpose(axes).reshape(shape),
            self.keep.transpose(axes).reshape(shape),
        )

    def simplest(self) -> Weights:
        """Returns the same without axes along which nothing changes."""
        found = self
        for x in self.labels:
            axis = found.labels.index(x)
            first = (slice(None),) * axis + (slice(0, 1),)
            if (found.keep == found.keep[first]).all() and (
                np.where(found.keep, found.numbers, 0) == np.where(found.keep, found.numbers, 0)[first]
            ).all():
                rest = found.labels[:axis] + found.labels[axis + 1 :]
                found = Weights(rest, found.numbers.take(0, axis), found.keep.take(0, axis))
        return found


def multiplied(tables: Sequence[Weights], order: Sequence[int] | None = None) -> Weights:
    """Returns the product of tables over the axes ``order``, by default all that they have."""
    if order is None:
        order = tuple(dict.fromkeys(x for t in tables for x in t.labels))
    aligned = [t.over(order) for t in tables]
    shape = np.broadcast_shapes((1,) * len(order), *(t.numbers.shape for t in aligned))
    if np.prod(shape, dtype=float) > LARGEST:
        raise Refused("too long a sequence")
    numbers, keep = np.zeros(shape, dtype=np.int64), np.ones(shape, dtype=bool)
    for t in aligned:
        numbers, keep = numbers + t.numbers, keep & t.keep
    return Weights(tuple(order), numbers, keep)


def products_of(v: Value, constants: Constants) -> tuple[list[Monomial], set[Value]]:
    """Returns a value as a sum of products that go down to chunks, and the values that were taken apart."""
    opened = {v}
    known: dict[Value, bool] = {}
    while True:
        try:
            terms = ChunkAlgebra(opened).terms(v)
        except NonAffine as why:
            raise Refused(str(why)) from None
        todo = {
            f.value
            for m in terms
            for f in m.factors
            if f.value is not None
            and f.value not in opened
            and _may_open(f.value)
            and (f.value.op not in _WITHIN or holds_sums(f.value, known))
            and (f.value.op not in ("where", "masked_fill", "tril", "triu") or constants(f.value) is None)
        }
        if not todo:
            return terms, opened
        opened |= todo
        if len(opened) > 64:
            raise Refused("too many ops")


def read_term(m: Monomial, exponents: dict[Value, Table], constants: Constants) -> Term | None:
    """Returns a product with its tables multiplied out as far as they can be; None where it is zero."""
    term = Term(m.coefficient, m.out)
    for f in m.factors:
        if f.value is None:
            raise Refused("an identity matrix")
        if f.value.op in ("exp", "exp2") and f.value.inputs[0] in exponents:
            _add_exponential(term, f, exponents[f.value.inputs[0]])
            continue
        numbers = constants(f.value)
        if numbers is None:
            term.data.append((f.value, f.labels, f.power))
        elif np.isin(numbers, (0, 1)).all() and f.power == 1:
            _add_table(term, f.labels, np.zeros(numbers.shape, dtype=np.int64), numbers == 1)
        else:
            raise Refused("a table of other numbers than 0 and 1")
    inside = {x for f in m.factors for x in f.labels if x is not None} - set(m.out)
    inside -= {x for _, labels, _ in term.data for x in labels if x is not None}
    for x in sorted(inside):
        _sum_over(term, x)
    term.tables = [t.simplest() for t in term.tables]
    return term if all(t.keep.any() for t in term.tables) else None


def _add_exponential(term: Term, f: Atom, table: Table) -> None:
    assert f.value is not None
    if f.power != 1 or f.value.op != "exp":
        raise Refused("an exponential that is divided by, or not of base e")
    labels: list[Label] = []
    for x, name in zip(f.labels, table.names, strict=True):
        if name is not None and term.batch.setdefault(name, x) != x:
            raise Refused("gates of different heads")
        labels.append(None if name is not None else x)
    _add_table(term, labels, table.numbers, table.keep)


def _add_table(term: Term, labels: Sequence[Label], numbers: Array, keep: Array) -> None:
    dims = [d for d, size in enumerate(numbers.shape) if size != 1 and labels[d] is not None]
    held = [x for x in labels if x is not None]
    kept = tuple(x for d in dims if (x := labels[d]) is not None)
    if len(set(held)) < len(held):
        raise Refused("a table read along its diagonal")
    index = tuple(slice(None) if d in dims else 0 for d in range(numbers.ndim))
    term.tables.append(Weights(kept, numbers[index], np.broadcast_to(keep, numbers.shape)[index]))


def _sum_over(term: Term, label: int) -> None:
    """Sums the tables over one axis, along which all but one entry must be zero."""
    held = [t for t in term.tables if label in t.labels]
    if not held:
        raise Refused("a sum over an axis that no table has")
    both = multiplied(held)
    axis = both.labels.index(label)
    if (both.keep.sum(axis) > 1).any():
        raise Refused("a sum of several decays")
    numbers = np.where(both.keep, both.numbers, 0).sum(axis)
    rest = both.labels[:axis] + both.labels[axis + 1 :]
    term.tables = [t for t in term.tables if label not in t.labels]
    term.tables.append(Weights(rest, numbers, np.asarray(both.keep.any(axis))))


def used_labels(labels: Iterable[Label]) -> list[int]:
    return [x for x in labels if x is not None]
