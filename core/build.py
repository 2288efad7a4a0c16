"""From a captured model to an artifact file: code from the compile cache or the compile process, then the weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spikingbrain import artifact, code_cache, errors
from spikingbrain.backend import Backend, resolve_target
from spikingbrain.code_cache import code_parts, versions
from spikingbrain.compile_process import Progress, compile_in_process
from spikingbrain.target import Target
from spikingbrain.tuning import settings_of

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
    key = code_cache.Key.of(module, code_parts(backend, status.target, chosen)) if use_cache else None
    if key and dump is None and (found := code_cache.find(key)):
        found.raise_error()
        progress("code from the cache")
        return Code(found.members, found.report, cached=True)
    made = compile_in_process(module, target_name, dataclasses.asdict(chosen), progress, dump)
    if key and made.lasts:
        code_cache.write(key, made)
    made.raise_error()
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
