"""IREE as a backend: CPUs of three architectures, Vulkan, CUDA, ROCm."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spikingbrain.backend import Executable, Stage, StageContext, TargetStatus
from spikingbrain.backend_iree import cpu, targets
from spikingbrain.errors import MissingDependency, OptionError, PassFailed, SourceLine
from spikingbrain.target import Target
from spikingbrain.tuning import USUAL

if TYPE_CHECKING:
    import numpy as np

MODULE, SOURCE = "module.vmfb", "iree.mlir"
# Elementwise and reduction code comes from IREE; the scratch of the attention kernel fits its default stack limit.
BASE_FLAGS = (
    "--iree-opt-level=O3",
    "--iree-vm-bytecode-module-strip-source-map=true",
)


@dataclass(frozen=True)
class IreeOptions:
    """What a user may choose.

    Attributes:
        threads: worker threads at run time on a CPU; 1 runs in the caller's thread.
        flags: further flags for iree-compile, separated by blanks.
        tuning: settings of kernels for a CPU that are not the usual ones, by the names of ``spikingbrain.tuning.Tuning``.
    """

    threads: int = 1
    flags: str = ""
    tuning: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.threads) is not int or self.threads < 1:
            raise OptionError(f"threads is {self.threads!r}", why="it must be a whole number, 1 or more")
        USUAL.with_changes(self.tuning)


# Errors of IREE 3.13.0 that come of fusing too much, and what happened.
_LESS_FUSION = {
    # a broadcast and a sum of one dynamic value: that value is wanted on the stack
    "exceeded stack allocation limit": "a fused loop did not fit the stack",
    # several results of transposed sums that share an operand
    "does not dominate this use": "fused loops came out in the wrong order",
}


class IreeBackend:
    """Compiles lowered modules with iree-compile and runs them with the IREE runtime."""

    name = "iree"
    options = IreeOptions

    def targets(self) -> list[TargetStatus]:
        return targets.statuses()

    def status(self, name: str) -> TargetStatus | None:
        entry = targets.known().get(name)
        return targets.status(entry) if entry else None

    def cache_key(self, target: Target, options: IreeOptions) -> str:
        from importlib.metadata import version

        flags = " ".join(self._flags(target, options))
        features = ",".join(sorted(target.features))
        device = targets.known()[target.name].device
        return f"iree-base-compiler {version('iree-base-compiler')} {flags} [{features}] {device}"

    def stages(self, target: Target) -> dict[str, Stage]:
        return {"dispatch": _dispatch, "vmfb": self._compile}

    def load(
        self,
        code: Mapping[str, memoryview],
        manifest: Mapping[str, Any],
        weights: Mapping[str, np.ndarray[Any, Any]],
    ) -> Executable:
        from spikingbrain.backend_iree.runtime import IreeExecutable

        entry = targets.known()[manifest["target"]["name"]]
        return IreeExecutable(code[MODULE], entry.driver, weights, IreeOptions(**manifest.get("options", {})))

    def _flags(self, target: Target, options: IreeOptions) -> list[str]:
        return [*BASE_FLAGS, *targets.known()[target.name].flags, *options.flags.split()]

    def _compile(self, module: str, context: StageContext) -> dict[str, bytes]:
        source, result = context.workdir / SOURCE, context.workdir / MODULE
        source.write_text(module)
        command = [_compiler(), *self._flags(context.target, context.options), str(source), "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True)
        reason = next((why for error, why in _LESS_FUSION.items() if error in done.stderr), None)
        if done.returncode and reason:
            context.report["note"] = f"compiled with less fusion: {reason}"
            command.append("--iree-dispatch-creation-enable-aggressive-fusion=false")
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            (context.workdir / "command.txt").write_text(" ".join(command) + "\n")
            (context.workdir / "iree-stderr.txt").write_text(done.stderr)
            where, why = _first_error(done.stderr)
            raise PassFailed(
                f"iree-compile stopped ({_ending(done.returncode)})",
                where=where,
                why=why,
                hint=f"the module and the command that reproduce it are in {context.workdir}",
            )
        return {MODULE: result.read_bytes()}


def _dispatch(module: str, context: StageContext) -> str:
    """Turns launches into dispatches and parameters into globals; the result is text for iree-compile."""
    from torch_mlir import ir

    from spikingbrain.backend_iree.devices import gather_slices, name_device
    from spikingbrain.backend_iree.dispatch import wrap_kernels
    from spikingbrain.backend_iree.double_reads import separate_double_reads
    from spikingbrain.backend_iree.loop_sizes import bound_sizes
    from spikingbrain.backend_iree.narrowing import narrow_by_f32
    from spikingbrain.backend_iree.parameters import emit_globals, protect_arguments
    from spikingbrain.backend_iree.rounding import keep_roundings
    from spikingbrain.backend_iree.sorts import keep_sort_results, order_nan, own_sort_operands
    from spikingbrain.passes import dialect

    with dialect.load(), ir.Location.unknown():
        parsed = ir.Module.parse(module)
        separate_double_reads(parsed)
        order_nan(parsed)
        own_sort_operands(parsed)
        keep_sort_results(parsed)
        protect_arguments(parsed)
        bound_sizes(parsed)
        narrow_by_f32(parsed)
        keep_roundings(parsed)
        wrap_kernels(parsed)
        emit_globals(parsed)
        if context.target.arch == "spirv":
            gather_slices(parsed)
        if device := targets.known()[context.target.name].device:
            name_device(parsed, device)
        text: str = parsed.operation.get_asm(enable_debug_info=True)
        return text


def _compiler() -> str:
    found = cpu.tool("iree-compile")
    if found is None:
        raise MissingDependency("iree-compile is not installed", hint="pip install 'spikingbrain[compile]'")
    return found


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


_MESSAGE = re.compile(r"^(?P<file>[^:]+):(?P<line>\d+):\d+: (?P<kind>error|note): (?P<text>.*)")


def _first_error(stderr: str) -> tuple[SourceLine | None, str]:
    """Returns the user's line behind the first error, where one is known, and what the error says."""
    lines = stderr.splitlines()
    messages = [m for m in map(_MESSAGE.match, lines) if m]
    errors = [i for i, m in enumerate(messages) if m["kind"] == "error"]
    if not errors:
        return None, _complaint(lines)[:500]
    first = errors[0]
    callers = itertools.takewhile(lambda m: m["text"].startswith("called from"), messages[first + 1 :])
    for message in (messages[first], *callers):
        if message["file"].endswith(".py") and not re.match(r"torch/|.*/site-packages/", message["file"]):
            return SourceLine(message["file"], int(message["line"])), messages[first]["text"][:500]
    return None, messages[first].group()[:500]


def _complaint(lines: list[str]) -> str:
    """Returns the line that says most, of output without a located error."""
    for line in lines:
        if re.search(r"error:|LLVM ERROR|Assertion|^iree-compile: ", line):
            return line
    frames = [m[1] for m in map(re.compile(r"^ *#\d+ 0x\w+ (.+?)\(").match, lines) if m]
    inner = [f for f in frames if not re.match(r"llvm::sys::|SignalHandler| *$", f)]
    if inner:
        return f"it crashed in {inner[0]}"
    return lines[0] if lines else "it said nothing"
