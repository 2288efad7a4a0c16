"""``spikingbrain doctor``: what this machine has, what that allows, and what to do about the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import spikingbrain
from spikingbrain.artifact import cache_folder
from spikingbrain.errors import SpikingBrainError

if TYPE_CHECKING:
    from spikingbrain.backend_maca import mxcc
    from spikingbrain.backend_maca.run import probe

MARKS = {"ok": "ok", "missing": "--", "problem": "!!"}


@dataclass(frozen=True)
class Line:
    """One thing that was looked at: ``status`` is a key of MARKS; a problem makes the command fail."""

    status: str
    what: str
    found: str
    remedy: str = ""


# Package -> what it is for, how to get it.
PACKAGES = {
    "numpy": ("runs artifacts", "pip install numpy"),
    "iree-base-runtime": ("runs artifacts for CPUs and Vulkan", "pip install 'spikingbrain[iree]'"),
    "torch": ("compiles models", "pip install 'spikingbrain[compile]'"),
    "torch-mlir": ("compiles models", "pip install 'spikingbrain[compile]'"),
    "iree-base-compiler": ("compiles models for CPUs and Vulkan", "pip install 'spikingbrain[compile]'"),
    "triton": ("runs kernels inside a PyTorch process on a GPU", "pip install 'spikingbrain[triton]'"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--emulator",
        action="store_true",
        help="run the probe of MetaX devices on the emulator, too, as a check of itself",
    )


def run(args: argparse.Namespace) -> int:
    sections = {
        "this machine": _machine(),
        "packages": _packages(),
        "compilers": _compilers(),
        "targets": _targets(),
        "MetaX": _metax(args.emulator),
    }
    problems = 0
    for name, lines in sections.items():
        print(name)
        for line in lines:
            problems += line.status == "problem"
            print(f"  {MARKS[line.status]}  {line.what}: {line.found}")
            if line.remedy:
                print(f"        try: {line.remedy}")
    print("nothing is wrong" if not problems else f"{problems} problem{'s' * (problems > 1)}, marked !!")
    return 1 if problems else 0


def _machine() -> Iterator[Line]:
    version = platform.python_version()
    old = sys.version_info < (3, 10)
    yield Line("problem" if old else "ok", "Python", version, "install Python 3.10 or later" if old else "")
    yield Line("ok", "processor", f"{platform.machine()}, {os.cpu_count()} cores")
    yield Line("ok", "spikingbrain", spikingbrain.__version__)
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    free = shutil.disk_usage(folder).free / 1e9 if writable else 0.0
    if writable:
        yield Line("ok", "cache", f"{folder}, {free:.0f} GB free")
    else:
        yield Line(
            "problem", "cache", f"{folder} cannot be written", "set SPIKINGBRAIN_CACHE to another folder"
        )


def _packages() -> Iterator[Line]:
    for package, (purpose, remedy) in PACKAGES.items():
        try:
            version = importlib.metadata.version(package)
            yield Line("ok", package, f"{version}, {purpose}")
        except importlib.metadata.PackageNotFoundError:
            status = "problem" if package == "numpy" else "missing"
            yield Line(status, package, f"not installed; it {purpose}", remedy)
    if find_spec("torch"):
        yield _torch()


def _torch() -> Line:
    import torch

    if torch.cuda.is_available():
        return Line("ok", "torch's device", torch.cuda.get_device_name())
    return Line("ok", "torch's device", "the CPU: torch sees no GPU")


def _compilers() -> Iterator[Line]:
    from spikingbrain.backend_maca import toolchains
    from spikingbrain.backend_maca.run import emulate

    version = emulate.compiler_version()
    purpose = "builds kernels for the MetaX emulator"
    if version:
        yield Line("ok", emulate.compiler(), f"{version.splitlines()[0]}, {purpose}")
    else:
        yield Line(
            "missing",
            emulate.compiler(),
            f"not found; it {purpose}",
            "install g++, or name a compiler in CXX",
        )
    for toolchain in toolchains.TOOLCHAINS:
        purpose = f"checks MetaX kernels as code for {toolchain.arch}"
        command = toolchain.command()
        if command:
            yield Line("ok", toolchain.commands[0], f"{command}, {purpose}")
        else:
            remedy = (
                "optional: apt install clang"
                if "clang++" in toolchain.commands
                else "optional: the CUDA toolkit"
            )
            yield Line("missing", toolchain.commands[0], f"not found; it {purpose}", remedy)


def _targets() -> Iterator[Line]:
    for status in spikingbrain.targets():
        does = [word for word, can in (("compiles", status.compiles), ("runs here", status.runs)) if can]
        note = f" ({status.note})" if status.note else ""
        found = f"{' and '.join(does) or 'neither compiles nor runs here'}{note}"
        yield Line("ok" if status.compiles else "missing", status.target.name, found)


def _metax(emulator: bool) -> Iterator[Line]:
    from spikingbrain.backend_maca import mxcc, providers
    from spikingbrain.backend_maca.run import probe

    sdk = None
    try:
        sdk = mxcc.find()
        if sdk:
            yield Line("ok", "SDK", f"{sdk.root}, {sdk.version.splitlines()[0]}: exports hold native code")
        else:
            yield Line(
                "missing", "SDK", "MACA_PATH is not set: exports for 'maca' hold source only",
                "where the SDK is installed, set MACA_PATH to its folder",
            )  # fmt: skip
    except SpikingBrainError as error:
        yield Line("problem", "SDK", f"{error.what}, {error.why}", error.hint)
    yield from _device(sdk)
    for op, told in providers.lines():
        yield Line("ok", op, told)
    if emulator:
        try:
            yield from _findings("emulator", probe.run(probe.emulated()))
        except SpikingBrainError as error:
            yield Line("problem", "emulator", error.what, error.hint)


def _device(sdk: mxcc.Sdk | None) -> Iterator[Line]:
    from spikingbrain.backend_maca import mxcc
    from spikingbrain.backend_maca.run import driver as drivers
    from spikingbrain.backend_maca.run import probe

    try:
        driver = drivers.open_driver("maca")
        name = driver.device_name()
    except SpikingBrainError as error:
        yield Line(
            "missing", "device", f"{error.what}, {error.why}",
            "on a machine with a card, install its driver and set MACA_PATH",
        )  # fmt: skip
        return
    yield Line("ok", "device", name)
    if sdk is None:
        yield Line("missing", "probe", "not run: its kernels need the SDK's compiler", "set MACA_PATH")
        return
    try:
        image = mxcc.build(probe.SOURCE.read_text(), sdk)
        record = probe.examine(driver, image, anew=True)
    except SpikingBrainError as error:
        yield Line("problem", "probe", f"{error.what}, {error.why}", error.hint)
        return
    way = "by address" if record.convention is None else f"packed, with end {record.convention}"
    yield Line("ok", "arguments of kernels", way)
    yield from _findings(name, record.findings)


def _findings(device: str, findings: Sequence[probe.Finding]) -> Iterator[Line]:
    for finding in findings:
        found = "as assumed" if finding.passed else f"{finding.found}; {finding.consequence}"
        yield Line("ok" if finding.passed else "problem", f"{device}, {finding.name}", found)
