"""The public functions; each imports what it needs when called, so that the slim runtime stays slim."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from spikingbrain import errors
from spikingbrain.artifact import STATE, TOKENIZER, Artifact, check_writable, pack
from spikingbrain.backend import TargetStatus, backends, resolve_target
from spikingbrain.memory import Forecast
from spikingbrain.program import Program

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from torch import nn

    from spikingbrain.frontend.capture import Entry
    from spikingbrain.frontend.dynamo.explain import Explanation

_Model = TypeVar("_Model", bound=Callable[..., Any])


def export(
    model: nn.Module,
    entries: Mapping[str, Entry],
    path: str | Path,
    *,
    state: str | None = None,
    target: str = "cpu",
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
        target: a name from ``targets()``.
        options: options of the target's backend.
        tokenizer: content of a ``tokenizer.json``, for ``Program.generate``.
        metadata: further manifest entries, such as ``{"generation": {...}}``.
        progress: called with a line at each step.
        dump: folder for the IR after each pass and stage.
        check_finite: for debugging: the program raises NotFinite where the input of a spiking layer held NaN or infinity.

    Raises CompileError and its kinds (with the user's line), OptionError, TargetError.
    """
    try:
        from spikingbrain.build import compile_code, write_artifact
        from spikingbrain.frontend.capture import capture
        from spikingbrain.frontend.weights import as_numpy
    except ModuleNotFoundError as error:
        raise errors.needs_compiler(error) from error

    def tell(step: str) -> None:
        if not step.endswith("%"):
            log.info("%s", step)
        progress(step)

    check_writable(Path(path))
    _, status = resolve_target(target)
    captured = capture(model, entries, state, tell, check_finite)
    code = compile_code(captured.module, target, options or {}, tell, Path(dump) if dump else None, use_cache)
    extra = {TOKENIZER: tokenizer.encode()} if tokenizer else {}
    if captured.blocks:
        extra[STATE] = pack({name: as_numpy(block) for name, block in captured.blocks.items()})
    write_artifact(
        Path(path),
        code,
        status.target,
        options or {},
        captured.entries,
        captured.state,
        lambda name: as_numpy(captured.weights[name]),
        extra,
        metadata or {},
        tell,
    )
    return Artifact(path)


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


def load(path: str | Path | Artifact, *, verify: bool = False, check_memory: bool = True) -> Program:
    """Loads an artifact for this machine.

    Manifest and code are always checked, weights at the first load of a file (``verify=True``: always). Weights are mapped
    from the file. Raises CorruptArtifact, NewerFormat or WrongTarget in plain words; OutOfMemory, unless
    ``check_memory=False``, where weights and state need clearly more of a CPU's memory than is available.
    """
    opened = path if isinstance(path, Artifact) else Artifact(path)
    wanted = opened.manifest["target"]
    try:
        backend, status = resolve_target(wanted["name"])
    except errors.TargetError as error:
        raise errors.WrongTarget(
            f"{opened.path} needs the target {wanted['name']!r}", why=error.what
        ) from None
    here = status.target
    if wanted["arch"] != here.arch or not status.runs:
        raise errors.WrongTarget(
            f"{opened.path} was compiled for {wanted['arch']} ({wanted['name']})",
            why=status.note or f"this machine is {here.arch}",
            hint="compile it with --target for this machine",
        )
    missing = sorted(set(wanted["features"]) - here.features)
    if missing:
        raise errors.WrongTarget(
            f"{opened.path} was compiled for a CPU with {', '.join(missing)}",
            why="this CPU lacks them",
            hint="compile it here, or with --target x86-64-v3 for most x86-64 machines",
        )
    check_memory = check_memory and here.kind == "cpu"
    if check_memory:
        Forecast.of(opened).check(str(opened.path))
    opened.verify_weights(force=verify)
    executable = backend.load(opened.code, opened.manifest, opened.weights())
    return Program(opened.manifest, executable, opened, check_memory)


def targets() -> list[TargetStatus]:
    """Returns every target of every backend: whether it compiles and runs here, and why not."""
    return [status for backend in backends().values() for status in backend.targets()]
