"""The wave kernels of scans against loops over time, on the MACA emulator in three orders of threads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import test_kernels_scan as pointwise
import test_kernels_selective as recurrences
from test_maca import compile_text, load, needs_cxx
from test_wave_recurrence import WAVES
from torch_mlir import ir

from spikingbrain.backend_maca.run.emulate import ORDERS
from spikingbrain.backend_maca.toolchains import TOOLCHAINS, compile_kernels
from spikingbrain.passes import dialect, pipeline
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.lower_pointwise_scan import LowerPointwiseScan
from spikingbrain.passes.lower_scan import LowerScan

pytestmark = needs_cxx
SELECTIVE = [
    name for name in recurrences.SELECTIVE if name != "large"
]  # no state of 200 entries fits in registers


def code_of(text: str) -> Any:
    """Returns the code of a module whose scans are one launch each."""
    with dialect.load(), ir.Location.unknown():
        module, context = ir.Module.parse(text), PassContext(WAVES)
        pipeline.run([LowerScan(), LowerPointwiseScan()], module, context)
        assert {r.reason for r in context.records} <= {"kernel", "pointwise_scan"}
        pipeline.check_lowered(module)
        pipeline.clean(module)
        return compile_text(str(module))


@dataclass(frozen=True)
class Result:
    """A result as tests of other targets take it."""

    value: Any

    def to_host(self) -> Any:
        return self.value


@dataclass(frozen=True)
class Program:
    """Entry points by name, as tests of other targets call them; all orders of threads agree bit for bit."""

    program: Any

    def __getitem__(self, name: str) -> Callable[..., Sequence[Result]]:
        def call(*arrays: Any) -> list[Result]:
            found = []
            for order in ORDERS:
                self.program.kernels.order = order
                device = [self.program.to_device(a) for a in arrays]
                found.append([np.array(value) for value in self.program.call(name, device)])
            for other in found[1:]:
                for a, b in zip(found[0], other, strict=True):
                    np.testing.assert_array_equal(a, b)
            return [Result(value) for value in found[0]]

        return call


@pytest.fixture(scope="module")
def scans() -> Program:
    cases = [pointwise.function(name, case) for name, case in pointwise.CASES.items()]
    cases += [recurrences.linear(name, *case) for name, case in recurrences.LINEAR.items()]
    cases += [recurrences.selective(name, *recurrences.SELECTIVE[name]) for name in SELECTIVE]
    return Program(load(code_of("\n".join(cases))))


@pytest.mark.parametrize("name", pointwise.CASES)
def test_any_body_agrees_with_the_loop(scans: Program, name: str) -> None:
    for steps, n in [(0, 3), (1, 65), (19, 1), (12, 67), (3, 0)]:
        pointwise.check(scans, name, {"t": steps, "n": n, "b": 3, "w": 2}, seed=n)


@pytest.mark.parametrize("steps", [0, 1, 19])
def test_linear_and_selective_scans_agree_with_the_loop(scans: Program, steps: int) -> None:
    for name in recurrences.LINEAR:
        recurrences.check_linear(scans, name, steps)
    for name in SELECTIVE:
        recurrences.check_selective(scans, name, steps)


def test_any_decay_gives_the_bits_of_the_loop() -> None:
    """Decays of 0, below it and far above 1, infinity and NaN, in f32 and f16; more points than a wave has lanes."""
    for element, dtype in (("f32", np.float32), ("f16", np.float16)):
        matrix, row = f"tensor<?x?x{element}>", f"tensor<?x{element}>"
        code = code_of(f"""func.func @main(%s: {row}, %a: {matrix}, %u: {matrix}) -> ({row}, {matrix}) {{
  %last, %ys = "spikingbrain_control.pointwise_scan"(%s, %a, %u) ({{
  ^bb0(%h: {element}, %d: {element}, %x: {element}):
    %m = arith.mulf %d, %h : {element}
    %n = arith.addf %m, %x : {element}
    "spikingbrain_control.yield"(%n, %n) : ({element}, {element}) -> ()
  }}) {{carried = 1 : i64, scanned = 2 : i64, backwards = [false, false, true],
      maps = [affine_map<(t, n) -> (n)>, affine_map<(t, n) -> (t, n)>, affine_map<(t, n) -> (t, n)>,
              affine_map<(t, n) -> (t, n)>]}} : ({row}, {matrix}, {matrix}) -> ({row}, {matrix})
  return %last, %ys : {row}, {matrix}
}}""")
        launches = json.loads(code["plan.json"])["entries"]["main"]["launches"]
        assert sum("pointwise_scan" in step["kernel"] for step in launches) == 1
        rng = np.random.default_rng(0)
        a, u = (rng.standard_normal((21, 131)).astype(dtype) for _ in range(2))
        a[:, 7], a[4:6, ::3], a[9:12, 5], u[3, 9], u[8, 10] = 0, 0, 30000, np.inf, np.nan
        state = expected = rng.standard_normal(131).astype(dtype)
        steps = []
        with np.errstate(over="ignore", invalid="ignore"):
            for t in range(21):
                wide = a[t].astype(np.float32) * expected + u[t]  # halves are computed in f32
                expected = wide.astype(dtype)
                steps.append(expected)
        found = Program(load(code))["main"](state, a, u)
        np.testing.assert_array_equal(found[0].value, expected)
        np.testing.assert_array_equal(found[1].value, np.stack(steps[::-1]))


@pytest.mark.slow  # clang takes seconds
def test_nothing_spills() -> None:
    (clang,) = [t for t in TOOLCHAINS if t.arch == "gfx90a"]
    if clang.command() is None:
        pytest.skip(f"no {clang.commands[0]}")
    widest = [recurrences.selective(e, {"n": n}, e, False, True) for e, n in (("f32", 64), ("f64", 32))]
    scans = [recurrences.linear(name, *case) for name, case in recurrences.LINEAR.items()]
    source = code_of("\n".join([*widest, *scans]))["kernels.maca"].decode()
    for usage in compile_kernels(source, clang):
        assert usage.registers <= 256 and not usage.spilled_bytes, usage
