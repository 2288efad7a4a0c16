"""`spikingbrain::linear_scan` and `spikingbrain::selective_scan`, against the plain loops of models/reference/."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spikingbrain.frontend.ops  # noqa: F401  (registers the ops)
from spikingbrain.errors import CompileError, ShapeError
from spikingbrain.models.reference import recurrences as reference

sys.path.append(str(Path(__file__).parents[1]))
from tolerances import assert_close

ops = torch.ops.spikingbrain
B, C, N = 2, 3, 4


def _scan(T: int, with_state: bool, log: bool) -> dict[str, Tensor]:
    factor = torch.rand(B, T, C, dtype=torch.float64) * 2.2 - (0 if log else 1.1)
    factor = torch.where(torch.rand(factor.shape) < 0.1, 0.0, factor)
    x = {"decay": factor.log() if log else factor, "update": torch.randn(B, T, C, dtype=torch.float64)}
    return {**x, "state": torch.randn(B, C, dtype=torch.float64)} if with_state else x


def _selective(T: int, with_state: bool) -> dict[str, Tensor]:
    x = {n: torch.randn(B, T, d, dtype=torch.float64) for n, d in (("x", C), ("dt", C), ("b", N), ("c", N))}
    x = {"x": x["x"], "dt": x["dt"].exp(), "a": -torch.randn(C, N).double().exp(), "b": x["b"], "c": x["c"]}
    return {**x, "state": torch.randn(B, C, N, dtype=torch.float64)} if with_state else x


def _results(
    run: Callable[..., Any], tensors: dict[str, Tensor], options: dict[str, Any]
) -> dict[str, Tensor]:
    given = {n: x.clone().requires_grad_() for n, x in tensors.items()}
    out = run(**given, **options)
    loss = sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in out)
    loss = loss + sum(0 * x[x.isfinite()].sum() for x in given.values())
    gradients = torch.autograd.grad(loss, list(given.values()))
    return {"out": out[0], "last": out[1], **dict(zip(given, gradients, strict=True))}


def _compare(name: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    actual = _results(getattr(ops, name), tensors, options)
    expected = _results(getattr(reference, name), tensors, options)
    for part, value in actual.items():
        assert_close(value, expected[part], part, scale=1.0)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 130])
def test_results_and_gradients_are_those_of_the_loop(steps: int) -> None:
    torch.manual_seed(steps)
    for with_state, reverse in itertools.product((False, True), repeat=2):
        for log in (False, True):
            tensors = _scan(steps, with_state, log)
            _compare("linear_scan", tensors, {"log_decay": log, "reverse": reverse})
        _compare("selective_scan", _selective(steps, with_state), {"reverse": reverse})


def test_gradcheck() -> None:
    torch.manual_seed(1)
    for tensors, run in ((_scan(4, True, False), ops.linear_scan), (_selective(4, True), ops.selective_scan)):
        assert torch.autograd.gradcheck(
            run, tuple(x.requires_grad_() for x in tensors.values()), fast_mode=True
        )


def test_opcheck() -> None:
    torch.manual_seed(2)
    for tensors, run in ((_scan(4, True, False), ops.linear_scan), (_selective(4, True), ops.selective_scan)):
        for reverse in (False, True):
            given = tuple(x.float().requires_grad_() for x in tensors.values())
            torch.library.opcheck(run.default, given, {"reverse": reverse})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrower_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    bound = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for name, tensors in (
        ("linear_scan", _scan(500, True, False)),
        ("selective_scan", _selective(500, True)),
    ):
        if name == "linear_scan":
            tensors["decay"] = tensors["decay"] / 1.2  # of magnitude below one: the sum stays small
        cast = {n: x.to(torch.float32 if n == "state" else dtype) for n, x in tensors.items()}
        got = _results(getattr(ops, name), cast, {})
        expected = _results(getattr(ops, name), {n: x.double() for n, x in cast.items()}, {})
        assert got["out"].dtype == dtype
        assert got["last"].dtype == torch.float32
        for part, value in got.items():
            error = (value.double() - expected[part]).abs().max() / expected[part].abs().max()
            assert error < bound, f"{part} of {name}"


def test_states_that_are_forgotten_leave_finite_gradients() -> None:
    torch.manual_seed(4)
    tensors = {n: x.float() for n, x in _scan(100, True, True).items()}
    got = _results(ops.linear_scan, tensors, {"log_decay": True})
    forgotten = tensors["decay"] == -torch.inf
    assert forgotten.any()
    assert all(x.isfinite().all() for x in got.values())
    assert not got["decay"][forgotten].any()


def test_exports_with_any_number_of_steps() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            y, _ = ops.selective_scan(x, dt, a, b, c)
            h, _ = ops.linear_scan(-dt, y, log_decay=True)
            return h

    steps = {1: torch.export.Dim("T")}
    program = torch.export.export(
        Model(), tuple(_selective(5, False).values()), dynamic_shapes=(steps, steps, None, steps, steps)
    )
    x = _selective(70, False)
    expected = reference.linear_scan(-x["dt"], reference.selective_scan(**x)[0], log_decay=True)[0]
    assert_close(program.module()(*x.values()), expected, "70 steps")


def test_selective_scan_is_differentiated_once() -> None:
    given = [x.requires_grad_() for x in _selective(3, False).values()]
    (gradient,) = torch.autograd.grad(ops.selective_scan(*given)[0].sum(), given[0], create_graph=True)
    with pytest.raises(CompileError, match="selective_scan can be differentiated only once"):
        gradient.sum().backward()


def test_what_does_not_fit_is_named() -> None:
    x, a = torch.zeros(1, 5, 3), torch.zeros(3, 2)
    with pytest.raises(
        ShapeError, match=r"linear_scan: decay has shape \[1, 4, 3\]\n.*\[B, T, C\] is \[1, 5, 3\]"
    ):
        ops.linear_scan(x[:, :4], x)
    with pytest.raises(
        ShapeError, match=r"linear_scan: the state is torch\.bfloat16\n.*kept in torch\.float32"
    ):
        ops.linear_scan(x, x, torch.zeros(1, 3).bfloat16())
    with pytest.raises(ShapeError, match=r"linear_scan: arguments of torch\.int64"):
        ops.linear_scan(x.long(), x.long())
    with pytest.raises(
        ShapeError, match=r"selective_scan: b has shape \[1, 5, 3\]\n.*\[B, T, N\] is \[1, 5, 2\]"
    ):
        ops.selective_scan(x, x, a, x, x)
