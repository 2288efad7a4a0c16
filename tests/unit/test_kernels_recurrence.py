"""The kernels of linear recurrences against a plain loop."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_mlir import ir

from spikingbrain.backend_iree.dispatch import wrap_kernels
from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes import dialect
from spikingbrain.passes.kernels import recurrence_blocked, recurrence_sequential
from spikingbrain.passes.kernels.recurrence import emit_recurrence_launch
from spikingbrain.passes.kernels.recurrence_base import SCRATCH_BYTES, Problem, pieces
from spikingbrain.target import Target

rt = pytest.importorskip("iree.runtime")

INFINITY = float("inf")


def cpu(level: str, bits: int, registers: int, *features: str) -> Target:
    return Target(
        f"x86-64-{level}",
        "cpu",
        "iree",
        "x86-64",
        cpu=f"x86-64-{level}",
        features=frozenset(features),
        vector_bits=bits,
        vector_registers=registers,
    )


TARGETS = {
    "v4": cpu("v4", 512, 32, "fma", "avx512f"),
    "v3": cpu("v3", 256, 16, "fma", "avx2"),
    "v2": cpu("v2", 128, 16),  # no FMA
}
WITHOUT_VECTORS = Target("vulkan", "gpu", "iree", "spirv")
AXES = {"none": "", "head": "BTS", "key": "BTSK", "value": "BTSV"}


@dataclass(frozen=True)
class Case:
    """A ``linear_recurrence`` of H heads reading S states of K x V; ``rank_one`` adds erase and predict."""

    target: str
    H: int
    S: int
    K: int
    V: int
    axis: str = "key"
    log: bool = True
    exclusive: bool = False
    reverse: bool = False
    rank_one: bool = False
    bonus: bool = False
    state: bool = True
    B: str = "?"
    T: str = "?"
    element: str = "f32"

    @property
    def fields(self) -> dict[str, str]:
        """Returns the operands with their sizes, by letter."""
        fields = {"q": "BTHK", "k": "BTSK", "v": "BTSV"}
        if self.axis != "none":
            fields["decay"] = AXES[self.axis]
        if self.rank_one:
            fields |= {"erase": "BTSK", "predict": "BTSK"}
        if self.bonus:
            fields["bonus"] = "SK"
        return fields | {"state": "BSKV"} if self.state else fields

    def __str__(self) -> str:
        named = [n for n in ("log", "exclusive", "reverse", "rank_one", "bonus", "state") if getattr(self, n)]
        sizes = f"{self.H}x{self.S}x{self.K}x{self.V}"
        return "-".join([self.target, sizes, self.axis, *named] + [f"T{self.T}"] * (self.T != "?"))


def function(case: Case, name: str = "main") -> str:
    def kind(letters: str) -> str:
        return "tensor<" + "".join(f"{getattr(case, letter)}x" for letter in letters) + f"{case.element}>"

    fields = case.fields
    present = ("q", "k", "v", "decay", "erase", "predict", "bonus", "state")
    segments = ", ".join("1" if n in fields else "0" for n in present)
    flags = {"log_decay": case.log, "exclusive": case.exclusive, "reverse": case.reverse}
    attributes = ", ".join(f"{n} = {str(value).lower()}" for n, value in flags.items())
    results = f"{kind('BTHV')}, {kind('BSKV')}"
    return (
        f"func.func @{name}({', '.join(f'%{n}: {kind(x)}' for n, x in fields.items())}) -> ({results}) {{\n"
        f'%o, %s = "spikingbrain.linear_recurrence"({", ".join(f"%{n}" for n in fields)})'
        f' {{decay_axis = "{case.axis}", {attributes}, operandSegmentSizes = array<i32: {segments}>}}'
        f" : ({', '.join(map(kind, fields.values()))}) -> ({results})\n"
        f"return %o, %s : {results}\n}}\n"
    )


def lowered(text: str, target: Target) -> ir.Module:
    """Returns the module with every recurrence lowered to a kernel."""
    context = dialect.load()
    with context, ir.Location.unknown():
        module = ir.Module.parse(text)
        for function in list(module.body.operations):
            for op in list(function.body.blocks[0].operations):
                if op.operation.name == "spikingbrain.linear_recurrence":
                    emit_recurrence_launch(op, target)
        dialect.verify(module)
    return module


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a function that compiles a case, once."""

    @functools.cache
    def build(case: Case) -> Any:
        if case.target == "v4" and "avx512f" not in Path("/proc/cpuinfo").read_text():
            pytest.skip("this processor has no AVX-512")
        module = lowered(function(case), TARGETS[case.target])
        wrap_kernels(module)
        folder = tmp_path_factory.mktemp("recurrence")
        (folder / "module.mlir").write_text(module.operation.get_asm())
        command = ["iree-compile", str(folder / "module.mlir"), "-o", str(folder / "module.vmfb")]
        command += ["--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"]
        command += [f"--iree-llvmcpu-target-cpu={TARGETS[case.target].cpu}"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        config = rt.Config(device=rt.get_device("local-sync"))
        return rt.load_vm_module(rt.VmModule.mmap(config.vm_instance, str(folder / "module.vmfb")), config)

    return build


def reference(case: Case, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence as the op's docstring says it, one step at a time, in float64."""
    x = {name: array.astype(np.float64) for name, array in inputs.items()}
    batch, time = x["q"].shape[:2]
    state = x.get("state", np.zeros((batch, case.S, case.K, case.V)))
    out = np.zeros((batch, time, case.H, case.V))
    for t in reversed(range(time)) if case.reverse else range(time):
        before, key, value = state, x["k"][:, t], x["v"][:, t]
        if "decay" in x:
            factor = np.exp(x["decay"][:, t]) if case.log else x["decay"][:, t]
            state = before * {"head": factor[..., None, None], "key": factor[..., None]}.get(
                case.axis, factor[:, :, None]
            )
        if case.rank_one:
            predicted = np.einsum("bsk,bskv->bsv", x["predict"][:, t], before)
            state = state + x["erase"][:, t, ..., None] * predicted[:, :, None]
        state = state + key[..., None] * value[:, :, None]
        query = x["q"][:, t].reshape(batch, case.S, -1, case.K)
        result = np.einsum("bsgk,bskv->bsgv", query, before if case.exclusive else state)
        if case.bonus:
            result += np.einsum("bsgk,sk,bsk->bsg", query, x["bonus"], key)[..., None] * value[:, :, None]
        out[:, t] = result.reshape(batch, case.H, case.V)
    return out, state


def arguments(case: Case, batch: int, time: int, gate: float = 0.1, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random inputs; log decays are between 0 and a few times ``-gate``, and erasing is stable."""
    rng = np.random.default_rng(seed)
    sizes = {"B": batch, "T": time} | {letter: getattr(case, letter) for letter in "HSKV"}
    inputs = {}
    for name, letters in case.fields.items():
        x = rng.standard_normal([sizes[letter] for letter in letters], dtype=np.float32)
        if name == "decay":
            x = -gate * abs(x)
            x = x if case.log else np.exp(x)
        elif name in ("erase", "predict"):
            x /= np.linalg.norm(x, axis=-1, keepdims=True)
            x *= -0.5 if name == "erase" else 1
        elif name in ("q", "k"):
            x *= case.K**-0.5
        inputs[name] = x
    return inputs


def check(compiled: Any, case: Case, inputs: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    """Compares a call with the loop; errors are relative to the largest value."""
    results = [r.to_host() for r in compiled(case).main(*inputs.values())]
    for name, got, expected in zip(("output", "state"), results, reference(case, inputs), strict=True):
        assert got.shape == expected.shape
        scale = max(1.0, np.abs(expected).max(initial=0))
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale, err_msg=name)


CASES = [
    Case("v4", 2, 2, 64, 96),
    Case("v4", 7, 1, 40, 65),  # grouped heads; neither rows nor columns are whole vectors
    Case("v4", 4, 2, 33, 24, axis="value", log=False, reverse=True),
    Case("v4", 6, 2, 20, 33, log=False, exclusive=True, bonus=True, reverse=True),
    Case("v4", 2, 2, 36, 1, axis="none", state=False),  # as normalisers are
    Case("v4", 4, 2, 36, 72, axis="head", rank_one=True),
    Case("v4", 20, 1, 17, 65, rank_one=True, exclusive=True, bonus=True, reverse=True),
    Case("v3", 6, 2, 40, 35),
    Case("v3", 4, 2, 24, 40, axis="head", log=False, exclusive=True),
    Case("v3", 8, 2, 33, 20, axis="value", rank_one=True, exclusive=True),
    Case("v2", 6, 2, 37, 18, axis="value", exclusive=True),
    Case("v2", 3, 3, 5, 7, axis="none", rank_one=True, state=False),
]
DECAYED = [case for case in CASES if case.axis != "none"]


@pytest.mark.parametrize("case", CASES, ids=str)
class TestAgainstLoop:
    @pytest.mark.parametrize("time", [0, 1, 3, 16, 17, 70])
    def test_lengths(self, compiled: Any, case: Case, time: int) -> None:
        check(compiled, case, arguments(case, 2, time))

    def test_large_values(self, compiled: Any, case: Case) -> None:
        inputs = arguments(case, 1, 33)
        for name in ("q", "k", "v"):
            inputs[name] *= 1e3
        check(compiled, case, inputs)

    def test_batch_entries_do_not_mix(self, compiled: Any, case: Case) -> None:
        inputs = arguments(case, 3, 9)
        one = {name: x if name == "bonus" else x[1:2].copy() for name, x in inputs.items()}
        both = [r.to_host() for r in compiled(case).main(*inputs.values())]
        alone = [r.to_host() for r in compiled(case).main(*one.values())]
        for b, a in zip(both, alone, strict=True):
            np.testing.assert_array_equal(b[1:2], a)

    def test_any_split_gives_the_same(self, compiled: Any, case: Case) -> None:
        if not case.state:
            pytest.skip("the second part has no place for the state of the first")
        inputs = arguments(case, 1, 40)
        whole = [r.to_host() for r in compiled(case).main(*inputs.values())]
        for n in (1, 13):
            state, outputs = inputs["state"], []
            parts = [slice(None, n), slice(n, None)]
            for part in parts[::-1] if case.reverse else parts:
                some = {m: x if m in ("bonus", "state") else x[:, part].copy() for m, x in inputs.items()}
                out, state = (r.to_host() for r in compiled(case).main(*(some | {"state": state}).values()))
                outputs.append(out)
            joined = np.concatenate(outputs[::-1] if case.reverse else outputs, 1)
            np.testing.assert_allclose(joined, whole[0], rtol=0, atol=1e-5)
            np.testing.assert_allclose(state, whole[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", DECAYED, ids=str)
class TestDecays:
    @pytest.mark.parametrize("gate", [1.0, 3.0, 20.0, 1e3, 1e30])
    def test_strong(self, compiled: Any, case: Case, gate: float) -> None:
        check(compiled, case, arguments(case, 1, 50, gate))

    def test_exact_zeros(self, compiled: Any, case: Case) -> None:
        inputs = arguments(case, 1, 50)
        chosen = np.random.default_rng(1).random(inputs["decay"].shape) < 0.05
        inputs["decay"][chosen] = -INFINITY if case.log else 0.0
        check(compiled, case, inputs)

    def test_all_zero_forgets_exactly(self, compiled: Any, case: Case) -> None:
        if case.rank_one:
            pytest.skip("the erased part is read from the state before")
        inputs = arguments(case, 1, 20)
        inputs["decay"][:] = -INFINITY if case.log else 0.0
        _, state = (r.to_host() for r in compiled(case).main(*inputs.values()))
        last = 0 if case.reverse else -1
        expected = inputs["k"][:, last, ..., None] * inputs["v"][:, last, :, None]
        np.testing.assert_array_equal(state, expected)

    def test_growth(self, compiled: Any, case: Case) -> None:
        inputs = arguments(case, 1, 12)
        inputs["decay"][:] = np.log(2.0) if case.log else 2.0
        check(compiled, case, inputs)

    def test_signs(self, compiled: Any, case: Case) -> None:
        if case.log:
            pytest.skip("an exponential has no sign")
        inputs = arguments(case, 1, 50)
        inputs["decay"] *= np.random.default_rng(1).choice([-1, 1], inputs["decay"].shape).astype(np.float32)
        check(compiled, case, inputs)

    def test_nan_is_kept(self, compiled: Any, case: Case) -> None:
        inputs = arguments(case, 1, 40)
        inputs["decay"][0, 20] = np.nan
        out, state = (r.to_host() for r in compiled(case).main(*inputs.values()))
        assert np.isnan(state).all()
        assert np.isfinite(out[0, 21:] if case.reverse else out[0, :20]).all()

    def test_overflow_is_that_of_the_loop(self, compiled: Any, case: Case) -> None:
        if not case.log or case.rank_one:
            pytest.skip("of exponentials")
        inputs = arguments(case, 1, 3)
        inputs["decay"][:] = 0.0
        inputs["decay"][0, 1] = 1e3
        _, state = (r.to_host() for r in compiled(case).main(*inputs.values()))
        assert np.isinf(state).all()


@pytest.mark.parametrize("rank_one", [False, True])
def test_one_known_step(compiled: Any, rank_one: bool) -> None:
    case = Case("v3", 4, 2, 32, 48, rank_one=rank_one, T="1", B="1")
    check(compiled, case, arguments(case, 1, 1))


def test_long_weak_decay_stays_close(compiled: Any) -> None:
    """Errors of factors add up over the memory of the state, here a thousand steps."""
    case = CASES[0]
    inputs = arguments(case, 1, 4000)
    inputs["decay"][:] = -1e-3
    check(compiled, case, inputs, 3e-5)


def test_equal_ops_share_a_kernel() -> None:
    case = CASES[0]
    text = function(case, "a") + function(case, "b") + function(dataclasses.replace(case, reverse=True), "c")
    names = [op.name.value for op in lowered(text, TARGETS["v3"]).body.operations]
    assert len([name for name in names if name.startswith("recurrence")]) == 2


def test_names_do_not_depend_on_the_order() -> None:
    one, two = (function(case, name) for case, name in zip(CASES, "ab", strict=False))
    names = [
        {op.name.value for op in lowered(text, TARGETS["v4"]).body.operations}
        for text in (one + two, two + one)
    ]
    assert names[0] == names[1]


def test_state_is_updated_in_place() -> None:
    module = lowered(function(CASES[0]), TARGETS["v3"])
    (launch,) = (
        op
        for function in module.body.operations
        for op in function.body.blocks[0].operations
        if op.operation.name == "spikingbrain_control.launch"
    )
    assert [entry.value for entry in launch.attributes["tied"]] == [-1, 4]
    assert launch.operands[3 + 4].type == launch.results[1].type


@pytest.mark.parametrize("length", range(1, 100))
def test_pieces_cover_a_length_once(length: int) -> None:
    for lanes, vectors in ((16, 4), (8, 2), (4, 1)):
        at = 0
        for piece in pieces(length, lanes, vectors):
            assert piece.start == at
            assert piece.tiles > 0
            assert piece.lanes <= lanes
            assert piece.vectors <= vectors
            at = piece.end
        assert at == length


def test_scratch_stays_below_the_stack_limit() -> None:
    for target in TARGETS.values():
        for axis in AXES:
            for heads, key_size, value_size in ((1, 128, 128), (7, 128, 128), (28, 64, 96), (1, 256, 512)):
                problem = Problem(heads, 1, key_size, value_size, axis, True, True, False, False, True, None)
                schedule = recurrence_blocked.plan(problem, target)
                assert value_size % schedule.columns == 0
                used = recurrence_blocked.scratch_bytes(problem, schedule.steps, schedule.columns)
                assert used <= SCRATCH_BYTES
                steps = recurrence_sequential.plan(problem, target).steps
                assert recurrence_sequential.scratch_bytes(problem, steps) <= SCRATCH_BYTES


REFUSED = [
    (CASES[0], WITHOUT_VECTORS, "no vector registers"),
    (dataclasses.replace(CASES[0], element="f64"), TARGETS["v3"], "must be f32, not f64"),
    (Case("v3", 4, 4, 32, "?"), TARGETS["v3"], "dynamic or empty state"),  # type: ignore[arg-type]
    (Case("v3", 1, 1, 20000, 64, rank_one=True), TARGETS["v3"], "exceeds 28672 bytes of scratch"),
    (Case("v3", 500, 1, 64, 64), TARGETS["v3"], "exceeds 28672 bytes of scratch"),
]


@pytest.mark.parametrize(("case", "target", "message"), REFUSED)
def test_refusals(case: Case, target: Target, message: str) -> None:
    context = dialect.load()
    with context, ir.Location.unknown():
        module = ir.Module.parse(function(case))
        before = module.operation.get_asm()
        with pytest.raises(UnsupportedOp, match=message) as raised:
            emit_recurrence_launch(module.body.operations[0].body.blocks[0].operations[0], target)
        assert module.operation.get_asm() == before
    assert raised.value.hint
