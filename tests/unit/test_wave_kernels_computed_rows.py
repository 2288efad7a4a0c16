"""Projections that compute few rows themselves (a norm, a gate, a slice), on the emulator in every thread order, against f64."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")

from wave_programs import Array, Program, run

from spikingbrain.backend_maca.plan.resolve import resolve
from spikingbrain.backend_maca.run import emulate
from spikingbrain.passes.lower_linear import LowerLinear

pytestmark = pytest.mark.skipif(shutil.which(emulate.compiler()) is None, reason="no C++ compiler")

MAPS = """
#row = affine_map<(i, j) -> (i, j)>
#of_row = affine_map<(i, j) -> (i)>
#of_channel = affine_map<(i, j) -> (j)>
"""
# M rows of K channels; {size} is the operand that M is where it is dynamic.
NORM = """
  %f = linalg.fill ins(%zero : f32) outs(%one : tensor<{M}xf32>) -> tensor<{M}xf32>
  %q = linalg.generic {indexing_maps = [#row, #of_row], iterator_types = ["parallel", "reduction"]}
      ins(%x : tensor<{M}x{K}xf32>) outs(%f : tensor<{M}xf32>) {
  ^bb0(%a: f32, %c: f32):
    %v = arith.mulf %a, %a : f32
    %s = arith.addf %v, %c : f32
    linalg.yield %s : f32
  } -> tensor<{M}xf32>
  %e = tensor.empty({size}) : tensor<{M}x{K}xf32>
  %h = linalg.generic {indexing_maps = [#row, #of_row, #of_channel, #row], iterator_types = ["parallel", "parallel"]}
      ins(%x, %q, %g : tensor<{M}x{K}xf32>, tensor<{M}xf32>, tensor<{K}xf32>) outs(%e : tensor<{M}x{K}xf32>) {
  ^bb0(%a: f32, %b: f32, %w1: f32, %c: f32):
    %mean = arith.divf %b, %channels : f32
    %r = math.rsqrt %mean : f32
    %u = arith.mulf %a, %r : f32
    %p = arith.mulf %u, %w1 : f32
    linalg.yield %p : f32
  } -> tensor<{M}x{K}xf32>"""
# a sum that depends on another one
LAYER_NORM = """
  %f = linalg.fill ins(%zero : f32) outs(%one : tensor<{M}xf32>) -> tensor<{M}xf32>
  %q = linalg.generic {indexing_maps = [#row, #of_row], iterator_types = ["parallel", "reduction"]}
      ins(%x : tensor<{M}x{K}xf32>) outs(%f : tensor<{M}xf32>) {
  ^bb0(%a: f32, %c: f32):
    %s = arith.addf %a, %c : f32
    linalg.yield %s : f32
  } -> tensor<{M}xf32>
  %f2 = linalg.fill ins(%zero : f32) outs(%one : tensor<{M}xf32>) -> tensor<{M}xf32>
  %q2 = linalg.generic {indexing_maps = [#row, #of_row, #of_row], iterator_types = ["parallel", "reduction"]}
      ins(%x, %q : tensor<{M}x{K}xf32>, tensor<{M}xf32>) outs(%f2 : tensor<{M}xf32>) {
  ^bb0(%a: f32, %b: f32, %c: f32):
    %mean = arith.divf %b, %channels : f32
    %d = arith.subf %a, %mean : f32
    %v = arith.mulf %d, %d : f32
    %s = arith.addf %v, %c : f32
    linalg.yield %s : f32
  } -> tensor<{M}xf32>
  %e = tensor.empty({size}) : tensor<{M}x{K}xf32>
  %h = linalg.generic {indexing_maps = [#row, #of_row, #of_row, #row], iterator_types = ["parallel", "parallel"]}
      ins(%x, %q, %q2 : tensor<{M}x{K}xf32>, tensor<{M}xf32>, tensor<{M}xf32>) outs(%e : tensor<{M}x{K}xf32>) {
  ^bb0(%a: f32, %b: f32, %b2: f32, %c: f32):
    %mean = arith.divf %b, %channels : f32
    %d = arith.subf %a, %mean : f32
    %variance = arith.divf %b2, %channels : f32
    %r = math.rsqrt %variance : f32
    %p = arith.mulf %d, %r : f32
    linalg.yield %p : f32
  } -> tensor<{M}x{K}xf32>"""
GATE = """
  %l = tensor.extract_slice %x[0, 0] [{m}, {K}] [1, 1] : tensor<{M}x{2K}xbf16> to tensor<{M}x{K}xbf16>
  %r = tensor.extract_slice %x[0, {K}] [{m}, {K}] [1, 1] : tensor<{M}x{2K}xbf16> to tensor<{M}x{K}xbf16>
  %e = tensor.empty({size}) : tensor<{M}x{K}xbf16>
  %h = linalg.generic {indexing_maps = [#row, #row, #row], iterator_types = ["parallel", "parallel"]}
      ins(%l, %r : tensor<{M}x{K}xbf16>, tensor<{M}x{K}xbf16>) outs(%e : tensor<{M}x{K}xbf16>) {
  ^bb0(%a: bf16, %b: bf16, %c: bf16):
    %unit = arith.constant 1.0 : f32
    %a1 = arith.extf %a : bf16 to f32
    %b1 = arith.extf %b : bf16 to f32
    %n = arith.negf %a1 : f32
    %t = math.exp %n : f32
    %d = arith.addf %t, %unit : f32
    %u = arith.divf %a1, %d : f32
    %v = arith.mulf %u, %b1 : f32
    %p = arith.truncf %v : f32 to bf16
    linalg.yield %p : bf16
  } -> tensor<{M}x{K}xbf16>"""
SLICE = """
  %h = tensor.extract_slice %x[0, 3] [{m}, {K}] [1, 1] : tensor<{M}x{K+5}xf32> to tensor<{M}x{K}xf32>"""


@dataclass(frozen=True)
class Case:
    """Rows of K channels that are made of x, then a projection to N columns; ``rows``: None for any number of them."""

    form: str
    k: int
    n: int
    rows: int | None = None

    @property
    def element(self) -> str:
        return "bf16" if self.form == GATE else "f32"

    @property
    def inputs(self) -> int:
        """Returns the channels of x."""
        return {GATE: 2 * self.k, SLICE: self.k + 5}.get(self.form, self.k)

    def function(self, name: str) -> str:
        t, k = self.element, self.k
        x, w = f"tensor<{{M}}x{self.inputs}x{t}>", f"tensor<{self.n}x{k}x{t}>"
        y, g = f"tensor<{{M}}x{self.n}x{t}>", f"tensor<{k}x{t}>"
        text = f"""
func.func @{name}(%x: {x}) -> {y} {{
  %w = "spikingbrain.parameter"() {{sources = ["{name}.w"], recipe = []}} : () -> {w}
  %g = "spikingbrain.parameter"() {{sources = ["{name}.g"], recipe = []}} : () -> {g}
  %c0 = arith.constant 0 : index
  %zero = arith.constant 0.0 : f32
  %channels = arith.constant {float(k)} : f32
  %m = tensor.dim %x, %c0 : {x}
  %one = tensor.empty({{size}}) : tensor<{{M}}xf32>
{self.form}
  %y = "spikingbrain.linear"(%h, %w) {{columns = {self.n} : i64}} : (tensor<{{M}}x{k}x{t}>, {w}) -> {y}
  return %y : {y}
}}"""
        m = "?" if self.rows is None else str(self.rows)
        names = {"{M}": m, "{K}": str(k), "{2K}": str(2 * k), "{K+5}": str(k + 5)}
        names |= {"{size}": "%m", "{m}": "%m"} if self.rows is None else {"{size}": "", "{m}": m}
        for word, value in names.items():
            text = text.replace(word, value)
        return text

    def stored(self, values: Array) -> Array:
        """Returns values as the program takes them."""
        bits = values.astype(np.float32).view(np.uint32)
        return (bits >> 16).astype(np.uint16) if self.element == "bf16" else bits.view(np.float32)

    def values(self, stored: Array) -> Array:
        if self.element == "bf16":
            return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return stored.astype(np.float64)

    @property
    def weights(self) -> dict[str, Array]:
        rng = np.random.default_rng(0)
        return {
            n: self.stored(rng.standard_normal(s)) for n, s in (("w", (self.n, self.k)), ("g", (self.k,)))
        }

    def row(self, x: Array, gain: Array) -> Array:
        """Returns the rows of the projection in f64."""
        if self.form == NORM:
            return x / np.sqrt(np.mean(x**2, -1, keepdims=True)) * gain
        if self.form == LAYER_NORM:
            return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
        if self.form == GATE:
            a, b = x[:, : self.k], x[:, self.k :]
            return a / (1 + np.exp(-a)) * b
        return x[:, 3 : 3 + self.k]

    def close(self, got: Array, x: Array) -> None:
        """Rows are off by some (K + 16) / 2**24, once for the sums and once for the products, or by a bfloat's rounding."""
        weight, gain = (self.values(self.weights[n]) for n in ("w", "g"))
        rows = self.row(self.values(x), gain)
        sizes = np.abs(rows) @ np.abs(weight).T
        unit = 2.0**-8 if self.element == "bf16" else 0.0
        exact = rows @ weight.T
        bound = (2 * (self.k + 16) * 2.0**-24 + unit) * sizes + unit * np.abs(exact) + 1e-30
        np.testing.assert_array_less(np.abs(self.values(got) - exact), bound)


CASES = {
    "norm": Case(NORM, 96, 33),
    "long_norm": Case(NORM, 700, 17),  # more than one piece of 8 rows
    "norm_row": Case(NORM, 37, 20, rows=1),
    "layer_norm": Case(LAYER_NORM, 130, 5),
    "gate": Case(GATE, 72, 33),
    "gate_rows": Case(GATE, 1100, 3, rows=4),
    "slice": Case(SLICE, 16, 32),
}


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(MAPS + "".join(case.function(name) for name, case in CASES.items()), [LowerLinear()])


@pytest.fixture(scope="module")
def loaded(program: Program) -> Any:
    return program.load({name: case.weights for name, case in CASES.items()})


def _launched(program: Program, name: str, rows: int) -> int:
    plan = json.loads(bytes(program.code["plan.json"]))
    return len(resolve(plan, name, {0: (rows, CASES[name].inputs)}).steps)


def test_few_rows_take_one_launch(program: Program) -> None:
    assert {r.reason for r in program.records} == {"kernel, few rows computed in it"}
    for name, case in CASES.items():
        for rows in (1, 4) if case.rows is None else (case.rows,):
            assert _launched(program, name, rows) == 1, name
    assert _launched(program, "norm", 9) == _launched(program, "gate", 9) == 2


@pytest.mark.parametrize("name", list(CASES))
def test_products(loaded: Any, name: str) -> None:
    rng, case = np.random.default_rng(1), CASES[name]
    for m in (0, 1, 3, 8, 9, 67) if case.rows is None else (case.rows,):
        x = case.stored(rng.standard_normal((m, case.inputs)))
        case.close(run(loaded, name, x), x)


def test_extremes_stay_in_their_rows(loaded: Any) -> None:
    x = np.ones((3, 96), np.float32)
    x[0] *= 1e15
    x[1, 5] = np.inf
    got = run(loaded, "norm", x)
    assert np.isnan(got[1]).all() and np.isfinite(got[[0, 2]]).all()
    np.testing.assert_allclose(got[0], got[2], rtol=1e-5, atol=1e-6)
