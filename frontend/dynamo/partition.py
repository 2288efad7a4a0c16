"""Cuts a graph into regions that are compiled and ops that torch runs.

One walk in the graph's own order, which AOTAutograd chose with memory in mind. Compiled ops collect in an open region. An op that
torch runs closes the region if it reads from it, and is run before the region if it does not; so a region goes on past ops that
it has nothing to do with. Views belong to nobody: each reader takes its own copy of the chain, so that whole tensors cross
between regions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import fx

from spikingbrain.frontend.dynamo.ops import OURS, Kind, Verdict, packet_name

# A region of fewer ops than this costs more to enter than fusing it saves; a projection or a recurrence is worth it.
SMALLEST = 3
_WORTH = {"linear", "scan", *OURS}
_FREE = {"empty", "full", "scalar_tensor", "arange", "zeros", "ones", "clone", "lift_fresh_copy", "getitem"}


@dataclass
class Region:
    """Ops that are compiled together, in order; views among them are copies for this region's use."""

    nodes: list[fx.Node] = field(default_factory=list)

    def weight(self) -> int:
        """Returns how many of its ops compute something."""
        return sum(packet_name(n.target) not in _FREE for n in self.nodes)


Step: TypeAlias = Region | fx.Node


def partition(graph: fx.Graph, verdicts: Mapping[fx.Node, Verdict], smallest: int = SMALLEST) -> list[Step]:
    """Returns what to run in order: regions, and nodes that torch or Python runs.

    ``verdicts`` holds every ``call_function`` node. A node with several results (split) is a view of its source.
    """
    steps: list[Step] = []
    region = Region()
    inside: set[fx.Node] = set()

    def close() -> None:
        nonlocal region
        if region.nodes:
            worth = region.weight() >= smallest or any(packet_name(n.target) in _WORTH for n in region.nodes)
            steps.extend([region] if worth else region.nodes)
        region = Region()
        inside.clear()

    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        kind = verdicts[node].kind
        if kind is Kind.VIEW:
            continue
        if kind is Kind.COMPILED:
            region.nodes.append(node)
            inside.add(node)
            continue
        if any(source in inside for source in sources(node, verdicts)):
            close()
        steps.append(node)
    close()
    return steps


def sources(node: fx.Node, verdicts: Mapping[fx.Node, Verdict]) -> Iterator[fx.Node]:
    """Yields what a node reads, looking through views."""
    for source in node.all_input_nodes:
        if source in verdicts and verdicts[source].kind is Kind.VIEW:
            yield from sources(source, verdicts)
        else:
            yield source
