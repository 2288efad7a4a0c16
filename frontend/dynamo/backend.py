"""``torch.compile(model, backend="spikingbrain")``: from Dynamo's graph to a callable, through AOTAutograd.

Training graphs are partitioned after AOTAutograd, forward and backward each on its own; what cannot be compiled is run by torch,
op by op, with the same numbers as without this backend.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch._dynamo.backends.common import aot_autograd

from spikingbrain import workers
from spikingbrain.finite import WatchedLayer
from spikingbrain.frontend.before_autograd import raise_in_dynamo_graph
from spikingbrain.frontend.dynamo import aot_cache, decompositions, on_device, report
from spikingbrain.frontend.dynamo.ops import Kind, Verdict
from spikingbrain.frontend.dynamo.options import CompileOptions, parse
from spikingbrain.frontend.dynamo.partition import Region, Step
from spikingbrain.frontend.dynamo.plan import Plan, carry_out, plan
from spikingbrain.frontend.dynamo.program import GraphProgram, assemble
from spikingbrain.frontend.ops.substitutions import register_for_dynamo
from spikingbrain.frontend.recurrences.associative import leave_as_written
from spikingbrain.frontend.spikes.finite import checked

_numbers = itertools.count()
register_for_dynamo()  # before the first model is traced: torch looks for this module when it is asked for the backend


def spikingbrain(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend, as Dynamo calls it; see ``CompileOptions`` for the options."""
    chosen = parse(options, mode)
    watched: list[WatchedLayer] = []
    if chosen.level:
        workers.prewarm()  # it imports while AOTAutograd traces
        module, found = raise_in_dynamo_graph(
            module,
            example_inputs,
            chosen.check_finite,
            on_device.refusal(chosen.target, chosen.providers, "window_attention"),
        )
        report.publish_found(found)
        watched = found.watched
    else:
        leave_as_written(module)

    def compiler(kind: str) -> Callable[..., Any]:
        return aot_cache.cacheable(lambda graph: compile_graph(graph, kind, chosen))

    with aot_cache.enabled(module, chosen):
        made: Any = aot_autograd(
            **decompositions.aot_settings(
                compiler,
                apart=on_device.kernels_of(chosen.target, chosen.providers) is None,
                library=chosen.library,
            ),
        )(module, example_inputs)
    # torch copies this mark from our compiled graph onto its wrapper, which takes plain arguments; the minifier believes it
    made._boxed_call = False
    return checked(made, watched) if watched else made


def compile_graph(
    module: fx.GraphModule, kind: str, options: CompileOptions
) -> tuple[GraphProgram, report.GraphReport]:
    """Returns the compiled graph, and what was compiled of it and what was not."""
    name = f"graph{next(_numbers)}"
    kernels = on_device.kernels_of(options.target, options.providers)
    if kernels is None:
        planned = plan(module.graph, kind, options)
    else:
        planned = Plan(module.graph, on_device.verdicts(module.graph, kernels), set())
    done = carry_out(planned, options, name)
    made = report.GraphReport(name, kind, _reports(done.steps, planned.verdicts))
    report.publish(made)
    if options.strict:
        report.refuse(made)
    program = assemble(module, done)
    if options.tuning and kernels is not None and kernels.using is not None:
        program.within = functools.partial(kernels.using, options.tuning)
    return program, made


def _reports(steps: Sequence[Step], verdicts: Mapping[fx.Node, Verdict]) -> list[report.RegionReport]:
    found: list[report.RegionReport] = []
    status = {Kind.KERNEL: "compiled", Kind.LIBRARY: "library", Kind.EAGER: "eager", Kind.COMPILED: "library"}
    for verdict, group in itertools.groupby(steps, lambda s: None if isinstance(s, Region) else verdicts[s]):
        if verdict is None:
            found += [report.describe("compiled", step.nodes) for step in group if isinstance(step, Region)]
        elif verdict.kind in status:
            few = "too few ops in a row to gain from being compiled" if verdict.kind is Kind.COMPILED else ""
            nodes = [step for step in group if not isinstance(step, Region)]
            reason = verdict.reason or few
            found.append(report.describe(status[verdict.kind], nodes, reason, verdict.remedy, verdict.failed))
    return found
