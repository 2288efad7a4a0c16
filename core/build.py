"""From a captured model to an artifact file: runs the compile process, caches its code, writes the weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import spikingbrain
from spikingbrain import artifact, errors, workers
from spikingbrain.backend import Backend, resolve_target
from spikingbrain.files import write_atomically
from spikingbrain.target import Target
from spikingbrain.tuning import settings_of, tuned

log = logging.getLogger(__name__)
Progress = Callable[[str], None]
Array = np.ndarray[Any, Any]
COMPILER = tuple(  # packages whose sources shape code
    f"spikingbrain{name}"
    for name in (
        "",
        ".passes",
        ".passes.kernels",
        ".passes.recurrence",
        ".passes.wave_kernels",
        ".frontend",
        ".frontend.dynamo",
        ".frontend.masks",
        ".frontend.ops",
        ".frontend.recurrences",
        ".frontend.spikes",
        ".backend_iree",
        ".backend_maca",
        ".backend_maca.lower",
        ".backend_maca.source",
        ".backend_maca.plan",
        ".backend_maca.run",
        ".backend_maca.triton",
    )
)
LIMIT_MB = 2000  # of the compile cache
TIMEOUT = 900  # seconds of one compile


@dataclasses.dataclass(frozen=True)
class Code:
    """What the compile process returns."""

    members: dict[str, bytes]
    report: dict[str, Any]
    cached: bool


def check_options(backend: Backend, options: Mapping[str, Any]) -> Any:
    """Returns the backend's options object; raises OptionError for an unknown name, listing the known ones."""
    known = {f.name for f in dataclasses.fields(backend.options)}
    for name in options:
        if name not in known:
            raise errors.OptionError(
                f"unknown option {name!r} for the {backend.name} backend",
                hint=f"known: {', '.join(sorted(known))}",
            )
    return backend.options(**options)


def compile_code(
    module: str,
    target_name: str,
    options: Mapping[str, Any],
    progress: Progress = lambda _: None,
    dump: Path | None = None,
    use_cache: bool = True,
) -> Code:
    """Compiles a captured module in a child process, or takes the result from the compile cache.

    May be called from several threads. ``spikingbrain.workers.prewarm()``, called earlier, starts the process by then.
    """
    backend, status = resolve_target(target_name)
    if not status.compiles:
        raise errors.TargetError(f"cannot compile for {target_name!r} here", why=status.note)
    chosen = check_options(backend, options)
    key = _Key.of(module, code_parts(backend, status.target, chosen)) if use_cache else None
    if key and dump is None:
        found = _read_cache(key)
        _count_use("h" if found else "m")
        if found and found.error:
            raise _failure(found.error)
        if found:
            progress("code from the cache")
            return Code(found.members, found.report, cached=True)
    made = _run_worker(module, target_name, dataclasses.asdict(chosen), progress, dump)
    if key and (made.error is None or _lasts(made.error)):
        _write_cache(key, made)
    if made.error:
        raise _failure(made.error)
    return Code(made.members, made.report, cached=False)


@dataclasses.dataclass(frozen=True)
class Part:
    """Code for one target of an artifact, and the backend's options that it was made with."""

    target: Target
    code: Code
    options: Mapping[str, Any]

    def record(self, folder: str = "") -> dict[str, Any]:
        """Returns what the manifest says of the target."""
        target = self.target
        found: dict[str, Any] = {
            "name": target.name,
            "backend": target.backend,
            "arch": target.arch,
            "cpu": target.cpu,
            "features": sorted(target.features),
        }
        return {**found, "folder": folder, "options": dict(self.options)} if folder else found


def options_by_target(targets: str | Sequence[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns for each of the targets the options that its backend knows; raises OptionError for one that none knows.

    Of several targets each takes the settings of kernels, ``tuning``, that its kernels read.
    """
    names = targets.split(",") if isinstance(targets, str) else list(targets)
    names = list(dict.fromkeys(filter(None, (name.strip() for name in names))))
    found = {}
    for name in names:
        backend, status = resolve_target(name)
        known = {f.name for f in dataclasses.fields(backend.options)}
        found[name] = {key: value for key, value in options.items() if key in known}
        if len(names) > 1 and "tuning" in found[name]:
            found[name]["tuning"] = settings_of(status.target.kind, options["tuning"])
    if not found:
        raise errors.OptionError("no target to compile for", hint="see 'spikingbrain targets'")
    if len(found) > 1 and (strange := options.keys() - {k for own in found.values() for k in own}):
        raise errors.OptionError(
            f"unknown option {min(strange)!r} for {', '.join(found)}",
            hint="an option of one of their backends",
        )
    return found if len(found) > 1 else {name: dict(options) for name in found}


def write_artifact(
    path: Path,
    parts: Sequence[Part],
    entries: Mapping[str, Any],
    state: list[dict[str, Any]],
    source: Callable[[str], Array],
    extra: Mapping[str, bytes],
    metadata: Mapping[str, Any],
    progress: Progress = lambda _: None,
) -> None:
    """Writes the artifact; ``source`` returns a tensor of the model by name as a numpy array."""
    from spikingbrain.passes import recipes

    first, *further = parts
    table = {key: entry for part in parts for key, entry in part.code.report["weights"].items()}
    headers = [artifact.TensorHeader(k, tuple(w["shape"]), w["element"]) for k, w in table.items()]

    def content(header: artifact.TensorHeader) -> Array:
        entry = table[header.key]
        return recipes.apply(entry["recipe"], [source(name) for name in entry["sources"]])

    manifest = {
        "producer": versions(),
        "target": first.record(),
        **({"further_targets": [p.record(f"{p.target.name}/") for p in further]} if further else {}),
        "options": dict(first.options),
        "entries": dict(entries),
        "state": state,
        **metadata,
    }
    code = dict(first.code.members)
    for part in further:
        code.update({f"{part.target.name}/{name}": data for name, data in part.code.members.items()})
    reports = {p.target.name: p.code.report for p in further}
    report = json.dumps({**first.code.report, **({"further_targets": reports} if further else {})}).encode()
    percent = [-1]

    def written(done: int, total: int) -> None:
        now = 10 * done // max(1, total)
        if now != percent[0]:
            percent[0] = now
            progress(f"write weights {10 * now} %")

    artifact.write(path, manifest, code, headers, content, {artifact.REPORT: report, **extra}, written)


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of everything that shapes generated code."""
    found = {"spikingbrain": spikingbrain.__version__}
    for package in ("torch", "torch-mlir", "iree-base-compiler"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def source_hash() -> str:
    """Returns a hash of this package's own sources, so that an edited compiler never serves old code."""
    digest = hashlib.sha256()
    for name in COMPILER:
        spec = importlib.util.find_spec(name)
        folder = Path(spec.origin).parent if spec and spec.origin else None
        for file in sorted(folder.glob("*.py")) if folder else []:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def code_parts(backend: Backend, target: Target, options: Any) -> dict[str, str]:
    """Returns everything besides the module that decides about its code, by the names that the log uses."""
    return {
        "target": target.name,
        "CPU features": " ".join(sorted(target.features)),
        "flags and options": f"{backend.name} {backend.cache_key(target, options)}",
        "tuning": str(tuned(target, options).tuning),
        "versions": " ".join(f"{name}=={version}" for name, version in versions().items()),
        "compiler sources": source_hash()[:32],
    }


# The compile cache: a file for each module and all that decides about its code. Some modules fail each time; their
# error is kept in place of code.


@dataclasses.dataclass(frozen=True)
class _Key:
    """Where the cache keeps a module.

    Attributes:
        module: a hash of the module without source lines: a model that was only moved has the same code.
        lines: a hash of the module with them, for what names them.
        parts: see ``code_parts``.
    """

    module: str
    lines: str
    parts: Mapping[str, str]

    @staticmethod
    def of(module: str, parts: Mapping[str, str]) -> _Key:
        return _Key(_hash(_without_lines(module)), _hash(module), parts)

    @property
    def place(self) -> Path:
        return code_folder() / f"{self.module}-{_hash(json.dumps(self.parts))}.zip"


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Code with its report, or the error as the compile process describes it."""

    members: dict[str, bytes]
    report: dict[str, Any]
    error: dict[str, Any] | None = None


def code_folder() -> Path:
    """Returns the folder of the compile cache."""
    return artifact.cache_folder() / "compile"


def cache_uses() -> tuple[str, int, int] | None:
    """Returns since when uses of the compile cache have been counted, hits and misses."""
    try:
        since, _, marks = _uses_file().read_text().partition("\n")
    except OSError:
        return None
    return since, marks.count("h"), marks.count("m")


def prune_cache(limit: int | None = None) -> None:
    """Removes the code that was used least recently, until at most ``limit`` bytes are left.

    Without a limit, ``SPIKINGBRAIN_CACHE_LIMIT`` counts, in MB.
    """
    if limit is None:
        limit = int(_number("SPIKINGBRAIN_CACHE_LIMIT", LIMIT_MB) * 1e6)
    found = []
    for file in code_folder().glob("*.zip"):
        with contextlib.suppress(OSError):  # another process may remove it
            found.append((file.stat().st_mtime, file.stat().st_size, file))
    size = sum(entry[1] for entry in found)
    for _, freed, file in sorted(found):
        if size <= limit:
            break
        file.unlink(missing_ok=True)
        size -= freed
    for file in code_folder().glob(".*.tmp"):  # of a process that was killed as it wrote
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < time.time() - 86400:
                file.unlink()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _without_lines(module: str) -> str:
    from torch_mlir import ir

    from spikingbrain.passes.context import new_context

    try:
        with new_context(), ir.Location.unknown():
            text: str = ir.Module.parse(module).operation.get_asm(enable_debug_info=False)
            return text
    except ir.MLIRError:  # the compile process will say more
        return module


def _read_cache(key: _Key) -> _Entry | None:
    try:
        with zipfile.ZipFile(key.place) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("checksum")
            members = {
                n.removeprefix("code/"): archive.read(n) for n in archive.namelist() if n.startswith("code/")
            }
            lines = json.loads(archive.read("key.json"))["lines"]
            entry = _Entry(members, **json.loads(archive.read("report.json")))
    except OSError:
        log.info("compile cache: nothing for this module, target, options and versions")
        log.info("  %s", _why_missing(key))
        return None
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError) as error:
        log.warning("compile cache: entry %s is damaged (%s) and will be rebuilt", key.place.name, error)
        return None
    if entry.error and (lines != key.lines or not _reproducible(entry.error)):
        log.info(
            "compile cache: this module failed before, but its error names what is gone; compiling again"
        )
        return None
    if lines != key.lines:
        for record in entry.report.get("records", []):
            record["where"] = ""  # the line is another now
    with contextlib.suppress(OSError):
        os.utime(key.place)
    return entry


def _write_cache(key: _Key, entry: _Entry) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entry.members.items():
            archive.writestr(f"code/{name}", content)
        archive.writestr("report.json", json.dumps({"report": entry.report, "error": entry.error}))
        archive.writestr("key.json", json.dumps({"lines": key.lines, "parts": key.parts}))
    try:
        key.place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(key.place, data.getvalue())
    except OSError as error:
        level = logging.DEBUG if key.place.parent in _unwritable else logging.WARNING
        _unwritable.add(key.place.parent)
        log.log(level, "compile cache: cannot write %s: %s", key.place, error)
        return
    prune_cache()


_unwritable: set[Path] = set()  # folders whose warning was given


def _why_missing(key: _Key) -> str:
    """Says how the module's nearest entry differs, the one with the fewest other parts."""
    nearest: dict[str, tuple[str, str]] | None = None
    for file in key.place.parent.glob(f"{key.module}-*.zip"):
        with (
            contextlib.suppress(OSError, zipfile.BadZipFile, KeyError, ValueError),
            zipfile.ZipFile(file) as z,
        ):
            old = json.loads(z.read("key.json"))["parts"]
            other = {n: (str(old.get(n)), v) for n, v in key.parts.items() if old.get(n) != v}
            if nearest is None or len(other) < len(nearest):
                nearest = other
    if nearest is None:
        return "the module is new"
    if {"target", "CPU features"} & nearest.keys():
        nearest.pop("flags and options", None)  # which repeat them
    changes = [f"{name}: {_change(*values)}" for name, values in nearest.items()]
    return "the module was compiled before with other " + "; ".join(changes)


def _change(old: str, new: str) -> str:
    """Returns the words that two texts do not share."""
    before, after = old.split(), new.split()
    gone, come = [w for w in before if w not in after], [w for w in after if w not in before]
    return f"{' '.join(gone)[:200] or 'nothing'} -> {' '.join(come)[:200] or 'nothing'}"


def _uses_file() -> Path:
    return artifact.cache_folder() / "compile.uses"


def _count_use(mark: str) -> None:
    """Appends one letter to a file, which needs no lock."""
    file = _uses_file()
    with contextlib.suppress(OSError):
        if not file.exists() or file.stat().st_size > 1 << 20:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, time.strftime("%Y-%m-%d\n").encode())
        with file.open("a") as opened:
            opened.write(mark)


# The compile process.


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


def _run_worker(
    module: str, target: str, options: Mapping[str, Any], progress: Progress, dump: Path | None
) -> _Entry:
    limit = _number("SPIKINGBRAIN_COMPILE_TIMEOUT", TIMEOUT)
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
        return _Entry(members, report)
    described = workdir / "error.json"
    if not described.is_file():
        raise _death(workdir, returncode)
    error = json.loads(described.read_text())
    if issubclass(_kind(error), errors.PassFailed):
        error["folder"] = str(workdir)
    else:
        shutil.rmtree(workdir)  # an error of the user's model needs no reproducer
    return _Entry({}, {}, error)


def _death(workdir: Path, returncode: int) -> errors.PassFailed:
    last = (workdir / "stderr.txt").read_text().strip().splitlines()[-1:] or ["it said nothing"]
    ending = f" (signal {-returncode})" if returncode < 0 else ""
    return errors.PassFailed(
        f"the compile process died{ending}",
        why=last[0],
        hint=f"python -m spikingbrain.worker {workdir} reproduces it",
    )


def _kind(error: Mapping[str, Any]) -> type[errors.SpikingBrainError]:
    found: type[errors.SpikingBrainError] = getattr(errors, error["type"], errors.PassFailed)
    return found


def _failure(error: Mapping[str, Any]) -> errors.SpikingBrainError:
    where = error.get("where")
    if isinstance(where, dict):
        where = errors.SourceLine(where["file"], where["line"])
    return _kind(error)(error["what"], where=where, why=error.get("why", ""), hint=error.get("hint", ""))


# What says that the machine was at fault, not the module: the next try may end otherwise.
_PASSING = re.compile(
    r"\(signal \d|\bErrno\b|MemoryError|ImportError|[Nn]o space left|[Oo]ut of memory|[Cc]annot allocate|[Tt]oo many open files"
)


def _lasts(error: Mapping[str, Any]) -> bool:
    """Returns whether a failure would come again."""
    return issubclass(_kind(error), errors.CompileError) and not _PASSING.search(error["what"] + error["why"])


def _reproducible(error: Mapping[str, Any]) -> bool:
    """Returns whether the folder that an error names is still there, if it names one."""
    return "folder" not in error or Path(error["folder"]).is_dir()


def _number(variable: str, default: float) -> float:
    text = os.environ.get(variable, "")
    try:
        return float(text) if text else default
    except ValueError:
        raise errors.OptionError(f"{variable} is {text!r}", why="it must be a number") from None
