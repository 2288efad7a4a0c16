"""Temporaries of plans whose host reads data to go on: they share memory between two reads, and lose nothing by it."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")

from test_maca_device import OWN, card, clean, runtimes  # noqa: F401
from test_maca_ops import members, program, run

from spikingbrain.artifact import Artifact, write
from spikingbrain.backend import StageContext
from spikingbrain.backend_maca.backend import MacaBackend
from spikingbrain.backend_maca.plan import host_program
from spikingbrain.backend_maca.plan.intervals import Interval, intervals
from spikingbrain.backend_maca.plan.resolve import used_by
from spikingbrain.backend_maca.run import emulate, machine
from spikingbrain.errors import CallError

needs_cxx = pytest.mark.skipif(shutil.which(emulate.compiler()) is None, reason="no C++ compiler")
Array = np.ndarray[Any, Any]
STAGES = 4


def stages(name: str, made: str, size: str) -> str:
    """Returns code that multiplies a square by itself several times."""
    text = ""
    for n in range(STAGES):
        before, after = (name if n == 0 else f"%{made}{n}"), f"%{made}{n + 1}"
        text += f"""
  %{made}e{n} = tensor.empty({size}, {size}) : tensor<?x?xf32>
  %{made}f{n} = linalg.fill ins(%zero : f32) outs(%{made}e{n} : tensor<?x?xf32>) -> tensor<?x?xf32>
  {after} = linalg.matmul ins({before}, {name} : tensor<?x?xf32>, tensor<?x?xf32>)
    outs(%{made}f{n} : tensor<?x?xf32>) -> tensor<?x?xf32>"""
    return text


# A computed element chooses the size of what comes next.
TEXT = f"""
func.func public @main(%x: tensor<?x?xf32>, %sizes: tensor<2xi64>) -> (tensor<?x?xf32>) {{
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %zero = arith.constant 0.0 : f32
  %n = tensor.dim %x, %c0 : tensor<?x?xf32>
  {stages("%x", "a", "%n")}
  %v = tensor.extract %a{STAGES}[%c0, %c0] : tensor<?x?xf32>
  {stages(f"%a{STAGES}", "b", "%n")}
  %p = arith.cmpf ogt, %v, %zero : f32
  %at = arith.select %p, %c1, %c0 : index
  %k0 = tensor.extract %sizes[%at] : tensor<2xi64>
  %k = arith.index_cast %k0 : i64 to index
  %s = tensor.extract_slice %b{STAGES}[0, 0] [%k, %k] [1, 1] : tensor<?x?xf32> to tensor<?x?xf32>
  {stages("%s", "d", "%k")}
  return %d{STAGES} : tensor<?x?xf32>
}}"""


def reference(x: Array, sizes: Array) -> Array:
    """Returns what ``TEXT`` computes."""

    def mixed(y: Array) -> Array:
        return np.linalg.matrix_power(y, STAGES + 1)

    a = mixed(x.astype(np.float64))
    k = sizes[int(a[0, 0] > 0)]
    return mixed(mixed(a)[:k, :k])


@pytest.fixture(scope="module")
def loaded() -> Any:
    return program(TEXT)


CASES = [(n, k, sign) for n, k in ((5, 3), (5, 0), (1, 1), (17, 17)) for sign in (1, -1)]


def arguments(n: int, k: int, sign: int) -> tuple[Array, Array]:
    """Returns a matrix whose powers stay near 1, of either sign, and two sizes of which the second is half the first."""
    x = np.abs(np.random.default_rng(n).standard_normal((n, n))).astype(np.float32)
    return sign * x / x.sum(1, keepdims=True), np.array([k, k // 2])


@needs_cxx
@pytest.mark.parametrize("case", CASES)
def test_the_workspace_changes_no_bit(loaded: Any, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, sizes = arguments(*case)
    (found,) = run(loaded, x, sizes)
    np.testing.assert_allclose(found, reference(x, sizes), rtol=1e-5)
    monkeypatch.setattr(loaded, "_intervals", {"main": []})
    np.testing.assert_array_equal(found, run(loaded, x, sizes)[0])


@needs_cxx
def test_one_workspace_serves_all_intervals(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = memory(loaded, monkeypatch)
    all_apart = memory(loaded, monkeypatch, packed=False)
    assert len(all_apart) == len(asked) - 1 + sum(
        len(i.uses) for i in intervals(loaded.plan["entries"]["main"])
    )
    assert sum(asked) < 0.7 * sum(all_apart)


def memory(loaded: Any, monkeypatch: pytest.MonkeyPatch, packed: bool = True) -> list[int]:
    """Returns the sizes of all memory that a call asks for, in bytes."""
    asked, unwritten = [], machine.Emulator.unwritten
    with monkeypatch.context() as patch:
        patch.setattr(machine.Emulator, "spread", 1)
        if not packed:
            patch.setattr(loaded, "_intervals", {"main": []})

        def noted(self: Any, dtype: Any, shape: Any) -> Array:
            array = unwritten(self, dtype, shape)
            asked.append(array.nbytes)
            return array

        patch.setattr(machine.Emulator, "unwritten", noted)
        loaded.call("main", list(arguments(32, 32, -1)))
    return asked


@needs_cxx
def test_what_lives_together_lies_apart(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, apart = [], machine.Emulator.run

    def noted(self: Any, steps: Any, buffers: Any) -> None:
        for step in steps.steps:
            used = {i for i in used_by(step) if steps.workspace and i in steps.workspace.offsets}
            spans = sorted(self.span(buffers[i]) for i in used)
            seen.append(len(spans))
            for (start, end), (following, _) in itertools.pairwise(spans):
                assert following >= end + (end - start)
        apart(self, steps, buffers)

    monkeypatch.setattr(machine.Emulator, "run", noted)
    loaded.call("main", list(arguments(17, 13, 1)))
    assert max(seen) > 1


@needs_cxx
def test_a_card_runs_them_too(card: Any) -> None:  # noqa: F811
    (status,) = [s for s in MacaBackend().targets() if s.target.name == "maca"]
    code: Any = TEXT
    context = StageContext(status.target, MacaBackend().options(**OWN), Path("."))
    for stage in MacaBackend().stages(status.target).values():
        code = stage(code, context)
    on_card = MacaBackend().load({n: memoryview(c) for n, c in code.items()}, {"device": "maca"}, {})
    assert len(intervals(on_card.plan["entries"]["main"])) == 3
    for case in CASES:
        x, sizes = arguments(*case)
        (result,) = on_card.call("main", [on_card.to_device(x), on_card.to_device(sizes)])
        np.testing.assert_allclose(on_card.to_host(result), reference(x, sizes), rtol=1e-5)


def cut(entry: Any) -> Iterator[Interval]:
    """Yields intervals in which what is used twice is thought to be free one step too early."""
    for interval in intervals(entry):
        uses = {i: (first, max(first, last - 1)) for i, (first, last) in interval.uses.items()}
        yield dataclasses.replace(interval, uses=uses)


@needs_cxx
def test_lives_cut_by_one_step_are_caught(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, sizes = arguments(17, 13, 1)
    monkeypatch.setattr(loaded, "_intervals", {"main": list(cut(loaded.plan["entries"]["main"]))})
    with pytest.raises(emulate.KernelFault, match="global memory that thread"):
        loaded.call("main", [x, sizes])


@needs_cxx
def test_what_a_later_interval_reads_is_missed(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, sizes = arguments(17, 13, 1)
    first, second, third = intervals(loaded.plan["entries"]["main"])
    wrong = dataclasses.replace(first, uses={**first.uses, read_first(loaded): (0, second.begin - 1)})
    monkeypatch.setattr(loaded, "_intervals", {"main": [wrong, second, third]})
    assert np.isnan(loaded.call("main", [x, sizes])[0]).all()


def read_first(loaded: Any) -> int:
    """Returns the buffer of which the host reads an element first; what follows multiplies it."""
    number: int = next(
        step["buffer"] for step in loaded.plan["entries"]["main"]["launches"] if "read" in step
    )
    return number


@needs_cxx
def test_a_size_below_0_is_an_error_of_the_call(loaded: Any) -> None:
    with pytest.raises(CallError, match="would have sizes"):
        loaded.call("main", list(arguments(5, -4, -1)))


def written(folder: Path) -> Path:
    """Writes and builds the program in C++."""
    x = {"name": "x", "shape": ["n", "n"], "dtype": "float32"}
    sizes = {"name": "sizes", "shape": [2], "dtype": "int64"}
    entry = {"inputs": [x, sizes], "outputs": [x], "ranges": {}, "uses_state": False}
    manifest = {"target": {"name": "maca"}, "entries": {"main": entry}}
    write(folder / "artifact", manifest, members(TEXT), [], lambda _: np.zeros(0), {})
    host_program.write(Artifact(folder / "artifact"), folder / "program")
    subprocess.run([folder / "program" / "build.sh", "emulator"], check=True)
    return folder / "program"


def result(folder: Path, x: Array, sizes: Array) -> Array:
    for name, array in (("x", x), ("sizes", sizes)):
        np.save(folder / f"{name}.npy", array)
    subprocess.run(["./program", "-o", "out", "main", "x.npy", "sizes.npy"], cwd=folder, check=True)
    return np.load(folder / "out0.0.npy")  # type: ignore[no-any-return]


@needs_cxx
def test_the_program_in_cpp_packs_them_too(loaded: Any, tmp_path: Path) -> None:
    folder = written(tmp_path)
    for case in CASES:
        x, sizes = arguments(*case)
        np.testing.assert_array_equal(result(folder, x, sizes), loaded.call("main", [x, sizes])[0])


@needs_cxx
@pytest.mark.slow
def test_lives_cut_in_the_program_in_cpp_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host_program, "intervals", lambda entry: list(cut(entry)))
    x, sizes = arguments(17, 13, 1)
    with pytest.raises(subprocess.CalledProcessError):
        result(written(tmp_path), x, sizes)
    assert "global memory that thread" in capfd.readouterr().err


def launch(*buffers: int) -> dict[str, Any]:
    return {"kernel": "k", "grid": [1, 1, 1], "arguments": [{"buffer": i} for i in buffers]}


def read(value: int, buffer: int) -> dict[str, Any]:
    return {"read": value, "buffer": buffer, "shape": [1], "at": [0]}


def found(steps: list[Any], shapes: dict[int, list[Any]] | None = None, outputs: tuple[int, ...] = ()) -> Any:
    """Returns where intervals begin and what is used there, of an entry with nine temporaries."""
    buffers = [
        {"role": "temporary", "dtype": "float32", "shape": (shapes or {}).get(i, [4])} for i in range(9)
    ]
    entry = {"buffers": buffers, "launches": steps, "outputs": [{"buffer": i} for i in outputs]}
    return [(i.begin, dict(i.uses), i.is_known) for i in intervals(entry)]


def test_a_read_is_the_last_use_of_its_interval() -> None:
    steps = [launch(0, 1), launch(1, 2), read(0, 1), launch(2, 3), launch(3, 4)]
    assert found(steps, outputs=(4,)) == [(0, {0: (0, 0), 1: (0, 2)}, True), (3, {3: (3, 4)}, True)]


def test_a_read_may_be_the_last_step() -> None:
    assert found([launch(0, 1), read(0, 1)]) == [(0, {0: (0, 0), 1: (0, 1)}, True)]


def test_nothing_is_found_where_nothing_is_read() -> None:
    assert found([launch(0, 1), {"loop": 0, "from": 0, "to": 3, "by": 1, "steps": [launch(1, 2)]}]) == []


@pytest.mark.parametrize("kind", ["while", "loop", "if"])
def test_a_loop_with_a_read_inside_is_one_interval(kind: str) -> None:
    inner = [launch(1, 2), read(1, 2), launch(3, 4)]
    step = {
        "while": {"while": ["value", 1], "before": inner[:2], "steps": inner[2:]},
        "loop": {"loop": 0, "from": 0, "to": 3, "by": 1, "steps": inner},
        "if": {"if": 1, "then": inner, "else": []},
    }[kind]
    # 1 is carried in, 4 out
    around = found([launch(0, 1), step, launch(4, 5)])
    assert around == [(0, {0: (0, 0)}, True), (1, {2: (1, 1), 3: (1, 1)}, True), (2, {5: (2, 2)}, True)]


def test_sizes_must_be_known_when_the_interval_begins() -> None:
    value, late = ["value", 0], ["value", 1]
    shapes = {2: [["mul", value, 2]], 3: [late], 4: [["div", value, 2]], 5: [["div", 6, value]]}
    steps = [launch(0, 1), read(0, 1), {"set": [[1, ["add", value, 1]]]}, *map(launch, (2, 3, 4, 5))]
    assert found(steps, shapes) == [(0, {0: (0, 0), 1: (0, 1)}, True), (2, {2: (3, 3), 4: (5, 5)}, False)]
