"""Code that a card loads: from the artifact, or compiled from the source in it by the compiler that is here."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping

from spikingbrain.artifact import cache_folder
from spikingbrain.backend_maca import mxcc
from spikingbrain.backend_maca.native import compiled
from spikingbrain.backend_maca.run import probe
from spikingbrain.backend_maca.run.driver import CONVENTIONS, CudaDriver, DeviceError, Driver
from spikingbrain.backend_maca.toolchains import CUDA, ROOT
from spikingbrain.errors import MissingDependency

NVCC_FLAGS = ("-cubin", "-std=c++17", "-O3", "-fmad=false", f"-I{ROOT / CUDA}")


def image_of(driver: Driver, code: Mapping[str, memoryview], name: str = "kernels") -> bytes:
    """Returns the native code of a source in an artifact for a card.

    Raises MissingDependency where it has none and no compiler is here.
    """
    if isinstance(driver, CudaDriver):
        return nvcc(bytes(code[f"{name}.maca"]).decode(), driver.capability())
    native = code.get(f"{name}.{mxcc.ARCH}.mcbin")
    if native is not None:
        return bytes(native)
    sdk = mxcc.find()
    if sdk is None:
        raise MissingDependency(
            "the artifact has source for the card, but no native code",
            hint="set MACA_PATH to the folder of the MACA SDK, here or where the artifact is made",
        )
    return mxcc.build(bytes(code[f"{name}.maca"]).decode(), sdk)


def nvcc(source: str, arch: str) -> bytes:
    """Returns the native code of kernels for an NVIDIA card, from the cache or by nvcc; raises PassFailed."""
    toolkit = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    command = shutil.which("nvcc") or shutil.which("nvcc", path=f"{toolkit}/bin")
    if command is None:
        raise MissingDependency(
            "nvcc is needed to run kernels on an NVIDIA card",
            hint="put nvcc on the PATH, or name the toolkit's folder in CUDA_HOME",
        )
    headers = [p.read_text() for p in sorted((ROOT / CUDA).glob("*.h"))]
    parts = [_version(command), arch, *NVCC_FLAGS, source, *headers]
    kept = cache_folder() / "maca" / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.cubin"
    arguments = [command, f"-arch={arch}", *NVCC_FLAGS, "kernels.cu", "-o", "kernels.cubin"]
    return compiled(kept, arguments, ("kernels.cu", source), "kernels.cubin")


@functools.cache
def _version(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True).stdout


# Probe -> what kernels that rely on it have in their source.
USES = {
    "votes of 64 lanes": "__ballot_sync",
    "shuffles over 64 lanes": "__shfl_xor_sync",
    "matrix instruction, i8": "__builtin_mxc_mma_16x16x16i8",
    "matrix instruction, f16": "__builtin_mxc_mma_16x16x16f16",
    "matrix instruction, bf16": "__builtin_mxc_mma_16x16x16bf16",
    "matrix instruction, f32": "__builtin_mxc_mma_16x16x4f32",
    "64 KiB of shared memory": "SB_DYNAMIC_SHARED",
}


def convention(driver: Driver, code: Mapping[str, memoryview]) -> int | None:
    """Returns how a card's runtime takes arguments, found by running the probe; see ``Driver.launch``.

    Where no compiler can build the probe, and the artifact does not bring it, it is ``void**``, what public programs for
    these cards use most. Raises DeviceError where the card fails a probe of what the artifact's kernels rely on.
    """
    if isinstance(driver, CudaDriver):
        return CONVENTIONS[0]
    try:
        image = image_of(driver, {**code, "probe.maca": memoryview(probe.SOURCE.read_bytes())}, "probe")
    except MissingDependency:
        return CONVENTIONS[0]
    record = _examined(driver, image)
    source = bytes(code["kernels.maca"]).decode()
    for finding in record.findings:
        if not finding.passed and USES.get(finding.name, "\0") in source:
            raise DeviceError(
                f"{record.device} does not do what the kernels of this artifact rely on: {finding.name}",
                why=finding.found,
                hint="export again on this machine, where the probe turns such kernels off; or --device maca-emulator",
            )
    return record.convention


@functools.cache
def _examined(driver: Driver, image: bytes) -> probe.Record:
    return probe.examine(driver, image)
