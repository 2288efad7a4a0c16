"""torch's associative_scan before autograd: a loop where its function is associative, else the tree that torch makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._higher_order_ops import associative_scan
from torch.utils import _pytree as pytree

from spikingbrain.frontend.before_autograd import Found, raise_in_dynamo_graph
from spikingbrain.frontend.ops.substitutions import register_for_dynamo

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def combined(function: Callable[[Any, Any], Any], xs: Any, dim: int = 0, reverse: bool = False) -> Any:
    return associative_scan(function, xs, dim, reverse, combine_mode="generic")


def composed(left: Any, right: Any) -> Any:
    return left[0] * right[0], right[0] * left[1] + right[1]


class Raising:
    """A backend that raises and runs what it made op by op."""

    __module__ = "spikingbrain.tests"  # by which the replacement knows who traces

    def __init__(self) -> None:
        register_for_dynamo()
        self.graphs: list[fx.GraphModule] = []
        self.found: list[Found] = []

    def __call__(self, module: fx.GraphModule, inputs: Any) -> Any:
        made, found = raise_in_dynamo_graph(module, inputs)
        self.graphs.append(made)
        self.found.append(found)
        return made

    def check(self, function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> None:
        """Runs a function compiled and in eager; results and gradients must agree."""
        compiled = torch.compile(function, backend=self, fullgraph=True, dynamic=dynamic)
        found = []
        for f in (compiled, function):
            given = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
            results = pytree.tree_leaves(f(*given))
            weighted = [
                (y.double() * torch.arange(1.0, y.numel() + 1).reshape(y.shape).sin()).sum() for y in results
            ]
            sum(weighted).backward()  # type: ignore[union-attr]
            found.append([*results, *(x.grad for x in given if x.grad is not None)])
        bound = 2e-2 if any(x.dtype == torch.bfloat16 for x in found[1]) else 1e-4
        torch.testing.assert_close(*found, rtol=bound, atol=bound)

    @property
    def outcomes(self) -> list[str]:
        return [r.op or r.status for found in self.found for r in found.recurrences]

    def targets(self) -> list[str]:
        return [str(n.target) for n in self.graphs[-1].graph.nodes if n.op == "call_function"]


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)


def test_unused_products_are_not_computed() -> None:
    backend = Raising()
    backend.check(lambda a, b: combined(composed, (a, b), 1)[1], *pair(2, 9, 3))
    assert backend.outcomes == ["linear_scan"]
    assert [t for t in backend.targets() if "scan" in t] == ["spikingbrain.linear_scan.default"]
    assert not any("cat" in t or "mul" in t for t in backend.targets())  # it begins with zeros


def test_products_that_are_used() -> None:
    backend = Raising()
    backend.check(lambda a, b: combined(composed, (a, b), -1, reverse=True), *pair(2, 3, 9))
    assert [t for t in backend.targets() if "scan" in t] == ["spikingbrain.linear_scan.default"] * 2


@pytest.mark.parametrize(
    ("function", "outcome"),
    [
        (lambda u, v: u + v, "linear_scan"),
        (torch.mul, "linear_scan"),
        (lambda u, v: u + v - 0.5 * u * v, "linear_scan"),
        (torch.minimum, "pointwise_scan"),
        (torch.logaddexp, "pointwise_scan"),
        (lambda u, v: v, "linear_scan"),
        (lambda u, v: u - v, "unrolled"),
        (lambda u, v: 0.5 * (u + v), "unrolled"),
        (lambda u, v: (u + v).clamp(-1, 1), "unrolled"),
    ],
)
def test_one_leaf(function: Callable[[Tensor, Tensor], Tensor], outcome: str) -> None:
    backend = Raising()
    backend.check(lambda x: combined(function, x.exp(), 1), pair(2, 7, 3)[1])
    assert backend.outcomes == [outcome]


def test_not_associative_keeps_the_order_of_eager() -> None:
    def function(x: Tensor) -> Tensor:
        return combined(lambda u, v: 0.9 * u + v, x, 1)

    backend, x = Raising(), pair(2, 21, 3)[1]
    found = torch.compile(function, backend=backend, fullgraph=True)(x)
    assert torch.equal(found, function(x))
    assert "not associative" in backend.found[0].recurrences[0].reason
    assert "test_associative_scan.py" in backend.found[0].recurrences[0].where


def test_some_raised_and_some_not() -> None:
    backend = Raising()
    backend.check(lambda a, b: combined(composed, (a, b))[1] + combined(lambda u, v: u - v, b), *pair(8, 3))
    assert sorted(backend.outcomes) == ["linear_scan", "unrolled"]


def test_trees_of_leaves_and_tensors_closed_over() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        keep = a[0, 0].sigmoid()

        def combine(left: Any, right: Any) -> Any:
            decay = left["decay"] * right["decay"]
            return {
                "decay": decay,
                "state": left["state"] * right["decay"] + right["state"] * (keep - keep + 1),
            }

        return combined(combine, {"decay": a, "state": b}, 1)["state"]

    backend = Raising()
    backend.check(function, *pair(2, 7, 3))
    assert backend.outcomes == ["linear_scan"]


def segments(x: Tensor) -> Tensor:
    def combine(left: Any, right: Any) -> Any:
        return left[0] | right[0], torch.where(right[0], right[1], left[1] + right[1])

    return combined(combine, (x > 0.3, x), 1)[1]


@pytest.mark.slow
def test_flags() -> None:
    """Sums that begin anew where a flag is set; torch's scan has no gradient for flags that are carried."""
    backend, x = Raising(), pair(2, 9, 3)[1]
    with torch.no_grad():
        found = torch.compile(segments, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(found, segments(x))
    assert backend.outcomes == ["linear_scan"]
    backend.check(segments, x)


@pytest.mark.parametrize(
    ("function", "outcome"), [(lambda u, v: u + v, "linear_scan"), (torch.logaddexp, "unrolled")]
)
def test_bfloat16(function: Callable[[Tensor, Tensor], Tensor], outcome: str) -> None:
    """Rounded at each of many steps, a loop would be less exact than the tree."""
    backend = Raising()
    backend.check(lambda x: combined(function, x, 0), pair(9, 3)[0].bfloat16())
    assert backend.outcomes == [outcome]


def test_matrices() -> None:
    def function(a: Tensor) -> Tensor:
        return combined(lambda u, v: v @ u, a, 1)

    backend, a = Raising(), pair(2, 7, 3, 3)[1]
    with torch.no_grad():
        found = torch.compile(function, backend=backend, fullgraph=True)(a)
    torch.testing.assert_close(found, function(a), rtol=1e-4, atol=1e-4)
    assert backend.outcomes == ["time_loop"]
    backend.check(function, a)
    assert backend.outcomes == ["time_loop", "unrolled"]


@pytest.mark.slow
def test_any_length_is_one_graph() -> None:
    backend = Raising()
    for length in (7, 12, 31):
        backend.check(lambda a, b: combined(composed, (a, b), 1)[1], *pair(2, length, 3), dynamic=True)
        torch._dynamo.reset() if length == 7 else None
    assert set(backend.outcomes) == {"linear_scan"}


def test_one_element() -> None:
    Raising().check(lambda a, b: combined(composed, (a, b), 0), *pair(1, 3))


def test_other_backends_get_what_torch_makes() -> None:
    graphs: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module)
        return module

    register_for_dynamo()
    a, b = pair(6, 3)
    torch.compile(lambda a, b: combined(composed, (a, b)), backend=keep, fullgraph=True)(a, b)
    names = [str(n.target) for n in graphs[0].graph.nodes]
    assert not any("scan" in n or "first_or_combined" in n for n in names)
