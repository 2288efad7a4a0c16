"""``linear_scan`` and ``selective_scan`` lowered for every target, against loops in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler.tools")
pytest.importorskip("iree.runtime")

import scan_targets
from scan_targets import PORTABLE, V3, V4

Sizes = dict[str, int]


def _type(letters: str, static: Sizes, element: str) -> str:
    sizes = [str(static.get(letter, "?")) for letter in letters]
    return f"tensor<{'x'.join([*sizes, element])}>"


def linear(name: str, static: Sizes, element: str, log: bool, reverse: bool, state: bool) -> str:
    btc, bc = _type("btc", static, element), _type("bc", static, element)
    extra = f", %s: {bc}" if state else ""
    operands, types = ("%a, %u, %s", f"{btc}, {btc}, {bc}") if state else ("%a, %u", f"{btc}, {btc}")
    return f"""
func.func @{name}(%a: {btc}, %u: {btc}{extra}) -> ({btc}, {bc}) {{
  %h, %last = "spikingbrain.linear_scan"({operands}) {{log_decay = {str(log).lower()}, reverse = {str(reverse).lower()},
    operandSegmentSizes = array<i32: 1, 1, {int(state)}>}} : ({types}) -> ({btc}, {bc})
  return %h, %last : {btc}, {bc}
}}"""


def selective(name: str, static: Sizes, element: str, reverse: bool, state: bool) -> str:
    btc, btn, cn, bcn = (_type(letters, static, element) for letters in ("btc", "btn", "cn", "bcn"))
    extra = f", %s: {bcn}" if state else ""
    types = ", ".join([btc, btc, cn, btn, btn, *([bcn] if state else [])])
    return f"""
func.func @{name}(%x: {btc}, %dt: {btc}, %a: {cn}, %b: {btn}, %c: {btn}{extra}) -> ({btc}, {bcn}) {{
  %y, %last = "spikingbrain.selective_scan"(%x, %dt, %a, %b, %c{", %s" if state else ""}) {{reverse = {str(reverse).lower()},
    operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, {int(state)}>}} : ({types}) -> ({btc}, {bcn})
  return %y, %last : {btc}, {bcn}
}}"""


# name -> static sizes, element, log decay, reverse, with a state
LINEAR = {
    "factors": ({}, "f32", False, False, True),
    "logs": ({"c": 40}, "f32", True, False, True),
    "backwards": ({"b": 2}, "f32", False, True, False),
    "double": ({"c": 7}, "f64", True, True, True),
}
# name -> static sizes, element, reverse, with a state
SELECTIVE = {
    "mamba": ({"c": 70, "n": 16}, "f32", False, True),
    "odd": ({"c": 5, "n": 3}, "f32", True, True),
    "dynamic": ({"n": 6}, "f32", False, False),
    "large": ({"c": 17, "n": 200}, "f32", False, False),
    "wide": ({"c": 33, "n": 5}, "f64", True, True),
}


@pytest.fixture(
    scope="module",
    params=[V3, pytest.param(V4, marks=pytest.mark.slow), PORTABLE],
    ids=lambda target: target.name,
)
def program(request: pytest.FixtureRequest) -> Any:
    if not scan_targets.runs_here(request.param):
        pytest.skip(f"this processor is not {request.param.cpu}")
    text = "\n".join(linear(name, *case) for name, case in LINEAR.items())
    text += "\n".join(selective(name, *case) for name, case in SELECTIVE.items())
    return scan_targets.load(text, request.param)


def _linear_loop(a: Any, u: Any, s: Any, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
    h = np.zeros(u.shape)
    for t in reversed(range(u.shape[1])) if reverse else range(u.shape[1]):
        s = a[:, t] * s + u[:, t]
        h[:, t] = s
    return h, s


def _selective_loop(
    x: Any, dt: Any, a: Any, b: Any, c: Any, s: Any, reverse: bool
) -> tuple[np.ndarray, np.ndarray]:
    y = np.zeros(x.shape)
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        s = np.exp(dt[:, t, :, None] * a) * s + (dt[:, t] * x[:, t])[..., None] * b[:, t, None, :]
        y[:, t] = (s * c[:, t, None, :]).sum(-1)
    return y, s


def _close(found: list[Any], expected: tuple[np.ndarray, ...], element: str) -> None:
    tolerance = 1e-5 if element == "f32" else 1e-12
    for result, wanted in zip(found, expected, strict=True):
        assert result.shape == wanted.shape
        np.testing.assert_allclose(result, wanted, rtol=tolerance, atol=tolerance)


def check_linear(program: Any, name: str, steps: int) -> None:
    static, element, log, reverse, state = LINEAR[name]
    dtype = np.float32 if element == "f32" else np.float64
    rng = np.random.default_rng(steps)
    for channels in (1, 16, 77):
        b, c = static.get("b", 3), static.get("c", channels)
        a = rng.uniform(-1, 1, (b, steps, c)).astype(dtype)
        a[:, 3:4] = 0
        gate = np.abs(a)
        with np.errstate(divide="ignore"):
            given = np.log(gate) if log else a
        u, s = rng.standard_normal((b, steps, c)).astype(dtype), rng.standard_normal((b, c)).astype(dtype)
        found = [r.to_host() for r in program[name](given, u, *([s] if state else []))]
        factors = (gate if log else a).astype(np.float64)
        _close(found, _linear_loop(factors, u, s if state else np.zeros((b, c)), reverse), element)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("steps", [0, 1, 19])
def test_linear_scan(program: Any, name: str, steps: int) -> None:
    check_linear(program, name, steps)


def check_selective(program: Any, name: str, steps: int) -> None:
    static, element, reverse, state = SELECTIVE[name]
    dtype = np.float32 if element == "f32" else np.float64
    rng = np.random.default_rng(steps)
    for channels in (1, 16, 77):
        b, c, n = 2, static.get("c", channels), static["n"]
        make = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
        x, dt, a = make(b, steps, c), np.abs(make(b, steps, c)), -np.exp(make(c, n))
        dt[:, 2:3], dt[:, 5:6] = 0, 200  # keeps all, forgets all
        write, read, s = make(b, steps, n), make(b, steps, n), make(b, c, n)
        arguments = [x, dt, a, write, read]
        found = [r.to_host() for r in program[name](*arguments, *([s] if state else []))]
        wide = [v.astype(np.float64) for v in arguments]
        expected = _selective_loop(*wide, s if state else np.zeros((b, c, n)), reverse)
        scale = max(1.0, float(np.abs(expected[0]).max(initial=1)))
        _close([r / scale for r in found], tuple(r / scale for r in expected), element)


@pytest.mark.parametrize("name", SELECTIVE)
@pytest.mark.parametrize("steps", [0, 1, 19])
def test_selective_scan(program: Any, name: str, steps: int) -> None:
    check_selective(program, name, steps)


def test_growing_states(program: Any) -> None:
    """Positive exponents, infinity and NaN: as the formula says."""
    x, dt = np.ones((1, 3, 70), np.float32), np.ones((1, 3, 70), np.float32)
    a = np.full((70, 16), 2.0, np.float32)
    a[1], a[2] = 100.0, np.nan
    write = read = np.ones((1, 3, 16), np.float32)
    y = program.mamba(x, dt, a, write, read, np.ones((1, 70, 16), np.float32))[0].to_host()
    with np.errstate(over="ignore"):
        expected, _ = _selective_loop(x, dt, a, write, read, np.ones((1, 70, 16), np.float32), False)
    np.testing.assert_allclose(y, expected, rtol=1e-5)
