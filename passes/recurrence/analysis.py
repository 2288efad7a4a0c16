"""The analysis as a whole: what became of every loop over time and every written form in a graph."""

from __future__ import annotations

from spikingbrain.passes.recurrence.classify import classify
from spikingbrain.passes.recurrence.form import Loop, Verdict
from spikingbrain.passes.recurrence.graph import Graph
from spikingbrain.passes.recurrence.normalise import normalise
from spikingbrain.passes.recurrence.reroll import find_loops


def analyse(graph: Graph) -> list[Verdict]:
    """Returns a verdict for each loop of a neutral graph as an adapter makes it."""
    found = find_loops(normalise(graph))
    return [classify(f) if isinstance(f, Loop) else f for f in found]
