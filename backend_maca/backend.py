"""The backend for MetaX GPUs: MACA C++ with a launch plan, run on an emulator where there is no device."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from spikingbrain.backend import Executable, Stage, StageContext, TargetStatus, TorchKernels
from spikingbrain.backend_maca import mxcc, toolchains
from spikingbrain.backend_maca.options import MacaOptions
from spikingbrain.backend_maca.run import probe
from spikingbrain.errors import CorruptArtifact, MissingDependency, SpikingBrainError
from spikingbrain.target import Target
from spikingbrain.tuning import Tuning


def _target(name: str) -> Target:
    emulator = name == "maca-emulator"
    return Target(
        name=name,
        kind="gpu",
        backend="maca",
        arch="maca",
        cpu="xcore1000",
        wave_width=64,
        shared_bytes=64 << 10,
        wave_kernels=name != "maca" or probe.hand_scheduled(),
        tuning=Tuning(l2_bytes=8 << 20),
        host_memory=emulator,
        accepts=frozenset({"maca", "maca-emulator"}) - {name},
    )


class MacaBackend:
    """Generates kernels for MetaX GPUs; ``maca-emulator`` is the same code, run and checked on the CPU."""

    name = "maca"
    options: type = MacaOptions

    def targets(self) -> list[TargetStatus]:
        """Returns MetaX cards, NVIDIA cards for the same source, and the emulator."""
        from spikingbrain.backend_maca.run.emulate import compiler

        found = shutil.which(compiler()) is not None
        emulator = (
            "a checking emulator on the CPU, slow" if found else f"needs the C++ compiler '{compiler()}'"
        )
        compiles = find_spec("torch_mlir") is not None
        lacks = "compiling needs torch-mlir: pip install 'spikingbrain[compile]'"
        if not compiles:
            emulator = f"{emulator}; {lacks}"
        return [
            _card("maca", compiles, "compiles to source, with mxcc to native code" if compiles else lacks),
            _card(
                "maca-cuda", compiles, "the same source for an NVIDIA card, by nvcc" if compiles else lacks
            ),
            TargetStatus(_target("maca-emulator"), compiles, runs=found, note=emulator),
        ]

    def cache_key(self, target: Target, options: Any) -> str:
        """Returns a digest of what decides about the code: this package's own, and the SDK where it makes native code."""
        here = Path(__file__).parent
        parts = [p.read_bytes() for p in (*sorted(here.rglob("*.py")), *sorted(here.rglob("*.maca")))]
        if target.name == "maca" and (sdk := mxcc.find()):
            parts.append(sdk.version.encode())
        return f"{target.name} {target.wave_kernels} {options} {hashlib.sha256(b''.join(parts)).hexdigest()}"

    def stages(self, target: Target) -> dict[str, Stage]:
        """Returns: sorts and scans to launches, tensors to buffers, linear algebra to kernels, kernels to source and plan."""
        return {
            "prepare": _prepare,
            "fuse": _fuse,
            "bufferize": _bufferize,
            "kernels": _build_kernels,
            "maca": _print,
        }

    def torch_kernels(self, target: Target, providers: str = "") -> TorchKernels | None:
        """Returns kernels for the device that torch has in this process, for target ``maca``; see `providers.TORCH`.

        Raises:
            TargetError: torch has no MetaX or NVIDIA device.
            MissingDependency: Triton is not installed.
            OptionError: ``providers`` names what there is not.
        """
        if target.name != "maca":
            return None
        from spikingbrain.backend_maca.triton import device

        found = device.find()
        from spikingbrain.backend_maca.triton import bridge

        return bridge.kernels(found, providers)

    def load(
        self,
        code: Mapping[str, memoryview],
        manifest: Mapping[str, Any],
        weights: Mapping[str, np.ndarray[Any, Any]],
    ) -> Executable:
        """Returns the program on the machine that ``manifest["device"]`` names, else on the plan's own target."""
        from spikingbrain.backend_maca.run import runtime

        missing = [name for name in ("kernels.maca", "plan.json") if name not in code]
        if missing:
            raise CorruptArtifact(f"the artifact has no {' and no '.join(missing)}")
        try:
            plan = dict(json.loads(bytes(code["plan.json"])))
        except (ValueError, TypeError) as error:
            raise CorruptArtifact("the launch plan cannot be read", why=str(error)) from error
        runtime.check_format(plan)
        device = manifest.get("device") or plan["target"]
        if device == "maca-emulator":
            return runtime.emulated(bytes(code["kernels.maca"]).decode(), plan, weights)
        from spikingbrain.backend_maca.run.device import open_card

        return runtime.Program(plan, weights, open_card(device, code, plan))

    def estimate(
        self,
        code: Mapping[str, bytes],
        report: Mapping[str, Any],
        shapes: Mapping[str, Sequence[tuple[int, ...]]],
    ) -> dict[str, float]:
        """Returns the seconds of entry points on a C550, by a model; the code was compiled with ``work=True``."""
        from spikingbrain.backend_maca.plan.cost import estimate

        return estimate(json.loads(code["plan.json"]), report["work"], shapes)


def _card(name: str, compiles: bool, does: str) -> TargetStatus:
    """Returns whether cards of a kind are here, by asking their runtime."""
    from spikingbrain.backend_maca.run.driver import open_driver

    try:
        driver = open_driver(name)
        note, runs = f"{driver.device_name()}; {does}", True
    except SpikingBrainError as error:
        note, runs = f"{does}; {error.what}", False
    return TargetStatus(_target(name), compiles, runs=runs, note=note)


def _need_compiler_packages() -> None:
    try:
        import torch_mlir.ir  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "torch-mlir is needed to compile", hint="pip install spikingbrain[compile]"
        ) from error


def _prepare(module: str, context: StageContext) -> str:
    _need_compiler_packages()
    from spikingbrain.backend_maca.lower.prepare import prepare

    return prepare(module)


def _fuse(module: str, context: StageContext) -> str:
    _need_compiler_packages()
    from spikingbrain.backend_maca.lower.fusion import fuse

    return fuse(module)


def _bufferize(module: str, context: StageContext) -> str:
    _need_compiler_packages()
    from spikingbrain.backend_maca.lower.bufferize import bufferize

    return bufferize(module)


def _build_kernels(module: str, context: StageContext) -> str:
    _need_compiler_packages()
    from spikingbrain.backend_maca.lower import kernels

    return kernels.build_kernels(module, context.options.choice())


def _print(module: str, context: StageContext) -> dict[str, bytes]:
    _need_compiler_packages()
    from torch_mlir import ir

    from spikingbrain.backend_maca.lower import mlir as modules
    from spikingbrain.backend_maca.plan import figures, plan, streams, unread, work
    from spikingbrain.backend_maca.source import printer
    from spikingbrain.passes import dialect

    with dialect.load() as mlir, ir.Location.unknown():
        parsed = modules.parse(module, mlir)
        source, printed = printer.print_kernels(parsed)
        launches = plan.build_plan(parsed, printed, context.target.name)
        unread.skip_unread(launches, printed)
        if context.options.streams > 1:
            streams.use_streams(launches, printed, context.options.streams)
        scattered = figures.scattered_parameters(parsed, printed)
    context.report["kernels"] = len(launches["kernels"])
    context.report["steps"] = plan.providers(launches)
    context.report["one_token"] = figures.figures(launches, scattered, printed)
    if context.options.work:
        context.report["work"] = work.work_of(parsed, printed)
    if context.options.resources:
        context.report["resources"] = toolchains.resources(source)
    members = {"kernels.maca": source.encode(), "plan.json": (json.dumps(launches, indent=1) + "\n").encode()}
    if context.target.name == "maca" and (sdk := mxcc.find()):
        members[f"kernels.{mxcc.ARCH}.mcbin"] = mxcc.build(source, sdk)
        members[f"probe.{mxcc.ARCH}.mcbin"] = mxcc.build(probe.SOURCE.read_text(), sdk)
        context.report["native"] = {"arch": mxcc.ARCH, "flags": mxcc.FLAGS, "compiler": sdk.version}
    return members
