"""Sums of products of tensors whose axes carry labels: what the algebra of ``algebra.py`` computes with.

``Monomial(c, factors, out)`` stands for a tensor with axes ``out``: c times the product of the factors, summed over every
label that is not in ``out``. A label is a number; None is an axis along which nothing changes (of size 1, or broadcast).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from spikingbrain.passes.recurrence.graph import Value

Label = int | None
_numbers = itertools.count(1)


def fresh() -> int:
    return next(_numbers)


@dataclass(frozen=True)
class Atom:
    """One tensor of a product; without ``value`` the identity matrix over its two labels."""

    value: Value | None
    labels: tuple[Label, ...]
    power: int = 1


@dataclass(frozen=True)
class Monomial:
    coefficient: float
    factors: tuple[Atom, ...]
    out: tuple[Label, ...]

    def renamed(self, names: dict[int, int]) -> Monomial:
        def name(labels: Iterable[Label]) -> tuple[Label, ...]:
            return tuple(names.get(label, label) if label is not None else None for label in labels)

        factors = tuple(replace(f, labels=name(f.labels)) for f in self.factors)
        return Monomial(self.coefficient, factors, name(self.out))

    def labels(self) -> set[int]:
        held = {label for f in self.factors for label in f.labels} | set(self.out)
        return {label for label in held if label is not None}

    def fresh(self) -> Monomial:
        """Returns the same with labels that occur nowhere else: a product of two must not share any by accident."""
        return self.renamed({label: fresh() for label in self.labels()})

    def shaped(self, out: Sequence[Label]) -> Monomial:
        return replace(self, out=tuple(out))

    def without_identities(self) -> Monomial:
        """Returns the same after what identity matrices say: their two labels are one."""
        for i, f in enumerate(self.factors):
            if f.value is None:
                a, b = f.labels
                rest = Monomial(self.coefficient, self.factors[:i] + self.factors[i + 1 :], self.out)
                if a == b:
                    return rest.without_identities()
                for gone, kept in ((a, b), (b, a)):
                    if gone not in self.out and gone is not None and kept is not None:
                        return rest.renamed({gone: kept}).without_identities()
        return self


Sum = list[Monomial]


def atom(value: Value, power: int = 1) -> Sum:
    labels = tuple(fresh() if size != 1 else None for size in value.shape or ())
    return [Monomial(1.0, (Atom(value, labels, power),), labels)]


def number(c: float, rank: int) -> Sum:
    return [Monomial(c, (), (None,) * rank)] if c else []


def scaled(terms: Sum, c: float) -> Sum:
    return [replace(m, coefficient=m.coefficient * c) for m in terms] if c else []


def padded(terms: Sum, rank: int) -> Sum:
    return [m.shaped((None,) * (rank - len(m.out)) + m.out) for m in terms]


def rearranged(terms: Sum, change: Callable[[tuple[Label, ...]], Sequence[Label]]) -> Sum:
    return [m.shaped(change(m.out)) for m in terms]


def product(left: Sum, right: Sum, rank: int) -> Sum:
    """Returns the broadcast product, of ``rank`` axes."""
    found = []
    for a in padded(left, rank):
        for b in padded(right, rank):
            x, y = a.fresh(), b.fresh()
            names = {q: p for p, q in zip(x.out, y.out, strict=True) if p is not None and q is not None}
            out = [p if p is not None else q for p, q in zip(x.out, y.out, strict=True)]
            y = y.renamed(names)
            both = Monomial(x.coefficient * y.coefficient, x.factors + y.factors, tuple(out))
            found.append(both.without_identities())
    return found


def contracted(terms: Sum, dims: Iterable[int], shape: Sequence[int], keepdim: bool) -> Sum:
    """Returns the sum over ``dims`` of a tensor of ``shape``."""
    gone = set(dims)
    found = []
    for m in terms:
        c, out = m.coefficient, list(m.out)
        for d in gone:
            if out[d] is None:
                c *= shape[d]
            out[d] = None
        kept = out if keepdim else [label for d, label in enumerate(out) if d not in gone]
        found.append(Monomial(c, m.factors, tuple(kept)).without_identities())
    return found
