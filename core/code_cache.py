"""The compile cache: code by the module it was made of and by all else that decides about it.

Some modules fail each time; their error is kept in place of code.
"""

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
import time
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import spikingbrain
from spikingbrain import artifact
from spikingbrain.backend import Backend
from spikingbrain.compile_process import Outcome
from spikingbrain.environment import number
from spikingbrain.files import write_atomically
from spikingbrain.target import Target
from spikingbrain.tuning import tuned

log = logging.getLogger(__name__)
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
LIMIT_MB = 2000  # of code that is kept


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


@dataclasses.dataclass(frozen=True)
class Key:
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
    def of(module: str, parts: Mapping[str, str]) -> Key:
        return Key(_hash(_without_lines(module)), _hash(module), parts)

    @property
    def place(self) -> Path:
        return folder() / f"{self.module}-{_hash(json.dumps(self.parts))}.zip"


def folder() -> Path:
    """Returns the folder that all code lies in."""
    return artifact.cache_folder() / "compile"


def uses() -> tuple[str, int, int] | None:
    """Returns since when uses of the compile cache have been counted, hits and misses."""
    try:
        since, _, marks = _uses_file().read_text().partition("\n")
    except OSError:
        return None
    return since, marks.count("h"), marks.count("m")


def prune(limit: int | None = None) -> None:
    """Removes the code that was used least recently, until at most ``limit`` bytes are left.

    Without a limit, ``SPIKINGBRAIN_CACHE_LIMIT`` counts, in MB.
    """
    if limit is None:
        limit = int(number("SPIKINGBRAIN_CACHE_LIMIT", LIMIT_MB) * 1e6)
    found = []
    for file in folder().glob("*.zip"):
        with contextlib.suppress(OSError):  # another process may remove it
            found.append((file.stat().st_mtime, file.stat().st_size, file))
    size = sum(entry[1] for entry in found)
    for _, freed, file in sorted(found):
        if size <= limit:
            break
        file.unlink(missing_ok=True)
        size -= freed
    for file in folder().glob(".*.tmp"):  # of a process that was killed as it wrote
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


def find(key: Key) -> Outcome | None:
    """Returns what the cache holds for a module, counts the use, and says in the log why there is nothing."""
    found = _read(key)
    _count_use("h" if found else "m")
    return found


def _read(key: Key) -> Outcome | None:
    try:
        with zipfile.ZipFile(key.place) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("checksum")
            members = {
                n.removeprefix("code/"): archive.read(n) for n in archive.namelist() if n.startswith("code/")
            }
            lines = json.loads(archive.read("key.json"))["lines"]
            entry = Outcome(members, **json.loads(archive.read("report.json")))
    except OSError:
        log.info("compile cache: nothing for this module, target, options and versions")
        log.info("  %s", _why_missing(key))
        return None
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError) as error:
        log.warning("compile cache: entry %s is damaged (%s) and will be rebuilt", key.place.name, error)
        return None
    if entry.error and (lines != key.lines or not entry.reproducible):
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


def write(key: Key, outcome: Outcome) -> None:
    """Keeps code or an error for later compiles; where nothing can be written, a warning says so once for each folder."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in outcome.members.items():
            archive.writestr(f"code/{name}", content)
        archive.writestr("report.json", json.dumps({"report": outcome.report, "error": outcome.error}))
        archive.writestr("key.json", json.dumps({"lines": key.lines, "parts": key.parts}))
    try:
        key.place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(key.place, data.getvalue())
    except OSError as error:
        level = logging.DEBUG if key.place.parent in _unwritable else logging.WARNING
        _unwritable.add(key.place.parent)
        log.log(level, "compile cache: cannot write %s: %s", key.place, error)
        return
    prune()


_unwritable: set[Path] = set()  # folders whose warning was given


def _why_missing(key: Key) -> str:
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
