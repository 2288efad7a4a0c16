"""Every target: what compiles, what runs here and with which numbers, and how native tools fail."""

from __future__ import annotations

import inspect
import platform
import shutil
import subprocess
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim
from under_qemu import aarch64_runner, call

import spikingbrain
from spikingbrain import errors
from spikingbrain.backend import StageContext, TargetStatus
from spikingbrain.backend_iree import backend, targets
from spikingbrain.build import Part, compile_code, write_artifact
from spikingbrain.frontend.capture import capture
from spikingbrain.frontend.weights import as_numpy
from spikingbrain.models.llama.model import Llama, LlamaConfig
from spikingbrain.tools import cli

X86 = platform.machine() in ("x86_64", "AMD64")
# Where the code of a target runs: where compiled, on machines with a device, or nowhere that this package knows.
# Every target compiles wherever the compiler is installed.
RUNS = {
    "cpu": "always",
    "x86-64-v3": "cpu features",
    "x86-64-v4": "cpu features",
    "x86-64-v4-vnni": "cpu features",
    "aarch64": "always" if platform.machine() == "aarch64" else "never",
    "aarch64-dotprod": "cpu features" if platform.machine() == "aarch64" else "never",
    "riscv64": "always" if platform.machine() == "riscv64" else "never",
    "vulkan": "device",
    "cuda": "device",
    "rocm": "device",
    "maca": "device",
    "maca-cuda": "device",
    "maca-emulator": "compiler",
}
F32 = 1e-4  # absolute, for logits of order 10 after sums of a hundred products


@pytest.fixture(scope="module")
def status() -> dict[str, TargetStatus]:
    return {s.target.name: s for s in spikingbrain.targets()}


class Gate(nn.Module):
    """A little of everything: products, a reduction, a slice, 64-bit integers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(torch.softmax(gate, -1) * value), (n - 1) % 7


# The table


def test_the_table_names_every_target(status: dict[str, TargetStatus]) -> None:
    assert set(RUNS) == set(status)
    for name, where in RUNS.items():
        note = status[name].note
        assert status[name].compiles, note
        if where in ("always", "never"):
            assert status[name].runs == (where == "always"), note
        if not status[name].runs:
            assert note, f"{name} does not run here and does not say why"
    if X86:
        missing = status["x86-64-v4"].target.features - status["cpu"].target.features
        assert status["x86-64-v4"].runs == (not missing)
    assert status["maca-emulator"].runs == (shutil.which("g++") is not None)


@pytest.mark.parametrize("name", RUNS)
def test_a_small_module(name: str, status: dict[str, TargetStatus], tmp_path: Path) -> None:
    """Compiles for every target; right numbers where it runs, and a refusal that says why where it does not."""
    torch.manual_seed(1)
    model, rows = Gate().eval(), Dim("rows", min=1, max=64)
    x, n = torch.randn(5, 16), torch.arange(-4, 9)
    entry = spikingbrain.Entry((x, n), dynamic_shapes={"x": {0: rows}, "n": None})
    spikingbrain.export(model, {"main": entry}, tmp_path / "gate", target=name)
    if not status[name].runs:
        with pytest.raises((errors.WrongTarget, errors.TargetError)) as caught:
            spikingbrain.load(tmp_path / "gate")
        assert caught.value.why
        return
    program = spikingbrain.load(tmp_path / "gate")
    for count in (1, 5, 33):
        x = torch.randn(count, 16)
        with torch.no_grad():
            expected = model(x, n)
        for got, want in zip(program.main(x.numpy(), n.numpy()), expected, strict=True):
            np.testing.assert_allclose(got, want.numpy(), atol=1e-6, rtol=1e-5)


class Last(nn.Module):
    """The last row of a sum, where the number of rows is known only at run time."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x + y)[:, -1:]


@pytest.mark.parametrize("name", ["vulkan", "maca-emulator"])
def test_a_slice_at_a_dynamic_position(name: str, status: dict[str, TargetStatus], tmp_path: Path) -> None:
    shape = {0: Dim("B", min=1, max=8), 1: Dim("T", min=1, max=64)}
    shapes = {"x": shape, "y": shape}
    entry = spikingbrain.Entry((torch.zeros(2, 3, 32), torch.zeros(2, 3, 32)), dynamic_shapes=shapes)
    spikingbrain.export(Last(), {"main": entry}, tmp_path / "last", target=name)
    if status[name].runs:
        x, y = np.random.default_rng(0).standard_normal((2, 2, 17, 32), np.float32)
        got = spikingbrain.load(tmp_path / "last").main(x, y)
        np.testing.assert_array_equal(got, x[:, -1:] + y[:, -1:])


class Bytes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float8_e5m2).float()


def test_what_has_no_kernel_for_maca_is_refused_at_the_users_line(tmp_path: Path) -> None:
    entry = spikingbrain.Entry((torch.zeros(4, 8),))
    with pytest.raises(errors.UnsupportedOp, match="has no form in MACA") as caught:
        spikingbrain.export(Bytes(), {"main": entry}, tmp_path / "bytes", target="maca")
    assert isinstance(caught.value.where, errors.SourceLine)
    assert "float8" in caught.value.where.quote()


def test_a_generator_that_the_compiler_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_generators", lambda: frozenset({"llvm-cpu"}))
    found = {s.target.name: s for s in targets.statuses()}
    assert found["cpu"].compiles and not found["cuda"].compiles
    assert "this iree-compile has no generator cuda" in found["cuda"].note


def test_columns_of_the_table_line_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["targets"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(RUNS)
    for title, words in {
        "kind": {"cpu", "gpu"},
        "compiles": {"yes", "no"},
        "runs here": {"yes", "no"},
    }.items():
        column = heading.index(title)
        assert {row[column:].split()[0] for row in rows} <= words
        assert all(row[column - 1] == " " for row in rows)


# A language model


@dataclass(frozen=True)
class Tiny:
    """A Llama of two blocks over a window with sinks, captured once for all targets."""

    model: Llama
    captured: Any

    def compile(self, target: str, path: Path) -> None:
        code = compile_code(self.captured.module, target, {})
        (chosen,) = [s.target for s in spikingbrain.targets() if s.target.name == target]
        weights, entries, state = self.captured.weights, self.captured.entries, self.captured.state
        write_artifact(path, [Part(chosen, code, {})], entries, state, lambda n: as_numpy(weights[n]), {}, {})

    def check(self, path: Path, lengths: Sequence[int]) -> None:
        """Feeds texts of two piece by piece: each logit as eager torch has it, the state too."""
        program = spikingbrain.load(path)
        tokens = torch.randint(0, 97, (2, sum(lengths)))
        expected, kept = self.model.initial_state(2), program.new_state(batch=2)
        for piece in torch.split(tokens, list(lengths), dim=1):
            with torch.no_grad():
                logits, expected = self.model(piece, expected)
            got = program.call("decode" if piece.shape[1] == 1 else "prefill", piece.numpy(), state=kept)[0]
            np.testing.assert_allclose(got, logits.numpy(), atol=F32)
        snapshot = kept.snapshot()
        np.testing.assert_array_equal(snapshot["slot_positions"], expected.slot_positions.numpy())
        np.testing.assert_allclose(snapshot["keys.1"][:, :-1], expected.keys[1].numpy()[:, :-1], atol=F32)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    torch.manual_seed(0)
    sizes = dict(vocabulary=97, width=64, layers=2, heads=4, key_value_heads=2, head_size=16, feed_forward=96)
    model = Llama(LlamaConfig(**sizes, context=64, window=8, sinks=1)).eval()
    state, tokens = model.initial_state(2), torch.zeros(2, 5, dtype=torch.int64)
    batch, length = Dim("B", min=1, max=64), Dim("T", min=1, max=4096)
    shapes = {"tokens_BT": {0: batch, 1: length}, "state": {0: batch}}
    prefill = spikingbrain.Entry((tokens, state), dynamic_shapes=shapes)
    shapes = {"tokens_BT": {0: batch}, "state": {0: batch}}
    decode = spikingbrain.Entry((tokens[:, :1], state), dynamic_shapes=shapes)
    return Tiny(model, capture(model, {"prefill": prefill, "decode": decode}, "state"))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("cuda", "rocm")]


@pytest.mark.parametrize("name", ["vulkan", *SLOW, "maca-emulator"])
def test_a_language_model(name: str, tiny: Tiny, status: dict[str, TargetStatus], tmp_path: Path) -> None:
    tiny.compile(name, tmp_path / "tiny")
    if status[name].runs:
        # through an empty, a part-filled and an overflowing window; 17 is two tiles and a rest
        tiny.check(tmp_path / "tiny", [3, 1, 17, 1, 1])


@pytest.mark.slow
@pytest.mark.qemu
def test_a_language_model_on_aarch64(tiny: Tiny, tmp_path: Path) -> None:
    """The target's own kernels (128-bit vectors) under emulation, with the state passed on from call to call."""
    run = aarch64_runner(tmp_path)
    tiny.compile("aarch64", tmp_path / "tiny")
    with zipfile.ZipFile(tmp_path / "tiny") as made:
        made.extractall(tmp_path)
    state = [np.asarray(t) for t in torch.utils._pytree.tree_leaves(tiny.model.initial_state(2))]
    expected = tiny.model.initial_state(2)
    for length in (17, 1, 5):
        tokens = torch.randint(0, 97, (2, length))
        with torch.no_grad():
            logits, expected = tiny.model(tokens, expected)
        entry = "decode" if length == 1 else "prefill"
        got, *state = call(run, tmp_path, entry, [tokens.numpy(), *state], 1 + len(state))
        np.testing.assert_allclose(got, logits.numpy(), atol=F32)
    np.testing.assert_array_equal(state[-1], expected.position.numpy())


# Failures of native tools


def _export(target: str, flags: str, path: Path) -> errors.PassFailed:
    entry = spikingbrain.Entry((torch.zeros(4, 16), torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(errors.PassFailed) as caught:
        spikingbrain.export(Gate(), {"main": entry}, path, target=target, options={"flags": flags})
    assert not path.exists()
    return caught.value


def test_a_refused_flag_leaves_a_reproducer(tmp_path: Path) -> None:
    error = _export("cpu", "--no-such-flag", tmp_path / "gate")
    assert error.what == "iree-compile stopped (exit code 1)"
    assert "Unknown command line argument '--no-such-flag'" in error.why
    folder = Path(error.hint.split()[-1])
    assert (folder / "iree.mlir").is_file() and (folder / "module.mlir").is_file()
    again = subprocess.run(["sh", folder / "command.txt"], capture_output=True, text=True)
    assert again.returncode == 1 and "--no-such-flag" in again.stderr
    shutil.rmtree(folder)


def test_a_failure_in_code_generation_names_the_users_line(tmp_path: Path) -> None:
    """IREE 3.13 knows no sm_90."""
    error = _export("cuda", "--iree-cuda-target=sm_90", tmp_path / "gate")
    assert "missing GPU target" in error.why
    assert isinstance(error.where, errors.SourceLine)
    lines, start = inspect.getsourcelines(Gate)
    assert Path(error.where.file).resolve() == Path(__file__).resolve()
    assert start <= error.where.line < start + len(lines)
    shutil.rmtree(error.hint.split()[-1])


def _compile_stage(module: str, folder: Path) -> Any:
    (chosen,) = [s.target for s in spikingbrain.targets() if s.target.name == "cpu"]
    stage = backend.IreeBackend().stages(chosen)["vmfb"]
    return stage(module, StageContext(chosen, backend.IreeOptions(), folder))


def test_an_op_that_does_not_parse_is_a_failed_pass(tmp_path: Path) -> None:
    with pytest.raises(errors.PassFailed, match=r"iree-compile stopped \(exit code 1\)") as caught:
        _compile_stage("func.func @main() { arith.nothing return }", tmp_path)
    assert "arith.nothing" in caught.value.why and str(tmp_path) in caught.value.hint
    assert "arith.nothing" in (tmp_path / "iree-stderr.txt").read_text()


def test_a_crash_of_the_native_compiler_is_a_failed_pass(tmp_path: Path) -> None:
    """IREE 3.13 crashes on an op of no dialect it knows."""
    module = 'func.func @main() { "nowhere.to_be_found"() : () -> () return }'
    with pytest.raises(errors.PassFailed, match=r"iree-compile stopped \(signal 11\)") as caught:
        _compile_stage(module, tmp_path)
    assert "it crashed in mlir::iree_compiler::" in caught.value.why
    assert str(tmp_path) in caught.value.hint


def test_an_abort_of_the_native_compiler_is_a_failed_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashing = tmp_path / "crashing-compiler"
    crashing.write_text("#!/bin/sh\necho 'iree-compile: Assertion `false` failed.' >&2\nkill -ABRT $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(backend, "_compiler", lambda: str(crashing))
    with pytest.raises(errors.PassFailed, match=r"iree-compile stopped \(signal 6\)") as caught:
        _compile_stage("module {}", tmp_path)
    assert "Assertion" in caught.value.why
    assert str(crashing) in (tmp_path / "command.txt").read_text()
