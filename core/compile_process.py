"""One compile in a process of its own: what it is given, and what it leaves."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spikingbrain import errors, workers
from spikingbrain.environment import number

Progress = Callable[[str], None]
TIMEOUT = 900  # seconds of one compile
# What says that the machine was at fault, not the module: the next try may end otherwise.
_PASSING = re.compile(
    r"\(signal \d|\bErrno\b|MemoryError|ImportError|[Nn]o space left|[Oo]ut of memory|[Cc]annot allocate|[Tt]oo many open files"
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Code with its report, or the error as the compile process describes it."""

    members: dict[str, bytes]
    report: dict[str, Any]
    error: dict[str, Any] | None = None

    @property
    def lasts(self) -> bool:
        """Whether another try would end the same."""
        if self.error is None:
            return True
        said = self.error["what"] + self.error["why"]
        return issubclass(error_type(self.error), errors.CompileError) and not _PASSING.search(said)

    @property
    def reproducible(self) -> bool:
        """Whether the folder that an error names is still there, if it names one."""
        return not self.error or "folder" not in self.error or Path(self.error["folder"]).is_dir()

    def raise_error(self) -> None:
        """Raises the error, if there is one."""
        if not self.error:
            return
        where = self.error.get("where")
        if isinstance(where, dict):
            where = errors.SourceLine(where["file"], where["line"])
        why, hint = self.error.get("why", ""), self.error.get("hint", "")
        raise error_type(self.error)(self.error["what"], where=where, why=why, hint=hint)


def compile_in_process(
    module: str, target: str, options: Mapping[str, Any], progress: Progress, dump: Path | None
) -> Outcome:
    """Compiles a captured module in a process of its own, so that native code that fails takes nothing with it.

    Raises PassFailed where the process died, took too long or had no place for its files.
    """
    limit = number("SPIKINGBRAIN_COMPILE_TIMEOUT", TIMEOUT)
    job = {
        "target": target,
        "options": dict(options),
        "dump": str(dump.resolve()) if dump else None,  # the process may be older than the current folder
        "verify_each": bool(dump),
    }
    workdir = _workdir(module, job, dump)
    try:
        returncode = workers.run(workdir, progress, limit)
    except workers.TooLong:
        raise errors.PassFailed(
            f"the compile process took longer than {limit:g} s and was stopped",
            hint=f"SPIKINGBRAIN_COMPILE_TIMEOUT=SECONDS waits longer; python -m spikingbrain.worker {workdir} reproduces it",
        ) from None
    except BaseException:
        shutil.rmtree(workdir, ignore_errors=True)
        raise
    if returncode == 0:
        members = {f.name: f.read_bytes() for f in (workdir / "code").iterdir()}
        report = json.loads((workdir / "report.json").read_text())
        shutil.rmtree(workdir)
        return Outcome(members, report)
    described = workdir / "error.json"
    if not described.is_file():
        raise _death(workdir, returncode)
    error = json.loads(described.read_text())
    if issubclass(error_type(error), errors.PassFailed):
        error["folder"] = str(workdir)
    else:
        shutil.rmtree(workdir)  # an error of the user's model needs no reproducer
    return Outcome({}, {}, error)


def _workdir(module: str, job: Mapping[str, Any], dump: Path | None) -> Path:
    """Returns a new folder with a job; raises PassFailed where it cannot be written."""
    workdir = None
    try:
        if dump:
            dump.mkdir(parents=True, exist_ok=True)
        workdir = Path(tempfile.mkdtemp(prefix="spikingbrain-"))
        (workdir / "module.mlir").write_text(module)
        (workdir / "job.json").write_text(json.dumps(job))
    except OSError as error:
        if workdir:
            shutil.rmtree(workdir, ignore_errors=True)
        raise errors.PassFailed(
            "the compile has no place for its files",
            why=str(error),
            hint="set TMPDIR to a folder with free space",
        ) from error
    return workdir


def _death(workdir: Path, returncode: int) -> errors.PassFailed:
    last = (workdir / "stderr.txt").read_text().strip().splitlines()[-1:] or ["it said nothing"]
    ending = f" (signal {-returncode})" if returncode < 0 else ""
    return errors.PassFailed(
        f"the compile process died{ending}",
        why=last[0],
        hint=f"python -m spikingbrain.worker {workdir} reproduces it",
    )


def error_type(error: Mapping[str, Any]) -> type[errors.SpikingBrainError]:
    """Returns the class of an error that the compile process described."""
    found: type[errors.SpikingBrainError] = getattr(errors, error["type"], errors.PassFailed)
    return found
