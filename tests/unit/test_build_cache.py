"""The compile cache: what decides about an entry, what a miss says, what may go wrong. The compile process is played."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spikingbrain import build, code_cache, errors, workers
from spikingbrain.backend_iree import cpu
from spikingbrain.tools import cli

ROOT = Path(__file__).resolve().parents[2]
MODULE = 'module {{ func.func @{name}() {{ return loc("{file}":{line}:0) }} loc("{file}":{line}:0) }}'
REFUSAL = {
    "type": "UnsupportedOp",
    "what": "no lowering for torch.aten.fft",
    "where": {"file": "model.py", "line": 3},
    "why": "it makes complex numbers",
    "hint": "real numbers",
}
STOPPED = {
    "type": "PassFailed",
    "what": "iree-compile stopped (exit code 1)",
    "why": "a bug",
    "hint": "a folder",
}


def module(name: str = "f", file: str = "model.py", line: int = 3) -> str:
    return MODULE.format(name=name, file=file, line=line)


class Player:
    """Plays the compile process: returns code, describes ``error``, dies with code ``death``, or ``hangs``."""

    def __init__(self) -> None:
        self.jobs: list[Path] = []
        self.error: dict[str, Any] | None = None
        self.death = 0
        self.hangs = False

    def __call__(self, workdir: Path, progress: Callable[[str], None], limit: float) -> int:
        self.jobs.append(workdir)
        self.limit = limit
        if self.hangs:
            raise workers.TooLong
        (workdir / "stderr.txt").write_text("the last words")
        if self.death:
            return self.death
        if self.error:
            (workdir / "error.json").write_text(json.dumps(self.error))
            return 1
        (workdir / "code").mkdir()
        (workdir / "code" / "module").write_bytes(os.urandom(1000))
        (workdir / "report.json").write_text(json.dumps({"records": [{"where": "model.py:3"}]}))
        return 0


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    caplog.set_level(logging.INFO, "spikingbrain")
    monkeypatch.setenv("SPIKINGBRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPIKINGBRAIN_CACHE_LIMIT", raising=False)
    return tmp_path / "cache" / "compile"


@pytest.fixture(autouse=True)
def player(monkeypatch: pytest.MonkeyPatch) -> Player:
    made = Player()
    monkeypatch.setattr(workers, "run", made)
    return made


def compiled(text: str = "", target: str = "cpu", use_cache: bool = True, **options: Any) -> build.Code:
    return build.compile_code(text or module(), target, options, use_cache=use_cache)


def failed(text: str = "") -> errors.CompileError:
    with pytest.raises(errors.CompileError) as raised:
        compiled(text)
    return raised.value


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.zip"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# What decides


def test_the_same_module_is_compiled_once(player: Player) -> None:
    first, second = compiled(), compiled()
    assert not first.cached and second.cached and len(player.jobs) == 1
    assert (second.members, second.report) == (first.members, first.report)


def test_a_model_that_moved_has_the_same_code_and_no_lines(player: Player) -> None:
    first, moved = compiled(), compiled(module(file="elsewhere/model.py", line=7))
    assert moved.cached and moved.members == first.members and len(player.jobs) == 1
    assert moved.report["records"] == [{"where": ""}]
    assert compiled().report["records"] == [{"where": "model.py:3"}]


def test_what_does_not_shape_code_does_not_decide() -> None:
    compiled(threads=1)
    assert compiled(threads=2).cached


def test_another_module_is_new(caplog: pytest.LogCaptureFixture) -> None:
    compiled()
    caplog.clear()
    assert not compiled(module("g")).cached
    assert caplog.messages[-1].strip() == "the module is new"


def test_a_miss_says_what_differs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def differs(**arguments: Any) -> str:
        caplog.clear()
        assert not compiled(**arguments).cached
        assert caplog.messages[0] == "compile cache: nothing for this module, target, options and versions"
        assert caplog.messages[1].startswith("  the module was compiled before with other ")
        assert compiled(**arguments).cached
        return caplog.messages[1]

    compiled()
    assert "target: cpu -> x86-64-v3; CPU features: " in differs(target="x86-64-v3")
    assert differs(flags="--a-flag").endswith("other flags and options: nothing -> --a-flag")
    with monkeypatch.context() as patch:
        installed = code_cache.versions()
        patch.setattr(code_cache, "versions", lambda: {**installed, "torch": "0.1"})
        assert differs().endswith(f"with other versions: torch=={installed['torch']} -> torch==0.1")
    with monkeypatch.context() as patch:
        patch.setattr(code_cache, "source_hash", lambda: "edited")
        assert differs().endswith("-> edited") and "with other compiler sources: " in caplog.text
    with monkeypatch.context() as patch:
        features = cpu.features() ^ {"avx512f"}
        patch.setattr(cpu, "features", lambda: features)
        assert "with other CPU features: " in differs() and "avx512f" in caplog.text
    assert compiled().cached


def test_every_package_of_the_compiler_counts() -> None:
    """An edited compiler never serves old code."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    aside = ("spikingbrain.compat", "spikingbrain.models", "spikingbrain.tools")
    assert set(code_cache.COMPILER) == {p for p in packages if not p.startswith(aside)}


def test_without_the_cache_nothing_is_read_or_written(player: Player, folder: Path) -> None:
    compiled(use_cache=False)
    assert not folder.exists()
    compiled()
    assert not compiled(use_cache=False).cached and len(player.jobs) == 3


def test_a_dump_needs_a_compile(player: Player, tmp_path: Path) -> None:
    compiled()
    assert not build.compile_code(module(), "cpu", {}, dump=tmp_path / "dump").cached
    assert len(player.jobs) == 2 and compiled().cached


# What may go wrong


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "flipped", "no key", "no json"])
def test_a_damaged_entry_is_rebuilt(
    damage: str, player: Player, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled()
    (entry,) = entries(folder)
    content = bytearray(entry.read_bytes())
    match damage:
        case "cut":
            entry.write_bytes(content[:-40])
        case "noise":
            entry.write_bytes(os.urandom(500))
        case "empty":
            entry.write_bytes(b"")
        case "flipped":
            content[200] ^= 255
            entry.write_bytes(content)
        case "no key":
            with zipfile.ZipFile(entry, "w") as archive:
                archive.writestr("report.json", "{}")
        case "no json":
            with zipfile.ZipFile(entry, "w") as archive:
                archive.writestr("key.json", "{")
    assert not compiled().cached and len(player.jobs) == 2
    (warning,) = warnings(caplog)
    assert warning.startswith(f"compile cache: entry {entry.name} is damaged (")
    assert compiled().cached


def test_a_place_that_cannot_be_written_is_warned_of_once(
    player: Player, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.write_text("a file where the folder should be")
    for _ in range(3):
        assert not compiled().cached
    (warning,) = warnings(caplog)
    assert warning.startswith(f"compile cache: cannot write {folder}") and len(player.jobs) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_read(player: Player, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiled()
    folder.chmod(0o500)
    assert compiled().cached and not compiled(module("g")).cached
    assert len(warnings(caplog)) == 1
    folder.chmod(0o700)


def test_a_full_disk_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(code_cache, "write_atomically", full)
    compiled(), compiled(module("g"))
    (warning,) = warnings(caplog)
    assert "No space left on device" in warning and entries(folder) == []


WRITER = """
import sys
from spikingbrain import code_cache
from spikingbrain.compile_process import Outcome

key = code_cache.Key.of("module {}", {"target": "t"})
for i in range(150):
    code_cache.write(key, Outcome({"code": bytes([i]) * 50000}, {"i": i}))
    found = code_cache.find(key)
    assert found is not None and found.members["code"] == bytes([found.report["i"]]) * 50000
"""


def test_writers_and_readers_at_once(folder: Path) -> None:
    """Two processes write one entry again and again; each finds a whole one each time."""
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert said == ["", ""]
    assert len(list(folder.iterdir())) == 1


# What fails each time


def test_a_refusal_is_kept(player: Player) -> None:
    player.error = dict(REFUSAL)
    first, second = failed(), failed()
    assert len(player.jobs) == 1 and not player.jobs[0].exists()
    for error in (first, second):
        assert type(error) is errors.UnsupportedOp
        assert error.where == errors.SourceLine("model.py", 3)
        assert (error.what, error.why, error.hint) == (REFUSAL["what"], REFUSAL["why"], REFUSAL["hint"])


def test_a_refusal_names_the_lines_of_this_model(player: Player) -> None:
    player.error = dict(REFUSAL)
    failed()
    player.error["where"] = {"file": "model.py", "line": 9}
    assert failed(module(line=9)).where == errors.SourceLine("model.py", 9)
    assert len(player.jobs) == 2


def test_a_stopped_pass_is_kept_with_its_reproducer(player: Player) -> None:
    player.error = dict(STOPPED)
    assert str(failed()) == str(failed())
    (workdir,) = player.jobs
    assert (workdir / "module.mlir").is_file()
    shutil.rmtree(workdir)
    failed()
    assert len(player.jobs) == 2, "an error that names a folder is told while the folder is there"


@pytest.mark.parametrize(
    "error",
    [
        {**STOPPED, "what": "iree-compile stopped (signal 9)"},
        {**STOPPED, "what": "the compiler failed: [Errno 28] No space left on device"},
        {**STOPPED, "why": "LLVM ERROR: out of memory"},
        {**STOPPED, "why": "Traceback ...\nMemoryError"},
    ],
)
def test_what_may_pass_is_tried_again(player: Player, folder: Path, error: dict[str, Any]) -> None:
    player.error = error
    failed(), failed()
    assert len(player.jobs) == 2 and entries(folder) == []
    player.error = None
    compiled()


def test_what_is_missing_is_looked_for_again(player: Player) -> None:
    player.error = {"type": "MissingDependency", "what": "no iree-compile", "why": "", "hint": "install it"}
    for _ in range(2):
        with pytest.raises(errors.MissingDependency):
            compiled()
    assert len(player.jobs) == 2


@pytest.mark.parametrize("death", [-9, -11, 1])
def test_a_death_is_not_kept(player: Player, folder: Path, death: int) -> None:
    player.death = death
    assert failed().why == "the last words"
    player.death = 0
    assert not compiled().cached and len(entries(folder)) == 1


def test_a_compile_that_takes_too_long_is_not_kept(
    player: Player, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    player.hangs = True
    error = failed()
    assert type(error) is errors.PassFailed and "took longer than 900 s" in error.what
    assert f"spikingbrain.worker {player.jobs[0]} reproduces it" in error.hint
    assert (player.jobs[0] / "module.mlir").is_file() and not folder.exists()
    monkeypatch.setenv("SPIKINGBRAIN_COMPILE_TIMEOUT", "2.5")
    assert "took longer than 2.5 s" in failed().what and player.limit == 2.5
    monkeypatch.setenv("SPIKINGBRAIN_COMPILE_TIMEOUT", "soon")
    with pytest.raises(errors.OptionError, match="SPIKINGBRAIN_COMPILE_TIMEOUT is 'soon'"):
        compiled()


# How much is kept


def test_what_was_used_least_recently_goes_first(
    monkeypatch: pytest.MonkeyPatch, player: Player, folder: Path
) -> None:
    for i, name in enumerate("abc"):
        compiled(module(name))
        (newest,) = set(entries(folder)) - {f for f in entries(folder) if f.stat().st_mtime < 1e6}
        os.utime(newest, (i, i))
    size = sum(f.stat().st_size for f in entries(folder))
    assert compiled(module("a")).cached  # so b is the oldest now
    monkeypatch.setenv("SPIKINGBRAIN_CACHE_LIMIT", str((size + 100) / 1e6))
    compiled(module("d"))
    assert [compiled(module(name)).cached for name in "acd"] == [True] * 3
    assert not compiled(module("b")).cached


def test_what_a_killed_process_left_goes_after_a_day(folder: Path) -> None:
    compiled()
    old, young = folder / ".a.zip.x.tmp", folder / ".b.zip.y.tmp"
    old.touch(), young.touch()
    os.utime(old, (0, 0))
    compiled(module("g"))
    assert not old.exists() and young.exists()


def test_a_limit_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKINGBRAIN_CACHE_LIMIT", "2 GB")
    with pytest.raises(errors.OptionError, match="SPIKINGBRAIN_CACHE_LIMIT is '2 GB'"):
        compiled()


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        assert cli.main(["cache", *arguments]) == 0
        return capsys.readouterr().out

    assert said() == f"{folder.parent}\n"
    compiled(), compiled(), compiled(), compiled(module("g"))
    text = said()
    assert "compile                          2 files        0.0 MB\n" in text
    assert "compile: 2 hits and 2 misses since 20" in text
    said("--limit", "0")
    assert entries(folder) == [] and "2 hits" in said()
    assert said("--clear") == f"removed {folder.parent}\n" and not folder.parent.exists()
