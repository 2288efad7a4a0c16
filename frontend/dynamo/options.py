"""What a user of ``torch.compile(model, backend="spikingbrain", options={...})`` may choose."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from spikingbrain.backend import resolve_target
from spikingbrain.errors import OptionError, TargetError
from spikingbrain.frontend.dynamo.on_device import kernels_of


@dataclass(frozen=True)
class CompileOptions:
    """Options of the ``torch.compile`` backend.

    Attributes:
        target: where compiled regions run: a name from ``spikingbrain.targets()`` that runs here and shares torch's memory.
            "maca" takes a process whose torch has a MetaX GPU (or an NVIDIA one, for tests): our ops run on Triton
            kernels, all else on torch's.
        threads: threads of compiled regions; 0 takes ``torch.get_num_threads()`` at compile time.
        level: 2 compiles with kernels of our own, 1 with upstream lowerings only, 0 compiles nothing (the graph runs as
            torch decomposes it, which tells a fault of ours from one of torch's).
        providers: who computes an op on a target with a choice, such as ``"attention=triton"``; docs/maca.md has the table.
        tuning: settings of the target's kernels inside torch that are not the usual ones, or the path of a JSON file with them;
            docs/tuning.md has the table.
        library: leave matrix products, convolutions, attention and the like to torch's kernels, which are faster than
            generated code; False compiles all that can be compiled.
        strict: raise one error that lists every op that would have run in eager for want of a lowering.
        dump: a folder for the IR of each graph after every pass.
        cache: keep compiled code on disk and take it from there.
        check_finite: raise NotFinite, after the call, where the input of a spiking layer held NaN or infinity.
    """

    target: str = "cpu"
    threads: int = 0
    level: int = 2
    providers: str = ""
    tuning: Mapping[str, int] = field(default_factory=dict, hash=False)
    library: bool = True
    strict: bool = False
    dump: str = ""
    cache: bool = True
    check_finite: bool = False

    @property
    def thread_count(self) -> int:
        return self.threads or torch.get_num_threads()

    @property
    def of_backend(self) -> dict[str, Any]:
        """Returns the options of the target's backend: those that it knows."""
        backend, _ = resolve_target(self.target)
        known = {f.name for f in dataclasses.fields(backend.options)}
        given: dict[str, Any] = {"threads": self.thread_count}
        if kernels_of(self.target, self.providers) is None:  # else the choice is among those
            given["providers"] = self.providers
        return {name: value for name, value in given.items() if name in known}


_RANGES = {"level": (0, 2), "threads": (0, 1024)}


def parse(options: Mapping[str, Any] | None, mode: str | None = None) -> CompileOptions:
    """Returns checked options; raises OptionError naming the faulty one and what would be right."""
    if mode not in (None, "default"):
        raise OptionError(
            f"unknown mode {mode!r} for the spikingbrain backend", hint='options={"level": 0, 1 or 2}'
        )
    defaults = dataclasses.asdict(CompileOptions())
    given = dict(options or {})
    for name, value in given.items():
        if name not in defaults:
            close = difflib.get_close_matches(str(name), defaults, 1)
            meant = f"{close[0]!r}; " if close else ""
            raise OptionError(f"unknown option {name!r}", hint=f"{meant}known: {', '.join(sorted(defaults))}")
        if name == "tuning":  # the target's kernels know what it may be
            continue
        wanted = type(defaults[name])
        if type(value) is not wanted:
            raise OptionError(f"option {name!r} is {value!r}", why=f"it must be of type {wanted.__name__}")
        low, high = _RANGES.get(name, (value, value))
        if not low <= value <= high:
            raise OptionError(f"option {name!r} is {value!r}", why=f"it must be in {low} to {high}")
    parsed = CompileOptions(**given)
    if parsed.check_finite and not parsed.level:
        raise OptionError(
            "check_finite at level 0", why="level 0 looks for no spiking layers", hint="level 1 or 2"
        )
    kernels = kernels_of(parsed.target, parsed.providers)
    if parsed.tuning != {}:
        if kernels is None or kernels.settings is None:
            raise OptionError(
                f"option 'tuning' with target {parsed.target!r}",
                why="its kernels inside torch have no settings",
                hint="target 'maca', or spikingbrain.export(model, ..., options={'tuning': ...})",
            )
        parsed = dataclasses.replace(parsed, tuning=kernels.settings(parsed.tuning))
    if kernels is not None:
        return parsed
    backend, status = resolve_target(parsed.target)
    if parsed.providers and "providers" not in {f.name for f in dataclasses.fields(backend.options)}:
        raise OptionError(
            f"option 'providers' is {parsed.providers!r}",
            why=f"target {parsed.target!r} has no choice of providers",
            hint="target 'maca'",
        )
    if not (status.compiles and status.runs):
        raise TargetError(f"cannot run target {parsed.target!r} here", why=status.note)
    if status.target.kind != "cpu" and not status.target.host_memory:
        raise TargetError(
            f"torch.compile cannot run regions on target {parsed.target!r}",
            why="the tensors of this torch are in the CPU's memory",
            hint="spikingbrain.export(model, ..., target=...) compiles for it ahead of time",
        )
    return parsed
