"""Decays between two steps that are written as exponentials of differences, and what they are from step to step."""

from __future__ import annotations

import math

import numpy as np

from spikingbrain.passes.recurrence.algebra import Algebra, NonAffine
from spikingbrain.passes.recurrence.constants import Array, Constants
from spikingbrain.passes.recurrence.form import Factor, Product
from spikingbrain.passes.recurrence.graph import Slot, Value, argument
from spikingbrain.passes.recurrence.masks import slope_of
from spikingbrain.passes.recurrence.monomials import Monomial

Roles = tuple[str | None, ...]


class NoDecay(Exception):
    """Raised where an exponential is no decay from step to step; says why."""


class Exponents:
    def __init__(self, constants: Constants) -> None:
        self.constants = constants

    def difference(self, value: Value, roles: Roles) -> tuple[Product, list[tuple[Array, Roles]]]:
        """Returns the log decay of each step where ``value`` is ``exp(c_i - c_j)``, and the masks found inside the exp.

        ``roles`` names the axes of ``value``: "i", "j" and others. Raises ``NoDecay``.
        """
        x, masks = value.inputs[0], []
        while x.op in ("tril", "triu", "masked_fill", "where"):
            inner, mask = self._unmasked(x, roles)
            if mask is not None:
                masks.append((mask, roles[len(roles) - mask.ndim :]))
            x = inner
        scale = math.log(2) if value.op == "exp2" else 1.0
        return self._running(x, roles, scale), masks

    def _unmasked(self, x: Value, roles: Roles) -> tuple[Value, Array | None]:
        """Returns what is masked, and the mask where it makes the exponential zero."""
        where = x.op == "where"
        if x.op in ("tril", "triu"):
            keep = np.tril(np.ones((2, 2)), argument(x, 1, "diagonal", 0)) if x.op == "tril" else None
            if keep is None or not (keep == np.tril(keep)).all() or not keep.diagonal().all():
                raise NoDecay("the exponents are masked below the diagonal")
            return x.inputs[0], None
        mask = self.constants(x.inputs[0] if where else x.inputs[1])
        fill = x.literals[2] if len(x.literals) > 2 else None
        kept = x.literals[1] if where else x.literals[0]
        if where and isinstance(fill, Slot):
            numbers = self.constants(x.inputs[fill.index])
            fill = (
                float(numbers.flat[0])
                if numbers is not None and numbers.size and np.ptp(numbers) == 0
                else None
            )
            if numbers is not None and numbers.size and np.isneginf(numbers).all():
                fill = -math.inf
        if mask is None or not isinstance(kept, Slot) or not isinstance(fill, (int, float)):
            raise NoDecay("the exponents are masked by what is no constant")
        hidden = ~mask.astype(bool) if where else mask.astype(bool)
        if fill == -math.inf:
            if hidden.ndim > len(roles):
                raise NoDecay("a mask of more axes than the exponents")
            return x.inputs[kept.index], (~hidden).astype(float)
        if np.tril(hidden).any() or roles[-2:] != ("i", "j"):
            raise NoDecay("the exponents are masked below the diagonal")
        return x.inputs[kept.index], None

    def _running(self, x: Value, roles: Roles, scale: float) -> Product:
        """Returns the difference from step to step of an exponent ``c_i - c_j``."""
        terms = self._terms(x)
        pairs: dict[str, tuple[float, tuple[Factor, ...]]] = {}
        for m in terms:
            labels = {
                a: r for a, r in zip(m.out, roles[len(roles) - len(m.out) :], strict=True) if a is not None
            }
            factors, slope = self._factors(m, labels)
            held = {r for f in factors for r in f.axes}
            if slope is not None and not held & {"i", "j"}:
                if len(terms) > 1:
                    raise NoDecay("the exponent is a sum of several differences")
                return Product(scale * m.coefficient * slope, tuple(factors))
            side = "i" if "i" in held else "j"
            if slope is not None or {"i", "j"} <= held or not held & {"i", "j"} or side in pairs:
                raise NoDecay("the exponent is no difference of one value at two times")
            named = tuple(
                Factor(f.value, tuple("t" if r == side else r for r in f.axes), f.power) for f in factors
            )
            pairs[side] = (m.coefficient, named)
        if set(pairs) != {"i", "j"}:
            raise NoDecay("the exponent is no difference of one value at two times")
        (c, factors_i), (d, factors_j) = pairs["i"], pairs["j"]
        if c != -d or set(factors_i) != set(factors_j):
            raise NoDecay("the exponent is no difference of one value at two times")
        return self._step(scale * c, factors_i)

    def _terms(self, x: Value) -> list[Monomial]:
        """Returns an exponent as a sum in which no factor but constants has both i and j."""
        opened = {x}
        while True:
            algebra = Algebra([], set(), opened, {})
            try:
                terms = algebra.terms(x)
            except NonAffine as why:
                raise NoDecay(str(why)) from None
            todo = [
                f.value
                for m in terms
                for f in m.factors
                if f.value is not None and self._is_square(m, f.labels) and self.constants(f.value) is None
            ]
            if not todo:
                return terms
            if not algebra.can_open(todo[0]):
                raise NoDecay(f"the exponent is {todo[0].op} of both times")
            opened.add(todo[0])

    def _is_square(self, m: Monomial, labels: tuple[int | None, ...]) -> bool:
        return m.out[-1] is not None and m.out[-2] is not None and {m.out[-1], m.out[-2]} <= set(labels)

    def _factors(self, m: Monomial, labels: dict[int, str | None]) -> tuple[list[Factor], float | None]:
        """Returns the factors of a term, and the slope of the constant among them that is a multiple of ``i - j``."""
        found, slope = [], None
        for f in m.factors:
            if f.value is None or any(x is not None and x not in labels for x in f.labels):
                raise NoDecay("the exponent sums over an axis")
            axes = tuple(None if x is None else labels[x] for x in f.labels)
            if {"i", "j"} <= set(axes):
                numbers = self.constants(f.value)
                assert numbers is not None
                table = numbers if axes.index("i") < axes.index("j") else numbers.swapaxes(-1, -2)
                slope = slope_of(table.squeeze()) if slope is None and f.power == 1 else None
                if slope is None:
                    raise NoDecay("the exponent does not grow evenly with the distance in time")
                continue
            found.append(Factor(f.value, axes, f.power))
        return found, slope

    def _step(self, scalar: float, factors: tuple[Factor, ...]) -> Product:
        """Returns what a product of factors with an axis "t" grows by from step to step: it must be a running sum."""
        moving = [f for f in factors if "t" in f.axes]
        rest = tuple(f for f in factors if "t" not in f.axes)
        if len(moving) == 1 and moving[0].power == 1:
            f = moving[0]
            if f.value.op == "cumsum":
                dim = argument(f.value, 1, "dim", 0) % len(f.axes)
                if f.axes[dim] == "t":
                    return Product(scalar, (*rest, Factor(f.value.inputs[0], f.axes)))
            numbers = self.constants(f.value)
            if numbers is not None and numbers.size == max(numbers.shape) > 1:
                steps = np.diff(numbers.reshape(-1))
                if np.allclose(steps, steps[0]):
                    return Product(scalar * float(steps[0]), rest)
        raise NoDecay("the exponents are no running sums over time")

    # Exponents moved onto queries and keys

    def folded(
        self, query: list[Factor], key: list[Factor]
    ) -> tuple[list[Factor], list[Factor], Product] | None:
        """Returns queries and keys without ``exp(c)`` and ``exp(-c)``, and the log decay that these stand for."""
        left, right = self._taken_apart(query), self._taken_apart(key)
        for a in left:
            for b in right:
                x, y = self._exponent(a), self._exponent(b)
                if x is None or y is None or x[0] != -y[0] or x[1:] != y[1:]:
                    continue
                try:
                    step = self._step(x[0], (Factor(x[1], x[2]),))
                except NoDecay:
                    continue
                return [f for f in left if f is not a], [f for f in right if f is not b], step
        return None

    def _exponent(self, f: Factor) -> tuple[float, Value, Roles] | None:
        """Returns (c, x, axes) of a factor ``exp(c * x)``."""
        if f.value.op != "exp":
            return None
        x = f.value.inputs[0]
        terms = Algebra([], set(), {x}, {}).terms(x)
        if len(terms) != 1 or len(terms[0].factors) != 1 or terms[0].factors[0].value is None:
            return None
        m, inner = terms[0], terms[0].factors[0]
        labels = {a: r for a, r in zip(m.out, f.axes, strict=True) if a is not None}
        if any(a is not None and a not in labels for a in inner.labels) or inner.power != 1:
            return None
        axes = tuple(None if a is None else labels[a] for a in inner.labels)
        assert inner.value is not None
        return m.coefficient * f.power, inner.value, axes

    def _taken_apart(self, factors: list[Factor]) -> list[Factor]:
        """Returns the factors of products among the factors."""
        found = []
        for f in factors:
            terms = Algebra([], set(), {f.value}, {}).terms(f.value)
            labels = {a: r for m in terms[:1] for a, r in zip(m.out, f.axes, strict=True) if a is not None}
            inner = terms[0].factors if len(terms) == 1 and terms[0].coefficient == 1 else ()
            if not inner or any(a is not None and a not in labels for x in inner for a in x.labels):
                found.append(f)
                continue
            for x in inner:
                assert x.value is not None
                axes = tuple(None if a is None else labels[a] for a in x.labels)
                found.append(Factor(x.value, axes, x.power * f.power))
        return found
