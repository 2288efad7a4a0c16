"""How a value depends on the state: as a sum of products, found op by op, or not affine.

Values without a state in them are atoms, whole: ``(1 - a) * k`` stays one tensor. Only where the structure of such a value is
asked for (``Algebra.open``) is it taken apart, one op at a time.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterable

from spikingbrain.passes.recurrence.graph import Slot, Value, argument
from spikingbrain.passes.recurrence.monomials import (
    Atom,
    Label,
    Monomial,
    Sum,
    atom,
    contracted,
    fresh,
    number,
    padded,
    product,
    rearranged,
    scaled,
)

MOST_TERMS = 64
WIDTH = {"float16": 1, "bfloat16": 1, "float32": 2, "float64": 3}
REASONS = {
    "detach": "the gradient is cut here",
    "getitem": "a function with a gradient of its own",  # its result
}
RELABELS = {"unsqueeze", "squeeze", "permute", "expand", "view"}


class NonAffine(Exception):
    """Raised where a value depends on the state in another way; ``op`` does that, ``why`` says how."""

    def __init__(self, op: str, why: str) -> None:
        super().__init__(f"{op}: {why}")
        self.op, self.why = op, why


class Algebra:
    """Expresses values by ``states`` (values that count as variables).

    ``moving`` are the values that depend on one of them (themselves included), ``opened`` the others that are taken apart,
    and ``same`` gives another writing of a value to take apart in its place.
    """

    def __init__(
        self, states: Iterable[Value], moving: set[Value], opened: set[Value], same: dict[Value, Value]
    ) -> None:
        self.states = set(states)
        self.moving = moving
        self.opened = opened
        self.same = same
        self.made: list[Value] = []  # values that stand in no graph: masks turned round
        self._terms: dict[Value, Sum] = {}
        self._failed: dict[Value, NonAffine] = {}
        self._not: dict[Value, Value] = {}

    def depends(self, v: Value) -> bool:
        """Whether a state is among what ``v`` is computed from."""
        return v in self.moving or v in self.states

    def degree(self, m: Monomial) -> int:
        return sum(1 for f in m.factors if f.value in self.states)

    def terms(self, v: Value) -> Sum:
        """Returns ``v`` as a sum; raises ``NonAffine``."""
        todo = [v]
        while todo:
            x = todo[-1]
            inner = [
                i for i in x.inputs if self._looks_into(i) and i not in self._terms and i not in self._failed
            ]
            if inner and self._looks_into(x) and x not in self.states:
                todo += inner
                continue
            todo.pop()
            if x not in self._terms and x not in self._failed:
                self._note(x)
        if v in self._failed:
            raise self._failed[v]
        return self._terms[v]

    def _looks_into(self, v: Value) -> bool:
        return v in self.moving or v in self.opened or v.op in RELABELS

    def _note(self, v: Value) -> None:
        try:
            found = merged(self._compute(v))
            if len(found) > MOST_TERMS:
                raise NonAffine(v.op, "too many terms")
            self._terms[v] = found
        except NonAffine as why:
            self._failed[v] = why

    def can_open(self, v: Value) -> bool:
        """Whether a value without states has an inside to look at."""
        if v.op not in RULES or v in self.opened:
            return False
        try:
            RULES[v.op](self, v)
        except NonAffine:
            return False
        return True

    def _compute(self, v: Value) -> Sum:
        if v in self.states:
            return atom(v)
        if v in self.same and v in self.opened:
            return self.terms(self.same[v])
        if v.op == "full" and v.shape is not None:
            return number(float(v.literals[1]), len(v.shape))
        if v.op == "eye" and v.shape is not None and len(v.shape) == 2 and v.shape[0] == v.shape[1] > 1:
            labels = (fresh(), fresh())
            return [Monomial(1.0, (Atom(None, labels),), labels)]
        moves = self.depends(v)
        if not moves and v not in self.opened and v.op not in RELABELS:
            return atom(v)
        rule = RULES.get(v.op)
        try:
            if rule is None:
                raise NonAffine(v.op, REASONS.get(v.op, "not a linear operation"))
            return rule(self, v)
        except NonAffine:
            if moves:
                raise
            return atom(v)

    def free(self, v: Value, why: str, op: str) -> None:
        if self.depends(v):
            raise NonAffine(op, why)

    def negation(self, mask: Value) -> Value:
        if mask not in self._not:
            v = Value("logical_not", [mask], (Slot(0),), mask.shape, "bool", ())
            self._not[mask] = v
            self.made.append(v)
        return self._not[mask]


def merged(terms: Sum) -> Sum:
    """Returns the sum with products that are the same but for their coefficient added up."""
    found: dict[object, Monomial] = {}
    for m in terms:
        names: dict[int, int] = {}

        def name(labels: tuple[Label, ...], names: dict[int, int] = names) -> tuple[Label, ...]:
            return tuple(names.setdefault(x, len(names)) if x is not None else None for x in labels)

        out = name(m.out)
        factors = sorted(m.factors, key=lambda f: (id(f.value), f.power))
        key = (out, tuple((id(f.value), f.power, name(f.labels)) for f in factors))
        if key in found:
            m = Monomial(found[key].coefficient + m.coefficient, found[key].factors, found[key].out)
        found[key] = m
    return [m for m in found.values() if m.coefficient]


# The rules, by op

Rule = Callable[[Algebra, Value], Sum]
RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    def keep(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return keep


def _rank(v: Value) -> int:
    return len(v.shape or ())


def _shape(v: Value) -> tuple[int, ...]:
    if v.shape is None:
        raise NonAffine(v.op, "not a tensor")
    return v.shape


def _scalar(v: Value, position: int = 1) -> float:
    found = v.literals[position] if position < len(v.literals) else None
    if not isinstance(found, (int, float)):
        raise NonAffine(v.op, "an argument that is no number")
    return float(found)


def _inverse(a: Algebra, v: Value, op: str) -> Sum:
    a.free(v, "divides by a value of the state", op)
    return [
        Monomial(1.0, tuple(Atom(f.value, f.labels, -f.power) for f in m.factors), m.out) for m in atom(v)
    ]


@rule("mul", "multiply")
def _mul(a: Algebra, v: Value) -> Sum:
    if len(v.inputs) == 2:
        return product(a.terms(v.inputs[0]), a.terms(v.inputs[1]), _rank(v))
    return scaled(a.terms(v.inputs[0]), _scalar(v))


@rule("div", "true_divide", "divide")
def _div(a: Algebra, v: Value) -> Sum:
    if argument(v, 2, "rounding_mode", None) is not None:
        raise NonAffine(v.op, "rounds")
    if len(v.inputs) == 2:
        return product(a.terms(v.inputs[0]), _inverse(a, v.inputs[1], v.op), _rank(v))
    if not isinstance(v.literals[0], Slot):
        raise NonAffine(v.op, "divides by a value of the state")
    return scaled(a.terms(v.inputs[0]), 1 / _scalar(v))


@rule("add", "sub", "rsub", "subtract")
def _add(a: Algebra, v: Value) -> Sum:
    alpha = float(argument(v, 2, "alpha", 1))
    rank = _rank(v)
    left = a.terms(v.inputs[0])
    right = a.terms(v.inputs[1]) if len(v.inputs) == 2 else number(_scalar(v), rank)
    if v.op == "rsub":
        left, right = right, left
    return padded(scaled(left, alpha if v.op == "rsub" and alpha != 1 else 1), rank) + padded(
        scaled(right, (-1 if v.op != "add" else 1) * alpha), rank
    )


@rule("neg", "negative")
def _neg(a: Algebra, v: Value) -> Sum:
    return scaled(a.terms(v.inputs[0]), -1)


@rule("sum", "mean")
def _sum(a: Algebra, v: Value) -> Sum:
    shape = _shape(v.inputs[0])
    dims = argument(v, 1, "dim", None)
    dims = range(len(shape)) if dims is None or dims == () else ((dims,) if isinstance(dims, int) else dims)
    dims = {d % len(shape) for d in dims}
    keepdim = bool(argument(v, 2, "keepdim", False))
    if argument(v, 3, "dtype", v.dtype) != v.dtype:
        raise NonAffine(v.op, "changes the type")
    total = contracted(a.terms(v.inputs[0]), dims, shape, keepdim)
    return scaled(total, 1 / math.prod(shape[d] for d in dims)) if v.op == "mean" else total


@rule("cast")
def _cast(a: Algebra, v: Value) -> Sum:
    before, after = (WIDTH.get(x.dtype, 0) for x in (v.inputs[0], v))
    if not before or after < before or (after == before and v.dtype != v.inputs[0].dtype):
        raise NonAffine("cast", f"rounds {v.inputs[0].dtype} to {v.dtype}")
    return a.terms(v.inputs[0])


@rule("unsqueeze")
def _unsqueeze(a: Algebra, v: Value) -> Sum:
    d = v.literals[1]
    return rearranged(a.terms(v.inputs[0]), lambda out: (*out[:d], None, *out[d:]))


@rule("squeeze")
def _squeeze(a: Algebra, v: Value) -> Sum:
    gone = v.literals[1]
    return rearranged(a.terms(v.inputs[0]), lambda out: [x for d, x in enumerate(out) if d not in gone])


@rule("permute")
def _permute(a: Algebra, v: Value) -> Sum:
    order = v.literals[1]
    return rearranged(a.terms(v.inputs[0]), lambda out: [out[d] for d in order])


@rule("expand")
def _expand(a: Algebra, v: Value) -> Sum:
    return padded(a.terms(v.inputs[0]), _rank(v))


@rule("view")
def _view(a: Algebra, v: Value) -> Sum:
    before, after = _shape(v.inputs[0]), _shape(v)
    if [s for s in before if s != 1] != [s for s in after if s != 1]:
        raise NonAffine("view", "merges or splits axes")

    def change(out: tuple[Label, ...]) -> list[Label]:
        kept = iter([x for x, s in zip(out, before, strict=True) if s != 1])
        return [next(kept) if s != 1 else None for s in after]

    return rearranged(a.terms(v.inputs[0]), change)


@rule("select")
def _select(a: Algebra, v: Value) -> Sum:
    d = v.literals[1]
    if _shape(v.inputs[0])[d] != 1:
        raise NonAffine("select", "takes one entry of the state")
    return rearranged(a.terms(v.inputs[0]), lambda out: out[:d] + out[d + 1 :])


@rule("diag_embed")
def _diag_embed(a: Algebra, v: Value) -> Sum:
    if len(v.literals) > 1:
        raise NonAffine("diag_embed", "not along the last axes")
    found = []
    for m in a.terms(v.inputs[0]):
        x, y = m.out[-1] if m.out[-1] is not None else fresh(), fresh()
        found.append(Monomial(m.coefficient, (*m.factors, Atom(None, (x, y))), (*m.out[:-1], x, y)))
    return found


def _matrices(x: Sum, y: Sum, inner: int, rank: int) -> Sum:
    """(..., i, j) times (..., j, k); ``rank`` of the result."""
    left = rearranged(padded(x, rank), lambda out: (*out, None))
    right = rearranged(padded(y, rank), lambda out: (*out[:-2], None, *out[-2:]))
    return contracted(product(left, right, rank + 1), [rank - 1], [1] * (rank - 1) + [inner, 1], False)


@rule("matmul", "bmm", "mm", "mv", "dot")
def _matmul(a: Algebra, v: Value) -> Sum:
    x, y = v.inputs
    left, right = a.terms(x), a.terms(y)
    if _rank(x) == 1:
        left = rearranged(left, lambda out: (None, *out))
    if _rank(y) == 1:
        right = rearranged(right, lambda out: (*out, None))
    rank = max(_rank(x), _rank(y), 2)
    found = _matrices(left, right, _shape(x)[-1], rank)
    if _rank(x) == 1:
        found = rearranged(found, lambda out: (*out[:-2], out[-1]))
    if _rank(y) == 1:
        found = rearranged(found, lambda out: out[:-1])
    return found


@rule("outer", "ger")
def _outer(a: Algebra, v: Value) -> Sum:
    left = rearranged(a.terms(v.inputs[0]), lambda out: (*out, None))
    return product(left, a.terms(v.inputs[1]), 2)


@rule("linear")
def _linear(a: Algebra, v: Value) -> Sum:
    x, weight = v.inputs[:2]
    turned = rearranged(a.terms(weight), lambda out: out[::-1])
    left = a.terms(x) if _rank(x) > 1 else rearranged(a.terms(x), lambda out: (None, *out))
    found = _matrices(left, turned, _shape(x)[-1], max(2, _rank(x)))
    if _rank(x) == 1:
        found = rearranged(found, lambda out: out[1:])
    return found + (padded(a.terms(v.inputs[2]), _rank(v)) if len(v.inputs) > 2 else [])


@rule("baddbmm", "addmm")
def _addmm(a: Algebra, v: Value) -> Sum:
    c, x, y = v.inputs
    beta, alpha = (float(argument(v, 3 + i, name, 1)) for i, name in enumerate(("beta", "alpha")))
    found = _matrices(a.terms(x), a.terms(y), _shape(x)[-1], _rank(v))
    return padded(scaled(a.terms(c), beta), _rank(v)) + scaled(found, alpha)


@rule("addcmul")
def _addcmul(a: Algebra, v: Value) -> Sum:
    c, x, y = v.inputs
    found = product(a.terms(x), a.terms(y), _rank(v))
    return padded(a.terms(c), _rank(v)) + scaled(found, float(argument(v, 3, "value", 1)))


@rule("addcdiv")
def _addcdiv(a: Algebra, v: Value) -> Sum:
    c, x, y = v.inputs
    found = product(a.terms(x), _inverse(a, y, v.op), _rank(v))
    return padded(a.terms(c), _rank(v)) + scaled(found, float(argument(v, 3, "value", 1)))


@rule("lerp")
def _lerp(a: Algebra, v: Value) -> Sum:
    x, y = (padded(a.terms(i), _rank(v)) for i in v.inputs[:2])
    step = y + scaled(x, -1)
    if len(v.inputs) == 2:
        return x + scaled(step, _scalar(v, 2))
    a.free(v.inputs[2], "the weight depends on the state", "lerp")
    return x + product(step, a.terms(v.inputs[2]), _rank(v))


@rule("where")
def _where(a: Algebra, v: Value) -> Sum:
    mask, rank = v.inputs[0], _rank(v)
    a.free(mask, "the condition depends on the state", "where")
    found: Sum = []
    for literal, condition in zip(v.literals[1:3], (mask, None), strict=True):
        if isinstance(literal, Slot):
            terms = padded(a.terms(v.inputs[literal.index]), rank)
        elif math.isfinite(literal):
            terms = number(float(literal), rank)
        else:
            raise NonAffine("where", f"fills with {literal}")
        if terms:
            found += product(terms, atom(condition or a.negation(mask)), rank)
    return found


@rule("masked_fill")
def _masked_fill(a: Algebra, v: Value) -> Sum:
    x, mask = v.inputs[:2]
    a.free(mask, "the mask depends on the state", "masked_fill")
    if len(v.inputs) > 2:
        raise NonAffine("masked_fill", "fills with a tensor")
    fill = _scalar(v, 2)
    if not math.isfinite(fill):
        raise NonAffine("masked_fill", f"fills with {fill}")
    kept = product(a.terms(x), atom(a.negation(mask)), _rank(v))
    return kept + (scaled(padded(atom(mask), _rank(v)), fill) if fill else [])


@rule("einsum")
def _einsum(a: Algebra, v: Value) -> Sum:
    found = equation_of(v)
    if found is None:
        raise NonAffine("einsum", f"the form {v.literals[0]}")
    left, result = found
    letters = sorted({c for names in left for c in names})
    sizes = dict.fromkeys(letters, 1)
    total: Sum | None = None
    for names, x in zip(left, v.inputs, strict=True):
        if len(set(names)) < len(names):
            raise NonAffine("einsum", "takes a diagonal")
        for name, size in zip(names, _shape(x), strict=True):
            sizes[name] = max(sizes[name], size)

        def spread(out: tuple[Label, ...], names: str = names) -> list[Label]:
            return [out[names.index(c)] if c in names else None for c in letters]

        terms = rearranged(a.terms(x), spread)
        total = terms if total is None else product(total, terms, len(letters))
    gone = [i for i, c in enumerate(letters) if c not in result]
    summed = contracted(total or [], gone, [sizes[c] for c in letters], True)
    return rearranged(summed, lambda out: [out[letters.index(c)] for c in result])


def equation_of(v: Value) -> tuple[list[str], str] | None:
    """Returns the letters of an einsum's operands and result, ``...`` spelled out; None for an implicit result."""
    equation = str(v.literals[0]).replace(" ", "")
    if "->" not in equation:
        return None
    left, result = equation.split("->")
    free = [c for c in string.ascii_letters if c not in equation]
    names = left.split(",")
    more = [len(x.shape or ()) - len(n.replace("...", "")) for n, x in zip(names, v.inputs, strict=True)]
    widest = max((m for n, m in zip(names, more, strict=True) if "..." in n), default=0)
    spelled = "".join(free[:widest])
    names = [n.replace("...", spelled[widest - m :]) for n, m in zip(names, more, strict=True)]
    return names, result.replace("...", spelled)
