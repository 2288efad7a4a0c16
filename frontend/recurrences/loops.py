"""Loops that are not affine, as one ``scan`` over a body that is there once.

What a step computes of its tokens alone by more than elementwise ops, such as a linear layer, is computed for all steps at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import fx

from spikingbrain.frontend.recurrences.emit import NotEmitted, step_graph
from spikingbrain.frontend.recurrences.linear import Steps, item
from spikingbrain.passes.recurrence.classify import ELEMENTWISE
from spikingbrain.passes.recurrence.form import Loop
from spikingbrain.passes.recurrence.graph import Value

aten = torch.ops.aten


def emit_scan(steps: Steps, module: fx.GraphModule, name: str) -> None:
    """Emits the loop as torch's ``scan``; afterwards ``steps`` knows the stacked values and the final ones.

    The body becomes the submodule ``name`` of ``module``. Raises NotEmitted where a step changes the shape or type of what it
    hands on.
    """
    loop, emit = steps.loop, steps.emit
    before = [c.before for c in loop.carried]
    results = [c.after for c in loop.carried] + [s.value for s in loop.stacked]
    ahead = _compute_ahead(steps, before, results)
    needed = _needed(results, {*loop.tokens, *ahead}, loop)
    tokens = [v for v in (*loop.tokens, *ahead) if v in needed] or list(loop.tokens)
    body_values = [v for v in loop.body if v in needed and v not in tokens and v not in before]
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


def _compute_ahead(steps: Steps, before: Sequence[Value], results: Sequence[Value]) -> list[Value]:
    """Computes for all steps at once what needs no state and is not elementwise, as far as it changes; returns its values."""
    loop = steps.loop
    moving = set(before)
    for v in loop.body:
        if any(i in moving for i in v.inputs):
            moving.add(v)
    heavy = [v for v in loop.body if not (v in moving or v in loop.tokens or v.op in ELEMENTWISE)]
    changing = [v for v in heavy if steps.emit.varies(v, loop, steps.known)]
    needed = _needed(results, {*loop.tokens, *changing}, loop)
    ahead = [v for v in changing if v in needed]
    try:
        steps.known.update(zip(ahead, steps.values(ahead), strict=True))
    except NotEmitted:
        return []
    return ahead


def _needed(results: Sequence[Value], given: Collection[Value], loop: Loop) -> set[Value]:
    """Returns the body's values that ``results`` take, down to those given."""
    body, seen, todo = set(loop.body), set(), list(results)
    while todo:
        v = todo.pop()
        if v in body and v not in seen:
            seen.add(v)
            todo += () if v in given else v.inputs
    return seen


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
