"""Compile processes are kept, shared by threads, and replaced when they die. A backend made for this does odd things."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spikingbrain import build, errors, workers

BACKEND = """
import ctypes, dataclasses, os, subprocess, sys, time
from spikingbrain.backend import TargetStatus
from spikingbrain.target import Target

@dataclasses.dataclass(frozen=True)
class Options:
    do: str = ""

class Odd:
    name, options = "odd", Options

    def targets(self):
        return [TargetStatus(Target("odd", "cpu", "odd", "none"), compiles=True, runs=False)]

    def cache_key(self, target, options):
        return options.do

    def stages(self, target):
        return {"odd things": stage}

def stage(module, context):
    context.report["pid"] = os.getpid()
    match context.options.do:
        case "print":
            print("end 0")
            os.write(1, b"end 1\\n")
            context.report["swallowed"] = subprocess.run(["cat"], capture_output=True).stdout.decode()
        case "abort":
            os.write(2, b"Assertion `false` failed.\\n")
            os.abort()
        case "exit":
            os._exit(0)
        case "sleep":
            time.sleep(60)
        case "spin":  # in native code, with the interpreter's lock
            (context.workdir / "child").write_text(str(os.getpid()))
            ctypes.PyDLL(None).sleep(60)
        case "hang":
            child = subprocess.Popen(["sleep", "60"])
            (context.workdir / "child").write_text(str(child.pid))
            child.wait()
        case "meet":  # until a second one is there
            mine = os.path.join(os.environ["ODD_MEETING"], str(os.getpid()))
            open(mine, "w").close()
            while len(os.listdir(os.environ["ODD_MEETING"])) < 2:
                time.sleep(0.01)
    return {"code": b"odd"}
"""


@pytest.fixture(scope="module", autouse=True)
def odd_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Registers the backend ``odd`` here and in new workers; ends with none of them kept."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "odd_backend.py").write_text(BACKEND)
    info = folder / "odd-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[spikingbrain.backends]\nodd = odd_backend:Odd\n")
    (folder / "meeting").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
        patch.setenv("ODD_MEETING", str(folder / "meeting"))
        importlib.invalidate_caches()
        workers._pool.close()
        yield
        workers._pool.close()


def compiles(do: str, progress: Callable[[str], None] = lambda _: None) -> build.Code:
    return build.compile_code("module {}", "odd", {"do": do}, progress, use_cache=False)


def pid() -> int:
    found: int = compiles("").report["pid"]
    return found


def soon(check: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not check() and time.monotonic() < deadline:
        time.sleep(0.01)
    return check()


def gone(process: int) -> bool:
    """Whether a process ended; where nobody collects orphans, it stays behind as a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_worker_is_kept_and_reports_each_step() -> None:
    steps: list[str] = []
    first = compiles("", steps.append)
    assert steps == ["passes", "odd things"] and first.members == {"code": b"odd"}
    assert pid() == first.report["pid"] != os.getpid()


def test_prints_and_tools_do_not_meet_the_protocol() -> None:
    assert compiles("print").report["swallowed"] == ""


def test_threads_have_workers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = workers.Pool(2)
    monkeypatch.setattr(workers, "run", pool.run)
    with ThreadPoolExecutor(2) as threads:
        assert len({code.report["pid"] for code in threads.map(compiles, ["meet", "meet"])}) == 2
    pool.close()


def test_no_more_workers_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = workers.Pool(1)
    monkeypatch.setattr(workers, "run", pool.run)
    with ThreadPoolExecutor(3) as threads:
        assert len({code.report["pid"] for code in threads.map(compiles, ["", "", ""])}) == 1
    pool.close()


def test_an_abort_leaves_a_reproducer_and_a_fresh_worker() -> None:
    before = pid()
    with pytest.raises(errors.PassFailed, match=r"the compile process died \(signal 6\)") as caught:
        compiles("abort")
    assert caught.value.why == "Assertion `false` failed."
    command = caught.value.hint.removesuffix(" reproduces it").split()
    again = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
    assert again.returncode == -signal.SIGABRT and "Assertion" in again.stderr
    assert again.stdout == "passes\nodd things\n"
    shutil.rmtree(command[-1])
    assert pid() != before


def test_an_exit_amid_a_job_is_a_failure() -> None:
    with pytest.raises(errors.PassFailed) as caught:
        compiles("exit")
    assert caught.value.what == "the compile process died"
    shutil.rmtree(caught.value.hint.split()[3])


def test_killed_amid_a_job() -> None:
    worker = pid()
    with pytest.raises(errors.PassFailed, match=r"\(signal 9\)") as caught:
        compiles("sleep", lambda step: os.kill(worker, signal.SIGKILL) if step == "odd things" else None)
    shutil.rmtree(caught.value.hint.split()[3])


def test_killed_while_idle_fails_no_job() -> None:
    before = pid()
    os.kill(before, signal.SIGKILL)
    assert pid() != before


def test_gone_unseen_fails_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    before = pid()
    monkeypatch.setattr(workers.Pool, "_drop_dead", lambda _: None)
    os.kill(before, signal.SIGKILL)
    assert soon(lambda: gone(before))
    assert pid() != before


def test_a_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = workers.Pool(1)
    monkeypatch.setattr(workers, "run", pool.run)
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", "raise SystemExit('no torch_mlir')"))
    with pytest.raises(errors.PassFailed) as caught:
        compiles("")
    assert caught.value.why == "no torch_mlir"
    shutil.rmtree(caught.value.hint.split()[3])


def test_replaced_after_many_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = pid()
    monkeypatch.setattr(workers, "JOBS_EACH", 1)
    pid()
    assert gone(before) and pid() != before


def test_prewarming_starts_one_and_does_not_wait() -> None:
    workers._pool.close()
    workers.prewarm()
    workers.prewarm()
    (started,) = workers._pool._idle
    assert pid() == started._process.pid


def test_ctrl_c_ends_the_job_and_its_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # a shell starts what runs in the background with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    worker, tools = pid(), []

    def interrupt() -> None:
        assert soon(lambda: any(f.read_text() for f in tmp_path.glob("*/child")))
        tools.extend(int(f.read_text()) for f in tmp_path.glob("*/child"))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            compiles("hang")
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert gone(worker) and len(tools) == 1 and soon(lambda: gone(tools[0]))
    assert not list(tmp_path.iterdir())
    assert pid() != worker


def test_a_fork_has_workers_of_its_own() -> None:
    mine = pid()
    kept = workers._pool._idle[-1]
    (told, tell), (wait, go_on) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(tell, str(pid()).encode())
            os.close(go_on)
            os.read(wait, 1)
        finally:
            os._exit(0)
    theirs = int(os.read(told, 100))
    assert theirs != mine == pid()
    kept._pipes()[0].close()
    kept._process.wait(10)  # it ends with its input, so the child does not hold that
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert soon(lambda: gone(theirs))
    for end in (told, tell, wait, go_on):
        os.close(end)


SCRIPT = """
import sys
from spikingbrain import build, workers
def tell(step):
    (worker,) = workers._pool._busy
    print(worker._process.pid, flush=True)
build.compile_code("module {}", "odd", {"do": sys.argv[1]}, tell, use_cache=False)
"""


@pytest.mark.parametrize("do", ["hang", "spin", ""])
def test_no_orphan_and_no_noise(do: str, tmp_path: Path) -> None:
    """Killed amid a job, or left in peace."""
    command = [sys.executable, "-c", SCRIPT, do]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as user:
        assert user.stdout and user.stderr
        worker = int(user.stdout.readline())
        if do:
            assert soon(lambda: any(f.read_text() for f in tmp_path.glob("*/child")))
            user.kill()
        assert user.stderr.read() == ""
    assert user.returncode == (-signal.SIGKILL if do else 0)
    assert soon(lambda: gone(worker))
    assert all(soon(lambda f=f: gone(int(f.read_text()))) for f in tmp_path.glob("*/child"))


def test_a_worker_that_rests_for_long_ends() -> None:
    code = "from spikingbrain import worker; worker.REST = 0; worker.serve()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        assert process.wait(10) == 0


@pytest.mark.parametrize("do", ["sleep", "hang", "spin"])
def test_a_job_that_hangs_is_stopped_with_its_tools(do: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiles("")  # a process is up
    monkeypatch.setenv("SPIKINGBRAIN_COMPILE_TIMEOUT", "1")
    start = time.monotonic()
    with pytest.raises(errors.PassFailed, match="took longer than 1 s") as raised:
        compiles(do)
    assert time.monotonic() - start < 30
    workdir = Path(raised.value.hint.partition("spikingbrain.worker ")[2].split()[0])
    if (child := workdir / "child").exists():
        assert soon(lambda: gone(int(child.read_text())))
    shutil.rmtree(workdir)
    monkeypatch.delenv("SPIKINGBRAIN_COMPILE_TIMEOUT")
    assert compiles("").members == {"code": b"odd"}
