"""What a user of torch.compile meets when something is wrong, refused or missing."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import spikingbrain
from spikingbrain import workers
from spikingbrain.errors import OptionError, TargetError, UnsupportedOp

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def wave(x: Tensor) -> Tensor:
    return (x.tanh() * 2 + 1).exp()


def unsupported(x: Tensor) -> Tensor:
    singular = torch.linalg.svdvals(x)
    spectrum = torch.fft.rfft(x).abs()
    return singular.sum() + (spectrum.tanh() * 2 + 1).exp()


def line_of(function: Callable[..., Any], text: str) -> str:
    """Returns FILE:LINE of the first line of a function that holds a text."""
    lines = Path(__file__).read_text().splitlines()
    start = function.__code__.co_firstlineno
    return next(f"{__file__}:{i + 1}" for i in range(start, len(lines)) if text in lines[i])


# Options are checked before anything runs.


def test_an_unknown_option_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(
        OptionError, match=r"unknown option 'thread'(.|\n)*try: 'threads'; known: cache, check_finite, dump"
    ):
        spikingbrain.compile(wave, thread=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threads": "2"}, "option 'threads' is '2'\n  because: it must be of type int"),
        ({"threads": True}, "it must be of type int"),
        ({"level": 7}, "it must be in 0 to 2"),
        ({"strict": 1}, "it must be of type bool"),
    ],
)
def test_a_wrong_option_says_what_would_be_right(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        spikingbrain.compile(wave, **options)
    assert message in str(caught.value)


def test_options_given_to_torch_are_checked_too() -> None:
    compiled = torch.compile(wave, backend="spikingbrain", options={"thread": 1})
    with pytest.raises(BackendCompilerFailed, match="unknown option 'thread'"):
        compiled(torch.ones(2))


def test_targets_that_are_unknown_or_elsewhere() -> None:
    with pytest.raises(TargetError, match=r"unknown target 'gpu'\n  try: one of cpu, "):
        spikingbrain.compile(wave, target="gpu")
    with pytest.raises(TargetError, match=r"cannot run target 'riscv64' here\n  because: "):
        spikingbrain.compile(wave, target="riscv64")
    with pytest.raises(
        TargetError, match=r"memory(.|\n)*spikingbrain.export|cannot run target 'vulkan' here"
    ):
        spikingbrain.compile(wave, target="vulkan")


# Ops and programs that cannot be compiled.


def test_an_unsupported_op_runs_in_eager_and_is_right() -> None:
    x = torch.randn(3, 6)
    assert_close(spikingbrain.compile(unsupported)(x), unsupported(x), "result")
    regions = spikingbrain.explain(unsupported, x).regions
    eager = {op: r for r in regions if r.status == "eager" for op in r.ops}
    assert eager["_linalg_svd"].where == line_of(unsupported, "svdvals")
    assert eager["_fft_r2c"].reason == "element type complex64"


def test_strict_lists_every_op_with_its_line() -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        spikingbrain.compile(unsupported, strict=True)(torch.randn(3, 6))
    assert isinstance(caught.value.inner_exception, UnsupportedOp)
    text = str(caught.value)
    assert f"_linalg_svd at {line_of(unsupported, 'svdvals')}: " in text
    assert f"_fft_r2c, abs at {line_of(unsupported, 'rfft')}: element type complex64" in text


def test_strict_is_content_with_what_compiles() -> None:
    x = torch.randn(3, 6)
    assert_close(spikingbrain.compile(wave, strict=True)(x), wave(x), "result")


def branches(x: Tensor) -> Tensor:
    y = x.tanh() * 2 + 1
    if y.sum() > 0:
        y = y.exp() * 3 - 1
    return y * y.mean().item()


def test_numbers_and_branches_that_depend_on_data_work_and_are_listed() -> None:
    x = torch.rand(3, 6)
    compiled = spikingbrain.compile(branches)
    for sign in (1, -1, 1):
        assert_close(compiled(sign * x - 1), branches(sign * x - 1), "result")
    breaks = {b.where: b for b in spikingbrain.explain(branches, x).graph_breaks}
    branch = breaks[line_of(branches, "if y.sum()")]
    assert branch.reason == "a branch depends on a tensor's value"
    assert "torch.where" in branch.remedy
    assert "Tensor.item()" in breaks[line_of(branches, ".item()")].reason


def test_fullgraph_refuses_what_breaks_the_graph() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Data-dependent"):
        spikingbrain.compile(branches, fullgraph=True)(torch.rand(3, 6))


# Arguments that change from call to call.


def test_an_empty_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    compiled = spikingbrain.compile(model)
    for rows in (3, 0, 5):
        x = torch.randn(rows, 4)
        assert_close(compiled(x), model(x), f"{rows} rows")


def test_another_element_type_or_rank_compiles_anew() -> None:
    compiled = spikingbrain.compile(wave)
    for x in (torch.randn(3, 4), torch.randn(3, 4).double(), torch.randn(2, 3, 4), torch.randn(3).bfloat16()):
        assert_close(compiled(x), wave(x), f"{x.dtype} of shape {tuple(x.shape)}")


def test_another_device_is_left_to_torch_and_told() -> None:
    x = torch.empty(3, 4, device="meta")
    assert spikingbrain.compile(wave)(x).device.type == "meta"
    (region,) = spikingbrain.explain(wave, x).regions
    assert region.status == "eager"
    assert region.reason == "a tensor on meta; the target's memory is the CPU's"


# The machine fails.


def test_a_killed_compile_process_costs_speed_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = workers.Worker._run

    def killed(self: Any, workdir: Path, progress: Any) -> tuple[int, bool]:
        return run(self, workdir, lambda _: os.killpg(self._process.pid, signal.SIGKILL))

    monkeypatch.setattr(workers.Worker, "_run", killed)
    x = torch.randn(3, 4)
    with caplog.at_level(logging.WARNING, "spikingbrain"):
        assert_close(spikingbrain.compile(wave, cache=False)(x), wave(x), "result")
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert f"at {line_of(wave, 'return')} runs in eager" in warning
    assert "the compile process died (signal 9)" in warning
    folder = Path(warning.partition("spikingbrain.worker ")[2].split()[0])
    assert (folder / "module.mlir").is_file()


def check_with_one_cache_warning(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(3, 4)
    with caplog.at_level(logging.WARNING, "spikingbrain"):
        assert_close(spikingbrain.compile(wave)(x), wave(x), "result")
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "compile cache: cannot write" in warning
    assert not any(r.status == "eager" for r in spikingbrain.explain(wave, x).regions)


def test_a_cache_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPIKINGBRAIN_CACHE", "/proc/read-only")
    check_with_one_cache_warning(caplog)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    with pytest.raises(OSError), (disk / "fill").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(
    full_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPIKINGBRAIN_CACHE", str(full_disk))
    check_with_one_cache_warning(caplog)


def test_no_place_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The model runs, in eager, and one warning says what to do."""
    monkeypatch.setenv("SPIKINGBRAIN_CACHE", str(tmp_path / "cache"))
    fast = torch.compile(wave, backend="spikingbrain")
    x = torch.randn(5)
    monkeypatch.setattr("tempfile.mkdtemp", _refuses)
    with caplog.at_level("WARNING", "spikingbrain"):
        torch.testing.assert_close(fast(x), wave(x))
    (told,) = [r.getMessage() for r in caplog.records if "TMPDIR" in r.getMessage()]
    assert "No space left" in told


def _refuses(*_: object, **__: object) -> str:
    raise OSError(28, "No space left on device")
