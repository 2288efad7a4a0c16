"""Artifacts as programs in C++: built for the emulator, they give the bits that the Python runtime gives."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torch_mlir")

from test_maca import compile_text, load
from test_maca_ops import TRIANGLE, WHILE, members, program
from test_maca_runtime import deep
from test_maca_streams import drawn, kernels, module_text, planned, two_chains

import spikingbrain
from spikingbrain.artifact import Artifact, write
from spikingbrain.backend_maca.plan import host_program
from spikingbrain.backend_maca.plan.order import order_of
from spikingbrain.backend_maca.plan.plan import evaluate
from spikingbrain.backend_maca.run import emulate
from spikingbrain.errors import ArtifactError
from spikingbrain.tools import cli

pytestmark = pytest.mark.skipif(shutil.which(emulate.compiler()) is None, reason="no C++ compiler")


class Remembering(torch.nn.Module):
    """A projection wide enough for the matrix library, and a state that begins with something."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(24, 40), torch.nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor, scale: torch.Tensor, state: dict[str, torch.Tensor]) -> Any:
        y = self.down(torch.relu(self.up(x))) * scale
        total, seen, number = state["total"] + y.mean(1), state["seen"] + x.shape[1], state["number"] + 1
        results = y + total[:, None], seen * number, (y > 0).to(torch.uint8) + 250, y.bfloat16()
        return (*results, {"total": total, "seen": seen, "number": number})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    model = Remembering().eval()
    batch, length = torch.export.Dim("B", min=1, max=8), torch.export.Dim("T", min=1, max=64)
    total = torch.zeros(2, 24)
    total[:, 3:7] = torch.arange(4) + 0.5
    state = {
        "total": total,
        "seen": torch.zeros(2, dtype=torch.int64),
        "number": torch.full((2,), -1.5, dtype=torch.bfloat16),
    }
    entry = spikingbrain.Entry(
        (torch.randn(2, 5, 24), torch.tensor([3.0]), state),
        dynamic_shapes={"x": {0: batch, 1: length}, "scale": None, "state": {0: batch}},
    )
    path = tmp_path_factory.mktemp("model") / "remembering.sbrain"
    return spikingbrain.export(model, {"step": entry}, path, state="state", target="maca")


@pytest.fixture(scope="module")
def folder(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program") / "standalone"
    assert cli.main(["standalone", str(artifact.path), "-o", str(folder)]) == 0
    subprocess.run([folder / "build.sh", "emulator"], check=True)
    return folder


def run(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([folder / "program", *map(str, words)], cwd=folder, capture_output=True, text=True)


def save(path: Path, array: Any) -> Path:
    np.save(path, array)
    return path


@pytest.mark.parametrize("order", emulate.ORDERS)
def test_a_program_gives_the_bits_of_the_runtime(
    artifact: Artifact, folder: Path, tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIKINGBRAIN_EMULATOR_ORDER", order)
    random = np.random.default_rng(2)
    inputs = [random.standard_normal((3, n, 24)).astype(np.float32) for n in (9, 1, 17)]
    scales = [np.float32([n]) for n in (0, 4, -1)]
    words: list[Any] = ["--batch", 3, "-o", tmp_path / "out"]
    for i, (x, n) in enumerate(zip(inputs, scales, strict=True)):
        words += ["then"] if i else []
        words += ["step", save(tmp_path / f"x{i}.npy", x), save(tmp_path / f"n{i}.npy", n)]
    done = run(folder, *words)
    assert done.returncode == 0, done.stderr
    program = spikingbrain.load(artifact, device="maca-emulator")
    state = program.new_state(3)
    for i, (x, n) in enumerate(zip(inputs, scales, strict=True)):
        for j, wanted in enumerate(program.step(x, n, state=state)):
            found = np.load(tmp_path / f"out{i}.{j}.npy")
            if wanted.dtype.name == "bfloat16":
                wanted = wanted.view(np.uint16)
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted)


def test_a_program_says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    x, n = (
        save(tmp_path / "x.npy", np.ones((1, 4, 24), np.float32)),
        save(tmp_path / "n.npy", np.float32([1])),
    )
    assert run(folder, "--batch", 1, "step", x, n).returncode == 0
    short = tmp_path / "short.npy"
    short.write_bytes(x.read_bytes()[:-1])
    for words, text in [
        (["step", x], "error: step lacks scale\nusage: ./program"),
        (["jump", x, n], "error: there is no entry point jump\nusage: ./program"),
        (["step", x, n, n], "error: step takes no "),
        (["step", save(tmp_path / "i.npy", np.array([1])), n], "i.npy has another type"),
        (["step", save(tmp_path / "w.npy", np.ones((1, 4, 23), np.float32)), n], "w.npy has another shape"),
        (["step", save(tmp_path / "l.npy", np.ones((1, 65, 24), np.float32)), n], "l.npy has T = 65"),
        (["--batch", 2, "step", x, n], "x.npy has B = 1\n  because: elsewhere it is 2"),
        (["step", tmp_path / "none.npy", n], "cannot read"),
        (["step", Path(__file__), n], "is no .npy file"),
        (["step", short, n], "short.npy is too short"),
        (["--batch", 1 << 50, "step", x, n], "not enough memory"),
        (["--batch", 1 << 62, "step", x, n], "no array can have such sizes"),
    ]:
        done = run(folder, *words)
        assert done.returncode != 0
        assert text in done.stderr


def test_a_compiler_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "MACA_PATH": str(tmp_path), "CXX": "no-compiler"}
    for target, name in (("maca", f"{tmp_path}/mxgpu_llvm/bin/mxcc"), ("emulator", "no-compiler")):
        done = subprocess.run([folder / "build.sh", target], env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: there is no {name}; set ")


def test_mxcc_gets_the_documented_command(folder: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "mxgpu_llvm" / "bin" / "mxcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text('#!/bin/sh\necho "$@"\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "MACA_PATH": str(tmp_path)}
    done = subprocess.run([folder / "build.sh"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"-x maca program.cpp -o program --maca-path={tmp_path} --offload-arch=xcore1000 -I. -O3 -std=c++17"
        " -ffp-contract=off -DSB_LIBRARY -lmcblas\n"
    )


def test_an_artifact_without_kernels_for_cards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = spikingbrain.Entry((torch.ones(2),))
    artifact = spikingbrain.export(torch.nn.ReLU(), {"main": entry}, tmp_path / "relu.sbrain")
    assert cli.main(["standalone", str(artifact.path), "-o", str(tmp_path / "out")]) == 1
    assert "because: it has code for cpu\n  try: --target maca" in capsys.readouterr().err


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that reads what it computed to go on; it calls no library."""
    tensor = {"name": "x", "shape": [4], "dtype": "float32"}
    entry = {"inputs": [tensor], "outputs": [tensor, {"dtype": "int64"}], "ranges": {}, "uses_state": False}
    manifest = {"target": {"name": "maca"}, "entries": {"main": entry}}
    folder = tmp_path_factory.mktemp("loops")
    write(folder / "artifact", manifest, members(WHILE), [], lambda _: np.zeros(0), {})
    host_program.write(Artifact(folder / "artifact"), folder / "standalone")
    return folder / "standalone"


def test_loops_that_data_ends(loops: Path, tmp_path: Path) -> None:
    subprocess.run([loops / "build.sh", "emulator"], check=True)
    loaded = program(WHILE)
    for first in (3.0, 1.0, 200.0):
        x = np.float32([first, 0.5, -7, 0])
        done = run(loops, "-o", tmp_path / "out", "main", save(tmp_path / "x.npy", x))
        assert done.returncode == 0, done.stderr
        for i, wanted in enumerate(loaded.call("main", [x])):
            np.testing.assert_array_equal(np.load(tmp_path / f"out0.{i}.npy"), wanted)


@pytest.mark.slow
def test_a_loop_may_need_more_memory_in_a_later_round(tmp_path: Path) -> None:
    entry = {
        "inputs": [{"name": "x", "shape": ["n"], "dtype": "float32"}],
        "outputs": [{"dtype": "float32"}],
        "ranges": {},
        "uses_state": False,
    }
    manifest = {"target": {"name": "maca"}, "entries": {"main": entry}}
    code = members(TRIANGLE.replace("SIZE", "arith.addi %i, %c1"))
    write(tmp_path / "artifact", manifest, code, [], lambda _: np.zeros(0), {})
    host_program.write(Artifact(tmp_path / "artifact"), tmp_path / "program")
    subprocess.run([tmp_path / "program" / "build.sh", "emulator"], check=True)
    x = save(tmp_path / "x.npy", np.zeros(300, np.float32))
    done = run(tmp_path / "program", "-o", tmp_path / "out", "main", x)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "out0.0.npy") == 300 * 301


def test_a_program_that_cannot_be_written_changes_nothing(
    loops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Artifact(loops.parent / "artifact")

    def full(*words: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for existing in (tmp_path / "old", tmp_path / "new"):
        if existing.name == "old":
            host_program.write(artifact, existing)
            (existing / "program.cpp").write_text("mine")
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "copyfile", full)
            with pytest.raises(ArtifactError, match=r"cannot write the program into .*\n.*No space left"):
                host_program.write(artifact, existing)
    assert (tmp_path / "old" / "program.cpp").read_text() == "mine"
    assert not list((tmp_path / "new").iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]


@pytest.mark.slow
def test_long_sizes_have_names(tmp_path: Path) -> None:
    tensor = {"name": "x", "shape": ["n"], "dtype": "float32"}
    entry = {"inputs": [tensor], "outputs": [tensor], "ranges": {}, "uses_state": False}
    manifest = {"target": {"name": "maca"}, "entries": {"main": entry}}
    write(tmp_path / "artifact", manifest, members(deep(12)), [], lambda _: np.zeros(0), {})
    host_program.write(Artifact(tmp_path / "artifact"), tmp_path / "program")
    assert "const int64_t s1 = " in (tmp_path / "program" / "program.cpp").read_text()
    subprocess.run([tmp_path / "program" / "build.sh", "emulator"], check=True)
    x = save(tmp_path / "x.npy", np.zeros(2, np.float32))
    assert run(tmp_path / "program", "-o", tmp_path / "out", "main", x).returncode == 0
    assert np.load(tmp_path / "out0.0.npy").shape == (97,)


def test_what_a_program_does_not_compute(tmp_path: Path) -> None:
    source = tmp_path / "sizes.cpp"
    source.write_text("""
#include "machine.h"
using namespace sb_host;
int main(int, char** words) {
  const int64_t a = atoll(words[2]), b = atoll(words[3]);
  int64_t found = 0;
  switch (words[1][0]) {
    case '/': found = quotient(a, b); break;
    case '%': found = sb_host::remainder(a, b); break;
    case 'c': found = ceildiv(a, b); break;
    case 'f': found = floordiv(a, b); break;
    case '#': found = count_of({a, b}); break;
    case '+': found = step(b); break;
  }
  printf("%lld", (long long)found);
}""")
    headers = [f"-I{host_program.ROOT / name}" for name in ("host", "emulator")]
    command = [emulate.compiler(), "-std=c++17", "-w", "-DSB_EMULATOR", *headers, str(source)]
    subprocess.run([*command, "-c", "-o", tmp_path / "sizes.o"], check=True)
    subprocess.run([emulate.compiler(), tmp_path / "sizes.o", "-o", tmp_path / "sizes"], check=True)

    def compute(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([tmp_path / "sizes", *map(str, words)], capture_output=True, text=True)

    for name, sign in (("div", "/"), ("rem", "%"), ("ceildiv", "c"), ("floordiv", "f")):
        for a in (-7, 0, 6, 7):
            for b in (-3, 2, 7):
                assert int(compute(sign, a, b).stdout) == evaluate([name, a, b], {})
        done = compute(sign, 7, 0)
        assert (done.returncode, "because: it divides by 0" in done.stderr) == (1, True)
    for words in (("#", 1 << 40, 1 << 40), ("#", -1, 2), ("+", 0, 0)):
        done = compute(*words)
        assert (done.returncode, done.stderr[:7]) == (1, "error: ")


def test_a_disk_that_is_full(folder: Path, tmp_path: Path) -> None:
    x, n = (
        save(tmp_path / "x.npy", np.ones((1, 64, 24), np.float32)),
        save(tmp_path / "n.npy", np.float32([1])),
    )
    limited = ["sh", "-c", 'ulimit -f 2; trap "" XFSZ; exec ./program "$@"', "sh", "-o", tmp_path / "out"]
    done = subprocess.run([*limited, "step", x, n], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert "out0.0.npy\n  because: " in done.stderr
    assert not list(tmp_path.glob("out*"))  # nothing half-written


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_builds_a_program(loops: Path, concurrent: Path) -> None:
    for folder in (loops, concurrent):
        subprocess.run([folder / "build.sh", "cuda"], env={**os.environ, "ARCH": "sm_80"}, check=True)


@pytest.fixture(scope="module")
def concurrent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program on two streams."""
    text = module_text(["tensor<?xf32>"] * 2, "tensor<?xf32>", two_chains, kernels)
    tensors = [{"name": name, "shape": ["n"], "dtype": "float32"} for name in "xw"]
    entry = {"inputs": tensors, "outputs": tensors[:1], "ranges": {}, "uses_state": False}
    manifest = {"target": {"name": "maca"}, "entries": {"main": entry}}
    folder = tmp_path_factory.mktemp("concurrent")
    code = compile_text(text, target="maca", streams=2)  # type: ignore[arg-type]
    write(folder / "artifact", manifest, code, [], lambda _: np.zeros(0), {})
    host_program.write(Artifact(folder / "artifact"), folder / "program")
    return folder / "program"


CALLS = 12


def in_all_orders(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns the results of calls with two inputs in turn, in each order, or what went wrong."""
    subprocess.run([folder / "build.sh", "emulator"], check=True)
    files = [
        save(out / f"{n}.npy", np.random.default_rng(n).standard_normal(100, np.float32)) for n in range(4)
    ]
    words, found = ["main", *files[:2], "then", "main", *files[2:], "then"] * (CALLS // 2), []
    for order in emulate.ORDERS:
        monkeypatch.setenv("SPIKINGBRAIN_EMULATOR_ORDER", order)
        done = run(folder, "-o", out / "out", *words[:-1])
        failed = [done.stderr] * bool(done.returncode)
        found.append(failed or [np.load(out / f"out{turn}.0.npy") for turn in range(CALLS)])
    return found


@pytest.mark.parametrize("seed", range(4))
def test_memory_is_free_where_all_that_comes_waits(seed: int) -> None:
    plan = planned(drawn(seed), 3)
    main = plan["entries"]["main"]
    steps, order = main["launches"], order_of(main["launches"])[0]
    freed = host_program._Entry(plan["kernels"], "main", main, None)._last_uses()
    for place, buffers in freed.items():
        for buffer in buffers:
            uses = [n for n, s in enumerate(steps) if {"buffer": buffer} in s["arguments"]]
            later = range(place + 1, len(steps))
            assert all(use <= place for use in uses)
            assert all(order.before(use, step) for use in uses for step in later)
    used = {a["buffer"] for s in steps for a in s["arguments"]}
    assert {buffer for buffers in freed.values() for buffer in buffers} == used - {0}


@pytest.mark.slow
def test_a_program_on_two_streams(concurrent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = in_all_orders(concurrent, tmp_path, monkeypatch)
    loaded = load(compile_text(module_text(["tensor<?xf32>"] * 2, "tensor<?xf32>", two_chains, kernels)))
    given = [np.load(tmp_path / f"{n}.npy") for n in range(4)]
    wanted = [loaded.call("main", pair)[0] for pair in (given[:2], given[2:])] * (CALLS // 2)
    for results in found:
        np.testing.assert_array_equal(results, wanted)


@pytest.mark.slow
def test_a_program_that_waits_for_too_little_shows_it(
    concurrent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (concurrent / "program.cpp").read_text()
    waits = re.findall(r"  m\.wait\(\d, \d\);\n", text)
    assert len(waits) > 3
    wanted = in_all_orders(concurrent, tmp_path, monkeypatch)[0]
    told = []
    for wait in waits:
        broken = tmp_path / "broken"
        shutil.copytree(concurrent, broken, dirs_exist_ok=True)
        (broken / "program.cpp").write_text(text.replace(wait, ""))
        found = in_all_orders(broken, tmp_path, monkeypatch)
        assert any(isinstance(f[0], str) or not np.array_equal(f, wanted) for f in found), wait
        told += [f[0] for f in found if isinstance(f[0], str)]
    assert any("is not begun" in text for text in told)
    assert any("is left alone" in text for text in told)
