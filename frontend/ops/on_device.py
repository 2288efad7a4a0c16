"""Kernels that a backend has for our ops inside a PyTorch process, by device: what was installed, and who takes what."""

from __future__ import annotations

from typing import Any

from spikingbrain.backend import TorchKernels

_installed: dict[str, TorchKernels] = {}  # by torch's type of device


def installed(device: str) -> TorchKernels | None:
    """Returns the kernels for tensors on a device of that type, such as "cuda"."""
    return _installed.get(device)


def remember(kernels: TorchKernels) -> bool:
    """Notes that kernels are there for a device; returns whether they are the first."""
    return _installed.setdefault(kernels.device, kernels) is kernels


def takes(op: str, device: str, *arguments: Any) -> bool:
    """Returns whether a kernel takes a call of ``op``, all of whose arguments are given, on tensors of that device."""
    kernels = installed(device)
    return kernels is not None and op in kernels.table and kernels.table[op].refuse(*arguments) is None
