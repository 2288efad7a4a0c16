"""Projections of floats, by experts too, by wave kernels against f64 in numpy, on the emulator in every thread order."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")

from wave_programs import Array, Program, joined, run

from spikingbrain.backend_maca.run import emulate
from spikingbrain.passes.lower_grouped_linear import LowerGroupedLinear
from spikingbrain.passes.lower_linear import LowerLinear

pytestmark = pytest.mark.skipif(shutil.which(emulate.compiler()) is None, reason="no C++ compiler")

ROWS = (0, 1, 3, 17, 64, 67)
BITS = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}  # the error of storing a sum


@dataclass(frozen=True)
class Case:
    """A projection of K channels to N columns, of ``rows`` rows (None: any number), by one of E experts, or with a sum.

    All is of one type; bf16 travels as its bits.
    """

    k: int
    n: int
    rows: int | None = None
    experts: int | None = None
    sum: bool = False
    element: str = "f32"

    def function(self, name: str) -> str:
        m = "?" if self.rows is None else self.rows
        t = self.element
        x, y, e = f"tensor<{m}x{self.k}x{t}>", f"tensor<{m}x{self.n}x{t}>", f"tensor<{m}xi64>"
        w = "x".join(map(str, [*([self.experts] if self.experts else []), self.n, self.k]))
        stored = (
            f'  %w = "spikingbrain.parameter"() {{sources = ["w"], recipe = []}} : () -> tensor<{w}x{t}>\n'
        )
        if self.experts:
            return f"""
func.func @{name}(%x: {x}, %e: {e}) -> {y} {{
{stored}  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {{columns = {self.n} : i64}}
    : ({x}, tensor<{w}x{t}>, {e}) -> {y}
  return %y : {y}
}}"""
        product = (
            f'"spikingbrain.linear"(%x, %w) {{columns = {self.n} : i64}} : ({x}, tensor<{w}x{t}>) -> {y}'
        )
        if not self.sum:
            return f"\nfunc.func @{name}(%x: {x}) -> {y} {{\n{stored}  %y = {product}\n  return %y : {y}\n}}"
        maps = ", ".join(["affine_map<(i, j) -> (i, j)>"] * 3)
        return f"""
func.func @{name}(%x: {x}, %r: {y}) -> {y} {{
{stored}  %p = {product}
  %c0 = arith.constant 0 : index
  %m = tensor.dim %r, %c0 : {y}
  %o = tensor.empty({"%m" if self.rows is None else ""}) : {y}
  %y = linalg.generic {{indexing_maps = [{maps}], iterator_types = ["parallel", "parallel"]}}
      ins(%p, %r : {y}, {y}) outs(%o : {y}) {{
  ^bb0(%a: {t}, %b: {t}, %c: {t}):
    %s = arith.addf %a, %b : {t}
    linalg.yield %s : {t}
  }} -> {y}
  return %y : {y}
}}"""

    @property
    def weight(self) -> Array:
        shape = [*([self.experts] if self.experts else []), self.n, self.k]
        return self.stored(np.random.default_rng(0).standard_normal(shape))

    def stored(self, values: Array) -> Array:
        """Returns values as the program takes them."""
        single = values.astype(np.float32)
        if self.element == "bf16":  # some multiple of 2**-7: exact in so few bits
            return ((np.round(single * 32).clip(-128, 128) / 32).view(np.uint32) >> 16).astype(np.uint16)
        return single.astype(np.float16) if self.element == "f16" else single

    def values(self, stored: Array) -> Array:
        """Returns what stored values are."""
        if self.element == "bf16":
            return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return stored.astype(np.float64)

    def close(self, got: Array, x: Array, weight: Array, more: Array | None = None) -> None:
        """A sum of K products has an error of at most (K + 1) / 2**24 of the sum of their magnitudes, then it is stored."""
        x, weight = self.values(x), self.values(weight)
        residual = 0.0 if more is None else self.values(more)
        weight = np.broadcast_to(weight, (len(x), *weight.shape[-2:]))
        exact = np.einsum("mk,mnk->mn", x, weight) + residual
        sizes = np.einsum("mk,mnk->mn", np.abs(x), np.abs(weight)) + np.abs(residual)
        bound = (x.shape[-1] + 2) * 2.0**-24 * sizes + BITS[self.element] * np.abs(exact) + 1e-30
        np.testing.assert_array_less(np.abs(self.values(got) - exact), bound)


CASES = {
    "tiny": Case(1, 1, rows=1),
    "odd": Case(37, 70),
    "vectors": Case(96, 33, sum=True),
    "row": Case(1028, 19, rows=1),
    "rows": Case(333, 17, rows=3, sum=True),
    "no_rows": Case(20, 5, rows=0),
    "halves": Case(37, 20, rows=3, sum=True, element="f16"),
    "bfloats": Case(80, 33, rows=17, element="bf16"),
    "experts": Case(36, 70, experts=5),
    "many_experts": Case(5, 3, experts=300),
    "experts_row": Case(130, 67, rows=1, experts=3),
    "experts_rows": Case(68, 33, rows=4, experts=4),
    "more_experts": Case(3, 3, experts=1500),  # than can be sorted
}


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(joined(CASES), [LowerGroupedLinear(), LowerLinear()])


@pytest.fixture(scope="module")
def loaded(program: Program) -> Any:
    return program.load({name: {"w": case.weight} for name, case in CASES.items()})


def test_what_has_a_kernel(program: Program) -> None:
    refused = [r.reason for r in program.records if "linalg" in r.reason]
    assert refused == ["linalg: 1500 experts; 1023 can be sorted"]
    assert {r.reason for r in program.records} - set(refused) == {"kernel", "kernel with a sum"}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.experts])
def test_products(loaded: Any, name: str) -> None:
    rng, case = np.random.default_rng(1), CASES[name]
    for m in ROWS if case.rows is None else (case.rows,):
        x, residual = (case.stored(rng.standard_normal((m, size))) for size in (case.k, case.n))
        more = [residual] if case.sum else []
        case.close(run(loaded, name, x, *more), x, case.weight, *more)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.experts])
def test_experts(loaded: Any, name: str) -> None:
    """Rows for experts that do not exist are NaN; many rows may have one expert, and most experts no row."""
    rng, case = np.random.default_rng(2), CASES[name]
    experts, weight = case.experts or 0, case.weight
    for m in (0, 1, 9, 64, 200) if case.rows is None else (case.rows,):
        x = rng.standard_normal((m, case.k)).astype(np.float32)
        for expert in (rng.integers(-experts - 1, experts + 1, m), np.full(m, experts - 1)):
            got = run(loaded, name, x, expert)
            known = (expert >= -experts) & (expert < experts)
            assert np.isnan(got[~known]).all()
            case.close(got[known], x[known], weight[expert[known]])


def test_infinity_stays_in_its_row_and_column(loaded: Any) -> None:
    """Channels, rows and columns that a tile has beyond the matrix are no part of it."""
    x = np.ones((3, 37), np.float32)
    x[1, 36] = np.inf
    got = run(loaded, "odd", x)
    assert np.isinf(got[1]).all() and np.isfinite(got[[0, 2]]).all()
