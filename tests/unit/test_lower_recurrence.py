"""The portable form of linear recurrences against a loop over time, on a CPU through IREE and on the MACA emulator."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_mlir import ir

from spikingbrain.backend import StageContext
from spikingbrain.backend_maca.backend import MacaBackend
from spikingbrain.backend_maca.run import emulate
from spikingbrain.errors import OptionError
from spikingbrain.passes import dialect, pipeline
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.lower_recurrence import LowerRecurrence
from spikingbrain.target import Target

rt = pytest.importorskip("iree.runtime")

Array = np.ndarray[Any, Any]
WITHOUT_VECTORS = Target("portable", "cpu", "iree", "x86-64")
LENGTHS = (
    0,
    1,
    3,
    4,
    5,
    37,
    150,
)  # with chunks of 4: none, part of one, whole, several, more than a block of 16


@dataclass(frozen=True)
class Case:
    """One member of the family of recurrences; ``sizes`` are states, queries of each, keys and values."""

    axis: str
    log: bool = True
    rank_one: bool = False
    exclusive: bool = False
    bonus: bool = False
    reverse: bool = False
    state: bool = True
    element: str = "f32"
    sizes: tuple[int, int, int, int] = (2, 2, 4, 6)

    def name(self) -> str:
        flags = ("log", "rank_one", "exclusive", "bonus", "reverse", "state")
        sizes = "x".join(map(str, self.sizes))
        return "_".join([self.axis, *(f for f in flags if getattr(self, f)), self.element, sizes])

    def shapes(self, b: Any, t: Any) -> dict[str, list[Any]]:
        states, group, keys, values = self.sizes
        decay = {"none": None, "head": [], "key": [keys], "value": [values]}[self.axis]
        by_key = [b, t, states, keys]
        found = {"q": [b, t, states * group, keys], "k": by_key, "v": [b, t, states, values]}
        if decay is not None:
            found["decay"] = [b, t, states, *decay]
        if self.rank_one:
            found |= {"erase": by_key, "predict": by_key}
        if self.bonus:
            found["bonus"] = [states, keys]
        if self.state:
            found["state"] = [b, states, keys, values]
        return found

    def function(self, b: Any = "?", t: Any = "?") -> str:
        """Returns a function of the op alone."""
        shapes = self.shapes(b, t)
        type_ = lambda sizes: f"tensor<{'x'.join(map(str, [*sizes, self.element]))}>"  # noqa: E731
        states, group, keys, values = self.sizes
        results = ", ".join(map(type_, ([b, t, states * group, values], [b, states, keys, values])))
        order = ["q", "k", "v", "decay", "erase", "predict", "bonus", "state"]
        segments = ", ".join(str(int(n in shapes)) for n in order)
        flags = ", ".join(
            f"{key} = {str(value).lower()}"
            for key, value in (
                ("log_decay", self.log),
                ("exclusive", self.exclusive),
                ("reverse", self.reverse),
            )
        )
        arguments = ", ".join(f"%{n}: {type_(s)}" for n, s in shapes.items())
        return (
            f"func.func @{self.name()}({arguments}) -> ({results}) {{\n"
            f'%o, %last = "spikingbrain.linear_recurrence"({", ".join(f"%{n}" for n in shapes)}) {{'
            f'decay_axis = "{self.axis}", {flags}, operandSegmentSizes = array<i32: {segments}>}} : '
            f"({', '.join(map(type_, shapes.values()))}) -> ({results})\n"
            f"return %o, %last : {results}\n}}\n"
        )

    def operands(self, b: int, t: int) -> dict[str, Array]:
        """Returns random operands with resets (0, or -inf) and, as factors, decays below 0 and above 1."""
        rng = np.random.default_rng(t)
        dtype = np.float64 if self.element == "f64" else np.float32
        found = {n: rng.standard_normal(s).astype(dtype) for n, s in self.shapes(b, t).items()}
        found["k"] /= np.sqrt((found["k"] ** 2).sum(-1, keepdims=True))
        if "decay" in found:
            shape = found["decay"].shape
            reset = rng.random(shape) < 0.1
            if self.log:
                found["decay"] = -np.abs(found["decay"]) * rng.choice([0.05, 1, 30], shape).astype(dtype)
                found["decay"][reset] = -np.inf
            else:
                found["decay"] = np.clip(found["decay"], -1.2, 1.2)
                found["decay"][reset] = 0
        if self.rank_one:
            found["erase"] = -rng.uniform(0, 1.5, (b, t, self.sizes[0], 1)).astype(dtype) * found["k"]
            found["predict"] = found["k"] + 0.1 * found["predict"]
        return found

    def expected(self, operands: dict[str, Array]) -> tuple[Array, Array]:
        """Computes the op as its docstring says it, one step at a time, in float64."""
        x = {n: v.astype(np.float64) for n, v in operands.items()}
        b, t, heads, _ = x["q"].shape
        states, group, keys, values = self.sizes
        state = x.get("state", np.zeros((b, states, keys, values)))
        out = np.zeros((b, t, heads, values))
        for i in range(t - 1, -1, -1) if self.reverse else range(t):
            before, k, v = state, x["k"][:, i], x["v"][:, i]
            if "decay" in x:
                a = np.exp(x["decay"][:, i]) if self.log else x["decay"][:, i]
                a = {"head": a[..., None, None], "key": a[..., None], "value": a[:, :, None]}[self.axis]
                state = a * before
            if self.rank_one:
                predicted = np.einsum("bsk,bskv->bsv", x["predict"][:, i], before)
                state = state + x["erase"][:, i][..., None] * predicted[:, :, None]
            state = state + k[..., None] * v[:, :, None]
            q = x["q"][:, i].reshape(b, states, group, keys)
            read = np.einsum("bsgk,bskv->bsgv", q, before if self.exclusive else state)
            if self.bonus:
                read += np.einsum("bsgk,sk,bsk->bsg", q, x["bonus"], k)[..., None] * v[:, :, None]
            out[:, i] = read.reshape(b, heads, values)
        return out, state

    def check(self, call: Any, lengths: Sequence[int] = LENGTHS) -> None:
        for t in lengths:
            operands = self.operands(2, t)
            found = call(*operands.values())
            for got, want in zip(found, self.expected(operands), strict=True):
                scale = max(1.0, np.abs(want).max(initial=0.0))
                limit = scale * (1e-12 if self.element == "f64" else 3e-6)
                np.testing.assert_allclose(got, want, rtol=0, atol=limit, err_msg=f"{self} at T = {t}")


def lowered(text: str, steps: int) -> str:
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.parse(text)
        pipeline.run([LowerRecurrence(steps)], module, PassContext(WITHOUT_VECTORS))
        pipeline.clean(module)
        pipeline.check_lowered(module)
        return str(module)


def compiled(cases: Sequence[Case], steps: int, folder: Path) -> Any:
    """Returns the compiled functions of several cases."""
    (folder / "m.mlir").write_text(lowered("".join(case.function() for case in cases), steps))
    command = ["iree-compile", str(folder / "m.mlir"), "-o", str(folder / "m.vmfb"), "--iree-opt-level=O0"]
    command += ["--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"]
    command += ["--iree-llvmcpu-target-cpu=generic", "--iree-input-demote-f64-to-f32=false"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    config = rt.Config(device=rt.get_device("local-sync"))
    return rt.load_vm_module(rt.VmModule.mmap(config.vm_instance, str(folder / "m.vmfb")), config)


def run(cases: Sequence[Case], steps: int, folder: Path, lengths: Sequence[int] = LENGTHS) -> None:
    program = compiled(cases, steps, folder)
    for case in cases:
        function = program[case.name()]
        case.check(lambda *a, f=function: [r.to_host() for r in f(*a)], lengths)


QUICK = [
    Case("head"),
    Case("key", log=False, exclusive=True, bonus=True, reverse=True),
    Case("key", rank_one=True),
]  # decays by value: on the emulator, and in the slow tests


def test_equals_a_loop(tmp_path: Path) -> None:
    run(QUICK, 4, tmp_path)


def test_chunks_of_the_usual_length(tmp_path: Path) -> None:
    run([Case("none", rank_one=True, element="f64")], 0, tmp_path, (0, 1, 64, 150))


ALL = [
    Case(axis, log, rank_one, exclusive, bonus, reverse, state)
    for axis in ("none", "head", "key", "value")
    for log in ((True, False) if axis != "none" else (True,))
    for rank_one in (False, True)
    for exclusive, bonus, reverse, state in (
        (False, False, False, True),
        (True, False, True, False),
        (True, True, False, True),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["none", "head", "key", "value"])
def test_every_member_equals_a_loop(axis: str, tmp_path: Path) -> None:
    run([case for case in ALL if case.axis == axis], 4, tmp_path)


@pytest.mark.slow
def test_loops_of_many_chunks(tmp_path: Path) -> None:
    """More turns than the shortest inner loop has, and turns that do not fill the last one."""
    cases = [Case("head", rank_one=True), Case("value", rank_one=True)]
    run(cases, 2, tmp_path, (1, 16, 17, 300))


needs_cxx = pytest.mark.skipif(shutil.which(emulate.compiler()) is None, reason="no C++ compiler")


@needs_cxx
@pytest.mark.parametrize(
    ("case", "time", "lengths"),
    [
        (Case("key"), "?", (1, 5, 19)),
        (Case("value", log=False, reverse=True, exclusive=True, bonus=True), "?", (9,)),
        (Case("head", rank_one=True), "3", (3,)),
        (Case("value", rank_one=True), "1", (1,)),
    ],
    ids=lambda x: x.name() if isinstance(x, Case) else "",
)
def test_on_the_maca_emulator(case: Case, time: str, lengths: tuple[int, ...], tmp_path: Path) -> None:
    backend = MacaBackend()
    (status,) = [s for s in backend.targets() if s.target.name == "maca-emulator"]
    context = StageContext(status.target, backend.options(), tmp_path)
    form: Any = lowered(case.function(t=time), 4)
    for stage in backend.stages(status.target).values():
        form = stage(form, context)
    program = backend.load({n: memoryview(c) for n, c in form.items()}, {}, {})
    call = lambda *a: program.call(case.name(), [program.to_device(x) for x in a])  # noqa: E731
    case.check(call, lengths)


def test_a_silent_state_outlives_products_that_overflow(tmp_path: Path) -> None:
    """Each step doubles a state of 0, whose product over a block of chunks is infinite in float32."""
    case = Case("head", log=False, state=False)
    program = compiled([case], 4, tmp_path)
    operands = case.operands(1, 200)
    operands["decay"][:] = 4.0
    operands["k"][:, :198] = 0
    out, _ = program[case.name()](*operands.values())
    np.testing.assert_allclose(out.to_host(), case.expected(operands)[0], rtol=1e-4, atol=1e-5)


def test_chunks_are_powers_of_two() -> None:
    with pytest.raises(OptionError, match="power of two, not 6"):
        lowered(QUICK[0].function(), 6)
