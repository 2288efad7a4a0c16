"""The analysis as a whole: what became of every loop over time and every written form in a graph."""

from __future__ import annotations

from spikingbrain.passes.recurrence.chunked import find_chunked
from spikingbrain.passes.recurrence.classify import classify
from spikingbrain.passes.recurrence.constants import Constants
from spikingbrain.passes.recurrence.cumulative import find_cumulative
from spikingbrain.passes.recurrence.form import Loop, Verdict
from spikingbrain.passes.recurrence.graph import Graph
from spikingbrain.passes.recurrence.normalise import normalise
from spikingbrain.passes.recurrence.quadratic import find_quadratic
from spikingbrain.passes.recurrence.reroll import find_loops


def analyse(graph: Graph, forms: bool = False) -> list[Verdict]:
    """Returns a verdict for each loop of a neutral graph as an adapter makes it, then, if asked, for each form without one."""
    normal = normalise(graph)
    loops = [classify(f) if isinstance(f, Loop) else f for f in find_loops(normal)]
    return loops + (find_forms(normal) if forms else [])


def find_forms(graph: Graph) -> list[Verdict]:
    """Returns a verdict for each recurrence of a normalised graph that is written without a loop, or looks like one."""
    constants = Constants()
    chunked = list(find_chunked(graph, constants))
    inside = {v for verdict in chunked for v in verdict.values}
    others = [*find_quadratic(graph, constants), *find_cumulative(graph)]
    return chunked + [v for v in others if inside.isdisjoint(v.values)]
