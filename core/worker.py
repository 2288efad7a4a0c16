"""The compile process: passes and backend stages over one module, in a process of its own.

Native code that aborts takes this process along and not the user's. The job and its results are files in a folder::

    module.mlir, job.json  ->  code/*, report.json  or  error.json

``python -m spikingbrain.worker FOLDER`` does one job and prints a line per step. With ``--serve`` it does the jobs whose
folders come in on standard input, one a line, and answers each on standard output with lines of its own::

    begin
    step NAME        any number of times
    end CODE         0 or 1, as the return code of a single job

It then keeps what it imported, and ends when its input does, even amid a job, or when it rested for long.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

REST = 300.0  # seconds without a job before a serving process ends


def main(folder: str, progress: Callable[[str], None]) -> int:
    """Does the job in ``folder`` and returns 0 for code, 1 for an error that is described."""
    workdir = Path(folder)
    job = json.loads((workdir / "job.json").read_text())
    try:
        code, report = compile_module((workdir / "module.mlir").read_text(), job, workdir, progress)
    except Exception as error:
        (workdir / "error.json").write_text(json.dumps(_describe(error)))
        return 1
    (workdir / "code").mkdir(exist_ok=True)
    for name, data in code.items():
        (workdir / "code" / name).write_bytes(data)
    (workdir / "report.json").write_text(json.dumps(report))
    return 0


def serve() -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    jobs, answers = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "w", buffering=1)
    # Tools inherit 0 and native code prints to 1; neither may meet the protocol.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    with contextlib.suppress(Exception):  # the job itself will meet it, and describe it
        _warm()
    while select.select([jobs], [], [], REST)[0] and (line := jobs.readline()):
        folder = os.fsdecode(line.rstrip(b"\n"))
        with _ends_with(jobs), _standard_error(Path(folder) / "stderr.txt"):
            print("begin", file=answers)
            code = main(folder, lambda step: print("step", *step.split(), file=answers))
        print("end", code, file=answers)
    os._exit(0)


@contextlib.contextmanager
def _ends_with(jobs: IO[bytes]) -> Iterator[None]:
    """Ends this process, with the tools it started, when its input closes, even where native code never returns.

    A thread that waits for the input would need the interpreter's lock, which native code may hold. So the kernel
    is asked for SIGIO, whose default is to end a process, whenever the input changes; amid a job it can only close.
    """
    leads = os.getpgrp() == os.getpid()
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(jobs, fcntl.F_SETOWN, -os.getpid() if leads else os.getpid())
    flags = fcntl.fcntl(jobs, fcntl.F_GETFL)
    fcntl.fcntl(jobs, fcntl.F_SETFL, flags | os.O_ASYNC)
    closed = select.poll()
    closed.register(jobs, 0)
    if closed.poll(0):  # before the kernel was asked
        os._exit(0)
    yield
    fcntl.fcntl(jobs, fcntl.F_SETFL, flags)


def _warm() -> None:
    """Imports what every job needs."""
    from spikingbrain.backend import backends
    from spikingbrain.passes import parameters, pipeline  # noqa: F401
    from spikingbrain.passes.context import new_context

    new_context()
    backends()


@contextlib.contextmanager
def _standard_error(path: Path) -> Iterator[None]:
    """Sends what this process prints to ``path``; also, after an exception, its last words."""
    before = os.dup(2)
    with open(path, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    yield
    os.dup2(before, 1)
    os.dup2(before, 2)
    os.close(before)


def compile_module(
    text: str, job: dict[str, Any], workdir: Path, progress: Callable[[str], None]
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Returns the code members and the compile report."""
    from torch_mlir import ir

    from spikingbrain.backend import StageContext, resolve_target
    from spikingbrain.passes import parameters, pipeline
    from spikingbrain.passes.base import Pass, PassContext
    from spikingbrain.passes.context import new_context
    from spikingbrain.tuning import tuned

    backend, status = resolve_target(job["target"])
    options = backend.options(**job["options"])
    target = tuned(status.target, options)
    context = PassContext(target)
    dump = Path(job["dump"]) if job.get("dump") else None
    timings: list[tuple[str, float]] = []

    def observe(pass_: Pass, module: ir.Module, seconds: float) -> None:
        timings.append((pass_.name, seconds))
        if dump:
            (dump / f"{len(timings):02}-{pass_.name}.mlir").write_text(str(module))

    with new_context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        progress("passes")
        pipeline.run(
            pipeline.default_pipeline(),
            module,
            context,
            verify_each=job.get("verify_each", False),
            observe=observe,
        )
        start = time.perf_counter()
        pipeline.clean(module)
        pipeline.check_lowered(module)
        timings.append(("clean", time.perf_counter() - start))
        stored = {s.key: dataclasses.asdict(s) for s in parameters.all_stored(module)}
        value: Any = module.operation.get_asm(enable_debug_info=True)
    stage_context = StageContext(target, options, workdir)
    for name, stage in backend.stages(target).items():
        progress(name)
        start = time.perf_counter()
        value = stage(value, stage_context)
        timings.append((name, time.perf_counter() - start))
        if dump and isinstance(value, str):
            (dump / f"{len(timings):02}-{name}.mlir").write_text(value)
    report = {
        "timings": timings,
        "records": [r.to_dict() for r in context.records],
        "weights": stored,
        "weight_arguments": {
            name: [dataclasses.asdict(s) for s in listed] for name, listed in context.weight_arguments.items()
        },
        **stage_context.report,
    }
    return value, report


def _describe(error: BaseException) -> dict[str, Any]:
    from spikingbrain.errors import SourceLine, SpikingBrainError

    if not isinstance(error, SpikingBrainError):
        import traceback

        return {"type": "PassFailed", "what": f"the compiler failed: {error}", "why": traceback.format_exc()}
    where: Any = error.where
    if isinstance(where, SourceLine):
        where = {"file": where.file, "line": where.line}
    return {
        "type": type(error).__name__,
        "what": error.what,
        "where": where,
        "why": error.why,
        "hint": error.hint,
    }


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve()
    sys.exit(main(sys.argv[1], lambda step: print(step, flush=True)))
