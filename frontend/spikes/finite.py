"""The debug mode ``check_finite`` in a graph: spiking layers' inputs are looked at, and what is seen is returned besides.

Nothing is raised while the graph runs, so that it is compiled as without the mode; whoever calls it raises (`core.finite`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from spikingbrain.finite import INFINITY, NAN, WatchedLayer, require_finite
from spikingbrain.frontend.checks import user_line
from spikingbrain.frontend.recurrences.emit import Emitter

aten = torch.ops.aten


class Watch:
    """Collects the states of one graph's inputs; layers that read the same input share one.

    ``behind``: how many of the graph's results, its last, come after the states.
    """

    def __init__(self, behind: int = 0) -> None:
        self.behind = behind
        self.states: list[fx.Node] = []
        self._layers: dict[tuple[fx.Node, int], dict[str, str]] = {}
        self._state_of: dict[fx.Node, dict[str, str]] = {}

    @property
    def layers(self) -> list[WatchedLayer]:
        """Returns what ``states`` are of."""
        return [
            WatchedLayer(", ".join(filter(None, found)), next(iter(found.values())))
            for found in map(self._state_of.__getitem__, self.states)
        ]

    def add(self, emit: Emitter, x: fx.Node, axis: int, counts: fx.Node) -> None:
        """Emits the state of each row of ``x``, whose channels lie along ``axis`` and become ``counts``: int32, 0 for finite."""
        found = self._layers.setdefault((x, axis), {})
        if not found:
            emit.trace = counts.meta.get("stack_trace")
            with emit.graph.inserting_before(counts):
                nan = _any(emit, emit.op(aten.ne.Tensor, x, x), axis, NAN)
                size = emit.op(aten.abs.default, x)
                infinite = _any(emit, emit.op(aten.eq.Scalar, size, math.inf), axis, INFINITY)
                state = emit.op(aten.add.Tensor, nan, infinite)
            self.states.append(state)
            self._state_of[state] = found
        found.setdefault(module_path(counts), str(user_line(counts) or ""))

    def append_to(self, graph: fx.Graph) -> None:
        """Lets a graph return the states, in the order of the program."""
        output = graph.output_node()
        place_of = {node: i for i, node in enumerate(graph.nodes)}
        self.states.sort(key=place_of.__getitem__)
        results = list(output.args[0])
        place = len(results) - self.behind
        output.args = ((*results[:place], *self.states, *results[place:]),)


def _any(emit: Emitter, flags: fx.Node, axis: int, bit: int) -> fx.Node:
    found = emit.op(aten._to_copy.default, emit.op(aten.any.dim, flags, axis), dtype=torch.int32)
    return emit.op(aten.mul.Tensor, found, bit)


def module_path(node: fx.Node) -> str:
    """Returns the path of the innermost module that a node was traced in, without the name of the whole."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return re.sub(r"^(L\['\w+'\]|model)(\.|$)", "", path)


def checked(made: Callable[..., Any], layers: Sequence[WatchedLayer]) -> Callable[..., Any]:
    """Returns a compiled graph that keeps its last results, the states of ``layers``, to itself, and raises NotFinite by them."""

    def run(*args: Any) -> Any:
        results = made(*args)
        require_finite(layers, [state.cpu().numpy() for state in results[-len(layers) :]])
        return results[: -len(layers)]

    return run
