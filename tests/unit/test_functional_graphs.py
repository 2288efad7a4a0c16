"""Dynamo graphs in functional form compute what they did, gradients included; what cannot be shown is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from spikingbrain.frontend.before_autograd import raise_in_dynamo_graph
from spikingbrain.frontend.recurrences.functional import NotFunctional, functionalise


def graph_of(function: Callable[..., Any], *inputs: Tensor) -> tuple[fx.GraphModule, list[Any]]:
    """Returns Dynamo's graph of a function and the arguments that it is called with."""
    found: list[Any] = []

    def backend(module: fx.GraphModule, arguments: list[Tensor]) -> Any:
        found.append((module, arguments))
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*[i.clone() for i in inputs])
    module, arguments = found[0]
    assert len(found) == 1
    return module, list(arguments)


def check(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """Compares results, gradients and what happens to the arguments; returns the functional graph."""
    module, arguments = graph_of(function, *inputs)
    functional = functionalise(module)

    def run(g: fx.GraphModule) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        given = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in arguments]
        used = [g_.clone() for g_ in given]  # so that writes into arguments are allowed
        torch.manual_seed(0)
        results = [r for r in g(*used) if isinstance(r, Tensor)]
        total = sum((r.double().square().sum() for r in results if r.requires_grad), torch.zeros(()))
        leaves = [x for x in given if x.requires_grad]
        gradients = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else []
        return results, [x for x in gradients if x is not None], used

    for a, b in zip(run(functional), run(module), strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
    return functional


def mutable(module: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if n.meta.get("opaque")]


X, Y = torch.randn(3, 5), torch.randn(3, 5)


def accumulated(x: Tensor, y: Tensor) -> Tensor:
    s = torch.zeros_like(x)
    s += x
    s *= y
    s.add_(x, alpha=2).sub_(y)
    return s


def written_rows(x: Tensor, y: Tensor) -> Tensor:
    o = torch.empty(4, 5)
    for t in range(3):
        o[t] = x[t] * y[t]
    o[-1] = 1.0
    o[:, 2] = o[:, 1]
    o[..., None, 0][:2] = 3
    return o


def written_views(x: Tensor, y: Tensor) -> Tensor:
    o = torch.zeros(3, 5, dtype=torch.float64)
    o[1].add_(x[0])
    row = o[2]
    row[1:3] += y[0, 1:3]
    row.mul_(2)
    o[:, 4:].copy_(x[:, :1])
    return o.transpose(0, 1) + 0


def view_read_later(x: Tensor, y: Tensor) -> Tensor:
    o = torch.zeros(3, 5)
    row, column = o[0], o[:, 1, None]
    o[0] = y[0]
    o[1] += x[2]
    return row + column + x


def rounded(x: Tensor, y: Tensor) -> Tensor:
    s = x.to(torch.bfloat16)
    s += y  # stays bfloat16
    o = torch.zeros(3, dtype=torch.int64)
    o[0] = x.sum()  # truncates
    return s.float() + o[:, None]


def cut(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    s = x * y
    s = s.detach() + s
    with torch.no_grad():
        z = s * 2
    a, b = (s * z).chunk(2)
    return a, b, torch.cat([a, b]).unbind(1)[1]


def filled(x: Tensor, y: Tensor) -> Tensor:
    o = torch.ones(3, 5)
    o.fill_(2.0)
    o[:, 0].zero_()
    mask = x > 0
    return torch.where(mask, o, y) + x.new_full((1,), 4.0) + torch.arange(5)


@pytest.mark.parametrize(
    "function", [accumulated, written_rows, written_views, view_read_later, rounded, filled]
)
def test_writes_become_values(function: Callable[..., Tensor]) -> None:
    functional = check(function, X, Y)
    assert not mutable(functional)
    targets = [n.target for n in functional.graph.nodes if n.op == "call_function"]
    assert all(isinstance(t, torch._ops.OpOverload) and not t._schema.is_mutable for t in targets)


def test_modes_and_detach_stay() -> None:
    functional = check(cut, X, Y)
    assert any("set_grad" in name for name in mutable(functional))
    assert torch.ops.aten.detach.default in {n.target for n in functional.graph.nodes}


def test_random_numbers_are_drawn_in_the_same_order() -> None:
    def noisy(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, 0.5) + torch.rand(5) * torch.nn.functional.dropout(y, 0.2)

    check(noisy, X, Y)


def test_writes_into_arguments_stay() -> None:
    def writes(x: Tensor, y: Tensor) -> Tensor:
        before = x[0] + 0
        x[0] = y[1]
        x.mul_(2)
        return before + x[0] + x[0, 1:2]

    functional = check(writes, X, Y)
    reads = [n for n in functional.graph.nodes if n.target is torch.ops.aten.select.int]
    assert all(
        n.meta.get("opaque")
        for n in reads
        if n.args[0].op == "placeholder" and n.args[0].name.startswith("l_x")
    )


def test_checkpoint_stays() -> None:
    check(lambda x, y: checkpoint(lambda a: a.sin() * y, x, use_reentrant=False) + x, X, Y)


def test_a_function_of_the_users_own() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * 5

    functional = check(lambda x, y: Twice.apply(x) + Twice.apply(y * 3), X, Y)
    assert not mutable(functional)


def test_writes_by_tensors_of_indices() -> None:
    def writes(x: Tensor, y: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(3)
        o = torch.zeros(3, 5)
        o[x > 0] = 1.0
        o[inverse, order] = y[:, 0]
        return (o * y)[inverse] + o

    assert not mutable(check(writes, X, Y))


def diagonal_read_later(x: Tensor, y: Tensor) -> Tensor:
    o = torch.zeros(3, 5)
    diagonal = o.diagonal()
    o[0] = y[0]
    return diagonal + x[:, 0]


def diagonal_written(x: Tensor, y: Tensor) -> Tensor:
    o = torch.zeros(3, 5)
    o.diagonal().add_(1.0)
    return o + x


def written_by_index(x: Tensor, y: Tensor) -> Tensor:
    o = torch.zeros(3, 5)
    o[:, x[0].argsort()] = y
    return o


@pytest.mark.parametrize(
    "function, why",
    [
        (diagonal_read_later, "a view of the tensor is read after a write into it"),
        (diagonal_written, "a write into a view that is no slice"),
        (written_by_index, "a write by an index that is a symbol, or a tensor among others"),
    ],
)
def test_refused(function: Callable[..., Tensor], why: str) -> None:
    module, _ = graph_of(function, X, Y)
    with pytest.raises(NotFunctional, match=why) as stop:
        functionalise(module)
    assert stop.value.node.meta["stack_trace"]


def test_attention_is_told_of_where_a_graph_is_refused() -> None:
    """What would have been looked for, and why it was not, is in the report."""
    found = []

    def backend(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.append(raise_in_dynamo_graph(module, inputs, attention=lambda *given: None)[1])
        return module.forward

    def attention(q: Tensor) -> Tensor:
        q = torch.func.vmap(torch.sin)(q)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    with torch.no_grad():
        torch.compile(attention, backend=backend)(torch.randn(1, 2, 8, 4))
    (told,) = [a for f in found for a in f.attention]
    assert (told.status, told.reason) == ("torch's", "inside a transform of torch.func")
