"""Runs a form compiled and in eager: results and gradients must agree; says what became of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from written import Form

import spikingbrain
from spikingbrain.frontend.dynamo import report

sys.path.append(str(Path(__file__).parents[1]))
from tolerances import assert_close

# A gradient that cancels is measured against this; inputs are of size one.
LEAST_GRADIENT = 1.0

OPTIONS = {"threads": 1}

LOOPS = {"pointwise_scan": "pointwise", "time_loop": "loop"}


def check(
    form: Form,
    length: int | None = None,
    extreme: bool = False,
    backend: str | Callable[..., Any] = "spikingbrain",
) -> list[dict[str, Any]]:
    """Raises AssertionError unless ``torch.compile`` gives eager's results, final states and gradients.

    Nor may the compiler fail, after which torch would give the right numbers. Returns what became of the form's
    recurrences, as ``explain`` tells it.
    """
    torch._dynamo.reset()
    inputs = form.example(length, extreme=extreme)
    module = form.module()
    options = OPTIONS if backend == "spikingbrain" else {}
    compiled = torch.compile(form.module(), backend=backend, options=options or None, dynamic=False)
    expected = results(form, module, inputs)
    with report.collect() as graphs, report.collect_found() as found:
        actual = results(form, compiled, inputs)
    failures = [f"{r.where}: {r.reason}" for graph in graphs for r in graph.regions if r.failed]
    assert not failures, f"{form.name}: {failures}"
    assert expected.keys() == actual.keys(), f"{form.name}: {list(actual)} instead of {list(expected)}"
    for what, wanted in expected.items():
        assert_close(
            actual[what], wanted, f"{form.name}: {what}", LEAST_GRADIENT if what.startswith("gradient") else 0
        )
    return [r.to_dict() for r in found.recurrences]


def results(form: Form, module: Callable[..., Any], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns the module's results and the gradients of inputs and parameters, by name.

    Each result counts with random weights, so that no gradient is the same everywhere.
    """
    if not form.gradients:
        with torch.no_grad():
            return named("result", module(*inputs))
    given = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    found = named("result", module(*given))
    generator = torch.Generator().manual_seed(2)
    loss = torch.zeros((), dtype=torch.float64)
    for result in found.values():
        weights = torch.randn(result.shape, generator=generator, dtype=torch.float64)
        loss = loss + (result.double() * weights).sum()
    loss.backward()
    gradients = {f"gradient of {n}": x.grad for n, x in zip(form.time_axes(), given, strict=True)}
    parameters = getattr(module, "_orig_mod", module)
    assert isinstance(parameters, nn.Module)
    gradients |= {f"gradient of {n}": p.grad for n, p in parameters.named_parameters()}
    return {n: r.detach() for n, r in found.items()} | {n: g for n, g in gradients.items() if g is not None}


def named(what: str, values: Any) -> dict[str, Tensor]:
    return {f"{what} {i}": x for i, x in enumerate(pytree.tree_leaves(values))}


def explained(form: Form) -> list[dict[str, Any]]:
    """Returns what ``spikingbrain.explain`` says of the form's recurrences."""
    torch._dynamo.reset()
    inputs = [x.requires_grad_(x.is_floating_point() and form.gradients) for x in form.example()]
    with torch.set_grad_enabled(form.gradients):
        found = spikingbrain.explain(form.module(), *inputs, options=OPTIONS).to_dict()
    recurrences: list[dict[str, Any]] = found["recurrences"]
    return recurrences


def outcome(recurrences: Sequence[Mapping[str, Any]]) -> str:
    """Returns what became of a form, in the words of `Form.expected`."""
    return " + ".join(sorted(set(_outcomes(recurrences)))) or "unrolled"


def _outcomes(recurrences: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for found in recurrences:
        if found["status"] == "raised":
            yield from found["op"].split(", ")
        elif found["status"] == "loop":
            yield LOOPS[found["op"]]
