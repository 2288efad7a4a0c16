"""Higher-order ops through ``torch.compile``: right, whatever is compiled; loops and branches themselves are run by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops import associative_scan, cond, scan, while_loop
from torch._higher_order_ops.map import map as torch_map
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from spikingbrain.frontend.dynamo import report

pytestmark = pytest.mark.slow
OPTIONS = {"library": False, "threads": 1}


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 3 * x * x


def _scan(x: Tensor) -> Tensor:
    last, all_ = scan(lambda carry, row: (carry * 0.5 + row, carry.sin()), x[0].clone(), x)
    return last.sum() + all_


def _associative(x: Tensor) -> Tensor:
    return associative_scan(lambda a, b: a + b, x, 0, combine_mode="generic")


def _cond(x: Tensor) -> Tensor:
    return cond(x.sum() > 0, lambda y: y.sin() + 1, lambda y: y.cos() * 2, (x,))


def _while(x: Tensor) -> Tensor:
    count, value = while_loop(lambda n, _: n < 3, lambda n, y: (n + 1, y * 1.5), (torch.tensor(0), x))
    return value + count


def _map(x: Tensor) -> Tensor:
    return torch_map(lambda row: row.exp() * 2, x)


def _flex(x: Tensor) -> Tensor:
    q = x.reshape(1, 2, 4, 4)
    return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score * 0.5 + (i - j))


def _checkpoint(x: Tensor) -> Tensor:
    return checkpoint(lambda y: (y.sin() * y).exp(), x, use_reentrant=False)


@torch.compiler.nested_compile_region
def _layer(x: Tensor) -> Tensor:
    return (x.sin() * 2).exp()


def _invoke_subgraph(x: Tensor) -> Tensor:
    return _layer(_layer(x) * 0.1)


FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "scan": _scan,
    "associative_scan": _associative,
    "cond": _cond,
    "while_loop": _while,
    "map": _map,
    "flex_attention": _flex,
    "checkpoint": _checkpoint,
    "invoke_subgraph": _invoke_subgraph,
    "autograd.Function": Cube.apply,
}
BACKWARD = ["cond", "map", "checkpoint", "invoke_subgraph", "autograd.Function", "scan"]


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str) -> None:
    torch._dynamo.reset()
    function, x = FORWARD[name], torch.linspace(-1, 1, 32).reshape(4, 8)
    with report.collect() as reports, torch.no_grad():
        found = torch.compile(function, backend="spikingbrain", fullgraph=True, options=OPTIONS)(x)
    assert reports
    torch.testing.assert_close(found, function(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name: str) -> None:
    torch._dynamo.reset()
    function, x = FORWARD[name], torch.linspace(-1, 1, 32).reshape(4, 8)
    gradients = []
    for f in (function, torch.compile(function, backend="spikingbrain", fullgraph=True, options=OPTIONS)):
        leaf = x.clone().requires_grad_()
        f(leaf).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def _scan_of_selected(x: Tensor) -> Tensor:
    return _scan(x[x[:, 0] > -0.6])


def _scan_beside_positions(x: Tensor) -> tuple[Tensor, Tensor]:
    return _scan(x), (x > 0.5).nonzero()


@pytest.mark.parametrize("function", [_scan_of_selected, _scan_beside_positions])
@pytest.mark.parametrize("dynamic", [False, True])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_sizes_known_at_run_time(function: Callable[[Tensor], Any], dynamic: bool) -> None:
    torch._dynamo.reset()
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    compiled = torch.compile(
        function, backend="spikingbrain", fullgraph=True, dynamic=dynamic, options=OPTIONS
    )
    torch.testing.assert_close(compiled(x), function(x), rtol=1e-4, atol=1e-5)


def _rows(x: Tensor) -> Tensor:
    return torch.vmap(lambda row: torch.where(row > 0, row.cumsum(0), 0.0))(x)


def _gradient(x: Tensor) -> Tensor:
    return torch.func.grad(lambda y: torch.where(y > 0, y.cumsum(0), 0.0).sum())(x)


@pytest.mark.parametrize("function", [_rows, _gradient, FORWARD["flex_attention"]])
@pytest.mark.parametrize("dynamic", [False, True])
def test_transforms(function: Callable[[Tensor], Tensor], dynamic: bool) -> None:
    torch._dynamo.reset()
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    compiled = torch.compile(
        function, backend="spikingbrain", fullgraph=True, dynamic=dynamic, options=OPTIONS
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), function(x), rtol=1e-4, atol=1e-5)


def test_while_loop_at_any_size() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_while, backend="spikingbrain", fullgraph=True, dynamic=True, options=OPTIONS)
    for rows in (4, 6):
        x = torch.linspace(-1, 1, 8 * rows).reshape(rows, 8)
        torch.testing.assert_close(compiled(x), _while(x), rtol=1e-4, atol=1e-5)
