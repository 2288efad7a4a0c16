"""What the host of a launch plan refuses or survives: shared memory, threads, sizes out of range, damaged files."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pytest
from test_maca import ELEMENTWISE, compile_text, load, needs_cxx, random, unary
from test_maca_ops import SORT

from spikingbrain.backend_maca.plan.plan import FORMAT
from spikingbrain.backend_maca.plan.resolve import MAX_GRID, resolve
from spikingbrain.backend_maca.run import machine, runtime
from spikingbrain.errors import CallError, CorruptArtifact, OutOfMemory
from spikingbrain.state import State

STEP = """
#id = affine_map<(i) -> (i)>
func.func public @main(%x: tensor<?xf32>, %s: tensor<?xf32>, %t: tensor<?xf32>) -> (tensor<?xf32>, tensor<?xf32>)
    attributes {spikingbrain.donated = [1, 2]} {
  %s1 = linalg.generic {indexing_maps = [#id, #id], iterator_types = ["parallel"]}
      ins(%x : tensor<?xf32>) outs(%s : tensor<?xf32>) {
  ^bb0(%a: f32, %o: f32):
    %0 = arith.addf %a, %o : f32
    linalg.yield %0 : f32
  } -> tensor<?xf32>
  %t1 = linalg.generic {indexing_maps = [#id, #id], iterator_types = ["parallel"]}
      ins(%x : tensor<?xf32>) outs(%t : tensor<?xf32>) {
  ^bb0(%a: f32, %o: f32):
    %0 = arith.mulf %a, %o : f32
    linalg.yield %0 : f32
  } -> tensor<?xf32>
  return %s1, %t1 : tensor<?xf32>, tensor<?xf32>
}"""


@needs_cxx
def test_state_that_is_given_twice_is_refused() -> None:
    program, wide = load(compile_text(STEP)), np.zeros(64, np.float32)
    x, s, t = random(8), random(8, seed=1), random(8, seed=2)
    for arguments, numbers in [
        ([x, s, s], "1 and 2"),
        ([s, s, t], "0 and 1"),
        ([t, s, t], "0 and 2"),
        ([x, wide[:32], wide[16:48]], "1 and 2"),
        ([wide, s, wide[32:40]], "0 and 2"),
    ]:
        with pytest.raises(
            CallError, match=f"arguments {numbers} of 'main' share memory\n  because: a call updates"
        ):
            program.call("main", arguments)
    sums, products = program.call("main", [x, s.copy(), t.copy()])
    np.testing.assert_array_equal(sums, x + s)
    np.testing.assert_array_equal(products, x * t)
    wide[:] = 1
    (sums, _) = program.call("main", [wide[:8], wide[16:24], wide[32:40]])  # side by side, but apart
    assert (sums == 2).all()
    empty = np.zeros(0, np.float32)
    assert program.call("main", [empty, empty, empty])[0].shape == (0,)


@needs_cxx
def test_what_is_only_read_may_be_given_twice() -> None:
    x = random(3, 3)
    (y,) = load(compile_text(ELEMENTWISE)).call("main", [x, x[0], x])
    np.testing.assert_array_equal(y, (x + x[0]) * x)


@needs_cxx
def test_bytes_without_a_sign_are_taken() -> None:
    x = np.arange(256, dtype=np.uint8)
    (y,) = load(compile_text(unary("%r = arith.extui %a : i8 to i32", "i8", "i32"))).call("main", [x])
    np.testing.assert_array_equal(y, x)


@needs_cxx
def test_threads_may_share_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "KEPT_SHAPES", 2)
    program, wrong = load(compile_text(ELEMENTWISE)), []

    def work(seed: int) -> None:
        for n in range(1, 30):
            x, bias = random(n % 7, 5, seed=seed), random(5, seed=n)
            try:
                (y,) = program.call("main", [x, bias, x])
                np.testing.assert_array_equal(y, (x + bias) * x)
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_cxx
def test_buffers_of_a_workspace_lie_apart_on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    text = SORT.replace("SHAPE", "1x1100").replace("DIM", "1").replace("PREDICATE", "olt")
    program, seen = load(compile_text(text)), []
    run = machine.Emulator.run

    def noted(self: Any, steps: Any, buffers: Any) -> None:
        assert steps.workspace
        for step in steps.steps:
            used = {i for i, _ in step.arguments if i in steps.workspace.offsets}
            spans = sorted(self.span(buffers[i]) for i in used)
            seen.append(len(spans))
            for (start, end), (following, _) in itertools.pairwise(spans):
                assert following >= end + (end - start)  # what one runs over by its own length hits nobody
        run(self, steps, buffers)

    monkeypatch.setattr(machine.Emulator, "run", noted)
    x = random(1, 1100)
    values, _ = program.call("main", [x, np.arange(1100).reshape(1, -1)])
    np.testing.assert_array_equal(values, np.sort(x))
    assert max(seen) > 2


def plan_of(shape: list[Any], grid: Any) -> dict[str, Any]:
    buffers = [
        {"role": "input", "dtype": "int8", "shape": [["dim", 0, 0]]},
        {"role": "temporary", "dtype": "int8", "shape": shape},
    ]
    step = {"kernel": "k", "grid": [grid, 1, 1], "arguments": [{"buffer": 1}]}
    entry = {"buffers": buffers, "checks": [], "sizes": [], "launches": [step], "outputs": [], "static": True}
    return {
        "format": FORMAT,
        "kernels": {"k": {"threads": 64, "dynamic_bytes": 0}},
        "entries": {"main": entry},
    }


def test_sizes_out_of_range_are_errors_of_the_call() -> None:
    length = ["dim", 0, 0]
    with pytest.raises(CallError, match=r"a tensor would have sizes \[-2\]"):
        resolve(plan_of([["sub", length, 5]], 1), "main", {0: (3,)})
    for grid in (MAX_GRID + 1, 1 << 32, -1):
        with pytest.raises(
            CallError, match=r"kernel 'k' cannot be launched\n  because: grid .* out of range"
        ):
            resolve(plan_of([1], ["mul", length, grid]), "main", {0: (1,)})


def deep(steps: int) -> str:
    """Returns a module whose sizes each hold the one before three times."""
    lines = [
        f"%b{i} = arith.cmpi slt, %n{i}, %c9 : index\n%t{i} = arith.select %b{i}, %n{i}, %c9 : index\n"
        f"%n{i + 1} = arith.addi %n{i}, %t{i} : index\n"
        for i in range(steps)
    ]
    return f"""
func.func public @main(%x: tensor<?xf32>) -> tensor<?xf32> {{
  %c0 = arith.constant 0 : index
  %c9 = arith.constant 9 : index
  %one = arith.constant 1.0 : f32
  %n0 = tensor.dim %x, %c0 : tensor<?xf32>
  {"".join(lines)}
  %e = tensor.empty(%n{steps}) : tensor<?xf32>
  %y = linalg.fill ins(%one : f32) outs(%e : tensor<?xf32>) -> tensor<?xf32>
  return %y : tensor<?xf32>
}}"""


@needs_cxx
def test_the_plan_of_a_deep_model_stays_short() -> None:
    code = compile_text(deep(30))
    assert len(code["plan.json"]) < 20_000
    for length in (0, 1, 20):
        wanted = length
        for _ in range(30):
            wanted += min(wanted, 9)
        assert load(code).call("main", [np.zeros(length, np.float32)])[0].shape == (wanted,)


@needs_cxx
def test_conditions_of_the_host_may_be_negated() -> None:
    text = STEP.replace(
        "  %s1 = linalg",
        """  %c0 = arith.constant 0 : index
  %c3 = arith.constant 3 : index
  %c9 = arith.constant 9 : index
  %true = arith.constant true
  %n = tensor.dim %x, %c0 : tensor<?xf32>
  %above = arith.cmpi sgt, %n, %c3 : index
  %below = arith.cmpi slt, %n, %c9 : index
  %both = arith.andi %above, %below : i1
  %neither = arith.xori %both, %true : i1
  cf.assert %neither, "between"
  %s1 = linalg""",
        1,
    )
    program = load(compile_text(text))
    for length in (3, 9):
        assert program.call("main", [random(length), random(length), random(length)])
    with pytest.raises(CallError, match="because: between"):
        program.call("main", [random(5), random(5), random(5)])


def test_memory_that_is_not_there_is_one_error() -> None:
    emulator = object.__new__(machine.Emulator)
    with pytest.raises(OutOfMemory, match="this machine has not enough memory"):
        emulator.unwritten(np.dtype(np.uint8), (1 << 60,))


@needs_cxx
def test_a_damaged_plan_is_named() -> None:
    code = compile_text(ELEMENTWISE)
    for text in (b"{", b"[1]", b"\xff"):
        with pytest.raises(CorruptArtifact, match="the launch plan cannot be read"):
            load({**code, "plan.json": text})


@needs_cxx
def test_kernels_that_were_cut_short_are_built_again() -> None:
    code = compile_text(ELEMENTWISE)
    library = load(code).kernels.path
    whole = library.read_bytes()
    for size in (0, 30, 5000, len(whole) - 1):
        library.unlink()  # this process has it open
        library.write_bytes(whole[:size])
        assert load(code).call("main", [random(1, 2), random(2), random(1, 2)])
        assert len(library.read_bytes()) == len(whole)


def test_a_state_of_another_machine_is_refused() -> None:
    one, other = (object.__new__(runtime.Program) for _ in range(2))
    one.machine, other.machine = (type("M", (), {"device": name})() for name in ("host memory", "a card"))
    one.to_device = lambda array: array
    state = State(one, [])
    assert state.fits(one, [])
    assert not state.fits(other, [])
