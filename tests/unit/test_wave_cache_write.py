"""The wave kernel of cache writes against a loop over rows, on the MACA emulator in three orders of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_maca import compile_text, load, needs_cxx
from test_wave_recurrence import WAVES
from torch_mlir import ir

from spikingbrain.backend_maca.run.emulate import ORDERS
from spikingbrain.passes import dialect, pipeline
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.lower_cache_write import LowerCacheWrite

pytestmark = needs_cxx
BITS = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "i8": np.int8, "i64": np.int64}


def compiled(row: tuple[int | str, ...], element: str, reason: str = "kernel") -> Any:
    tail = "".join(f"x{n}" for n in row)
    cache, rows = (f"tensor<?x?{tail}x{element}>" for _ in range(2))
    text = (
        f"func.func @main(%c: {cache}, %r: {rows}, %s: tensor<?x?xi64>) -> {cache} {{\n"
        f'%n = "spikingbrain.cache_write"(%c, %r, %s) : ({cache}, {rows}, tensor<?x?xi64>) -> {cache}\n'
        f"return %n : {cache}\n}}"
    )
    with dialect.load(), ir.Location.unknown():
        module, context = ir.Module.parse(text), PassContext(WAVES)
        pipeline.run([LowerCacheWrite()], module, context)
        assert [r.reason for r in context.records] == [reason]
        return load(compile_text(str(module)))


@pytest.mark.parametrize(
    ("row", "element"), [((3, 5), "f32"), ((2, 64), "bf16"), ((), "i64"), ((4, 33), "i8"), ((7,), "f16")]
)
def test_later_rows_stay_and_slots_outside_are_dropped(row: tuple[int, ...], element: str) -> None:
    program, rng = compiled(row, element), np.random.default_rng(0)
    for slots_count, time in [(9, 4), (5, 200), (1, 1), (6, 0), (0, 3)]:
        cache, rows = (rng.integers(-99, 99, (2, n, *row)).astype(BITS[element]) for n in (slots_count, time))
        slots = rng.integers(-1, slots_count + 1, (2, time))
        expected = cache.copy()
        for b, t in np.ndindex(*slots.shape):
            if 0 <= slots[b, t] < slots_count:
                expected[b, slots[b, t]] = rows[b, t]
        for order in ORDERS:
            program.kernels.order = order
            (got,) = program.call("main", [program.to_device(x) for x in (cache, rows, slots)])
            np.testing.assert_array_equal(np.array(got).view(expected.dtype), expected)


@pytest.mark.parametrize(
    ("row", "declared", "reason"),
    [
        ((3, 0), (3, 0), "there is nothing to write"),
        ((2, 5), (2, "?"), "linalg: rows of a size that is not known"),
    ],
)
def test_rows_without_a_kernel(row: tuple[int, ...], declared: tuple[int | str, ...], reason: str) -> None:
    program = compiled(declared, "f32", reason)
    cache, rows = np.ones((2, 4, *row), np.float32), np.zeros((2, 3, *row), np.float32)
    rows[:, 2] = 7
    (got,) = program.call("main", [cache, rows, np.int64([[1, 9, 1], [0, 3, -1]])])
    expected = cache.copy()
    expected[0, 1], expected[1, 0], expected[1, 3] = 7, 0, 0
    np.testing.assert_array_equal(got, expected)


def test_writes_to_the_same_slots_are_one_launch() -> None:
    """A second write to the same cache is a launch of its own."""
    cache, rows = "tensor<?x?x5xf32>", "tensor<?x?x5xf32>"
    write = f'"spikingbrain.cache_write"(%{{}}, %{{}}, %s) : ({cache}, {rows}, tensor<?x?xi64>) -> {cache}'
    arguments = ", ".join(f"%{name}: {cache}" for name in ("a", "b", "c", "p", "q", "r"))
    text = f"""func.func @main({arguments}, %s: tensor<?x?xi64>) -> ({", ".join([cache] * 4)}) {{
  %na = {write.format("a", "p")}
  %nb = {write.format("b", "q")}
  %nc = {write.format("c", "r")}
  %again = {write.format("c", "p")}
  return %na, %nb, %nc, %again : {", ".join([cache] * 4)}
}}"""
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.parse(text)
        pipeline.run([LowerCacheWrite()], module, PassContext(WAVES))
        lowered = str(module)
    assert lowered.count("spikingbrain_control.launch") == 2
    program, rng = load(compile_text(lowered)), np.random.default_rng(1)
    a, b, c = (rng.standard_normal((2, 4, 5)).astype(np.float32) for _ in range(3))
    p, q, r = (rng.standard_normal((2, 3, 5)).astype(np.float32) for _ in range(3))
    slots = np.int64([[1, 9, 1], [0, 3, -1]])
    for order in ORDERS:
        program.kernels.order = order
        got = program.call("main", [program.to_device(x) for x in (a, b, c, p, q, r, slots)])
        for old, new, written in zip((a, b, c, c), got, (p, q, r, p), strict=True):
            expected = old.copy()
            expected[0, 1], expected[1, 0], expected[1, 3] = written[0, 2], written[1, 0], written[1, 1]
            np.testing.assert_array_equal(np.array(new), expected)
