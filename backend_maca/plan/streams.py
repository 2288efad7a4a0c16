"""Gives the steps of a plan streams, so that what does not depend on each other may run at the same time.

Two steps depend on each other where both touch a buffer that one of them writes: the later one then waits, be it to read
what was written, or to overwrite what is read. A loop or a branch waits for all before it, and all after it for the loop.

The longest chain of launches stays on the caller's stream. Beside it, chain by chain, the longest first, launches go to
another stream where that shortens a call by a launch at least, by a model and not by measurement: a launch takes one
unit of time, to wait for another stream half a unit. Launches that move much memory share its bandwidth, so that what
two streams hide is how one starts and ends. Launches that some sizes skip count as nothing, and stay.

So do calls of the matrix library: what it shares among streams is not documented.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import networkx as nx

from spikingbrain.backend_maca.plan.conditions import ALWAYS
from spikingbrain.backend_maca.plan.unread import buffers_of, runs_when, written_by

if TYPE_CHECKING:
    from spikingbrain.backend_maca.source.printer import Kernel

WAIT = 0.5  # of a launch's time: an estimate
GAIN = 1.0  # launches that a chain has to save to have a stream of its own

Access = tuple[set[int], set[int]]  # what a step touches, and what of that it writes


def use_streams(plan: Mapping[str, Any], kernels: Mapping[str, Kernel], most: int) -> None:
    """Gives the steps of a plan up to ``most`` streams: ``"stream"`` where it is not 0, and ``"after"``, the steps of other
    streams that one waits for. Entry points in which the host reads data to go on stay on one."""
    by_name = {k.name: k for k in kernels.values()}
    for entry in plan["entries"].values():
        if entry["static"]:
            steps = entry["launches"]
            graph = _graph(steps, by_name)
            streams = _assign(graph, most)
            for number, after in _waits(graph, streams).items():
                steps[number].update({"stream": streams[number]} if streams[number] else {})
                steps[number].update({"after": after} if after else {})


def dependencies(accesses: Mapping[int, Access | None]) -> nx.DiGraph:
    """Returns which steps wait for which, given what they touch in their order; None waits for all, and all for it."""
    graph = nx.DiGraph()
    written: dict[int, int] = {}  # buffer -> the step that wrote it last
    read: dict[int, set[int]] = {}  # buffer -> the steps that have read it since
    barrier: set[int] = set()
    for step, access in accesses.items():
        before = set(barrier)
        if access is None:
            before |= {other for other in graph if not graph.succ[other]}
            written, read, barrier = {}, {}, {step}
        else:
            touched, writes = access
            before |= {written[b] for b in touched if b in written}
            for buffer in writes:
                before |= read.pop(buffer, set())
                written[buffer] = step
            for buffer in touched - writes:
                read.setdefault(buffer, set()).add(step)
        graph.add_node(step)
        graph.add_edges_from((other, step) for other in before - {step})
    return graph


def longest(graph: nx.DiGraph) -> list[int]:
    """Returns the chain of steps that wait for each other and count as the most launches, one each unless told."""
    ends: dict[int | None, int] = {None: 0}  # launches up to a step
    before: dict[int, int | None] = {}
    for step in graph:
        before[step] = max(graph.pred[step], key=ends.__getitem__, default=None)
        ends[step] = ends[before[step]] + graph.nodes[step].get("launches", 1)
    path: list[int] = []
    at: int | None = max(graph, key=ends.__getitem__, default=None)
    while at is not None:
        path.append(at)
        at = before[at]
    return path[::-1]


def _graph(steps: Sequence[Mapping[str, Any]], kernels: Mapping[str, Kernel]) -> nx.DiGraph:
    """Returns the dependencies of the steps that do something on the device, and how many launches each counts as."""
    accesses: dict[int, Access | None] = {}
    counted = {}
    for number, step in enumerate(steps):
        if "kernel" in step or "library" in step:
            accesses[number] = set(buffers_of(step)), written_by(step, kernels)
            counted[number] = int(runs_when(step) == ALWAYS)
        elif "set" not in step and "check" not in step:
            accesses[number], counted[number] = None, 1
    graph = dependencies(accesses)
    nx.set_node_attributes(graph, counted, "launches")
    moves = {n: "kernel" in steps[n] and counted[n] > 0 for n in graph}
    nx.set_node_attributes(graph, moves, "moves")
    return graph


def _assign(graph: nx.DiGraph, most: int) -> dict[int, int]:
    """Returns the stream of each step."""
    streams = dict.fromkeys(graph, 0)
    best = _time(graph, streams)
    rest = graph.copy()
    rest.remove_nodes_from([*longest(graph), *(n for n in graph if not graph.nodes[n]["moves"])])
    while rest:
        part = longest(rest)
        rest.remove_nodes_from(part)
        for stream in range(1, most):
            moved = streams | dict.fromkeys(part, stream)
            time = _time(graph, moved)
            if time <= best - GAIN:
                streams, best = moved, time
                break
    return streams


def _time(graph: nx.DiGraph, streams: Mapping[int, int]) -> float:
    """Returns how long the steps take on these streams, in launches."""
    ends: dict[int, float] = {}
    free: dict[int, float] = {}  # when a stream has done what it has so far
    for step in graph:
        own = streams[step]
        waits = [ends[p] + WAIT for p in graph.pred[step] if streams[p] != own]
        ends[step] = free[own] = max([free.get(own, 0.0), *waits]) + graph.nodes[step]["launches"]
    return max((end + WAIT * bool(stream) for stream, end in free.items()), default=0.0)


def _waits(graph: nx.DiGraph, streams: Mapping[int, int]) -> dict[int, list[int]]:
    """Returns for each step the steps of other streams that it has to wait for, and no more than it has to."""
    whole = graph.copy()
    last: dict[int, int] = {}
    for step in graph:
        if streams[step] in last:
            whole.add_edge(last[streams[step]], step)
        last[streams[step]] = step
    reduced = nx.transitive_reduction(whole)
    return {n: sorted(p for p in reduced.pred[n] if streams[p] != streams[n]) for n in graph}
