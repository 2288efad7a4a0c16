"""The wave kernels of attention against a loop over queries, on the MACA emulator in three orders of threads."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_kernels_attention import arguments, function, narrowed, reference
from test_maca import compile_text, load, needs_cxx
from test_wave_recurrence import WAVES
from torch_mlir import ir

from spikingbrain.backend_maca.run.emulate import ORDERS
from spikingbrain.passes import dialect, pipeline
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.lower_attention import LowerAttention

pytestmark = needs_cxx
GROUPED, ODD, LONE = (9, 3, 32), (4, 2, 24), (3, 1, 7)


def lowered(text: str) -> tuple[ir.Module, list[str]]:
    module, context = ir.Module.parse(text), PassContext(WAVES)
    pipeline.run([LowerAttention()], module, context)
    pipeline.clean(module)
    return module, [r.reason for r in context.records]


@functools.cache
def compiled(
    heads: tuple[int, int, int], rule: tuple[int, int], cache: str | None, time: str, element: str = "f32"
) -> Any:
    with dialect.load(), ir.Location.unknown():
        text = function("main", heads, rule, time, cache, element=element)
        if time == "1" and cache != "?":
            text = text.replace("<?x?x", "<?x1x")  # one new key as well: the number of keys is known
        module, reasons = lowered(text)
        assert reasons == ["kernel"]
        return load(compile_text(str(module)))


def run(program: Any, inputs: list[np.ndarray]) -> np.ndarray:
    stored = [x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x for x in inputs]
    results = []
    for order in ORDERS:
        program.kernels.order = order
        results.append(program.call("main", [program.to_device(x) for x in stored])[0])
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
    return np.array(results[0])


def check(program: Any, inputs: list[np.ndarray], rule: tuple[int, int]) -> None:
    np.testing.assert_allclose(run(program, inputs), reference(inputs, rule), rtol=0, atol=5e-6)


CASES = [(GROUPED, (40, 2), "?"), (ODD, (33, 0), "?"), (LONE, (0, 0), None)]


@pytest.mark.parametrize(("heads", "rule", "cache"), CASES)
def test_many_tokens(heads: tuple[int, int, int], rule: tuple[int, int], cache: str | None) -> None:
    program = compiled(heads, rule, cache, "?")
    for time in (0, 1, 7, 130):
        check(program, arguments(heads, time, [90, 5] if cache else [0, 0], 70 if cache else None), rule)


def test_a_long_text_looks_where_its_window_is() -> None:
    """The table of bounds passes 70 and more of 80 steps by, none where keys lie in any order, as in entry 1."""
    heads, rule = (1, 1, 8), (130, 2)
    inputs = arguments(heads, 70, [5000, 5000], 5000, seed=1)
    inputs[7][0].sort()
    check(compiled(heads, rule, "?", "?"), inputs, rule)


@pytest.mark.parametrize(
    ("cache", "launches"), [("50", ["decode"]), ("600", ["decode", "combine"]), ("?", ["decode", "combine"])]
)
def test_one_token(cache: str, launches: list[str]) -> None:
    heads, rule = (8, 2, 40), (40, 2)
    program = compiled(heads, rule, cache, "1")
    names = [launch["kernel"].split("_")[1] for launch in program.plan["entries"]["main"]["launches"]]
    assert names == launches
    for slots in [1100, 0, 50] if cache == "?" else [int(cache)]:
        check(program, arguments(heads, 1, [1300, 3], slots), rule)


@pytest.mark.parametrize("time", ["1", "?"])
def test_queries_without_keys_give_zero(time: str) -> None:
    program = compiled(ODD, (33, 0), "?", time)
    inputs = arguments(ODD, 1 if time == "1" else 20, [100], 16)
    inputs[1][0, ::2] = -1  # padding
    inputs[1][0, 1::2] = 3  # older than every key
    inputs[7][:] = -1
    check(program, inputs, (33, 0))
    assert not run(program, inputs).any()


def test_large_scores_and_positions_in_any_order() -> None:
    heads, rule, rng = GROUPED, (40, 2), np.random.default_rng(3)
    inputs = arguments(heads, 150, [300], 70)
    inputs[0] *= 5e3
    for positions in (inputs[1], inputs[4], inputs[7]):
        rng.shuffle(positions[0])
    inputs[4][:, ::7] = -1
    # A score of 1e4 carries an f32 rounding error of 1e-3 into the exponent.
    got = run(compiled(heads, rule, "?", "?"), inputs)
    np.testing.assert_allclose(got, reference(inputs, rule), rtol=0, atol=2e-2)


@pytest.mark.parametrize("element", [pytest.param("f16", marks=pytest.mark.slow), "bf16", "i8"])
def test_narrow_caches(element: str) -> None:
    heads, rule = (4, 2, 32), (40, 2)
    for time in ("1", "?"):
        program = compiled(heads, rule, "48", time, element)
        inputs, exact = narrowed(arguments(heads, 1 if time == "1" else 19, [100, 5], 48), element)
        np.testing.assert_allclose(run(program, inputs), reference(exact, rule), rtol=0, atol=1e-5)


def test_wide_heads_keep_the_form_of_linear_algebra() -> None:
    with dialect.load(), ir.Location.unknown():
        _, (reason,) = lowered(function("main", (1, 1, 320), (0, 0), "?", None))
    assert reason == "linalg: no attention kernel for heads of 320"
