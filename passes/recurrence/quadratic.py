"""The quadratic form of a recurrence: scores ``q k^T``, masked to the past and decayed, times v.

``o_i = sum_j P[i, j] v_j`` is a recurrence when P is one product of: factors of i, factors of j, what both share summed over one
axis (the key), constants whose table is causal and decays from step to step, and exponentials of a difference ``c_i - c_j`` of
running sums. The product is found by the same algebra as in loops, opening what ties i and j together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from spikingbrain.passes.recurrence.algebra import Algebra, NonAffine, equation_of
from spikingbrain.passes.recurrence.constants import Array, Constants
from spikingbrain.passes.recurrence.exponents import Exponents, NoDecay
from spikingbrain.passes.recurrence.form import Factor, Form, Product, Verdict
from spikingbrain.passes.recurrence.graph import Graph, Slot, Value, argument
from spikingbrain.passes.recurrence.masks import NotCausal, decays_of
from spikingbrain.passes.recurrence.monomials import Monomial, Sum, atom, product

SHORTEST = 8  # steps; below this the quadratic form is the better one anyway
PRODUCTS = {"matmul", "bmm", "mm", "einsum"}
MASKS = {"tril", "triu", "where", "masked_fill"}


class Refused(Exception):
    """Raised where scores are masked but are no recurrence; says why."""


@dataclass(frozen=True)
class Candidate:
    """``result = sum over j of scores * values``; axes of the operands are numbered as those of the result, "j" or None.

    ``row`` is the number of the axis i. ``values`` is None for the sum of the rows.
    """

    result: Value
    scores: Value
    values: Value | None
    score_axes: tuple[int | str, ...]
    value_axes: tuple[int | str, ...]
    row: int


def find_quadratic(graph: Graph, constants: Constants) -> Iterator[Verdict]:
    """Yields a verdict for each causal product of scores in a normalised graph."""
    for v in graph.values:
        for candidate in _candidates(v):
            if not _has_scores(candidate.scores):
                continue
            try:
                form = _Reader(candidate, constants).form()
            except Refused as why:
                if _is_masked(candidate.scores, constants):
                    yield Verdict("unrolled", str(why), [v])
                continue
            yield Verdict("raised", form.kind, [v], form=form)


def _candidates(v: Value) -> Iterator[Candidate]:
    if v.shape is None:
        return
    if v.op == "sum" and len(v.inputs) == 1:
        x = v.inputs[0]
        given = argument(v, 1, "dim", ())
        dims: tuple[int, ...] = (given,) if isinstance(given, int) else given or ()
        rank = len(x.shape or ())
        if len(dims) == 1 and rank >= 2 and dims[0] % rank == rank - 1 and _square(x, rank - 2, rank - 1):
            yield Candidate(v, x, None, (*range(rank - 2), rank - 2, "j"), (), rank - 2)
    elif v.op in PRODUCTS and len(v.inputs) == 2:
        for scores, values in ((0, 1), (1, 0)) if v.op == "einsum" else ((0, 1),):
            yield from _product(v, scores, values)


def _product(v: Value, scores: int, values: int) -> Iterator[Candidate]:
    p, x = v.inputs[scores], v.inputs[values]
    rank, left, right = len(v.shape or ()), len(p.shape or ()), len(x.shape or ())
    if v.op != "einsum":
        if min(left, right) >= 2 and _square(p, left - 2, left - 1):
            score_axes = (*range(rank - left, rank - 2), rank - 2, "j")
            yield Candidate(v, p, x, score_axes, (*range(rank - right, rank - 2), "j", rank - 1), rank - 2)
        return
    equation = equation_of(v)
    if equation is None:
        return
    names, result = equation
    mine, others = names[scores], names[values]
    if any(len(set(n)) < len(n) for n in (mine, others, result)):
        return
    summed = [c for c in mine if c in others and c not in result]
    rows = [c for c in mine if c in result and c not in others]
    if len(summed) != 1 or set(mine + others) - set(result) != set(summed):
        return
    for row in rows:
        if _square(p, mine.index(row), mine.index(summed[0])):
            score_axes, value_axes = (
                tuple("j" if c == summed[0] else result.index(c) for c in n) for n in (mine, others)
            )
            yield Candidate(v, p, x, score_axes, value_axes, result.index(row))


def _square(v: Value, i: int, j: int) -> bool:
    return v.shape is not None and v.shape[i] == v.shape[j] >= SHORTEST


def _within(scores: Value) -> Iterator[Value]:
    """Yields what the scores are computed from, as far as it is of their size."""
    assert scores.shape is not None
    length = scores.shape[-1]
    seen, todo = {scores}, [scores]
    while todo:
        v = todo.pop()
        yield v
        for x in v.inputs:
            if x not in seen and (x.shape or ()).count(length) >= 2:
                seen.add(x)
                todo.append(x)


def _has_scores(scores: Value) -> bool:
    return scores.op != "input" and any(v.op in PRODUCTS for v in _within(scores))


def _is_masked(scores: Value, constants: Constants) -> bool:
    """Whether something of the size of the scores is a constant mask: what looks like causal attention."""
    return any(v.op in MASKS or constants(v) is not None for v in _within(scores))


class _Masking(Algebra):
    """An algebra in which ``tril`` and ``triu`` are products with a mask."""

    def can_open(self, v: Value) -> bool:
        return v.op in ("tril", "triu") or super().can_open(v)

    def _compute(self, v: Value) -> Sum:
        if v.op in ("tril", "triu") and v in self.opened and v.shape is not None:
            ones = Value("full", [], (v.shape[-2:], 1.0), v.shape[-2:], "float32", ())
            mask = Value(v.op, [ones], (Slot(0), argument(v, 1, "diagonal", 0)), ones.shape, "float32", ())
            return product(self.terms(v.inputs[0]), atom(mask), len(v.shape))
        return super()._compute(v)


class _Reader:
    def __init__(self, candidate: Candidate, constants: Constants) -> None:
        self.c = candidate
        self.constants = constants
        self.opened: set[Value] = set()
        self.exponents = Exponents(constants)

    def form(self) -> Form:
        """Returns the recurrence; raises ``Refused``."""
        m = self._one_product()
        names = self._names(m)
        sides: dict[str, list[Factor]] = {"query": [], "key": [], "value": []}
        table: list[tuple[Array, tuple[str | None, ...]]] = []
        log: Product | None = None
        key = self._key_label(m)
        for f in m.factors:
            assert f.value is not None
            roles = tuple(self._role(x, names, key) for x in f.labels)
            if "i" in roles and "j" in roles:
                numbers = self.constants(f.value)
                if numbers is not None:
                    table.append((numbers**f.power, roles))
                    continue
                log = self._exponent(f.value, roles, f.power, log, table)
                continue
            side = "key" if "j" in roles else "query"
            axes = tuple("t" if r in ("i", "j") else r for r in roles)
            sides[side].append(Factor(f.value, axes, f.power))
        if self.c.values is not None:
            axes = tuple(
                self._value_role(a, s)
                for a, s in zip(self.c.value_axes, self.c.values.shape or (), strict=True)
            )
            sides["value"].append(Factor(self.c.values, axes))
        return self._written(sides, table, log, m.coefficient)

    def _one_product(self) -> Monomial:
        """Returns the scores as one product in which every factor of both i and j is a constant or an exponential."""
        self.opened.add(self.c.scores)
        while True:
            algebra = _Masking([], set(), self.opened, {})
            try:
                terms = algebra.terms(self.c.scores)
            except NonAffine as why:
                raise Refused(str(why)) from None
            if len(terms) != 1:
                raise Refused("the scores are a sum of products" if terms else "the scores are zero")
            names = self._names(terms[0])
            for f in terms[0].factors:
                held = {names.get(x) for x in f.labels if x is not None}
                if not {"i", "j"} <= held or f.value is None or self.constants(f.value) is not None:
                    continue
                if f.value.op in ("exp", "exp2"):
                    continue
                if not algebra.can_open(f.value):
                    raise Refused(f"{f.value.op} of the scores, or of what multiplies them")
                self.opened.add(f.value)
                break
            else:
                return terms[0]

    def _names(self, m: Monomial) -> dict[int, str]:
        """Returns the role of each label of the result: "i", "j", or the axis of the result as a number."""
        found = {}
        for x, axis in zip(m.out, self.c.score_axes, strict=True):
            if x is not None:
                found[x] = "j" if axis == "j" else "i" if axis == self.c.row else f"b{axis}"
        return found

    def _key_label(self, m: Monomial) -> int:
        names = self._names(m)
        inner = {x for f in m.factors for x in f.labels if x is not None and x not in names}
        if len(inner) != 1:
            raise Refused("the scores are no sum over one axis")
        return inner.pop()

    def _role(self, label: int | None, names: dict[int, str], key: int) -> str | None:
        return None if label is None else "k" if label == key else names[label]

    def _value_role(self, axis: int | str, size: int) -> str | None:
        if size == 1:
            return None
        return "t" if axis == "j" else f"b{axis}"

    def _exponent(
        self,
        value: Value,
        roles: tuple[str | None, ...],
        power: int,
        log: Product | None,
        table: list[tuple[Array, tuple[str | None, ...]]],
    ) -> Product:
        if log is not None or power != 1:
            raise Refused("several exponentials decay the scores")
        try:
            found, masks = self.exponents.difference(value, roles)
        except NoDecay as why:
            raise Refused(str(why)) from None
        table += masks
        return found

    # Writing it down

    def _written(
        self,
        sides: dict[str, list[Factor]],
        table: list[tuple[Array, tuple[str | None, ...]]],
        log: Product | None,
        scalar: float,
    ) -> Form:
        shape = self.c.result.shape or ()
        length = (self.c.scores.shape or ())[self.c.score_axes.index("j")]
        decay, weight, exclusive = self._decays(table, log is not None)
        if log is None and not exclusive:
            folded = self.exponents.folded(sides["query"], sides["key"])
            if folded is not None and decay is None:
                sides["query"], sides["key"], log = folded
        if weight is not None:
            sides["key"].append(weight)
        names = self._roles(sides, [f for f in (decay,) if f] + list(log.factors if log else ()))

        def named(factors: list[Factor], scalar: float = 1.0) -> Product:
            return Product(
                scalar, tuple(replace(f, axes=tuple(names.get(a or "", a) for a in f.axes)) for f in factors)
            )

        axes = tuple(
            None if size == 1 else "t" if a == self.c.row else names.get(f"b{a}", f"b{a}")
            for a, size in enumerate(shape)
        )
        return Form(
            result=self.c.result,
            axes=axes,
            kind="linear_recurrence",
            length=length,
            query=named(sides["query"], scalar),
            key=named(sides["key"]),
            value=named(sides["value"]),
            decay=named([decay]) if decay else None,
            decay_log=named(list(log.factors), log.scalar) if log else None,
            exclusive=exclusive,
        )

    def _decays(
        self, table: list[tuple[Array, tuple[str | None, ...]]], decayed: bool
    ) -> tuple[Factor | None, Factor | None, bool]:
        """Returns decay and weight of the constant tables' product, and whether a step sees only those before."""
        if not table:
            raise Refused("the scores are not masked")
        batch = sorted({r for _, roles in table for r in roles if r is not None and r not in "ij"})
        order = [*batch, "i", "j"]
        total: Array | float = 1.0
        for numbers, roles in table:
            held = [r for r in roles if r is not None]
            numbers = numbers.reshape([n for n, r in zip(numbers.shape, roles, strict=True) if r is not None])
            numbers = np.transpose(numbers, [held.index(r) for r in order if r in held])
            place = iter(numbers.shape)
            total = total * numbers.reshape([next(place) if r in held else 1 for r in order])
        try:
            found = decays_of(np.asarray(total))
        except NotCausal as why:
            raise Refused(str(why)) from None
        if found.exclusive and decayed:
            raise Refused("a step does not see itself, and decays")
        if found.decay is not None and decayed:
            raise Refused("two kinds of decay")
        return self._constant(found.decay, batch), self._constant(found.weight, batch), found.exclusive

    def _constant(self, numbers: Array | None, batch: list[str]) -> Factor | None:
        if numbers is None:
            return None
        axes = tuple(None if n == 1 else a for n, a in zip(numbers.shape, [*batch, "t"], strict=True))
        return Factor(Value("constant", [], (numbers,), numbers.shape, "float64", ()), axes)

    def _roles(self, sides: dict[str, list[Factor]], decay: list[Factor]) -> dict[str, str]:
        """Returns the names of the axes of the result: "v" the value's own, "g0", ... those of the query alone, else "b0", ..."""
        held = {
            side: {a for f in factors for a in f.axes if a and a.startswith("b")}
            for side, factors in sides.items()
        }
        held["decay"] = {a for f in decay for a in f.axes if a and a.startswith("b")}
        every = sorted(set().union(*held.values()), key=lambda a: int(a[1:]))
        own = [
            a
            for a in every
            if a in held["value"] and not any(a in held[s] for s in ("query", "key", "decay"))
        ]
        names: dict[str, str] = {}
        if own:
            names[own[-1]] = "v"
        counts = {"b": 0, "g": 0}
        for a in every:
            if a not in names:
                letter = (
                    "g"
                    if a in held["query"] and not any(a in held[s] for s in ("key", "value", "decay"))
                    else "b"
                )
                names[a] = f"{letter}{counts[letter]}"
                counts[letter] += 1
        return names
