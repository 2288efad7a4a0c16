"""From a captured model to an artifact file: runs the compile process, caches its code, writes the weights."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import spikingbrain
from spikingbrain import artifact, errors, workers
from spikingbrain.backend import Backend, resolve_target
from spikingbrain.files import write_atomically
from spikingbrain.target import Target

log = logging.getLogger(__name__)
Progress = Callable[[str], None]
Array = np.ndarray[Any, Any]


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
    key = _cache_key(module, backend, status.target, chosen)
    place = artifact.cache_folder() / "compile" / f"{key}.zip"
    if use_cache and dump is None and (found := _read_cache(place)):
        progress("code from the cache")
        return found
    code = _run_worker(module, target_name, dataclasses.asdict(chosen), progress, dump)
    if use_cache:
        _write_cache(place, code)
    return code


def write_artifact(
    path: Path,
    code: Code,
    target: Target,
    options: Mapping[str, Any],
    entries: Mapping[str, Any],
    state: list[dict[str, Any]],
    source: Callable[[str], Array],
    extra: Mapping[str, bytes],
    metadata: Mapping[str, Any],
    progress: Progress = lambda _: None,
) -> None:
    """Writes the artifact; ``source`` returns a tensor of the model by name as a numpy array."""
    from spikingbrain.passes import recipes

    table = code.report["weights"]
    headers = [artifact.TensorHeader(k, tuple(w["shape"]), w["element"]) for k, w in table.items()]

    def content(header: artifact.TensorHeader) -> Array:
        entry = table[header.key]
        return recipes.apply(entry["recipe"], [source(name) for name in entry["sources"]])

    manifest = {
        "producer": versions(),
        "target": {
            "name": target.name,
            "backend": target.backend,
            "arch": target.arch,
            "cpu": target.cpu,
            "features": sorted(target.features),
        },
        "options": dict(options),
        "entries": dict(entries),
        "state": state,
        **metadata,
    }
    report = json.dumps(code.report).encode()
    percent = [-1]

    def written(done: int, total: int) -> None:
        now = 10 * done // max(1, total)
        if now != percent[0]:
            percent[0] = now
            progress(f"write weights {10 * now} %")

    artifact.write(
        path, manifest, code.members, headers, content, {artifact.REPORT: report, **extra}, written
    )


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
    for name in ("", ".passes", ".passes.kernels", ".frontend", ".backend_iree", ".backend_maca"):
        spec = importlib.util.find_spec(f"spikingbrain{name}")
        folder = Path(spec.origin).parent if spec and spec.origin else None
        for file in sorted(folder.glob("*.py")) if folder else []:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _cache_key(module: str, backend: Backend, target: Target, options: Any) -> str:
    parts = [module, backend.name, backend.cache_key(target, options), source_hash(), json.dumps(versions())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read_cache(place: Path) -> Code | None:
    try:
        with zipfile.ZipFile(place) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("checksum")
            members = {
                n.removeprefix("code/"): archive.read(n) for n in archive.namelist() if n.startswith("code/")
            }
            return Code(members, json.loads(archive.read("report.json")), cached=True)
    except FileNotFoundError:
        log.info("compile cache: nothing for this module, target, options and versions")
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        log.warning("compile cache: entry %s is damaged (%s) and will be rebuilt", place.name, error)
    return None


def _write_cache(place: Path, code: Code) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in code.members.items():
            archive.writestr(f"code/{name}", content)
        archive.writestr("report.json", json.dumps(code.report))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, data.getvalue())
    except OSError as error:
        log.warning("compile cache: cannot write %s: %s", place, error)


def _run_worker(
    module: str, target: str, options: Mapping[str, Any], progress: Progress, dump: Path | None
) -> Code:
    workdir = Path(tempfile.mkdtemp(prefix="spikingbrain-"))
    (workdir / "module.mlir").write_text(module)
    if dump:
        dump.mkdir(parents=True, exist_ok=True)
    job = {
        "target": target,
        "options": dict(options),
        "dump": str(dump.resolve()) if dump else None,  # the process may be older than the current folder
        "verify_each": bool(dump),
    }
    (workdir / "job.json").write_text(json.dumps(job))
    try:
        returncode = workers.run(workdir, progress)
    except BaseException:
        shutil.rmtree(workdir, ignore_errors=True)
        raise
    if returncode == 0:
        members = {f.name: f.read_bytes() for f in (workdir / "code").iterdir()}
        report = json.loads((workdir / "report.json").read_text())
        shutil.rmtree(workdir)
        return Code(members, report, cached=False)
    raise _failure(workdir, returncode)


def _failure(workdir: Path, returncode: int) -> errors.CompileError:
    described = workdir / "error.json"
    if not described.is_file():
        last = (workdir / "stderr.txt").read_text().strip().splitlines()[-1:] or ["it said nothing"]
        return errors.PassFailed(
            f"the compile process died (signal {-returncode})"
            if returncode < 0
            else "the compile process died",
            why=last[0],
            hint=f"python -m spikingbrain.worker {workdir} reproduces it",
        )
    error = json.loads(described.read_text())
    where = error.get("where")
    if isinstance(where, dict):
        where = errors.SourceLine(where["file"], where["line"])
    kind = getattr(errors, error["type"], errors.PassFailed)
    if not issubclass(kind, errors.PassFailed):
        shutil.rmtree(workdir)  # an error of the user's model needs no reproducer
    failure: errors.CompileError = kind(
        error["what"], where=where, why=error.get("why", ""), hint=error.get("hint", "")
    )
    return failure
