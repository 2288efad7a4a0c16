"""Tensors without elements leave nothing to eager, compiled in place or exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import spikingbrain
from spikingbrain.frontend.dynamo import report


class Rotated(nn.Module):
    """Turns all of 6 entries, written for a rotation of a part."""

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x[..., :6], x[..., 6:]
        a, b = first.chunk(2, -1)
        return torch.cat([torch.cat([-b, a], -1) * first.sin(), rest.cos()], -1)


def joined(x: Tensor) -> tuple[Tensor, ...]:
    """By torch's old rule, 1-D tensors without elements fit everything."""
    nothing = torch.empty(0, dtype=torch.float64)
    cache = torch.cat([nothing.float(), x], 0) * 2
    wide = torch.cat([nothing, x.flatten() + 1])
    assert wide.dtype == torch.float64
    several = torch.cat([x[:0], x + 1, nothing.float(), x - 1], 0)
    return cache, wide, several, torch.cat([x[:0], x[:0].exp()], 0), x[:, :0] @ x[:0] + x[:1, :1]


def strictly(function: object, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Returns the results and the gradient of x, compiled with nothing left to eager."""
    torch._dynamo.reset()
    options = {"strict": True, "library": False}
    x = x.clone().requires_grad_()
    found = torch.compile(function, backend="spikingbrain", options=options)(x)
    found = [found] if isinstance(found, Tensor) else list(found)
    return found, torch.autograd.grad(sum(f.sum() for f in found), x)[0]


@pytest.mark.parametrize("function", [Rotated(), joined], ids=["rotated", "joined"])
def test_compiled_results_and_gradients_are_eagers(function: object) -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    found, gradient = strictly(function, x)
    x.requires_grad_()
    wanted = function(x)  # type: ignore[operator]
    wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradient, torch.autograd.grad(sum(w.sum() for w in wanted), x)[0])


def test_an_op_on_nothing_is_not_computed() -> None:
    torch._dynamo.reset()
    with report.collect() as reports:
        found = torch.compile(lambda x: x.exp() + 1, backend="spikingbrain")(torch.zeros(0, 3))
    assert found.shape == (0, 3)
    assert {r.status for g in reports for r in g.regions} <= {"library"}


def test_exported_result_is_eagers(tmp_path: Path) -> None:
    model, x = Rotated(), torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    spikingbrain.export(model, {"forward": spikingbrain.Entry((x,))}, tmp_path / "rotated.sbrain")
    found = spikingbrain.load(tmp_path / "rotated.sbrain").forward(x.numpy())
    torch.testing.assert_close(torch.as_tensor(found), model(x))
