"""Native code by mxcc, the vendor's compiler, where its SDK is installed: in the folder that ``MACA_PATH`` names."""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from spikingbrain.artifact import cache_folder
from spikingbrain.backend_maca.native import compiled
from spikingbrain.errors import MissingDependency

ARCH = "xcore1000"  # of the C500; the C550 takes native code of this family
FLAGS = ("-device-obj", "-O3", "-ffp-contract=off")


@dataclass(frozen=True)
class Sdk:
    """An installed SDK.

    Attributes:
        root: its folder.
        version: all that tells this SDK from others: the compiler's whole description of itself (its number alone does
            not change between releases) and the version files of the folder.
    """

    root: Path
    version: str

    @property
    def compiler(self) -> Path:
        """Returns the path of mxcc."""
        return compiler_of(self.root)

    def cached(self, source: str, arch: str = ARCH) -> Path:
        """Returns where the native code of a source is kept."""
        parts = "\0".join([self.version, arch, *FLAGS, source])
        return cache_folder() / "maca" / f"{hashlib.sha256(parts.encode()).hexdigest()}.mcbin"


def compiler_of(root: Path) -> Path:
    """Returns where an SDK has its compiler."""
    return root / "mxgpu_llvm" / "bin" / "mxcc"


def find() -> Sdk | None:
    """Returns the SDK that ``MACA_PATH`` names, None where it is not set; raises MissingDependency for a wrong path."""
    named = os.environ.get("MACA_PATH")
    if not named:
        return None
    root = Path(named)
    compiler = compiler_of(root)
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingDependency(
            f"MACA_PATH is {named!r}, but its compiler does not run",
            why=str(error),
            hint="set MACA_PATH to the SDK's folder, or unset it to export source only",
        ) from error
    files = sorted(p for p in root.iterdir() if p.is_file() and p.name.lower().startswith("version"))
    return Sdk(root, "\n".join([done.stdout, *(p.read_text(errors="replace") for p in files)]))


def build(source: str, sdk: Sdk, arch: str = ARCH) -> bytes:
    """Returns the native code of kernels, compiled now or taken from the cache; raises PassFailed."""
    command = [str(sdk.compiler), f"-offload-arch={arch}", *FLAGS, "kernels.maca", "-o", "kernels.mcbin"]
    hint = "unset MACA_PATH to export source only"
    return compiled(sdk.cached(source, arch), command, ("kernels.maca", source), "kernels.mcbin", hint)
