"""IREE as a backend: CPUs of three architectures, Vulkan, CUDA, ROCm."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikingbrain.backend import Executable, Stage, StageContext, TargetStatus
from spikingbrain.backend_iree import targets
from spikingbrain.errors import MissingDependency, PassFailed
from spikingbrain.target import Target

if TYPE_CHECKING:
    import numpy as np

MODULE = "module.vmfb"
# Elementwise and reduction code comes from IREE; the scratch of the attention kernel fits its default stack limit.
BASE_FLAGS = (
    "--iree-input-type=none",
    "--iree-opt-level=O3",
    "--iree-vm-bytecode-module-strip-source-map=true",
)


@dataclass(frozen=True)
class IreeOptions:
    """What a user may choose.

    Attributes:
        threads: worker threads at run time on a CPU; 1 runs in the caller's thread.
        flags: further flags for iree-compile, separated by blanks.
    """

    threads: int = 1
    flags: str = ""


class IreeBackend:
    """Compiles lowered modules with iree-compile and runs them with the IREE runtime."""

    name = "iree"
    options = IreeOptions

    def targets(self) -> list[TargetStatus]:
        return targets.statuses()

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
        source, result = context.workdir / "module.mlir", context.workdir / MODULE
        source.write_text(module)
        command = [_compiler(), *self._flags(context.target, context.options), str(source), "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and "exceeded stack allocation limit" in done.stderr:
            # a broadcast and a sum of one dynamic value, fused: IREE 3.13.0 wants that value on the stack
            context.report["note"] = "compiled with less fusion: a fused loop did not fit the stack"
            command.append("--iree-dispatch-creation-enable-aggressive-fusion=false")
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            (context.workdir / "command.txt").write_text(" ".join(command) + "\n")
            raise PassFailed(
                f"iree-compile stopped ({_ending(done.returncode)})",
                why=_first_error(done.stderr),
                hint=f"the module and the command that reproduce it are in {context.workdir}",
            )
        return {MODULE: result.read_bytes()}


def _dispatch(module: str, context: StageContext) -> str:
    """Turns launches into dispatches and parameters into globals; the result is text for iree-compile."""
    from torch_mlir import ir

    from spikingbrain.backend_iree.devices import gather_slices, name_device
    from spikingbrain.backend_iree.dispatch import wrap_kernels
    from spikingbrain.backend_iree.parameters import emit_globals, protect_arguments
    from spikingbrain.passes import dialect

    with dialect.load(), ir.Location.unknown():
        parsed = ir.Module.parse(module)
        protect_arguments(parsed)
        wrap_kernels(parsed)
        emit_globals(parsed)
        if context.target.arch == "spirv":
            gather_slices(parsed)
        if device := targets.known()[context.target.name].device:
            name_device(parsed, device)
        text: str = parsed.operation.get_asm(enable_debug_info=True)
        return text


def _compiler() -> str:
    beside = Path(sys.executable).with_name("iree-compile")
    found = str(beside) if beside.exists() else shutil.which("iree-compile")
    if found is None:
        raise MissingDependency("iree-compile is not installed", hint="pip install 'spikingbrain[compile]'")
    return found


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _first_error(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if "error:" in line] or stderr.splitlines()
    return lines[0][:500] if lines else "it said nothing"
