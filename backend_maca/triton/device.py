"""Which device the Triton kernels of this process run on, and what they may take of it."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from spikingbrain.errors import MissingDependency, TargetError

# Triton reads the variable when kernels are declared.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
SHARED_BYTES = 64 << 10  # of a block


@dataclass(frozen=True)
class Device:
    """A device whose tensors the kernels take.

    Attributes:
        kind: "metax", "nvidia", or "interpreter" where Triton runs kernels by numpy, for tests (TRITON_INTERPRET=1).
        torch_type: what torch calls it: "cuda", of both vendors, or "cpu".
        name: for messages.
    """

    kind: str
    torch_type: str
    name: str


def find() -> Device:
    """Returns the device of this process.

    Raises:
        MissingDependency: Triton is not installed.
        TargetError: torch has no MetaX or NVIDIA device.
    """
    if importlib.util.find_spec("triton") is None:
        raise MissingDependency(
            "Triton is needed to run target 'maca' inside torch",
            hint="the vendor's Triton on a MetaX machine, else pip install 'spikingbrain[triton]'",
        )
    if INTERPRETED:
        return Device("interpreter", "cpu", "Triton's interpreter")
    if not torch.cuda.is_available():
        raise TargetError(
            "target 'maca' cannot run inside torch here",
            why=f"torch {torch.__version__} has no MetaX or NVIDIA device",
            hint="a machine with such a device and its build of torch; spikingbrain.export(..., target='maca') needs none",
        )
    name = torch.cuda.get_device_name()
    if is_metax(torch.__version__):
        return Device("metax", "cuda", name)
    if torch.version.cuda is None:
        raise TargetError(
            "target 'maca' cannot run inside torch here",
            why=f"{name} is neither a MetaX nor an NVIDIA device",
            hint="target 'cpu', with the tensors in the CPU's memory",
        )
    return Device("nvidia", "cuda", name)


def is_metax(torch_version: str) -> bool:
    """Returns whether torch's "cuda" devices are MetaX GPUs: its version says so, or the vendor's runtime is there."""
    if "metax" in torch_version:
        return True
    root = os.environ.get("MACA_PATH")
    if not root:
        return False
    return (Path(root) / "lib" / "libmcruntime.so").exists() or ctypes.util.find_library(
        "mcruntime"
    ) is not None
