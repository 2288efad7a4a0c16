"""Which values are slices of a sequence at one position (tokens), and which values belong to one loop over positions.

A (tensor, dim) that is read at four or more positions is a *family*; its selects or windows are tokens. A value that sees
tokens of several positions carries something through time. Such values, connected, are the loops; what sees one position
only (gates, slices) feeds them and may feed several.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import gcd

from spikingbrain.passes.recurrence.graph import Graph, Value

FEWEST = 4
LATE = ("not joined", "none", "all")

Key = tuple[Value, int, int]  # source, dim, width


def place(v: Value) -> tuple[Key, int] | None:
    """Returns the family that a select or an aligned slice would belong to, and its position there."""
    if v.op == "select":
        return (v.inputs[0], v.literals[1], 0), v.literals[2]
    if v.op == "slice" and len(v.literals) == 4:
        _, dim, start, end = v.literals
        width = end - start
        if width > 0 and start % width == 0:
            return (v.inputs[0], dim, width), start // width
    return None


@dataclass(eq=False)
class Component:
    """One candidate for a loop.

    Attributes:
        mixed: values that see several positions, in graph order.
        inside: those and what feeds them.
        tokens: those of them that are tokens: family and position.
        places: every token of the graph by family and position.
        fixed: values that depend on a token but are the same for all steps.
        joined: values of ``mixed`` that something else reads as well.
    """

    mixed: list[Value]
    inside: list[Value]
    tokens: dict[Value, tuple[Key, int]]
    places: dict[tuple[Key, int], Value]
    fixed: set[Value] = field(default_factory=set)
    joined: set[Value] = field(default_factory=set)

    def bases(self) -> list[int]:
        """Returns the numbers of steps worth trying, the fewest first: sequences may be read several entries per step."""
        counts = {count for _, _, count in self._families().values() if count >= FEWEST}
        return sorted(counts)[:3]

    def times(self, base: int, reverse: bool, late: str) -> dict[Value, int]:
        """Returns the step of every value inside, in order of processing (from 0), when there are about ``base`` steps.

        What is computed of carried values alone belongs to the step that made them, or to the one that reads it: ``late`` is
        one of `LATE`, which of them are put off.
        """
        families = self._families()
        step: dict[Value, int] = {}
        for v, (key, position) in self.tokens.items():
            if v not in self.fixed:
                first, stride, count = families[key]
                step[v] = (position - first) // stride // max(1, round(count / base))
        last = max(step.values(), default=0)
        time: dict[Value, int] = {}
        for v in self.inside:
            if v in step:
                time[v] = last - step[v] if reverse else step[v]
            elif v not in self.fixed:
                time[v] = max((time[x] for x in v.inputs if x in time), default=0)
        if late != "none":
            self._put_off(time, set() if late == "all" else self.joined)
        return time

    def _put_off(self, time: dict[Value, int], kept: set[Value]) -> None:
        mixed = set(self.mixed)
        first_use: dict[Value, int] = {}
        for v in reversed(self.mixed):
            fed = any(x in time and x not in mixed for x in v.inputs)
            if not fed and v not in kept and first_use.get(v, time[v]) > time[v]:
                time[v] = first_use[v]
            for x in v.inputs:
                if x in mixed:
                    first_use[x] = min(first_use.get(x, time[v]), time[v])

    def _families(self) -> dict[Key, tuple[int, int, int]]:
        """Returns first position, stride and number of positions of each family."""
        positions: dict[Key, set[int]] = defaultdict(set)
        for v, (key, position) in self.tokens.items():
            if v not in self.fixed:
                positions[key].add(position)
        found = {}
        for key, seen in positions.items():
            least = min(seen)
            stride = gcd(*(p - least for p in seen)) or 1
            first = least if stride > 1 else 0
            found[key] = (first, stride, (max(seen) - first) // stride + 1)
        return found


def find_components(graph: Graph, consumed: set[Value], barred: set[Key]) -> list[Component]:
    """Returns the candidates among values that no loop has taken yet; tokens of ``barred`` families count as plain values."""
    families = _families(graph, consumed, barred)
    tokens = {
        v: at
        for v in graph.values
        if v not in consumed and (at := place(v)) is not None and at[0] in families
    }
    places = {at: v for v, at in tokens.items()}
    span = _spans(graph, consumed, tokens)
    mixed = [v for v in graph.values if v in span and span[v][0] != span[v][1]]
    mixed_set = set(mixed)
    users: dict[Value, set[Value]] = defaultdict(set)
    read_outside = mixed_set.intersection(graph.outputs)
    for v in graph.values:
        if v in mixed_set:
            for x in v.inputs:
                users[x].add(v)
        else:
            read_outside |= mixed_set.intersection(v.inputs)
    found: list[Component] = []
    for members in _connected(mixed, mixed_set):
        inside = _with_feeders(members, span, mixed_set)
        own = {v: tokens[v] for v in inside if v in tokens}
        if len({position for _, position in own.values()}) < FEWEST:
            continue
        component = Component(members, inside, own, places)
        steps = len({position for _, position in own.values()})
        own_members = set(members)
        component.joined = own_members & read_outside
        component.fixed = {
            v
            for v in inside
            if v not in own_members and len(users[v] & own_members) > max(2 * FEWEST, steps // 2)
        }
        found.append(component)
    return found


def _families(graph: Graph, consumed: set[Value], barred: set[Key]) -> set[Key]:
    """Returns the families that are time axes: read at enough positions, and their source is not itself made of tokens.

    Where the source is made of tokens of a shorter family (heads, the parts of a fused projection), that one is no time axis.
    """
    positions: dict[Key, set[int]] = defaultdict(set)
    for v in graph.values:
        if v not in consumed and (found := place(v)):
            positions[found[0]].add(found[1])
    active = {k: len(seen) for k, seen in positions.items() if len(seen) >= FEWEST and k not in barred}
    while True:
        under: dict[Value, Key] = {}  # the shortest family that a value is made of
        shorter: set[Key] = set()
        roots: set[Key] = set()
        for v in graph.values:
            if v in consumed or _joins(v):
                continue
            above = [under[x] for x in v.inputs if x in under]
            found = place(v)
            if found and found[0] in active:
                key = found[0]
                if key[0] not in under:
                    roots.add(key)
                    above.append(key)
                elif active[under[key[0]]] < active[key]:
                    shorter.add(under[key[0]])
            if above:
                under[v] = min(above, key=lambda k: active[k])
        if not shorter:
            return roots
        for key in shorter:
            del active[key]


def _joins(v: Value) -> bool:
    return v.op in ("stack", "cat") and len(v.inputs) >= FEWEST


def _spans(
    graph: Graph, consumed: set[Value], tokens: dict[Value, tuple[Key, int]]
) -> dict[Value, tuple[int, int]]:
    """Returns the smallest and largest position that each value sees; a join of pieces of different times sees none."""
    span: dict[Value, tuple[int, int]] = {}
    for v in graph.values:
        if v in consumed:
            continue
        if v in tokens:
            span[v] = (tokens[v][1], tokens[v][1])
            continue
        seen = [span[x] for x in v.inputs if x in span]
        if seen and not (_joins(v) and len(set(seen)) >= FEWEST):
            span[v] = (min(s[0] for s in seen), max(s[1] for s in seen))
    return span


def _connected(mixed: list[Value], within: set[Value]) -> list[list[Value]]:
    """Returns the weakly connected parts, each in graph order."""
    parent = {v: v for v in mixed}

    def root(v: Value) -> Value:
        while parent[v] is not v:
            parent[v] = parent[parent[v]]
            v = parent[v]
        return v

    for v in mixed:
        for x in v.inputs:
            if x in within:
                parent[root(v)] = root(x)
    parts: dict[Value, list[Value]] = defaultdict(list)
    for v in mixed:
        parts[root(v)].append(v)
    return list(parts.values())


def _with_feeders(
    members: list[Value], span: dict[Value, tuple[int, int]], mixed: Iterable[Value]
) -> list[Value]:
    seen, todo = set(members), list(members)
    while todo:
        for x in todo.pop().inputs:
            if x in span and x not in mixed and x not in seen:
                seen.add(x)
                todo.append(x)
    return sorted(seen, key=lambda v: v.number)
