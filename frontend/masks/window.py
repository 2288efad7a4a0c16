"""The window that conditions on positions spell out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spikingbrain.frontend.masks.values import Affine, Condition, NotShown, affine, sum_of, terms


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
    key = sum_of(
        affine(0, minus_key.shape), minus_key, -1
    )  # its constant is 0: that of the bound is in query
    found, there = set[Window](), key.data == () and min(key.factors) >= 0
    for clause in clauses:
        near = sinks = None
        for of_query, of_key in clause:
            if (
                sum_of(of_query, query)
                == replace(affine(0, query.shape), constant=of_query.constant + query.constant)
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
        Affine(shape, (0, 0, factors[2], 0), bound.constant, terms(of_queries)),
        Affine(shape, (0, 0, 0, factors[3]), 0, terms(of_keys)),
    )


def _is_nothing(x: Affine) -> bool:
    return not any(x.factors) and not x.data


def _is_key(x: Affine, sign: int) -> bool:
    """Returns whether something that differs between keys is their position, times ``sign``."""
    if x.data:
        return not any(x.factors) and [f for _, f in x.data] == [sign]
    return x.factors == (0, 0, 0, sign)
