"""Loops that are not affine, as one ``scan`` over a body that is there once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from spikingbrain.frontend.recurrences.emit import NotEmitted, step_graph
from spikingbrain.frontend.recurrences.linear import Steps, item
from spikingbrain.passes.recurrence.graph import Value

aten = torch.ops.aten


def emit_scan(steps: Steps, module: fx.GraphModule, name: str) -> None:
    """Emits the loop as torch's ``scan``; afterwards ``steps`` knows the stacked values and the final ones.

    The body becomes the submodule ``name`` of ``module``. Raises NotEmitted where a step changes the shape or type of what it
    hands on.
    """
    loop, emit = steps.loop, steps.emit
    tokens = list(loop.tokens)
    before = [c.before for c in loop.carried]
    results = [c.after for c in loop.carried] + [s.value for s in loop.stacked]
    body_values = [v for v in loop.body if v not in loop.tokens and v not in before]
    inside = {*tokens, *before, *body_values}
    read = [i for v in [*body_values, *results] for i in [*v.inputs, v]]
    fixed = list(dict.fromkeys(i for i in read if i not in inside and i.op != "module"))
    body = step_graph([*before, *tokens, *fixed], body_values, results)
    _copy_results(body)

    initial = []
    for carry in loop.carried:
        node = emit.value(carry.initial, steps.outside)
        if not carry.after.shape == carry.before.shape == tuple(node.meta["val"].shape):
            raise NotEmitted(
                f"a carried value changes its shape from {carry.before.shape} to {carry.after.shape}"
            )
        if not carry.after.dtype == carry.before.dtype == str(node.meta["val"].dtype).removeprefix("torch."):
            raise NotEmitted(
                f"a carried value changes its type from {carry.before.dtype} to {carry.after.dtype}"
            )
        initial.append(emit.op(aten.clone.default, node, memory_format=torch.contiguous_format))
    sequences = [steps.known[t] for t in tokens]
    if loop.reverse:
        sequences = [emit.op(aten.flip.default, s, [0]) for s in sequences]
    outside = [emit.value(v, steps.outside) for v in fixed]

    call = _call(steps, module, name, body, initial, sequences, outside)
    for i, carry in enumerate(loop.carried):
        steps.finals[carry] = item(emit, call, i)
    for i, stacked in enumerate(loop.stacked, len(loop.carried)):
        node = item(emit, call, i)
        steps.known[stacked.value] = emit.op(aten.flip.default, node, [0]) if loop.reverse else node


def _copy_results(body: fx.GraphModule) -> None:
    """Gives every result of the body memory of its own, laid out like the initial values, which ``scan`` asks for."""
    output = body.graph.output_node()
    dense = {"memory_format": torch.contiguous_format}
    with body.graph.inserting_before(output):
        copies = [body.graph.call_function(aten.clone.default, (n,), dense) for n in output.args[0]]
        output.args = (copies,)
    body.recompile()


def _call(
    steps: Steps,
    module: fx.GraphModule,
    name: str,
    body: fx.GraphModule,
    initial: Sequence[fx.Node],
    sequences: Sequence[fx.Node],
    outside: Sequence[fx.Node],
) -> fx.Node:
    emit, count = steps.emit, steps.loop.steps
    module.add_submodule(name, body)
    attribute = emit.graph.get_attr(name)
    call = emit.graph.call_function(
        torch.ops.higher_order.scan, (attribute, list(initial), list(sequences), list(outside))
    )
    with emit.faking():
        slices = [n.meta["val"].select(0, 0) for n in sequences]
        values = body(*[n.meta["val"] for n in initial], *slices, *[n.meta["val"] for n in outside])
        carried, stacked = values[: len(initial)], values[len(initial) :]
        call.meta["val"] = (*carried, *(y.new_empty([count, *y.shape]) for y in stacked))
    if emit.trace:
        call.meta["stack_trace"] = emit.trace
    return call


def size_of(values: Sequence[Value]) -> int:
    """Returns how many nodes of the graph a loop is made of."""
    return sum(len(v.origin) for v in values)
