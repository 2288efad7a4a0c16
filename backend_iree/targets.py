"""The targets that IREE serves, with the flags each needs."""

from __future__ import annotations

import functools
import importlib.util
import logging
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from spikingbrain.artifact import cache_folder
from spikingbrain.backend import TargetStatus
from spikingbrain.backend_iree import cpu
from spikingbrain.files import write_atomically
from spikingbrain.target import Target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IreeTarget:
    """A target with what iree-compile needs to know of it and the driver that runs its code.

    Attributes:
        generator: the code generator inside iree-compile, as its ``--iree-hal-list-target-backends`` spells it.
        device: the device as an attribute of the module, where flags cannot describe it.
    """

    target: Target
    flags: tuple[str, ...]
    driver: str
    generator: str
    device: str = ""


# IREE 3.13 fuses the score product of attention with its mask and its maximum otherwise, and then cannot distribute
# the result over threads; its own help says that not all of its generators support that fusion.
_GPU_FLAGS = ("--iree-dispatch-creation-enable-aggressive-fusion=false",)

# What a graphics card of the last years can do. IREE's default is the Android baseline, without the 64-bit integers
# that token positions are; its named cards assume a subgroup size, which would be wrong on the next card.
_VULKAN_DEVICE = (
    '#hal.device.target<"vulkan", [#hal.executable.target<"vulkan-spirv", "vulkan-spirv-fb", {'
    'iree_codegen.target_info = #iree_gpu.target<arch = "desktop", features = "spirv:v1.3,cap:Shader", wgp = <'
    "compute = fp32|fp16|int64|int32|int16|int8, storage = b64|b32|b16|b8, subgroup = none, "
    "subgroup_size_choices = [32], max_workgroup_sizes = [256, 256, 64], max_thread_count_per_workgroup = 256, "
    "max_workgroup_memory_bytes = 32768, max_workgroup_counts = [65535, 65535, 65535]>>}>]> : !hal.device"
)


def _cpu(name: str, arch: str, llvm_cpu: str, features: frozenset[str], *flags: str) -> IreeTarget:
    bits, registers = cpu.vector_bits(arch, features)
    target = Target(
        name=name,
        kind="cpu",
        backend="iree",
        arch=arch,
        cpu=llvm_cpu,
        features=features,
        vector_bits=bits,
        vector_registers=registers,
    )
    base = (
        "--iree-hal-target-device=local",
        "--iree-hal-local-target-device-backends=llvm-cpu",
        "--iree-input-demote-f64-to-f32=false",
        "--iree-llvmcpu-stack-allocation-limit=524288",  # norms of wide models keep a few rows there; threads have 8 MB
    )
    return IreeTarget(
        target, (*base, f"--iree-llvmcpu-target-cpu={llvm_cpu}", *flags), "local-sync", "llvm-cpu"
    )


def _gpu(
    name: str, arch: str, driver: str, generator: str, wave: int, shared: int, *flags: str, device: str = ""
) -> IreeTarget:
    target = Target(name=name, kind="gpu", backend="iree", arch=arch, wave_width=wave, shared_bytes=shared)
    return IreeTarget(target, (*flags, *_GPU_FLAGS), driver, generator, device)


def known() -> Mapping[str, IreeTarget]:
    """Returns every target by name."""
    host = _cpu("cpu", cpu.architecture(), "host", cpu.features())
    listed = [
        host,
        _cpu(
            "x86-64-v3",
            "x86-64",
            "x86-64-v3",
            cpu.X86_64_V3,
            "--iree-llvmcpu-target-triple=x86_64-unknown-linux-gnu",
        ),
        _cpu(
            "x86-64-v4",
            "x86-64",
            "x86-64-v4",
            cpu.X86_64_V4,
            "--iree-llvmcpu-target-triple=x86_64-unknown-linux-gnu",
        ),
        _cpu(  # Ice Lake, Zen 4 and later: bytes are multiplied four at a time
            "x86-64-v4-vnni",
            "x86-64",
            "x86-64-v4",
            cpu.X86_64_V4 | {"avx512vnni"},
            "--iree-llvmcpu-target-triple=x86_64-unknown-linux-gnu",
            "--iree-llvmcpu-target-cpu-features=+avx512vnni",
        ),
        _cpu(
            "aarch64",
            "aarch64",
            "generic",
            frozenset(),
            "--iree-llvmcpu-target-triple=aarch64-unknown-linux-gnu",
        ),
        _cpu(  # Armv8.2 with what servers and phones since 2018 have
            "aarch64-dotprod",
            "aarch64",
            "generic",
            frozenset({"dotprod"}),
            "--iree-llvmcpu-target-triple=aarch64-unknown-linux-gnu",
            "--iree-llvmcpu-target-cpu-features=+dotprod",
        ),
        _cpu(
            "riscv64",
            "riscv64",
            "generic-rv64",
            frozenset(),
            "--iree-llvmcpu-target-triple=riscv64-unknown-linux-gnu",
            "--iree-llvmcpu-target-abi=lp64d",
            "--iree-llvmcpu-target-cpu-features=+m,+a,+f,+d,+c",
        ),
        _gpu("vulkan", "spirv", "vulkan", "vulkan-spirv", 32, 32 << 10, device=_VULKAN_DEVICE),
        _gpu(
            "cuda",
            "sm_80",
            "cuda",
            "cuda",
            32,
            48 << 10,
            "--iree-hal-target-device=cuda",
            "--iree-cuda-target=sm_80",
        ),
        _gpu(
            "rocm",
            "gfx942",
            "hip",
            "rocm",
            64,
            64 << 10,
            "--iree-hal-target-device=hip",
            "--iree-rocm-target=gfx942",
        ),
    ]
    return {t.target.name: t for t in listed}


def statuses() -> list[TargetStatus]:
    """Returns what can be compiled for and run here, with reasons."""
    return [status(entry) for entry in known().values()]


def status(entry: IreeTarget) -> TargetStatus:
    """Returns whether a target can be compiled for and run here, with reasons, or the device that runs it."""
    compiles, note = True, ""
    if not _has("iree") or importlib.util.find_spec("iree.compiler") is None:
        compiles, note = False, "iree-base-compiler is not installed: pip install 'spikingbrain[compile]'"
    elif entry.generator not in _generators():
        compiles, note = False, f"this iree-compile has no generator {entry.generator}"
    reason, device = _runs_here(entry)
    return TargetStatus(entry.target, compiles, not reason, "; ".join(filter(None, (note, reason or device))))


@functools.cache
def _generators() -> frozenset[str]:
    """Returns the code generators inside iree-compile, kept on disk, as starting it takes a while."""
    command = cpu.tool("iree-compile")
    if command is None:
        return frozenset()
    place = cache_folder() / f"iree-generators-{metadata.version('iree-base-compiler')}.txt"
    try:
        return frozenset(place.read_text().split())
    except OSError:
        pass
    done = subprocess.run([command, "--iree-hal-list-target-backends"], capture_output=True, text=True)
    found = frozenset(line.strip() for line in done.stdout.splitlines() if line.startswith(" "))
    if found:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, "\n".join(sorted(found)).encode())
        except OSError as error:
            log.info("cannot keep %s: %s", place, error)
    return found


def _runs_here(entry: IreeTarget) -> tuple[str, str]:
    """Returns why code for a target cannot run on this machine, or an empty text; and the device that runs it."""
    target = entry.target
    if not _has("iree") or importlib.util.find_spec("iree.runtime") is None:
        return "iree-base-runtime is not installed: pip install 'spikingbrain[iree]'", ""
    if target.kind == "cpu":
        if target.arch != cpu.architecture():
            return f"this machine is {cpu.architecture()}", ""
        missing = sorted(target.features - cpu.features())
        return f"this CPU lacks {', '.join(missing)}" if missing else "", ""
    return _device(entry.driver)


@functools.cache
def _device(driver: str) -> tuple[str, str]:
    """Asks a driver for its first device: why there is none, or an empty text; and the device's name."""
    import iree.runtime as rt

    try:
        devices = rt.get_driver(driver).query_available_devices()
    except (RuntimeError, ValueError) as error:
        return _first_clause(str(error)), ""
    return ("", devices[0]["name"]) if devices else (f"the {driver} driver finds no device", "")


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _first_clause(text: str) -> str:
    """Returns the readable part of an IREE status text: behind the code, before the list of tried paths."""
    text = text.split("; ", 1)[-1] if "UNAVAILABLE; " in text or "NOT_FOUND; " in text else text
    return text.split(";")[0].split(":")[0].splitlines()[0].strip()
