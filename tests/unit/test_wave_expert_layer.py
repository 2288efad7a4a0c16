"""Few rows of a layer with experts: gates are computed where they are read, what a token's experts give is added up where it
is computed; on the emulator in every thread order, against f64."""

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
from spikingbrain.passes.lower_grouped_linear import LowerGroupedLinear

pytestmark = pytest.mark.skipif(shutil.which(emulate.compiler()) is None, reason="no C++ compiler")

MAPS = """
#row = affine_map<(i, j) -> (i, j)>
#cube = affine_map<(i, j, k) -> (i, j, k)>
#weight = affine_map<(i, j, k) -> (i, j, 0)>
#token = affine_map<(i, j, k) -> (i, k)>
"""


@dataclass(frozen=True)
class Case:
    """T tokens that go to ``each`` of ``experts``, K channels to N columns; ``read``: something else reads the rows, too."""

    tokens: int
    each: int
    k: int
    n: int
    experts: int = 5
    element: str = "f32"
    read: bool = False

    @property
    def rows(self) -> int:
        return self.tokens * self.each

    def function(self, name: str) -> str:
        r, t, j, k, n, e = self.rows, self.tokens, self.each, self.k, self.n, self.element
        x, h, y, c = (f"tensor<{s}x{e}>" for s in (f"{r}x{2 * k}", f"{r}x{k}", f"{r}x{n}", f"{t}x{j}x{n}"))
        w, g, z = f"tensor<{self.experts}x{n}x{k}x{e}>", f"tensor<{t}x{j}x1xf32>", f"tensor<{t}x{n}xf32>"
        wide = "%b = arith.addf %a, %nothing : f32" if e == "f32" else f"%b = arith.extf %a : {e} to f32"
        result, types = ("%z, %y", f"({z}, {y})") if self.read else ("%z", z)
        return f"""
func.func @{name}(%x: {x}, %e: tensor<{r}xi64>, %g: {g}) -> {types} {{
  %w = "spikingbrain.parameter"() {{sources = ["{name}.w"], recipe = []}} : () -> {w}
  %nothing = arith.constant -0.0 : f32
  %zero = arith.constant 0.0 : f32
  %l = tensor.extract_slice %x[0, 0] [{r}, {k}] [1, 1] : {x} to {h}
  %u = tensor.extract_slice %x[0, {k}] [{r}, {k}] [1, 1] : {x} to {h}
  %o = tensor.empty() : {h}
  %h = linalg.generic {{indexing_maps = [#row, #row, #row], iterator_types = ["parallel", "parallel"]}}
      ins(%l, %u : {h}, {h}) outs(%o : {h}) {{
  ^bb0(%a: {e}, %b: {e}, %c: {e}):
    %p = arith.mulf %a, %b : {e}
    linalg.yield %p : {e}
  }} -> {h}
  %y = "spikingbrain.grouped_linear"(%h, %w, %e) {{columns = {n} : i64}} : ({h}, {w}, tensor<{r}xi64>) -> {y}
  %c = tensor.expand_shape %y [[0, 1], [2]] output_shape [{t}, {j}, {n}] : {y} into {c}
  %o2 = tensor.empty() : tensor<{t}x{j}x{n}xf32>
  %v = linalg.generic {{indexing_maps = [#cube, #weight, #cube], iterator_types = ["parallel", "parallel", "parallel"]}}
      ins(%c, %g : {c}, {g}) outs(%o2 : tensor<{t}x{j}x{n}xf32>) {{
  ^bb0(%a: {e}, %s: f32, %d: f32):
    {wide}
    %p = arith.mulf %b, %s : f32
    linalg.yield %p : f32
  }} -> tensor<{t}x{j}x{n}xf32>
  %o3 = tensor.empty() : {z}
  %f = linalg.fill ins(%zero : f32) outs(%o3 : {z}) -> {z}
  %z = linalg.generic {{indexing_maps = [#cube, #token], iterator_types = ["parallel", "reduction", "parallel"]}}
      ins(%v : tensor<{t}x{j}x{n}xf32>) outs(%f : {z}) {{
  ^bb0(%a: f32, %d: f32):
    %p = arith.addf %a, %d : f32
    linalg.yield %p : f32
  }} -> {z}
  return {result} : {types.strip("()")}
}}"""

    def stored(self, values: Array) -> Array:
        """Returns values as the program takes them: exact in so few bits."""
        exact = (np.round(values * 8).clip(-15, 15) / 8).astype(np.float32)
        return (exact.view(np.uint32) >> 16).astype(np.uint16) if self.element == "bf16" else exact

    def values(self, stored: Array) -> Array:
        if self.element == "bf16":
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float64)

    @property
    def weight(self) -> Array:
        return self.stored(np.random.default_rng(0).standard_normal((self.experts, self.n, self.k)))


CASES = {
    "token": Case(1, 1, 37, 21),
    "two": Case(1, 2, 96, 33),
    "tokens": Case(2, 3, 40, 17, experts=64),
    "long": Case(1, 8, 4200, 3),  # more than one piece of a row
    "bfloats": Case(3, 2, 80, 20, element="bf16"),
    "apart": Case(1, 2, 16, 5, read=True),
    "many": Case(3, 3, 16, 5),  # more rows than few
}
LAUNCHES = {"apart": 2, "many": 4}


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(MAPS + "".join(c.function(name) for name, c in CASES.items()), [LowerGroupedLinear()])


@pytest.fixture(scope="module")
def loaded(program: Program) -> Any:
    return program.load({name: {"w": case.weight} for name, case in CASES.items()})


def test_few_rows_take_one_launch(program: Program) -> None:
    entries = json.loads(bytes(program.code["plan.json"]))["entries"]
    found = {name: len(entries[name]["launches"]) for name in CASES}
    assert found == {name: LAUNCHES.get(name, 1) for name in CASES}


@pytest.mark.parametrize("name", list(CASES))
def test_tokens_are_sums_over_their_experts(loaded: Any, name: str) -> None:
    """A row for an expert that there is not is NaN, and so is its token."""
    rng, case = np.random.default_rng(1), CASES[name]
    x = case.stored(rng.standard_normal((case.rows, 2 * case.k)))
    factors = rng.standard_normal((case.tokens, case.each, 1)).astype(np.float32)
    for expert in (
        rng.integers(-case.experts, case.experts, case.rows),
        np.arange(case.rows) + case.experts - 1,
    ):
        left, right = case.values(x)[:, : case.k], case.values(x)[:, case.k :]
        rows = left * right
        exists = expert < case.experts
        weights = case.values(case.weight)[np.where(exists, expert, 0)]
        shape = (case.tokens, case.each, case.n)
        product = np.where(exists[:, None], np.einsum("rk,rnk->rn", rows, weights), np.nan).reshape(shape)
        sizes = np.einsum("rk,rnk->rn", abs(rows), abs(weights)).reshape(shape)
        found = run(loaded, name, x, expert, factors).astype(np.float64)
        wanted = (product * factors).sum(1)
        unit = 2.0**-7 if case.element == "bf16" else 0.0
        bound = ((case.k + case.each + 2) * 2.0**-24 + unit) * (sizes * abs(factors)).sum(1) + 1e-30
        np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
        known = ~np.isnan(wanted)
        np.testing.assert_array_less(abs(found - wanted)[known], bound[known])


ANY = """
func.func @any(%x: tensor<?x24xf32>, %e: tensor<?xi64>) -> tensor<?x19xf32> {
  %w = "spikingbrain.parameter"() {sources = ["any.w"], recipe = []} : () -> tensor<3x19x24xf32>
  %c0 = arith.constant 0 : index
  %m = tensor.dim %x, %c0 : tensor<?x24xf32>
  %o = tensor.empty(%m) : tensor<?x24xf32>
  %h = linalg.generic {indexing_maps = [#row, #row], iterator_types = ["parallel", "parallel"]}
      ins(%x : tensor<?x24xf32>) outs(%o : tensor<?x24xf32>) {
  ^bb0(%a: f32, %c: f32):
    %p = arith.addf %a, %a : f32
    linalg.yield %p : f32
  } -> tensor<?x24xf32>
  %y = "spikingbrain.grouped_linear"(%h, %w, %e) {columns = 19 : i64}
      : (tensor<?x24xf32>, tensor<3x19x24xf32>, tensor<?xi64>) -> tensor<?x19xf32>
  return %y : tensor<?x19xf32>
}"""


def test_any_number_of_rows() -> None:
    """Few take one launch, unsorted; of many their doubles are written, sorted by expert, and multiplied."""
    program = Program(MAPS + ANY, [LowerGroupedLinear()])
    plan = json.loads(bytes(program.code["plan.json"]))
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 19, 24)).astype(np.float32)
    loaded = program.load({"any": {"w": weight}})
    for rows, launches in ((0, 0), (1, 1), (8, 1), (9, 3), (70, 3)):
        steps = [
            step for step in resolve(plan, "any", {0: (rows, 24), 1: (rows,)}).steps if 0 not in step.grid
        ]
        assert len(steps) == launches
        x, expert = rng.standard_normal((rows, 24)).astype(np.float32), rng.integers(0, 3, rows)
        wanted = np.einsum("rk,rnk->rn", 2 * x.astype(np.float64), weight[expert].astype(np.float64))
        np.testing.assert_allclose(run(loaded, "any", x, expert), wanted, atol=2e-5)
