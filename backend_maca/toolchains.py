"""What real device compilers make of generated kernels, without the SDK: nvcc and clang for AMD GPUs.

Both compile the same source, against headers that stand in for the SDK's (``compat_cuda``, ``compat_amdgcn``), and
tell what each kernel takes of registers and shared memory. The numbers are those of the machine named, not MetaX's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from spikingbrain.errors import MissingDependency, PassFailed

ROOT = Path(__file__).parent
CUDA = "compat_cuda"
AMDGCN = "compat_amdgcn"


@dataclass(frozen=True)
class Usage:
    """What one kernel takes: registers of 32 bits for each thread, bytes spilled for each, shared bytes of a block.

    On AMD GPUs, registers are vector registers, those of matrix instructions included.
    """

    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Toolchain:
    """A compiler and the architecture that it compiles for.

    Attributes:
        arch: as the compiler names it, ``"sm_80"`` or ``"gfx90a"``.
        commands: names of the compiler, the preferred one first.
        headers: the folder with the stand-ins.
    """

    arch: str
    commands: tuple[str, ...]
    headers: str

    def command(self) -> str | None:
        """Returns the path of the compiler, or None where there is none."""
        return next(filter(None, map(shutil.which, self.commands)), None)


_CLANGS = ("clang++", *(f"clang++-{version}" for version in range(22, 14, -1)))
TOOLCHAINS = (
    Toolchain("sm_80", ("nvcc",), CUDA),
    Toolchain("sm_90", ("nvcc",), CUDA),
    Toolchain("gfx90a", _CLANGS, AMDGCN),
)


def compile_kernels(source: str, toolchain: Toolchain) -> list[Usage]:
    """Compiles kernels for a public machine and returns what each takes, in order of the names.

    Raises MissingDependency where the compiler is not installed, and PassFailed with what it says of the source.
    """
    command = toolchain.command()
    if command is None:
        raise MissingDependency(
            f"no compiler for {toolchain.arch} here",
            hint=f"install {toolchain.commands[0]}, so that it is on the PATH",
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / f"kernels.{'cu' if toolchain.headers == CUDA else 'hip'}"
        file.write_text(source)
        arguments = [f"-I{ROOT / toolchain.headers}", "-std=c++17", "-O3", file.name]
        if toolchain.headers == CUDA:
            said = _run(
                [command, f"-arch={toolchain.arch}", "-cubin", "-fmad=false", "-Xptxas=-v", *arguments],
                folder,
            )
            found = _of_ptxas(said)
        else:
            flags = ["-x", "hip", "--offload-device-only", f"--offload-arch={toolchain.arch}"]
            flags += ["-nogpuinc", "-nogpulib", "-ffp-contract=off", "-S", "-o", "kernels.s"]
            _run([command, *flags, *arguments], folder)
            found = _of_metadata((folder / "kernels.s").read_text())
    return sorted(found, key=lambda usage: usage.kernel)


def resources(source: str) -> dict[str, list[dict[str, str | int]]]:
    """Returns what kernels take on each machine that a compiler is installed for, for the compile report."""
    installed = [toolchain for toolchain in TOOLCHAINS if toolchain.command()]
    return {t.arch: [asdict(usage) for usage in compile_kernels(source, t)] for t in installed}


def table(found: Mapping[str, Sequence[Mapping[str, str | int]]]) -> list[str]:
    """Returns the lines of a table of ``resources``: a line for each kernel, three columns for each machine."""
    by_kernel: dict[str, dict[str, Mapping[str, str | int]]] = {}
    for arch, usages in found.items():
        for usage in usages:
            by_kernel.setdefault(str(usage["kernel"]), {})[arch] = usage
    width = max([len("kernel"), *map(len, by_kernel)])
    fields = {"registers": "regs", "spilled_bytes": "spilled", "shared_bytes": "shared"}
    lines = [" " * width + "".join(f"     {arch:<22}" for arch in found).rstrip()]
    lines.append("kernel".ljust(width) + "".join(f"{name:>9}" for name in fields.values()) * len(found))
    for kernel, usages_of in by_kernel.items():
        numbers = [str(usages_of[arch][f]) if arch in usages_of else "-" for arch in found for f in fields]
        lines.append(kernel.ljust(width) + "".join(f"{number:>9}" for number in numbers))
    return lines


def _run(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise PassFailed(f"{Path(command[0]).name} refuses the kernels", why=done.stderr.strip()[:2000])
    return done.stderr


def _of_ptxas(said: str) -> list[Usage]:
    pattern = re.compile(
        r"Function properties for (?P<kernel>\w+)\s+\d+ bytes stack frame, "
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s+"
        r"ptxas info\s*: Used (?P<registers>\d+) registers(?P<rest>[^\n]*)"
    )
    found = []
    for match in pattern.finditer(said):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spilled = max(int(match["stores"]), int(match["loads"]))
        found.append(
            Usage(match["kernel"], int(match["registers"]), spilled, int(shared[1]) if shared else 0)
        )
    return found


def _of_metadata(assembly: str) -> list[Usage]:
    """Reads the records that the assembler keeps for the loader."""
    found = []
    for record in assembly.partition(".amdgpu_metadata")[2].split("- .agpr_count:")[1:]:
        field = dict(re.findall(r"^ +\.(\w+): +(\S+)$", f"    .agpr_count: {record}", re.MULTILINE))
        registers = int(field["vgpr_count"])
        spilled = 4 * int(field["vgpr_spill_count"])
        found.append(Usage(field["name"], registers, spilled, int(field["group_segment_fixed_size"])))
    return found
