"""Which keys a query sees, read off a mask's ops by algebra: no mask is computed.

A mask is boolean, or added to scores: 0 where a query sees a key and at most `BLOCKED` where it does not. Every value in it is an
affine function of its indices and of integers that are data, such as the positions of a cache; or a conjunction of clauses, each
a disjunction of bounds ``affine >= 0``; or such a condition as numbers. The bounds that remain tell the window and the sinks,
however they were spelled, at any length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

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


_Terms = tuple[tuple[Data, int], ...]  # data and their factors, in order of their names


def _terms(given: Iterable[tuple[Data, int]]) -> _Terms:
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
    data: _Terms = ()

    def moved(
        self, shape: Sequence[int], factors: Sequence[int], more: int = 0, to: Mapping[int, int] | None = None
    ) -> Affine:
        """Returns a view: ``to`` tells where axes lie in it that data may have, all if it is None."""
        data = self.data if to is None else _terms((d.moved(to), f) for d, f in self.data)
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
            dict[tuple[tuple[int, ...], _Terms], int]
        ] = []  # of each clause: factors and data -> constant
        for clause in clauses:
            bounds: dict[tuple[tuple[int, ...], _Terms], int] = {}
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


@dataclass(frozen=True)
class Window:
    """``0 <= key <= position and (key > position - window or key < sinks)``; a window of 0 is unlimited.

    ``query`` and ``key`` are the positions, functions of [batch, 1, queries, keys] that are data; if None, the queries are the
    last positions.
    """

    window: int
    sinks: int
    query: Affine | None = None
    key: Affine | None = None


def _sign(factors: Sequence[int], constant: int) -> int:
    """Returns 1 for a bound that holds at every index, however long the axes are, -1 for one that holds nowhere, else 0."""
    if constant >= 0 and min(factors, default=0) >= 0:
        return 1
    return -1 if constant < 0 and max(factors, default=0) <= 0 else 0


def _implies(a: Mapping[Any, int], b: Mapping[Any, int]) -> bool:
    """Returns whether a clause follows from another: each of its bounds from a looser one of the other."""
    return all(f in b and c <= b[f] for f, c in a.items())


def window_of(seen: Sequence[Condition], queries: int, keys: int, any_size: bool) -> Window:
    """Returns the window that conditions on [..., queries, keys] spell out together, the queries being the last positions.

    ``any_size``: the sizes stand for others, so that a bound beyond them is not one that always holds.

    Raises:
        NotShown: they are no such window.
    """
    if any(bound.data for condition in seen for clause in condition.clauses for bound in clause):
        return _window_of_data(seen, (queries, keys))
    shift, found = keys - queries, set[Window]()
    causal = queries == 1  # the only query is at the last key
    for clause in set().union(*(c.clauses for c in seen)):
        bounds: dict[tuple[int, int], int] = {}
        for bound in clause:
            if any(bound.factors[:-2]):
                raise NotShown("the mask differs between rows of a batch or between heads")
            row, column = (0, 0, *bound.factors)[-2:]
            if queries == 1:
                row = 0
            if (row, column) in bounds:
                raise NotShown("the mask has two bounds of one kind in a condition")
            bounds[row, column] = bound.constant
        upper = bounds.get((0, -1))
        if len(bounds) == 1 and upper is not None and (upper == keys - 1 or (upper >= keys and not any_size)):
            continue  # no key is beyond the last
        if list(bounds) == [(1, -1)] and bounds[1, -1] == shift:
            causal = True
            continue
        near = (0, 1) if queries == 1 else (-1, 1)
        if near in bounds and set(bounds) <= {near, (0, -1)}:
            # key >= position - (window - 1), position = row + shift
            behind = bounds[near] + (keys - 1 if queries == 1 else shift) + 1
            found.add(Window(behind, max(0, (upper if upper is not None else -1) + 1)))
            if behind < 1:
                raise NotShown("a query does not see its own position")
            continue
        raise NotShown("the mask is no window of positions")
    if not causal:
        raise NotShown("queries see later positions")
    if len(found) > 1:
        raise NotShown("the mask is more than one window")
    return found.pop() if found else Window(0, 0)


def _window_of_data(seen: Sequence[Condition], sizes: tuple[int, int]) -> Window:
    """Returns the window of queries and keys whose positions are data."""
    clauses = [
        [_parted(bound, sizes) for bound in clause] for clause in set().union(*(c.clauses for c in seen))
    ]
    causal = {
        (c[0][0], c[0][1])
        for c in clauses
        if len(c) == 1 and _is_key(c[0][1], -1) and not _is_nothing(c[0][0])
    }
    if len(causal) != 1:
        raise NotShown("queries see later positions" if not causal else "the mask is no window of positions")
    ((query, minus_key),) = causal
    key = _sum(_affine(0, minus_key.shape), minus_key, -1)  # its constant is 0: that of the bound is in query
    found, there = set[Window](), key.data == () and min(key.factors) >= 0
    for clause in clauses:
        near = sinks = None
        for of_query, of_key in clause:
            if (
                _sum(of_query, query)
                == replace(_affine(0, query.shape), constant=of_query.constant + query.constant)
                and of_key == key
            ):
                near = of_query.constant + query.constant + 1  # key >= query - (window - 1)
            elif _is_nothing(of_query) and of_key == minus_key:
                sinks = of_query.constant + 1
            elif _is_nothing(of_query) and of_key == key and of_query.constant == 0 and len(clause) == 1:
                there = True
            elif (of_query, of_key) != (query, minus_key) or len(clause) != 1:
                raise NotShown("the mask is no window of positions")
        if near is not None:
            found.add(Window(near, max(0, sinks or 0), query, key))
        elif sinks is not None:
            raise NotShown("the mask is no window of positions")
    if not there:
        raise NotShown("keys at negative positions are seen")
    if len(found) > 1 or any(w.window < 1 for w in found):
        raise NotShown("the mask is more than one window, or a query does not see its own position")
    return found.pop() if found else Window(0, 0, query, key)


def _parted(bound: Affine, sizes: tuple[int, int]) -> tuple[Affine, Affine]:
    """Returns a bound as the sum of what differs between queries, with the constant, and what differs between keys."""
    shape = (0, 1, *sizes)
    factors = ((0,) * 4 + bound.factors)[-4:]
    if any(factors[:2]) or any(
        a is not None and a not in (-1, -2, -4) for d, _ in bound.data for a in d.axes
    ):
        raise NotShown("the mask differs between heads")
    of_keys = [(d, f) for d, f in bound.data if -1 in d.axes]
    if any(-2 in d.axes for d, _ in of_keys):
        raise NotShown("the mask is data of queries and keys together")
    of_queries = [t for t in bound.data if t not in of_keys]
    return (
        Affine(shape, (0, 0, factors[2], 0), bound.constant, _terms(of_queries)),
        Affine(shape, (0, 0, 0, factors[3]), 0, _terms(of_keys)),
    )


def _is_nothing(x: Affine) -> bool:
    return not any(x.factors) and not x.data


def _is_key(x: Affine, sign: int) -> bool:
    """Returns whether something that differs between keys is their position, times ``sign``."""
    if x.data:
        return not any(x.factors) and [f for _, f in x.data] == [sign]
    return x.factors == (0, 0, 0, sign)


def is_written(node: fx.Node) -> bool:
    """Returns whether a tensor may be written in place, so that it is another at a later place in the graph."""
    return any(n.meta.get("opaque") for n in (node, *node.users))


class Reader:
    """Reads the values of a functional graph of ATen ops at known sizes."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, Value] = {}

    def condition(self, node: fx.Node) -> Condition:
        """Returns where a mask, boolean or to be added, lets a query see a key. Raises NotShown."""
        value = self.value(node)
        if isinstance(value, Condition):
            return value
        if isinstance(value, Added):
            return value.seen
        if isinstance(value, Number) and value.value == 0:
            return Condition(value.shape, frozenset())
        raise NotShown("the mask holds numbers that are neither 0 nor far below")

    def value(self, node: fx.Node) -> Value:
        if node not in self._known:
            try:
                self._known[node] = self._read(node)
            except NotShown:
                value = node.meta.get("val")
                if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
                    raise
                if is_written(node):
                    raise NotShown("the mask depends on data that may be written in place") from None
                shape = _shape(node)
                axes = [None if n == 1 else d - len(shape) for d, n in enumerate(shape)]
                self._known[node] = Affine(shape, (0,) * len(shape), 0, ((Data(node, tuple(axes)), 1),))
        return self._known[node]

    def _read(self, node: fx.Node) -> Value:
        if node.op != "call_function":
            raise NotShown(
                "the mask depends on data"
                if node.op == "placeholder"
                else "the mask is a tensor of the model"
            )
        rule = _RULES.get(node.target) if not node.meta.get("opaque") else None
        if rule is None:
            raise NotShown(f"the mask is made with {node.target}")
        try:
            return rule(self, node, *node.args, **node.kwargs)
        except (TypeError, ValueError, IndexError) as error:  # arguments that its rule does not know
            raise NotShown(f"the mask is made with a form of {node.target} that is not read") from error

    def either(self, given: Any) -> Any:
        """Returns the value of a node, a number as it is."""
        return self.value(given) if isinstance(given, fx.Node) else given


def _shape(node: fx.Node) -> tuple[int, ...]:
    shape = node.meta["val"].shape
    if any(not isinstance(n, int) for n in shape):
        raise NotShown("the mask has sizes that are symbols")
    return tuple(shape)


def _filled(node: fx.Node, value: Any) -> Value:
    """Returns a tensor of one number, as its dtype has it."""
    shape, dtype = _shape(node), node.meta["val"].dtype
    if dtype == torch.bool:
        return Condition(shape, frozenset() if value else frozenset([frozenset()]))
    if dtype.is_floating_point:
        return Number(shape, float(value))
    return Affine(shape, (0,) * len(shape), int(value))


def _viewed(value: Value, shape: Sequence[int], move: Callable[[Affine], Affine]) -> Value:
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


def _relabelled(reader: Reader, node: fx.Node, axes: Sequence[int | None]) -> Value:
    """Returns a view whose axis d is axis ``axes[d]`` of its source, or new."""
    shape = _shape(node)

    rank = len(_shape(node.args[0]))
    to = {a - rank: d - len(axes) for d, a in enumerate(axes) if a is not None}

    def move(x: Affine) -> Affine:
        return x.moved(shape, [0 if a is None else x.factors[a] for a in axes], to=to)

    return _viewed(reader.value(node.args[0]), shape, move)


def _axes(node: fx.Node) -> list[int | None]:
    return list(range(len(_shape(node.args[0]))))


def _permute(reader: Reader, node: fx.Node, x: fx.Node, *order: Any) -> Value:
    rank = len(_shape(x))
    return _relabelled(
        reader, node, [d % rank for d in (order[0] if isinstance(order[0], (list, tuple)) else order)]
    )


def _transpose(reader: Reader, node: fx.Node, x: fx.Node, i: int = -2, j: int = -1) -> Value:
    axes = _axes(node)
    if len(axes) > 1:
        axes[i], axes[j] = axes[j], axes[i]
    return _relabelled(reader, node, axes)


def _unsqueeze(reader: Reader, node: fx.Node, x: fx.Node, dim: int) -> Value:
    axes = _axes(node)
    axes.insert(dim % (len(axes) + 1), None)
    return _relabelled(reader, node, axes)


def _by_size(reader: Reader, node: fx.Node, *_: Any) -> Value:
    """A view that keeps the axes longer than 1, in their order."""
    before, after = _shape(node.args[0]), _shape(node)
    kept = [d for d, n in enumerate(before) if n != 1]
    if [before[d] for d in kept] != [n for n in after if n != 1]:
        raise NotShown("the mask's axes are split or joined")
    source = iter(kept)
    return _relabelled(reader, node, [None if n == 1 else next(source) for n in after])


def _expand(reader: Reader, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> Value:
    return _broadcast(reader.value(x), _shape(node))


def _broadcast(value: Value, shape: Sequence[int]) -> Value:
    def move(x: Affine) -> Affine:
        return x.moved(shape, (0,) * (len(shape) - len(x.factors)) + x.factors)

    return _viewed(value, shape, move)


def _same(reader: Reader, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> Value:
    return reader.value(x)


def _slice(
    reader: Reader, node: fx.Node, x: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    size = _shape(x)[dim]
    first = 0 if start is None else max(0, start + size if start < 0 else start)
    shape = _shape(node)

    kept = {a - len(shape): a - len(shape) for a in range(len(shape)) if a != dim % len(shape)}
    to = None if shape == _shape(x) else kept

    def move(a: Affine) -> Affine:
        factors = list(a.factors)
        more = factors[dim] * first
        factors[dim] = factors[dim] * step if shape[dim] != 1 else 0
        return a.moved(shape, factors, more, to)

    return _viewed(reader.value(x), shape, move)


def _select(reader: Reader, node: fx.Node, x: fx.Node, dim: int, index: int) -> Value:
    size, shape = _shape(x), _shape(node)
    at, place = index % size[dim], dim % len(size)

    rank = len(size)
    to = {a - rank: a - rank + (a < place) for a in range(rank) if a != place}

    def move(a: Affine) -> Affine:
        return a.moved(shape, a.factors[:place] + a.factors[place + 1 :], a.factors[place] * at, to)

    return _viewed(reader.value(x), shape, move)


def _arange(reader: Reader, node: fx.Node, *numbers: Any, **_: Any) -> Value:
    if node.meta["val"].dtype.is_floating_point or not all(isinstance(n, int) for n in numbers):
        raise NotShown("positions that are no integers")
    first, step = (0, 1) if len(numbers) == 1 else (numbers[0], numbers[2] if len(numbers) > 2 else 1)
    shape = _shape(node)
    return Affine(shape, (0 if shape[0] == 1 else step,), first)


def _full(reader: Reader, node: fx.Node, *given: Any, **_: Any) -> Value:
    value = given[-1]
    if isinstance(value, fx.Node):
        raise NotShown("the mask depends on data")
    return _filled(node, value)


def _constant(value: float) -> Callable[..., Value]:
    return lambda reader, node, *_, **__: _filled(node, value)


def _scalar(reader: Reader, node: fx.Node, value: Any, **_: Any) -> Value:
    return _filled(node, value)


def _to(reader: Reader, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> Value:
    value, dtype = reader.value(x), node.meta["val"].dtype
    if isinstance(value, Ones):
        return value.seen if dtype == torch.bool else value
    if isinstance(value, Condition) and dtype != torch.bool:
        return Ones(value)
    kept = (
        True
        if isinstance(value, Condition)
        else dtype.is_floating_point
        if isinstance(value, (Added, Number))
        else dtype in (torch.int32, torch.int64)
    )
    if isinstance(value, Affine) and value.data and not kept:
        raise NotShown("the mask depends on data")
    if not kept:
        raise NotShown(f"the mask is cast to {str(dtype).removeprefix('torch.')}")
    return value


# Arithmetic and comparisons


def _affine(given: Any, shape: Sequence[int]) -> Affine:
    if isinstance(given, bool) or not isinstance(given, (int, Affine)):
        raise NotShown("the mask computes with other things than positions")
    if isinstance(given, int):
        return Affine(tuple(shape), (0,) * len(shape), given)
    made = _broadcast(given, shape)
    assert isinstance(made, Affine)
    return made


def _sum(a: Affine, b: Affine, times: int = 1, more: int = 0) -> Affine:
    factors = [x + times * y for x, y in zip(a.factors, b.factors, strict=True)]
    data = _terms([*a.data, *((d, times * f) for d, f in b.data)])
    return Affine(a.shape, tuple(factors), a.constant + times * b.constant + more, data)


def _add(reader: Reader, node: fx.Node, a: Any, b: Any, *, alpha: int = 1) -> Value:
    left, right, shape = reader.either(a), reader.either(b), _shape(node)
    masks = [x for x in (left, right) if isinstance(x, Added)]
    if masks and alpha == 1 and all(isinstance(x, Added) or _is_zero(x) for x in (left, right)):
        return Added(_and(shape, *(m.seen for m in masks)))
    return _sum(_affine(left, shape), _affine(right, shape), alpha)


def _is_zero(x: Any) -> bool:
    return isinstance(x, Number) and x.value == 0


def _sub(reader: Reader, node: fx.Node, a: Any, b: Any, *, alpha: int = 1) -> Value:
    shape = _shape(node)
    return _sum(_affine(reader.either(a), shape), _affine(reader.either(b), shape), -alpha)


def _times(reader: Reader, node: fx.Node, a: Any, b: Any) -> Value:
    """A product of conditions, or of 1 and 0 with a number far below."""
    left, right, shape = reader.either(a), reader.either(b), _shape(node)
    if isinstance(left, Ones) and isinstance(right, (int, float)) and right <= BLOCKED:
        return Added(opposite(left.seen))
    if isinstance(left, Affine) and isinstance(right, int):
        whole = _affine(left, shape)
        return _sum(_affine(0, shape), whole, right)
    if isinstance(left, Ones) and isinstance(right, Ones):
        return Ones(_and(shape, left.seen, right.seen))
    return _and(shape, _condition(left, shape), _condition(right, shape))


def _rsub(reader: Reader, node: fx.Node, a: Any, b: Any, alpha: int = 1) -> Value:
    source = reader.either(a)
    if isinstance(source, Ones) and b == alpha == 1:
        return Ones(opposite(source.seen))
    return _sub(reader, node, b, a, alpha=alpha)


def _neg(reader: Reader, node: fx.Node, a: fx.Node) -> Value:
    shape = _shape(node)
    return _sum(_affine(0, shape), _affine(reader.value(a), shape), -1)


def _compare(flip: bool, strict: bool) -> Callable[..., Value]:
    """Returns the rule of a <= b (or <, if strict), or with ``flip`` of a >= b."""

    def rule(reader: Reader, node: fx.Node, a: Any, b: Any) -> Value:
        shape = _shape(node)
        low, high = _affine(reader.either(a), shape), _affine(reader.either(b), shape)
        if flip:
            low, high = high, low
        return Condition.of(shape, [[_sum(high, low, -1, -int(strict))]])

    return rule


def _equals(same: bool) -> Callable[..., Value]:
    """Returns the rule of == or !=."""

    def rule(reader: Reader, node: fx.Node, a: fx.Node, b: Any) -> Value:
        source, shape = reader.value(a), _shape(node)
        if isinstance(source, Ones) and b in (0, 1):
            return source.seen if same == bool(b) else opposite(source.seen)
        left, right = _affine(source, shape), _affine(reader.either(b), shape)
        equal = Condition.of(shape, [[_sum(left, right, -1)], [_sum(right, left, -1)]])
        return equal if same else opposite(equal)

    return rule


# What finds the texts in a row of several: differences of positions, their sums, and what stands at a position


def _diff(
    reader: Reader,
    node: fx.Node,
    x: fx.Node,
    n: int = 1,
    dim: int = -1,
    before: Any = None,
    after: Any = None,
) -> Value:
    shape, source = _shape(node), reader.value(x)
    if n != 1 or before is None or after is not None or _shape(before)[dim] != 1:
        raise NotShown("the mask has differences of another kind")
    if isinstance(source, Affine) and source.data:
        raise NotShown("the mask has differences of data")
    step = _affine(source, shape).factors[dim]
    to_first = _sum(_affine(source, shape), _affine(reader.value(before), shape), -1)
    factors = tuple(0 if d == dim % len(shape) else f for d, f in enumerate(to_first.factors))
    if any(factors) or to_first.constant != step:
        raise NotShown("the mask has differences that are not all the same")
    return Affine(shape, factors, step)


def _cumsum(reader: Reader, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> Value:
    if reader.value(x) != _filled(x, False):
        raise NotShown("the mask depends on a running sum")
    return _filled(node, 0)


def _index(reader: Reader, node: fx.Node, x: fx.Node, indices: Sequence[fx.Node | None]) -> Value:
    shape, source = _shape(node), reader.value(x)
    if not isinstance(source, Affine) or source.data or len(indices) != len(source.shape) or None in indices:
        raise NotShown("the mask is indexed by tensors")
    made = Affine(shape, (0,) * len(shape), source.constant)
    for factor, index in zip(source.factors, indices, strict=True):
        made = _sum(made, _affine(reader.either(index), shape), factor)
    return made


# Logic


def _condition(given: Any, shape: Sequence[int]) -> Condition:
    if not isinstance(given, Condition):
        raise NotShown("the mask combines conditions with other things")
    made = _broadcast(given, shape)
    assert isinstance(made, Condition)
    return made


def _and(shape: Sequence[int], *given: Condition) -> Condition:
    return Condition.of(shape, [list(c) for x in given for c in _condition(x, shape).clauses])


def _or(shape: Sequence[int], a: Condition, b: Condition) -> Condition:
    pairs = itertools.product(_condition(a, shape).clauses, _condition(b, shape).clauses)
    return Condition.of(shape, [list(x | y) for x, y in pairs])


def opposite(value: Condition) -> Condition:
    """Returns the condition that holds where ``value`` does not."""
    if math.prod(max(1, len(c)) for c in value.clauses) > _MOST_CLAUSES:
        raise NotShown("the mask has too many conditions")
    turned = [[_sum(_affine(0, b.shape), b, -1, -1) for b in clause] for clause in value.clauses]
    return Condition.of(value.shape, [list(c) for c in itertools.product(*turned)])


def _both(reader: Reader, node: fx.Node, a: fx.Node, b: fx.Node) -> Value:
    shape = _shape(node)
    return _and(shape, *(_condition(reader.value(x), shape) for x in (a, b)))


def _any(reader: Reader, node: fx.Node, a: fx.Node, b: fx.Node) -> Value:
    shape = _shape(node)
    left, right = (_condition(reader.value(x), shape) for x in (a, b))
    return _or(shape, left, right)


def _negated(reader: Reader, node: fx.Node, a: fx.Node) -> Value:
    return opposite(_condition(reader.value(a), _shape(node)))


def _chosen(shape: Sequence[int], condition: Condition, there: Any, elsewhere: Any) -> Value:
    """Returns a mask that is added, from a choice between numbers and masks."""
    condition = _condition(condition, shape)
    parts = []
    for when, x in ((condition, there), (opposite(condition), elsewhere)):
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            x = Number(tuple(shape), float(x))
        if isinstance(x, Affine) and not any(x.factors) and not x.data:
            x = Number(x.shape, float(x.constant))
        if isinstance(x, Number) and x.value <= BLOCKED:
            parts.append(opposite(when))
        elif isinstance(x, Added):
            parts.append(_or(shape, opposite(when), x.seen))
        elif not _is_zero(x):
            raise NotShown("the mask holds numbers that are neither 0 nor far below")
    return Added(_and(shape, *parts))


def _where(reader: Reader, node: fx.Node, condition: fx.Node, there: Any, elsewhere: Any) -> Value:
    shape = _shape(node)
    at = _condition(reader.value(condition), shape)
    left, right = reader.either(there), reader.either(elsewhere)
    if isinstance(left, Condition) and isinstance(right, Condition):
        return _and(shape, _or(shape, opposite(at), left), _or(shape, at, right))
    return _chosen(shape, at, left, right)


def _masked_fill(reader: Reader, node: fx.Node, x: fx.Node, condition: fx.Node, value: Any) -> Value:
    shape = _shape(node)
    at, source = _condition(reader.value(condition), shape), reader.value(x)
    if isinstance(source, Condition) and not isinstance(value, fx.Node):
        return _or(shape, at, source) if value else _and(shape, opposite(at), source)
    return _chosen(shape, at, reader.either(value), source)


def _triangle(lower: bool) -> Callable[..., Value]:
    """Returns the rule of tril, which keeps column <= row + diagonal, or of triu."""

    def rule(reader: Reader, node: fx.Node, x: fx.Node, diagonal: int = 0) -> Value:
        shape, source = _shape(node), reader.value(x)
        sign = 1 if lower else -1
        factors = [0] * (len(shape) - 2) + [sign * int(shape[-2] > 1), -sign * int(shape[-1] > 1)]
        kept = Condition.of(shape, [[Affine(shape, tuple(factors), sign * diagonal)]])
        if isinstance(source, Condition):
            return _and(shape, kept, source)
        if isinstance(source, Number) and source.value <= BLOCKED:  # 0 elsewhere
            return Added(opposite(kept))
        constant = isinstance(source, Number) or (
            isinstance(source, Affine) and not any(source.factors) and not source.data
        )
        if constant:
            one = source.value if isinstance(source, Number) else source.constant  # type: ignore[union-attr]
            if one == 1:
                return Ones(kept)
        raise NotShown("a triangle of other numbers than 1 or minus infinity")

    return rule


def _rules() -> Iterator[tuple[Any, Callable[..., Any]]]:
    for op in (aten.permute.default,):
        yield op, _permute
    for op in (aten.transpose.int, aten.swapaxes.default, aten.t.default, aten.mT.default):
        yield op, _transpose
    yield aten.unsqueeze.default, _unsqueeze
    for op in (
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.flatten.using_ints,
        aten.view_as.default,
    ):
        yield op, _by_size
    for op in (aten.expand.default, aten.expand_as.default):
        yield op, _expand
    for op in (
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.contiguous.default,
        aten.lift_fresh_copy.default,
    ):
        yield op, _same
    yield aten.slice.Tensor, _slice
    yield aten.select.int, _select
    for op in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        yield op, _arange
    for op in (aten.full.default, aten.full_like.default, aten.new_full.default):
        yield op, _full
    yield aten.scalar_tensor.default, _scalar
    for op in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        yield op, _constant(0)
    for op in (aten.ones.default, aten.ones_like.default, aten.new_ones.default):
        yield op, _constant(1)
    for op in (
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten._to_copy.default,
        aten.type_as.default,
    ):
        yield op, _to
    for op in (aten.add.Tensor, aten.add.Scalar):
        yield op, _add
    for op in (aten.sub.Tensor, aten.sub.Scalar):
        yield op, _sub
    for op in (aten.rsub.Tensor, aten.rsub.Scalar):
        yield op, _rsub
    yield aten.neg.default, _neg
    for name, flip, strict in (
        ("le", False, False),
        ("lt", False, True),
        ("ge", True, False),
        ("gt", True, True),
    ):
        for overload in ("Tensor", "Scalar"):
            yield getattr(getattr(aten, name), overload), _compare(flip, strict)
    for name, same in (("eq", True), ("ne", False)):
        for overload in ("Tensor", "Scalar"):
            yield getattr(getattr(aten, name), overload), _equals(same)
    yield aten.diff.default, _diff
    yield aten.cumsum.default, _cumsum
    yield aten.index.Tensor, _index
    for op in (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor):
        yield op, _both
    for op in (aten.mul.Tensor, aten.mul.Scalar):
        yield op, _times
    for op in (aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor):
        yield op, _any
    for op in (aten.logical_not.default, aten.bitwise_not.default):
        yield op, _negated
    yield aten.where.self, _where
    yield aten.where.ScalarSelf, _where
    yield aten.where.ScalarOther, _where
    yield aten.where.Scalar, _where
    yield aten.masked_fill.Scalar, _masked_fill
    yield aten.masked_fill.Tensor, _masked_fill
    yield aten.tril.default, _triangle(lower=True)
    yield aten.triu.default, _triangle(lower=False)


_RULES: dict[Any, Callable[..., Value]] = dict(_rules())
