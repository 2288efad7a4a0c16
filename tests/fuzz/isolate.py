"""Calls in processes of their own: what is compiled here may end, or never end, the process it runs in."""

from __future__ import annotations

import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any

from compare import Outcome

# Forked, so that torch is imported once. Safe as long as the parent starts no threads: it runs torch on one.
_CONTEXT = get_context("fork")
_ENDED = object()


def run_all(
    function: Callable[[Any], Any], tasks: Iterable[Any], workers: int, timeout: float
) -> Iterator[tuple[Any, Any]]:
    """Yields ``(task, function(task))`` as they end; an `Outcome` "abort" or "error" in place of a result there is none of."""
    tasks = iter(tasks)
    running: dict[Any, tuple[Any, Any, float, Any]] = {}
    while True:
        while len(running) < workers and (task := next(tasks, None)) is not None:
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process has ended
            process = _CONTEXT.Process(target=_child, args=(function, task, sender, errors.fileno()))
            process.start()
            sender.close()
            running[receiver] = (process, task, time.monotonic() + timeout, errors)
        if not running:
            return
        ready = wait(list(running), timeout=0.5)
        for receiver, (process, task, deadline, errors) in list(running.items()):
            if receiver in ready:
                try:
                    result = receiver.recv()
                except EOFError:
                    result = _ENDED
            elif time.monotonic() > deadline:
                result = Outcome("error", f"Timeout: no answer within {timeout:.0f} s")
            else:
                continue
            del running[receiver]
            _kill(process)
            if result is _ENDED:
                result = Outcome("abort", f"{_ended(process.exitcode)}: {_tail(errors)}")
            errors.close()
            receiver.close()
            yield task, result


def run_one(function: Callable[[Any], Any], task: Any, timeout: float) -> Any:
    """Returns ``function(task)``, or an `Outcome` as above."""
    return next(run_all(function, [task], 1, timeout))[1]


def _child(function: Callable[[Any], Any], task: Any, sender: Any, errors: int) -> None:
    os.setsid()  # so that compilers it starts can be ended with it
    os.dup2(errors, 2)
    try:
        result = function(task)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        result = Outcome("error", f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})")
    sender.send(result)
    sender.close()
    os._exit(0)  # without the destructors of libraries that the parent still uses


def _kill(process: Any) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def _ended(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _tail(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip()[-500:].replace("\n", " | ")
