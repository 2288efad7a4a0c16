"""What a mask is made of: functions of positions, conditions on them, and such conditions as numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

BLOCKED = -1e4  # what is added to a score that is to weigh nothing, at most

_MOST_CLAUSES = 64


class NotShown(Exception):
    """Raised where the graph does not show that a mask is a window; says why."""


@dataclass(frozen=True)
class Data:
    """A tensor of integers that the graph is given or computes; ``axes``: where its own lie, counted from the last, -1."""

    node: fx.Node
    axes: tuple[int | None, ...]  # None for one of size 1

    def moved(self, to: Mapping[int, int]) -> Data:
        if any(a is not None and a not in to for a in self.axes):
            raise NotShown("the mask takes parts of positions that are data")
        return Data(self.node, tuple(None if a is None else to[a] for a in self.axes))


Terms = tuple[tuple[Data, int], ...]  # data and their factors, in order of their names


def terms(given: Iterable[tuple[Data, int]]) -> Terms:
    total: dict[Data, int] = {}
    for data, factor in given:
        total[data] = total.get(data, 0) + factor
    return tuple(
        sorted(((d, f) for d, f in total.items() if f), key=lambda t: (t[0].node.name, str(t[0].axes)))
    )


@dataclass(frozen=True)
class Affine:
    """``constant + sum of factors[d] * index along axis d + data``; an axis of size 1 has the factor 0."""

    shape: tuple[int, ...]
    factors: tuple[int, ...]
    constant: int
    data: Terms = ()

    def moved(
        self, shape: Sequence[int], factors: Sequence[int], more: int = 0, to: Mapping[int, int] | None = None
    ) -> Affine:
        """Returns a view: ``to`` tells where axes lie in it that data may have, all if it is None."""
        data = self.data if to is None else terms((d.moved(to), f) for d, f in self.data)
        return Affine(tuple(shape), tuple(factors), self.constant + more, data)


@dataclass(frozen=True)
class Condition:
    """Whether, for every clause, some bound of it is at least 0. No clause: everywhere; an empty clause: nowhere."""

    shape: tuple[int, ...]
    clauses: frozenset[frozenset[Affine]]

    @staticmethod
    def of(shape: Sequence[int], clauses: Sequence[Sequence[Affine]]) -> Condition:
        """Returns the condition without what follows from the rest of it."""
        kept: list[
            dict[tuple[tuple[int, ...], Terms], int]
        ] = []  # of each clause: factors and data -> constant
        for clause in clauses:
            bounds: dict[tuple[tuple[int, ...], Terms], int] = {}
            for b in clause:
                key = (b.factors, b.data)
                bounds[key] = max(b.constant, bounds.get(key, b.constant))
            signs = {(f, d): 0 if d else _sign(f, c) for (f, d), c in bounds.items()}
            if 1 in signs.values():
                continue
            bounds = {f: c for f, c in bounds.items() if signs[f] == 0}
            if not any(_implies(other, bounds) for other in kept):
                kept = [*(other for other in kept if not _implies(bounds, other)), bounds]
        if len(kept) > _MOST_CLAUSES:
            raise NotShown("the mask has too many conditions")
        shape = tuple(shape)
        return Condition(
            shape,
            frozenset(frozenset(Affine(shape, f, c, d) for (f, d), c in one.items()) for one in kept),
        )


@dataclass(frozen=True)
class Added:
    """0 where the condition holds, elsewhere a number of at most `BLOCKED`."""

    seen: Condition

    @property
    def shape(self) -> tuple[int, ...]:
        return self.seen.shape


@dataclass(frozen=True)
class Number:
    """One float everywhere."""

    shape: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class Ones:
    """1 where the condition holds, else 0."""

    seen: Condition

    @property
    def shape(self) -> tuple[int, ...]:
        return self.seen.shape


Value = Affine | Condition | Added | Number | Ones


def _sign(factors: Sequence[int], constant: int) -> int:
    """Returns 1 for a bound that holds at every index, however long the axes are, -1 for one that holds nowhere, else 0."""
    if constant >= 0 and min(factors, default=0) >= 0:
        return 1
    return -1 if constant < 0 and max(factors, default=0) <= 0 else 0


def _implies(a: Mapping[Any, int], b: Mapping[Any, int]) -> bool:
    """Returns whether a clause follows from another: each of its bounds from a looser one of the other."""
    return all(f in b and c <= b[f] for f, c in a.items())


def shape_of(node: fx.Node) -> tuple[int, ...]:
    shape = node.meta["val"].shape
    if any(not isinstance(n, int) for n in shape):
        raise NotShown("the mask has sizes that are symbols")
    return tuple(shape)


def filled(node: fx.Node, value: Any) -> Value:
    """Returns a tensor of one number, as its dtype has it."""
    shape, dtype = shape_of(node), node.meta["val"].dtype
    if dtype == torch.bool:
        return Condition(shape, frozenset() if value else frozenset([frozenset()]))
    if dtype.is_floating_point:
        return Number(shape, float(value))
    return Affine(shape, (0,) * len(shape), int(value))


def viewed(value: Value, shape: Sequence[int], move: Callable[[Affine], Affine]) -> Value:
    """Returns a view of a value, given what it does to affine functions."""
    if isinstance(value, Affine):
        return move(value)
    if isinstance(value, Number):
        return replace(value, shape=tuple(shape))
    if isinstance(value, (Added, Ones)):
        return type(value)(_viewed_condition(value.seen, shape, move))
    return _viewed_condition(value, shape, move)


def _viewed_condition(value: Condition, shape: Sequence[int], move: Callable[[Affine], Affine]) -> Condition:
    return Condition.of(shape, [[move(b) for b in clause] for clause in value.clauses])


def broadcast(value: Value, shape: Sequence[int]) -> Value:
    def move(x: Affine) -> Affine:
        return x.moved(shape, (0,) * (len(shape) - len(x.factors)) + x.factors)

    return viewed(value, shape, move)


def affine(given: Any, shape: Sequence[int]) -> Affine:
    if isinstance(given, bool) or not isinstance(given, (int, Affine)):
        raise NotShown("the mask computes with other things than positions")
    if isinstance(given, int):
        return Affine(tuple(shape), (0,) * len(shape), given)
    made = broadcast(given, shape)
    assert isinstance(made, Affine)
    return made


def sum_of(a: Affine, b: Affine, times: int = 1, more: int = 0) -> Affine:
    factors = [x + times * y for x, y in zip(a.factors, b.factors, strict=True)]
    data = terms([*a.data, *((d, times * f) for d, f in b.data)])
    return Affine(a.shape, tuple(factors), a.constant + times * b.constant + more, data)


def condition_of(given: Any, shape: Sequence[int]) -> Condition:
    if not isinstance(given, Condition):
        raise NotShown("the mask combines conditions with other things")
    made = broadcast(given, shape)
    assert isinstance(made, Condition)
    return made


def both(shape: Sequence[int], *given: Condition) -> Condition:
    return Condition.of(shape, [list(c) for x in given for c in condition_of(x, shape).clauses])


def either(shape: Sequence[int], a: Condition, b: Condition) -> Condition:
    pairs = itertools.product(condition_of(a, shape).clauses, condition_of(b, shape).clauses)
    return Condition.of(shape, [list(x | y) for x, y in pairs])


def opposite(value: Condition) -> Condition:
    """Returns the condition that holds where ``value`` does not."""
    if math.prod(max(1, len(c)) for c in value.clauses) > _MOST_CLAUSES:
        raise NotShown("the mask has too many conditions")
    turned = [[sum_of(affine(0, b.shape), b, -1, -1) for b in clause] for clause in value.clauses]
    return Condition.of(value.shape, [list(c) for c in itertools.product(*turned)])
