"""``torch.compile(model, backend="spikingbrain")``: from Dynamo's graph to a callable, through AOTAutograd.

Training graphs are partitioned after AOTAutograd, forward and backward each on its own; what cannot be compiled is run by torch,
op by op, with the same numbers as without this backend.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext

from spikingbrain import workers
from spikingbrain.errors import CompileError
from spikingbrain.frontend.dynamo import aot_cache, decompositions, report, rewrites
from spikingbrain.frontend.dynamo.lowering import Compiled, compile_regions, culprit
from spikingbrain.frontend.dynamo.ops import Kind, Verdict, classify, packet_name
from spikingbrain.frontend.dynamo.options import CompileOptions, parse
from spikingbrain.frontend.dynamo.partition import SMALLEST, Region, Step, partition
from spikingbrain.frontend.dynamo.program import GraphProgram, assemble
from spikingbrain.frontend.dynamo.region import RegionGraph, build

_numbers = itertools.count()


def spikingbrain(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend, as Dynamo calls it; see ``CompileOptions`` for the options."""
    chosen = parse(options, mode)
    if chosen.level:
        workers.prewarm()  # it imports while AOTAutograd traces

    def compiler(kind: str) -> Callable[..., Any]:
        return aot_cache.cacheable(lambda graph: compile_graph(graph, kind, chosen))

    with aot_cache.enabled(module, chosen):
        return aot_autograd(
            fw_compiler=compiler("forward"),
            bw_compiler=compiler("backward"),
            inference_compiler=compiler("inference"),
            decompositions=decompositions.table(),
            partition_fn=min_cut_rematerialization_partition,
        )(module, example_inputs)


def compile_graph(
    module: fx.GraphModule, kind: str, options: CompileOptions
) -> tuple[GraphProgram, report.GraphReport]:
    """Returns the compiled graph, and what was compiled of it and what was not."""
    name = f"graph{next(_numbers)}"
    graph = module.graph
    frozen = _frozen_inputs(graph) if kind == "inference" and options.level > 1 else set()
    rewrites.gather_results(graph)
    rewrites.lift_sizes(graph)
    rewrites.drop_noop_copies(graph)
    rewrites.fuse_constant_scatters(graph)
    raised = rewrites.raise_linears(graph, frozen)
    verdicts = {n: classify(n, options.library) for n in graph.nodes if n.op == "call_function"}
    verdicts.update(dict.fromkeys(raised, Verdict(Kind.COMPILED)))
    if options.level == 0:
        off = Verdict(Kind.LIBRARY, "level 0 compiles nothing")
        verdicts = {n: off if v.kind is Kind.COMPILED else v for n, v in verdicts.items()}
    steps, regions, code = _compile(graph, verdicts, frozen, options, name)
    made = report.GraphReport(name, kind, _reports(steps, verdicts))
    report.publish(made)
    if options.strict:
        report.refuse(made)
    return assemble(module, steps, regions, code), made


def _frozen_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Returns the placeholders that are parameters or buffers of modules, by Dynamo's word."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context else None
    placeholders = graph.find_nodes(op="placeholder")
    static = set(metadata.static_input_indices) if metadata else set()
    return {n for i, n in enumerate(placeholders) if i in static}


def _compile(
    graph: fx.Graph,
    verdicts: dict[fx.Node, Verdict],
    frozen: set[fx.Node],
    options: CompileOptions,
    name: str,
) -> tuple[list[Step], dict[int, RegionGraph], dict[str, Compiled]]:
    """Partitions and compiles; ops that turn out not to lower are marked as eager in ``verdicts``, and it is tried again."""
    while True:
        steps = partition(graph, verdicts, SMALLEST if options.library else 1)
        regions = {id(s): build(s, verdicts, frozen) for s in steps if isinstance(s, Region)}
        code, failures = compile_regions(list(regions.values()), options, name)
        if not failures:
            return steps, regions, code
        for step in steps:
            if isinstance(step, Region) and (error := failures.get(regions[id(step)].key)):
                _blame(step, error, verdicts)


def _blame(region: Region, error: CompileError, verdicts: dict[fx.Node, Verdict]) -> None:
    """Marks the op that a failure names as eager, or the whole region where it names none of them."""
    named = culprit(error)
    blamed = [n for n in region.nodes if packet_name(n.target) == named] or region.nodes
    reason = f"{error.what}: {error.why}".strip(": ").splitlines()[0]
    for node in blamed:
        verdicts[node] = Verdict(Kind.EAGER, reason, error.hint)
        for user in node.users:
            if user.target is operator.getitem:
                verdicts[user] = verdicts[node]


def _reports(steps: Sequence[Step], verdicts: Mapping[fx.Node, Verdict]) -> list[report.RegionReport]:
    found: list[report.RegionReport] = []
    status = {Kind.LIBRARY: "library", Kind.EAGER: "eager", Kind.COMPILED: "library"}
    for (kind, reason, remedy), group in itertools.groupby(steps, lambda s: _group(s, verdicts)):
        for step in group if kind is None else [list(group)]:
            if isinstance(step, Region):
                found.append(report.describe("compiled", step.nodes))
            elif kind in status:
                found.append(report.describe(status[kind], step, reason, remedy))
    return found


def _group(step: Step, verdicts: Mapping[fx.Node, Verdict]) -> tuple[Kind | None, str, str]:
    if isinstance(step, Region):
        return None, "", ""
    verdict = verdicts[step]
    if verdict.kind is Kind.COMPILED:
        return Kind.COMPILED, "too few ops in a row to gain from being compiled", ""
    return verdict.kind, verdict.reason, verdict.remedy
