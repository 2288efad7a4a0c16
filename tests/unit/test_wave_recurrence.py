"""The wave kernels of linear recurrences against a loop over time, on the MACA emulator in three orders of threads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_lower_recurrence import Array, Case
from test_maca import compile_text, load, needs_cxx
from torch_mlir import ir

from spikingbrain.backend_maca.run.emulate import ORDERS
from spikingbrain.backend_maca.toolchains import TOOLCHAINS, compile_kernels
from spikingbrain.passes import dialect, pipeline
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.lower_recurrence import LowerRecurrence
from spikingbrain.target import Target

pytestmark = needs_cxx
WAVES = Target("maca-emulator", "gpu", "maca", "maca", wave_width=64, wave_kernels=True)
FEW, MANY = (0, 1, 9), (0, 1, 16, 37, 150)


def code_of(text: str) -> Any:
    """Returns the code of a module whose recurrences became kernels."""
    with dialect.load(), ir.Location.unknown():
        module, context = ir.Module.parse(text), PassContext(WAVES)
        pipeline.run([LowerRecurrence()], module, context)
        assert [r.reason for r in context.records] == ["kernel"]
        pipeline.clean(module)
        return compile_text(str(module))


def compiled(text: str) -> Any:
    """Returns the program of such a module."""
    return load(code_of(text))


def check(case: Case, lengths: tuple[int, ...], time: Any = "?") -> None:
    program = compiled(case.function(t=time))

    def call(*operands: Array) -> list[Array]:
        results = []
        for order in ORDERS:
            program.kernels.order = order
            results.append(program.call(case.name(), [program.to_device(x) for x in operands]))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                np.testing.assert_array_equal(a, b)
        return results[0]

    case.check(call, lengths)


STEPS = [
    Case("value", rank_one=True, sizes=(1, 2, 5, 80)),
    Case("key", rank_one=True),
    Case("head", rank_one=True, exclusive=True, reverse=True, state=False, sizes=(1, 3, 18, 33)),
    Case("none", rank_one=True, sizes=(1, 1, 300, 7)),
]
TILES = [
    Case("key", sizes=(2, 2, 20, 24)),
    Case("head", rank_one=True, exclusive=True, bonus=True, reverse=True, state=False, sizes=(1, 2, 18, 20)),
    Case("key", log=False, exclusive=True, bonus=True, reverse=True, sizes=(1, 3, 33, 17)),
    Case("head", reverse=True, state=False, sizes=(2, 1, 16, 70)),
    Case("head", log=False, exclusive=True, sizes=(1, 2, 5, 16)),
    Case("none", sizes=(1, 1, 200, 3)),
    Case("value", log=False, reverse=True, sizes=(1, 2, 20, 24)),
    Case("key", log=False, rank_one=True, sizes=(1, 2, 33, 17)),
    Case("none", rank_one=True, sizes=(1, 1, 160, 7)),
]


class Gentle(Case):
    """Decays of values near 1, whose products divide, but for one channel that forgets."""

    def operands(self, b: int, t: int) -> dict[str, Array]:
        found = super().operands(b, t)
        gates = 0.1 * np.random.default_rng(t).uniform(-1, 0, found["decay"].shape)
        gates[:, 20:23, :, 1] = -np.inf
        found["decay"] = (gates if self.log else np.exp(gates)).astype(np.float32)
        return found


GENTLE = [
    Gentle("value", exclusive=True, bonus=True, sizes=(1, 1, 18, 33)),
    Gentle("value", reverse=True, state=False, sizes=(2, 2, 16, 16)),
]


@pytest.mark.parametrize("case", STEPS, ids=Case.name)
def test_steps_equal_a_loop(case: Case) -> None:
    if case.axis == "value":
        check(case, FEW)
    else:
        check(case, (9,), time=9)


@pytest.mark.parametrize(
    "case",
    [*TILES[:2], *(pytest.param(c, marks=pytest.mark.slow) for c in TILES[2:]), GENTLE[0]]
    + [pytest.param(c, marks=pytest.mark.slow) for c in GENTLE[1:]],
    ids=Case.name,
)
def test_tiles_equal_a_loop(case: Case) -> None:
    check(case, MANY)


@pytest.mark.parametrize(
    ("axis", "rank_one"),
    [("key", False), ("value", False), pytest.param("key", True, marks=pytest.mark.slow)],
)
def test_what_is_not_finite_stays_behind_its_step(axis: str, rank_one: bool) -> None:
    case = Gentle(axis, rank_one=rank_one, sizes=(1, 2, 18, 20))
    operands = case.operands(1, 37)
    operands["v"][0, 5, 0, 3], operands["v"][0, 24, 0, 7] = np.inf, np.nan
    operands["q"][0, 2, 1] = np.nan
    if not rank_one:  # it spreads to all columns
        operands["decay"][0, 12, 0, 9], operands["k"][0, 30, 0, 4] = np.nan, np.inf
    program = compiled(case.function())
    with np.errstate(invalid="ignore"):
        wanted = case.expected(operands)
    found = program.call(case.name(), [program.to_device(x) for x in operands.values()])
    for got, want in zip(found, wanted, strict=True):
        known = np.isfinite(want)
        assert not known.all() and known.mean() > 0.1
        np.testing.assert_array_equal(np.isfinite(got), known)
        scale = max(1.0, np.abs(want[known]).max())
        np.testing.assert_allclose(got[known], want[known], rtol=0, atol=3e-6 * scale)


def test_one_token_takes_one_launch() -> None:
    case = Case("key", sizes=(2, 7, 32, 32))
    check(case, (1,), time=1)
    launches = compiled(case.function(t=1)).plan["entries"][case.name()]["launches"]
    assert (
        sum("recurrence" in launch["kernel"] for launch in launches) == 1
    )  # beside it: a copy of what a caller gave


@pytest.mark.slow  # clang takes seconds
def test_nothing_spills_at_the_sizes_of_a_7b() -> None:
    (clang,) = [t for t in TOOLCHAINS if t.arch == "gfx90a"]
    if clang.command() is None:
        pytest.skip(f"no {clang.commands[0]}")
    for case in (Case("key"), Case("value"), Case("key", rank_one=True)):
        source = code_of(replace(case, sizes=(4, 7, 128, 128)).function())["kernels.maca"].decode()
        for usage in compile_kernels(source, clang):
            assert usage.registers <= 256 and not usage.spilled_bytes, usage
