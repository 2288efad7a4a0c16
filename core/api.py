"""The public functions; each imports what it needs when called, so that the slim runtime stays slim."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from spikingbrain import errors, tuning
from spikingbrain.artifact import STATE, TOKENIZER, Artifact, check_writable, pack
from spikingbrain.backend import Backend, TargetStatus, backends, resolve_target
from spikingbrain.memory import Forecast
from spikingbrain.program import Program

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from torch import nn

    from spikingbrain.build import Part
    from spikingbrain.frontend.capture import Capture, Entry
    from spikingbrain.frontend.dynamo.explain import Explanation

_Model = TypeVar("_Model", bound=Callable[..., Any])


def export(
    model: nn.Module,
    entries: Mapping[str, Entry],
    path: str | Path,
    *,
    state: str | None = None,
    target: str | Sequence[str] = "cpu",
    options: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda _: None,
    dump: str | Path | None = None,
    use_cache: bool = True,
    check_finite: bool = False,
) -> Artifact:
    """Compiles a model ahead of time and writes an artifact.

    Args:
        model: any ``torch.nn.Module``; its parameters are read, not changed.
        entries: entry point name -> ``Entry`` with example arguments and dynamic dimensions; all share one copy of
            the weights.
        path: where the artifact is written (to a temporary name first, then renamed).
        state: name of the argument of forward that carries the state. Forward must return ``(*outputs, new_state)``;
            compiled, the state is updated in place. A fresh state of the program is the one given to the first entry.
        target: a name from ``targets()``; or several, as a list or with commas between, for code for each of them.
        options: options of the target's backend; of several, each takes those that it knows.
        tokenizer: content of a ``tokenizer.json``, for ``Program.generate``.
        metadata: further manifest entries, such as ``{"generation": {...}}``.
        progress: called with a line at each step.
        dump: folder for the IR after each pass and stage.
        check_finite: for debugging: the program raises NotFinite where the input of a spiking layer held NaN or infinity.

    Raises CompileError and its kinds (with the user's line), OptionError, TargetError.
    """
    try:
        from spikingbrain.build import Part, compile_code, options_by_target
        from spikingbrain.frontend.capture import capture
    except ModuleNotFoundError as error:
        raise errors.needs_compiler(error) from error

    def tell(step: str) -> None:
        if not step.endswith("%"):
            log.info("%s", step)
        progress(step)

    check_writable(Path(path))
    _require_text(tokenizer, metadata)
    chosen = options_by_target(target, options or {})
    captured = capture(model, entries, state, tell, check_finite)
    code = {
        name: compile_code(captured.module, name, own, tell, _dump_folder(dump, name, len(chosen)), use_cache)
        for name, own in chosen.items()
    }
    parts = [Part(resolve_target(name)[1].target, made, chosen[name]) for name, made in code.items()]
    return _write(Path(path), captured, parts, tokenizer, metadata or {}, tell)


def _require_text(tokenizer: object, metadata: object) -> None:
    """Raises OptionError for what an artifact cannot hold, before anything is compiled."""
    if not isinstance(tokenizer, str | None):
        raise errors.OptionError(
            f"tokenizer is a {type(tokenizer).__name__}", hint="the content of a tokenizer.json, as a str"
        )
    try:
        json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise errors.OptionError(
            "metadata cannot be written as JSON",
            why=str(error),
            hint="numbers, texts, lists and dictionaries",
        ) from error


def _write(
    path: Path,
    captured: Capture,
    parts: Sequence[Part],
    tokenizer: str | None,
    metadata: Mapping[str, Any],
    tell: Callable[[str], None],
) -> Artifact:
    from spikingbrain.build import write_artifact
    from spikingbrain.frontend.weights import as_numpy

    extra = {TOKENIZER: tokenizer.encode()} if tokenizer else {}
    if captured.blocks:
        extra[STATE] = pack({name: as_numpy(block) for name, block in captured.blocks.items()})
    write_artifact(
        path,
        parts,
        captured.entries,
        captured.state,
        lambda name: as_numpy(captured.weights[name]),
        extra,
        metadata,
        tell,
    )
    return Artifact(path)


def tune(
    model: nn.Module,
    entries: Mapping[str, Entry],
    path: str | Path,
    calls: Mapping[str, Sequence[Any]],
    *,
    state: str | None = None,
    target: str = "cpu",
    options: Mapping[str, Any] | None = None,
    settings: Sequence[str] | None = None,
    rounds: int = 9,
    budget: float | None = None,
    tokenizer: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Exports a model with settings of kernels that were searched: by measured time on the device, else by a model of it.

    The settings stand in the manifest, in ``options["tuning"]``, as ``export(..., options={"tuning": {...}})`` takes them; what
    was tried stands in ``tuned``, with how it was judged. A CPU is measured with one thread. A MetaX GPU that is not here
    is modelled.

    Args:
        path: where the artifact is written, twice: first with the usual settings.
        calls: entry point -> arguments that it is timed with, without the state, in the order of the calls.
        target: one target.
        settings: of ``spikingbrain.tuning.Tuning``, those that are searched; None: all that the model's kernels may read.
        rounds: measurements of each program.
        budget: seconds after which the search of no further setting is begun.

    The other arguments, and what is raised, are those of ``export``. Raises TargetError for a target that neither
    runs here nor has a model.
    """
    try:
        from spikingbrain.build import Part, compile_code
        from spikingbrain.frontend.capture import capture
        from spikingbrain.search import Built, Compare, Estimating, Timing, known, relevant, search
    except ModuleNotFoundError as error:
        raise errors.needs_compiler(error) from error

    backend, status = resolve_target(target)
    here = status.target
    estimate = getattr(backend, "estimate", None)
    is_emulated = here.kind == "gpu" and here.host_memory  # an emulator's time tells nothing
    compare: Compare
    if status.runs and not is_emulated:
        clock, why = (
            (time.thread_time, "thread CPU time") if here.kind == "cpu" else (time.perf_counter, "time")
        )
        compare, estimate = Timing(calls, rounds, clock), None
    elif estimate is not None:
        compare, why = Estimating(calls), "a cost model, not a measurement"
    else:
        raise errors.TargetError(
            f"settings for {target!r} cannot be searched here", why=status.note or "it does not run here"
        )
    fixed = {key: value for key, value in (options or {}).items() if key != "tuning"}
    if fixed.get("threads", 1) != 1:
        raise errors.OptionError("settings are searched with one thread", hint="leave 'threads' away")
    if strange := calls.keys() - entries.keys():
        raise errors.OptionError(f"no entry point {min(strange)!r}", hint=f"one of {', '.join(entries)}")
    searched = None if settings is None else known(settings, here.kind)
    check_writable(Path(path))
    _require_text(tokenizer, metadata)
    captured = capture(model, entries, state, progress)
    shapes = {entry: [np.shape(argument) for argument in arguments] for entry, arguments in calls.items()}

    def compiled(chosen: Mapping[str, int], **more: Any) -> Part:
        own = {**fixed, **({"tuning": dict(chosen)} if chosen else {}), **more}
        return Part(here, compile_code(captured.module, target, own, progress), own)

    usual = compiled({})
    written = _write(Path(path), captured, [usual], tokenizer, metadata or {}, progress)
    weights = written.weights()

    def build(chosen: Mapping[str, int]) -> Built:
        code = compiled(chosen, **({"work": True} if estimate else {})).code
        assert code.report["weights"] == usual.code.report["weights"]  # settings change no stored weight
        seconds = estimate(code.members, code.report, shapes) if estimate else {}
        if not status.runs:
            return Built(code.members, seconds=seconds)
        members = {name: memoryview(data) for name, data in code.members.items()}
        executable = backend.load(members, written.manifest, weights)
        return Built(code.members, Program(written.manifest, executable, written), seconds)

    searched = relevant(usual.code.report["records"], here.kind) if searched is None else searched
    progress(f"search {', '.join(searched) or 'nothing: no kernel here has settings'}, by {why}")
    found = search(build, compare, searched, budget, progress)
    tuned = {
        **({"cpu": tuning.cpu()} if here.kind == "cpu" else {}),
        "judged_by": why,
        "trials": [trial.record() for trial in found.trials],
        "left_out": list(found.left_out),
    }
    part, told = compiled(found.settings), {**(metadata or {}), "tuned": tuned}
    return _write(Path(path), captured, [part], tokenizer, told, progress)


def _dump_folder(dump: str | Path | None, target: str, targets: int) -> Path | None:
    if dump is None or targets == 1:
        return Path(dump) if dump else None
    return Path(dump) / target


def compile(model: _Model, *, dynamic: bool | None = None, fullgraph: bool = False, **options: Any) -> _Model:
    """Returns ``model``, a module or function, compiled when it is called: ``torch.compile`` with this compiler.

    What cannot be compiled runs in torch, with the same numbers as before; ``explain`` tells what and why. Training works:
    the backward is compiled too.

    Args:
        dynamic: True for sizes that change from call to call, False for code for each size, None to find out.
        fullgraph: raise torch's error where Python breaks the graph.
        options: fields of ``spikingbrain.frontend.dynamo.options.CompileOptions``.

    Raises OptionError and TargetError at once, not at the first call.
    """
    try:
        import torch

        from spikingbrain.frontend.dynamo.options import parse
    except ModuleNotFoundError as error:
        raise errors.needs_compiler(error) from error
    parse(options)
    compiled: Any = torch.compile(
        model, backend="spikingbrain", dynamic=dynamic, fullgraph=fullgraph, options=options or None
    )
    return compiled  # type: ignore[no-any-return]


def explain(
    model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Explanation:
    """Tells what the compiler does with ``model(*args, **kwargs)``: what is compiled, what is not, where and why.

    Compiles afresh and calls the model once, and its backward if the result requires a gradient. What was compiled before
    stays; ``.grad``, buffers of a module and torch's random state are left as they were. A model that writes elsewhere, such
    as into its arguments, does so. The code made here is kept by Dynamo until ``torch._dynamo.reset()``.
    """
    try:
        from spikingbrain.frontend.dynamo import explain as explaining
    except ModuleNotFoundError as error:
        raise errors.needs_compiler(error) from error
    return explaining.explain(model, args, kwargs, options)


def refresh() -> None:
    """Lets every model compiled by ``compile`` read its weights anew at its next call.

    In-place ops, ``load_state_dict``, optimizers and new tensors are noticed without it. Writes through ``.data``, numpy or
    other memory sharing leave no trace that could be noticed: call this after them.
    """
    from spikingbrain.frontend.dynamo import weights

    weights.refresh()


def load(
    path: str | Path | Artifact,
    *,
    device: str | None = None,
    verify: bool = False,
    check_memory: bool = True,
) -> Program:
    """Loads an artifact for this machine.

    Manifest and code are always checked, weights at the first load of a file (``verify=True``: always). Weights are mapped
    from the file. Raises CorruptArtifact, NewerFormat or WrongTarget in plain words; OutOfMemory, unless
    ``check_memory=False``, where weights and state need clearly more of a CPU's memory than is available.

    Args:
        device: a target that runs here and takes code of the artifact: ``"maca-emulator"`` runs code for ``"maca"``. None
            takes the first target of the artifact that runs here itself.
    """
    opened = path if isinstance(path, Artifact) else Artifact(path)
    record, backend, status = _choose(opened, device)
    tuning.warn_of_another(opened)
    here = status.target
    check_memory = check_memory and here.kind == "cpu"
    if check_memory:
        Forecast.of(opened).check(str(opened.path))
    opened.verify_weights(force=verify)
    options = record.get("options", opened.manifest.get("options", {}))
    manifest = {**opened.manifest, "target": record, "options": options, "device": here.name}
    executable = backend.load(opened.code_for(record), manifest, opened.weights())
    return Program(manifest, executable, opened, check_memory)


def _choose(artifact: Artifact, device: str | None) -> tuple[Mapping[str, Any], Backend, TargetStatus]:
    """Returns the target of the artifact whose code shall run, and where. Raises WrongTarget or TargetError."""
    if device is None:
        refused: list[errors.WrongTarget] = []
        for record in artifact.targets:
            try:
                backend, status = resolve_target(record["name"])
                _check_machine(artifact, record, status)
            except errors.TargetError as error:
                text = f"{artifact.path} needs the target {record['name']!r}"
                refused.append(errors.WrongTarget(text, why=error.what))
            except errors.WrongTarget as error:
                refused.append(error)
            else:
                return record, backend, status
        if len(refused) == 1:
            raise refused[0]
        names = ", ".join(r["name"] for r in artifact.targets)
        why = "; ".join(f"{error.what}: {error.why}" for error in refused)
        hint = next((error.hint for error in refused if "--device" in error.hint), "")
        raise errors.WrongTarget(f"{artifact.path} has code for {names}: none runs here", why=why, hint=hint)
    backend, status = resolve_target(device)
    for record in sorted(artifact.targets, key=lambda r: r["name"] != device):  # the device's own code first
        if record["name"] == device or record["name"] in status.target.accepts:
            _check_machine(artifact, record, status)
            return record, backend, status
    names = ", ".join(record["name"] for record in artifact.targets)
    raise errors.WrongTarget(
        f"{artifact.path} has no code that {device} runs",
        why=f"it has code for {names}",
        hint="compile it again",
    )


def _check_machine(artifact: Artifact, record: Mapping[str, Any], status: TargetStatus) -> None:
    here = status.target
    if record["arch"] != here.arch or not status.runs:
        others = [] if status.runs else [s.target for s in targets() if s.runs]
        devices = [t.name for t in others if record["name"] in t.accepts]
        hint = "compile it with --target for this machine"
        raise errors.WrongTarget(
            f"{artifact.path} was compiled for {record['arch']} ({record['name']})",
            why=status.note or f"this machine is {here.arch}",
            hint=f"--device {devices[0]}, load(..., device={devices[0]!r})" if devices else hint,
        )
    missing = sorted(set(record["features"]) - here.features)
    if missing:
        raise errors.WrongTarget(
            f"{artifact.path} was compiled for a CPU with {', '.join(missing)}",
            why="this CPU lacks them",
            hint="compile it here, or with --target x86-64-v3 for most x86-64 machines",
        )


def targets() -> list[TargetStatus]:
    """Returns every target of every backend: whether it compiles and runs here, and why not."""
    return [status for backend in backends().values() for status in backend.targets()]
