"""Many ops and modes, each in a process that a crash costs nothing but itself."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO

SECONDS = 600  # for one op and mode; the graphs in it have a limit of their own


def serve() -> None:
    """Answers one line of JSON per line ``op mode``; a crash costs the parent this one process."""
    answers, sys.stdout = sys.stdout, sys.stderr
    import harness
    import torch

    torch.set_num_threads(1)
    database = harness.database()
    for line in sys.stdin:
        name, mode = line.split()
        mode, _, dynamic = mode.partition("+")
        try:
            result = harness.conform(database[name], mode, harness.COUNTS.get(mode, 4), bool(dynamic))
        except BaseException as error:
            result = harness.Result("error", repr(error)[:300])
        print(json.dumps([result.status, result.reason]), file=answers, flush=True)


class Worker:
    """A process that serves, replaced when it dies or takes too long."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory()  # torch writes graphs that it fails on where it runs

    def ask(self, name: str, mode: str) -> tuple[str, str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve())],
                cwd=self._folder.name,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        process = self._process
        assert process.stdin and process.stdout
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            print(name, mode, file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            status, reason = json.loads(line)
            return status, reason
        self._process = None
        return "error", f"the process ended with {process.wait()}"

    def close(self) -> None:
        if self._process and self._process.stdin:
            self._process.stdin.close()
            self._process.wait()
        self._folder.cleanup()


def run(jobs: list[tuple[str, str]], processes: int, log: IO[str]) -> dict[tuple[str, str], tuple[str, str]]:
    """Returns the status and reason of each job; writes each to ``log`` as it is done."""
    waiting: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
    for job in [*jobs, *[None] * processes]:
        waiting.put(job)
    done: dict[tuple[str, str], tuple[str, str]] = {}

    def work() -> None:
        worker = Worker()
        while job := waiting.get():
            done[job] = worker.ask(*job)
            print(*job, *(" ".join(text.split()) for text in done[job]), sep="\t", file=log, flush=True)
        worker.close()

    threads = [threading.Thread(target=work) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


if __name__ == "__main__":
    serve()
