"""The graphs that AOTAutograd makes of a model for this backend, with what flowed through them in one run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext, tracing

from spikingbrain.frontend.before_autograd import raise_in_dynamo_graph
from spikingbrain.frontend.dynamo import decompositions, plan
from spikingbrain.frontend.dynamo.ops import Verdict
from spikingbrain.frontend.dynamo.options import CompileOptions
from spikingbrain.frontend.dynamo.partition import Region
from spikingbrain.frontend.recurrences.associative import leave_as_written


@dataclass
class Captured:
    """A graph as AOTAutograd gave it; of its first run the arguments, the results and the state of the random numbers."""

    module: fx.GraphModule
    kind: str
    context: TracingContext | None
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    random: torch.Tensor | None = None


@dataclass
class Planned:
    """A captured graph after this backend's rewrites, cut into regions.

    Attributes:
        values: what each node of the graph held, computed by torch.
    """

    graph: fx.Graph
    verdicts: dict[fx.Node, Verdict]
    frozen: set[fx.Node]
    regions: list[Region]
    values: dict[fx.Node, Any]
    outputs: list[Any]


def recorder(found: list[Captured], recurrences: bool = True) -> Callable[..., Any]:
    """Returns a Dynamo backend that compiles nothing and keeps every graph in ``found``, with the values of its first run.

    Without ``recurrences`` they are not raised.
    """

    def compiler(kind: str) -> Callable[..., Any]:
        def take(module: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            copied = fx.GraphModule(module, copy.deepcopy(module.graph))
            entry = Captured(copied, kind, TracingContext.try_get())
            found.append(entry)

            def boxed(arguments: list[Any]) -> Any:
                if entry.random is None:
                    entry.random = torch.get_rng_state()
                    entry.inputs = [_plain(a) for a in arguments]
                results = module.forward(*arguments)
                arguments.clear()
                if not entry.outputs:
                    entry.outputs = [_plain(r) for r in results]
                return results

            boxed._boxed_call = True  # type: ignore[attr-defined]
            return boxed

        return take

    def backend_function(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        if recurrences:
            module, _ = raise_in_dynamo_graph(module, inputs)
        else:
            leave_as_written(module)
        return aot_autograd(
            **decompositions.aot_settings(compiler),
        )(module, inputs)

    return backend_function


def plan_again(captured: Captured, options: CompileOptions, name: str) -> Planned:
    """Cuts a captured graph as the backend does, and runs it in torch."""
    graph = captured.module.graph
    with tracing(captured.context):
        planned = plan.plan(graph, captured.kind, options)
    steps = plan.carry_out(planned, options, name).steps
    captured.module.recompile()
    keeper = _Keeper(captured.module)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if captured.random is not None:
            torch.set_rng_state(captured.random)
        outputs = keeper.run(*[_plain(a) for a in captured.inputs])
    regions = [step for step in steps if isinstance(step, Region)]
    return Planned(graph, planned.verdicts, planned.frozen, regions, keeper.values, list(outputs))


class _Keeper(fx.Interpreter):  # type: ignore[misc]
    def __init__(self, module: fx.GraphModule):
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def _plain(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
