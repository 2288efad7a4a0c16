"""Makes a failing model small.

    python tests/fuzz/minimise.py --seed 17 --backend spikingbrain --out tests/fuzz/found/name.py

Every value of the model is recorded in eager. A smaller model is a choice of values to return and of values to put in as inputs
instead of computing them; what nothing depends on is gone. It is kept if it fails in the same way.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import compare
import generate
import isolate
import run
import script
import torch
from compare import Outcome
from torch import fx

Fails = Callable[[fx.GraphModule, list[torch.Tensor]], bool]


def minimise(
    graph: fx.GraphModule, inputs: list[torch.Tensor], fails: Fails
) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """Returns the smallest graph found for which ``fails`` holds, and its inputs."""
    recorded = _Record(graph)
    recorded.run(*[each.clone() for each in inputs])
    nodes = list(graph.graph.nodes)
    values = recorded.values | dict(
        zip(nodes, inputs, strict=False)
    )  # placeholders as they were before the run

    def holds(part: _Part) -> bool:
        return fails(*part.build(values))

    returned = list(dict.fromkeys(nodes[-1].args[0]))
    written = [node for node in nodes if node in values and node.is_impure() and node.op == "call_function"]
    part = _Part(tuple(dict.fromkeys([*returned, *written])), frozenset())
    if not holds(part):
        part = _Part(tuple(returned), frozenset())

    part = _fewer_outputs(part, values, holds)
    part = _more_inputs(part, values, holds)
    part = _fewer_outputs(part, values, holds)
    return _plainer_inputs(*part.build(values), fails)


class _Record(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, node: fx.Node) -> Any:
        out = super().run_node(node)
        if isinstance(out, torch.Tensor):
            self.values[node] = out.detach().clone()  # later ops may write to it
        return out


@dataclass(frozen=True)
class _Part:
    """Part of a graph: what it returns, and which nodes are inputs in place of what computed them."""

    outputs: tuple[fx.Node, ...]
    cut: frozenset[fx.Node]

    def nodes(self) -> list[fx.Node]:
        """Those that are computed or put in, in order."""
        needed, stack = set(), list(self.outputs)
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack += [] if node in self.cut else node.all_input_nodes
        return [node for node in self.outputs[0].graph.nodes if node in needed]

    def computed(self) -> list[fx.Node]:
        return [node for node in self.nodes() if node.op == "call_function" and node not in self.cut]

    def build(self, values: dict[fx.Node, torch.Tensor]) -> tuple[fx.GraphModule, list[torch.Tensor]]:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        nodes = self.nodes()
        given = [node for node in nodes if node.op == "placeholder" or node in self.cut]
        for i, node in enumerate(given):
            copies[node] = graph.placeholder(f"x{i}")
        for node in nodes:
            if node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in self.outputs))
        return fx.GraphModule(torch.nn.Module(), graph), [values[node] for node in given]


def _fewer_outputs(part: _Part, values: dict[fx.Node, torch.Tensor], holds: Callable[[_Part], bool]) -> _Part:
    """One value if one will do, the earliest that fails; else without those that are not needed."""
    if len(part.computed()) <= 1:
        return part
    for node in part.computed():
        if node in values and (node,) != part.outputs and holds(smaller := _Part((node,), part.cut)):
            return smaller
    for node in part.outputs:
        rest = tuple(each for each in part.outputs if each != node)
        if rest and holds(smaller := _Part(rest, part.cut)):
            part = smaller
    return part


def _more_inputs(part: _Part, values: dict[fx.Node, torch.Tensor], holds: Callable[[_Part], bool]) -> _Part:
    """Delta debugging: cuts half of the nodes, then quarters, down to single ones."""
    size = len(part.computed())
    while size:
        candidates = [node for node in part.computed() if node in values and node not in part.outputs]
        for start in range(0, len(candidates), size):
            smaller = _Part(part.outputs, part.cut | frozenset(candidates[start : start + size]))
            if len(smaller.computed()) < len(part.computed()) and holds(smaller):
                part = smaller
        size //= 2
    return part


def _plainer_inputs(
    graph: fx.GraphModule, inputs: list[torch.Tensor], fails: Fails
) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """Values drawn by a seed, where it fails with them too, are shorter to write than recorded ones."""
    for i, value in enumerate(inputs):
        drawn = script.uniform(value.shape, value.dtype)
        if fails(graph, plainer := [*inputs[:i], drawn, *inputs[i + 1 :]]):
            inputs = plainer
    return graph, inputs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, required=True)
    run.common(parser)
    parser.add_argument("--out", type=Path, help="file to write; without, the model is printed")
    options = parser.parse_args()
    compiler = run.prepare(options)

    def outcome(subject: tuple[fx.GraphModule, list[torch.Tensor], bool]) -> Outcome:
        torch.set_num_threads(1)
        return compare.check(subject[0], subject[1], compiler, subject[2])

    def tried(graph: fx.GraphModule, inputs: list[torch.Tensor], training: bool) -> Outcome:
        return isolate.run_one(outcome, (graph, inputs, training), options.timeout)

    model = generate.make(options.seed, options.nodes)
    for training in run.MODES:
        first = tried(model.graph, model.inputs, training)
        if first.kind in run.FAILURES:
            break
    else:
        sys.exit(f"seed {options.seed} does not fail: {first.kind}")

    def fails(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> bool:
        return _same(tried(graph, inputs, training), first)

    graph, inputs = minimise(model.graph, model.inputs, fails)
    last = tried(graph, inputs, training)
    text = script.text(
        graph, inputs, f"{last.kind}: {last.detail}", options.backend, options.options, training
    )
    if options.out:
        options.out.write_text(text)
    print(graph.code if options.out else text)
    print(f"{_calls(model.graph)} calls, minimised to {_calls(graph)}: {last.kind}: {last.detail}")


def _same(one: Outcome, other: Outcome) -> bool:
    """An error must be the same kind of exception: most ways to break a graph raise one."""
    return one.kind == other.kind and (
        one.kind != "error" or one.detail.split(":")[0] == other.detail.split(":")[0]
    )


def _calls(graph: fx.GraphModule) -> int:
    return sum(node.op == "call_function" for node in graph.graph.nodes)


if __name__ == "__main__":
    main()
