"""What torch.compile keeps between processes: code in our cache, traced graphs with their code in torch's own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config

from spikingbrain import build, code_cache, errors
from spikingbrain.backend_iree import cpu
from spikingbrain.frontend.dynamo import aot_cache, lowering
from spikingbrain.frontend.dynamo.options import CompileOptions

# Compiles inference and training of a model with weights of a seed; prints what was compiled and what torch's cache did.
PROGRAM = """
import json, sys
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from spikingbrain import workers

seed, caching = int(sys.argv[1]), sys.argv[2] == "torch's"
torch._functorch.config.enable_autograd_cache = caching
jobs, run = [], workers.run
workers.run = lambda *arguments: jobs.append(1) or run(*arguments)

class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x):
        return torch.sin(x) + self.down(F.silu(self.up(self.norm(x))))

torch.manual_seed(seed)
model, x = Mlp(), torch.randn(3, 16)
fast = torch.compile(model, backend="spikingbrain", dynamic=False)
with torch.no_grad():
    torch.testing.assert_close(fast(x), model(x))
parameters = list(model.parameters())
gradients = [torch.autograd.grad(f(x).square().sum(), parameters) for f in (fast, model)]
torch.testing.assert_close(*gradients)
print(json.dumps({"jobs": len(jobs), **counters["aot_autograd"]}))
"""


@pytest.fixture
def run_program(tmp_path: Path) -> Callable[..., dict[str, int]]:
    """Runs the program in a process of its own, with caches of this test, and returns what it counted."""
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)

    def run(seed: int, caching: str) -> dict[str, int]:
        environment = os.environ | {
            "PYTHONHASHSEED": str(seed),
            "SPIKINGBRAIN_CACHE": str(tmp_path / "ours"),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        }
        command = [sys.executable, file, str(seed), caching]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        found: dict[str, int] = json.loads(done.stdout)
        return found

    return run


@pytest.mark.slow
@pytest.mark.gate
def test_a_second_process_compiles_nothing(run_program: Callable[..., dict[str, int]]) -> None:
    """Not with another seed of hashes, nor with other weights, which are no part of what is kept."""
    first = run_program(1, "torch's")
    assert first["jobs"] > 1 and first["autograd_cache_saved"] == 2
    assert run_program(2, "ours alone") == {"jobs": 0, "total": 2, "ok": 2}
    third = run_program(3, "torch's")
    assert third["jobs"] == 0 and third["autograd_cache_hit"] == 2 and "autograd_cache_miss" not in third


# In one process: torch's cache is asked anew after a reset, and reads files each time.


@pytest.fixture(autouse=True)
def inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch.manual_seed(0)
    yield tmp_path / "inductor" / "aotautograd"
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts what is asked of the compiler, be it in our cache or not."""
    asked: list[str] = []
    compile_code = lowering.compile_code

    def count(module: str, *arguments: Any, **options: Any) -> build.Code:
        asked.append(module)
        return compile_code(module, *arguments, **options)

    monkeypatch.setattr(lowering, "compile_code", count)
    return asked


class Mlp(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 40), nn.Linear(40, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x) + self.down(F.silu(self.up(self.norm(x))))


def wave(x: Tensor) -> Tensor:
    return torch.sin(x) * torch.cos(x) + 2 * x


def check(
    function: Any, *inputs: Tensor, training: bool = False, dynamic: bool = False, **options: Any
) -> str:
    """Compiles anew and compares with eager; returns what torch's cache did: "hit", "saved", "bypass" or nothing."""
    torch._dynamo.reset()
    counters.clear()
    fast = torch.compile(function, backend="spikingbrain", dynamic=dynamic, options=options or None)
    if training:
        leaves = [*inputs, *(function.parameters() if isinstance(function, nn.Module) else ())]
        leaves = [leaf for leaf in leaves if leaf.requires_grad]
        results = [f(*inputs) for f in (fast, function)]
        assert_close(results[0].detach(), results[1].detach(), "result")
        actual, expected = (torch.autograd.grad(r.square().sum(), leaves) for r in results)
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_close(a, e, f"gradient {i}")
    else:
        with torch.no_grad():
            assert_close(fast(*inputs), function(*inputs), "result")
    done = {name.removeprefix("autograd_cache_") for name in counters["aot_autograd"]}
    return " ".join(sorted(done & {"hit", "saved", "bypass"}))


@pytest.mark.slow
def test_graphs_are_kept_with_their_code(compiles: list[str]) -> None:
    x = torch.randn(3, 16)
    assert [check(Mlp(), x), check(Mlp(), x, training=True)] == ["saved", "saved"]
    compiles.clear()
    assert [check(Mlp(), x), check(Mlp(), x, training=True)] == ["hit", "hit"]
    assert compiles == []


def test_what_decides_about_a_graph_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4)
    threads = torch.get_num_threads()
    for options in (
        {},
        {"threads": 3},
        {"level": 1},
        {"library": False},
        {"target": "x86-64-v3"},
        {"strict": True},
    ):
        if options.get("target") and not cpu.features() >= cpu.X86_64_V3:
            continue
        assert check(wave, x, **options) == "saved", options
        assert check(wave, x, **options) == "hit", options
    try:
        torch.set_num_threads(threads + 1)
        assert check(wave, x) == "saved"
    finally:
        torch.set_num_threads(threads)
    assert check(wave, x) == "hit"
    with monkeypatch.context() as patch:
        patch.setattr(code_cache, "source_hash", lambda: "edited")
        assert check(wave, x) == "saved"
    with monkeypatch.context() as patch:
        installed = code_cache.versions()
        patch.setattr(code_cache, "versions", lambda: {**installed, "torch-mlir": "1"})
        assert check(wave, x) == "saved"


def test_code_for_another_cpu_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code is kept with the graph: a folder that two machines share must not mix them up."""
    here = aot_cache._key(CompileOptions())
    features = cpu.features() ^ {"avx512f"}
    monkeypatch.setattr(cpu, "features", lambda: features)
    assert aot_cache._key(CompileOptions()) != here


def test_the_compile_cache_knows_source_lines_apart_from_code(compiles: list[str]) -> None:
    """The same function, further down in another file, needs no compile."""
    text = "import torch\ndef wave(x):\n    return torch.sin(x) * torch.cos(x) + 5 * x\n"
    texts: list[str] = []
    for i, name in enumerate(("one.py", "two.py")):
        scope: dict[str, Any] = {}
        exec(compile("\n" * i + text, f"/models/{name}", "exec"), scope)
        with functorch_config.patch(enable_autograd_cache=False):
            assert check(scope["wave"], torch.randn(4)) == ""
        texts.append(compiles[-1])
    keys = [code_cache.Key.of(text, {}) for text in texts]
    assert "/models/one.py" in texts[0] and "/models/two.py" in texts[1]
    assert keys[0].module == keys[1].module and keys[0].lines != keys[1].lines


def test_artifacts_carry_graphs_to_another_machine(
    compiles: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x = torch.randn(3, 16)
    torch.compiler._cache.CacheArtifactManager.clear()
    assert [check(Mlp(), x), check(Mlp(), x, training=True)] == ["saved", "saved"]
    saved = torch.compiler.save_cache_artifacts()
    assert saved is not None
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "fresh"))
    monkeypatch.setenv("SPIKINGBRAIN_CACHE", str(tmp_path / "fresh, ours"))
    torch.compiler.load_cache_artifacts(saved[0])
    compiles.clear()
    assert [check(Mlp(), x), check(Mlp(), x, training=True)] == ["hit", "hit"]
    assert compiles == []


def test_without_the_cache_nothing_is_read_or_written(inductor: Path, compiles: list[str]) -> None:
    x = torch.randn(4)
    assert check(wave, x, cache=False) == "" and not inductor.exists()
    assert check(wave, x) == "saved"
    before = len(compiles)
    assert check(wave, x, cache=False) == "" and len(compiles) == before + 1


def test_a_dump_is_written_although_the_graph_is_kept(tmp_path: Path) -> None:
    for folder in ("one", "one"):
        assert check(wave, torch.randn(4), dump=str(tmp_path / folder)) == ""
    assert len(list((tmp_path / "one").iterdir())) == 2


def test_dynamic_sizes(compiles: list[str]) -> None:
    assert check(Mlp(), torch.randn(3, 16), dynamic=True) == "saved"
    compiles.clear()
    assert check(Mlp(), torch.randn(3, 16), dynamic=True) == "hit" and compiles == []
    fast = torch.compile(wave, backend="spikingbrain", dynamic=True)
    for _ in range(2):
        torch._dynamo.reset()
        for rows in (3, 7, 2, 3):
            x = torch.randn(rows, 5)
            assert_close(fast(x), wave(x), f"{rows} rows")


def test_a_size_with_a_guard_is_not_taken_for_another() -> None:
    def branches(x: Tensor) -> Tensor:
        return wave(x) if x.shape[0] < 5 else wave(x) - 100

    for rows in (3, 9, 3, 9):
        check(branches, torch.randn(rows, 2), dynamic=True)


class Waves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return wave(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (torch.cos(2 * x) + 2)


TABLE = torch.arange(4.0)
ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "cond": lambda x: torch.cond(x.sum() > 0, wave, lambda x: 3 * x + 1, (x,)),
    "autograd function": lambda x: Waves.apply(x) + 1,  # type: ignore[no-untyped-call]
    "constant tensor": lambda x: wave(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "global tensor": lambda x: wave(x) * TABLE,
    "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(wave, x, use_reentrant=False),
}


@pytest.mark.parametrize("kind", ODD)
def test_graphs_that_may_not_be_kept_run_and_make_no_noise(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(2, 4, requires_grad=kind != "cond")
    with caplog.at_level(logging.WARNING):
        done = [check(ODD[kind], x, training=kind != "cond") for _ in range(2)]
    assert done == (["bypass"] * 2 if kind in ("cond", "autograd function") else ["saved", "hit"])
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_a_graph_that_cannot_be_pickled_is_left_out(
    monkeypatch: pytest.MonkeyPatch, inductor: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assemble = aot_cache.cacheable

    def odd(compile_graph: aot_cache.Compile) -> Any:
        def made(module: Any) -> Any:
            program, report = compile_graph(module)
            program.names["unused"] = lambda: None
            return program, report

        return assemble(made)

    monkeypatch.setattr(aot_cache, "cacheable", odd)
    with caplog.at_level(logging.WARNING):
        assert [check(wave, torch.randn(4)) for _ in range(2)] == ["bypass", "bypass"]
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert not inductor.exists()


@pytest.mark.parametrize("what", ["the compile process died (signal 9)", "iree-compile stopped (signal 6)"])
def test_a_graph_whose_compile_failed_is_compiled_again(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Else one moment without memory would leave a model in eager for good."""

    def fail(*_: Any, **__: Any) -> build.Code:
        raise errors.PassFailed(what, hint="a command reproduces it")

    with monkeypatch.context() as patch:
        patch.setattr(lowering, "compile_code", fail)
        assert check(wave, torch.randn(4)) == "bypass"
    assert check(wave, torch.randn(4)) == "saved"


@pytest.mark.parametrize("content", [b"", b"noise", None])
def test_a_damaged_entry_of_torchs_cache_is_no_error(content: bytes | None, inductor: Path) -> None:
    x = torch.randn(4)
    assert check(wave, x) == "saved"
    (entry,) = [file for file in inductor.rglob("*") if file.is_file()]
    entry.write_bytes(entry.read_bytes()[:-100] if content is None else content)
    assert "hit" not in check(wave, x)


def test_weights_are_not_kept(inductor: Path) -> None:
    """Only how they are packed; each process packs its own."""
    model = Mlp(width=64)
    weight = model.up.weight
    x = torch.randn(3, 64)
    assert check(model, x) == "saved"
    kept = b"".join(f.read_bytes() for f in inductor.rglob("*") if f.is_file())
    assert len(kept) > 0
    for piece in (weight[0], weight[:, 0], weight.T.contiguous()[0, :8], weight[:8, 0]):
        assert piece.detach().contiguous().numpy().tobytes() not in kept
    with torch.no_grad():
        weight.normal_()
    assert check(model, x) == "hit"
    assert check(Mlp(width=64), x) == "hit"
