"""What becomes of each op of a graph: the rewrites, the verdicts, and the cut into regions that compile."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx
from torch._guards import TracingContext

from spikingbrain.errors import CompileError, PassFailed
from spikingbrain.frontend.choices import compare_with_choices, sort_choices
from spikingbrain.frontend.dynamo import rewrites
from spikingbrain.frontend.dynamo.constant_scatters import fuse_constant_scatters
from spikingbrain.frontend.dynamo.lowering import Compiled, compile_regions, culprit
from spikingbrain.frontend.dynamo.ops import Kind, Verdict, classify, packet_name
from spikingbrain.frontend.dynamo.options import CompileOptions
from spikingbrain.frontend.dynamo.partition import SMALLEST, Region, Step, partition
from spikingbrain.frontend.dynamo.region import RegionGraph, build
from spikingbrain.frontend.grouped_mm import read_weights_in_place
from spikingbrain.frontend.without_elements import fold_tensors_without_elements


@dataclass
class Plan:
    """A graph after the rewrites.

    Attributes:
        verdicts: for each ``call_function`` node what becomes of it.
        frozen: inputs whose values change so rarely that their packed form is kept.
    """

    graph: fx.Graph
    verdicts: dict[fx.Node, Verdict]
    frozen: set[fx.Node]


@dataclass
class Compilation:
    """A plan carried out: the steps in order, each region as a graph of its own (by the step's id), code by region key."""

    steps: list[Step]
    regions: dict[int, RegionGraph]
    code: dict[str, Compiled]


def plan(graph: fx.Graph, kind: str, options: CompileOptions) -> Plan:
    """Rewrites the graph in place and decides about each op."""
    frozen = _frozen_inputs(graph) if kind == "inference" and options.level > 1 else set()
    rewrites.gather_results(graph)
    rewrites.lift_sizes(graph)
    fold_tensors_without_elements(graph)
    rewrites.drop_noop_copies(graph)
    fuse_constant_scatters(graph, indices_are_checked=kind == "backward")
    sort_choices(graph)
    compare_with_choices(graph)
    read_weights_in_place(graph)
    packed = rewrites.raise_linears(graph, frozen) + rewrites.frozen_experts(graph, frozen)
    verdicts = {n: classify(n, options.library) for n in graph.nodes if n.op == "call_function"}
    verdicts.update({n: Verdict(Kind.COMPILED) for n in packed if verdicts[n].kind is Kind.LIBRARY})
    if options.level == 0:
        off = Verdict(Kind.LIBRARY, "level 0 compiles nothing")
        verdicts = {n: off if v.kind is Kind.COMPILED else v for n, v in verdicts.items()}
    return Plan(graph, verdicts, frozen)


def carry_out(plan: Plan, options: CompileOptions, name: str) -> Compilation:
    """Partitions and compiles; ops that turn out not to lower become eager in the plan, and it is tried again."""
    while True:
        steps = partition(plan.graph, plan.verdicts, SMALLEST if options.library else 1)
        regions = {id(s): build(s, plan.verdicts, plan.frozen) for s in steps if isinstance(s, Region)}
        code, failures = compile_regions(list(regions.values()), options, name)
        if not failures:
            return Compilation(steps, regions, code)
        for step in steps:
            if isinstance(step, Region) and (error := failures.get(regions[id(step)].key)):
                _blame(step, error, plan.verdicts)


def _frozen_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Returns the placeholders that are parameters or buffers of modules, by Dynamo's word."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context else None
    placeholders = graph.find_nodes(op="placeholder")
    static = set(metadata.static_input_indices) if metadata else set()
    return {n for i, n in enumerate(placeholders) if i in static}


def _blame(region: Region, error: CompileError, verdicts: dict[fx.Node, Verdict]) -> None:
    """Marks the op that a failure names as eager, or the whole region where it names none of them."""
    named = culprit(error)
    blamed = [n for n in region.nodes if packet_name(n.target) == named] or region.nodes
    reason = f"{error.what}: {error.why}".strip(": ").splitlines()[0]
    for node in blamed:
        verdicts[node] = Verdict(Kind.EAGER, reason, error.hint, isinstance(error, PassFailed))
        for user in node.users:
            if user.target is operator.getitem:
                verdicts[user] = verdicts[node]
