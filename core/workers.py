"""Compile processes that are kept: started when first needed, lent to one job at a time, replaced when they die.

A job is a folder, and a process that serves reads their names, see ``worker.py``. Each runs in a session of its own:
Ctrl-C reaches only the process that waits for it, and it can be killed together with the tools that it started. It sees
the environment and the current folder as they were when it was started.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

JOBS_EACH = 200  # then a process is replaced, whatever native code may have leaked in it
COMMAND = (sys.executable, "-m", "spikingbrain.worker", "--serve")


class TooLong(Exception):
    """Raised when a job was not done in time."""


class Worker:
    """One process that serves."""

    def __init__(self) -> None:
        # What it says outside a job. No file here has a buffer, whose lock a thread may hold when another forks.
        self._early = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._process = subprocess.Popen(
            COMMAND,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._early,
            start_new_session=True,
        )
        self.jobs = 0

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def run(
        self, workdir: Path, progress: Callable[[str], None], limit: float | None = None
    ) -> tuple[int, bool]:
        """Returns the job's return code, minus the signal if one ended the process, and whether the job was begun."""
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(limit or threading.TIMEOUT_MAX, give_up)
        timer.daemon = True
        timer.start()
        try:
            code, begun = self._run(workdir, progress)
        except BaseException:
            self.stop()
            raise
        finally:
            timer.cancel()
        if code and late.is_set():
            raise TooLong
        return code, begun

    def _run(self, workdir: Path, progress: Callable[[str], None]) -> tuple[int, bool]:
        stdin, stdout = self._pipes()
        begun = False
        with contextlib.suppress(BrokenPipeError):
            stdin.write(os.fsencode(workdir) + b"\n")
        for line in iter(stdout.readline, b""):
            word, _, rest = line.decode().rstrip("\n").partition(" ")
            begun = True
            if word == "step":
                progress(rest)
            elif word == "end":
                self.jobs += 1
                return int(rest), True
        code = self._process.wait()
        if not begun:
            self._early.seek(0)
            (workdir / "stderr.txt").write_bytes(self._early.read())
        return code or 1, begun

    def stop(self) -> None:
        """Kills the process, if it lives, and what it started."""
        self._kill()
        self._process.wait()
        self._close()

    def _kill(self) -> None:
        if self.alive:
            os.killpg(self._process.pid, signal.SIGKILL)

    def disown(self) -> None:
        """Forgets the process, in a forked child: a child that held its input would keep it alive."""
        self._process.returncode = 0  # not a child of this process, so nothing to wait for
        self._close()

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process.stdin and self._process.stdout
        return self._process.stdin, self._process.stdout

    def _close(self) -> None:
        for file in (*self._pipes(), self._early):
            file.close()


class Pool:
    """At most ``limit`` workers. Any number of threads may run jobs; those beyond the limit wait."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._places = threading.Semaphore(self._limit)
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()

    def run(self, workdir: Path, progress: Callable[[str], None], limit: float | None = None) -> int:
        """Does the job in ``workdir`` and returns its return code, as ``subprocess`` does: 0, 1, or minus a signal.

        What the process says on standard error is in ``stderr.txt``. An exception in this thread (Ctrl-C, or one of
        ``progress``) kills the process and goes on. So does TooLong, after ``limit`` seconds.
        """
        with self._places:
            while True:
                worker, kept = self._take()
                try:
                    code, begun = worker.run(workdir, progress, limit)
                finally:
                    self._give_back(worker)
                if begun or not kept:
                    return code
                # a kept one went before it saw the job, e.g. after a long rest: another takes it

    def prewarm(self) -> None:
        """Starts a worker if none is idle, and does not wait for it: it imports while the caller prepares a job."""
        with self._lock:
            self._drop_dead()
            if not self._idle and len(self._busy) < self._limit:
                self._idle.append(Worker())

    def close(self) -> None:
        """Stops idle workers; one amid a job ends with this process at the latest."""
        with self._lock:
            for worker in self._idle:
                worker.stop()
            self._idle.clear()

    def disown(self) -> None:
        """Starts afresh in a forked child."""
        workers = [*self._idle, *self._busy]
        self._reset()
        for worker in workers:
            worker.disown()

    def _take(self) -> tuple[Worker, bool]:
        with self._lock:
            self._drop_dead()
            kept = bool(self._idle)
            worker = self._idle.pop() if kept else Worker()
            self._busy.add(worker)
            return worker, kept

    def _give_back(self, worker: Worker) -> None:
        with self._lock:
            self._busy.discard(worker)
            if worker.alive and worker.jobs < JOBS_EACH:
                self._idle.append(worker)
                return
        worker.stop()

    def _drop_dead(self) -> None:
        for worker in [w for w in self._idle if not w.alive]:
            self._idle.remove(worker)
            worker.stop()


_pool = Pool(os.cpu_count() or 1)
run, prewarm = _pool.run, _pool.prewarm
atexit.register(_pool.close)
os.register_at_fork(after_in_child=_pool.disown)
