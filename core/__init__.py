"""SpikingBrain compiler: PyTorch models in, deployable artifacts out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Artifact",
    "Entry",
    "Explanation",
    "Program",
    "compile",
    "explain",
    "export",
    "load",
    "refresh",
    "spike",
    "targets",
    "tune",
]

if TYPE_CHECKING:
    from spikingbrain.api import compile, explain, export, load, refresh, targets, tune
    from spikingbrain.artifact import Artifact
    from spikingbrain.frontend.capture import Entry
    from spikingbrain.frontend.dynamo.explain import Explanation
    from spikingbrain.models.spiking import spike
    from spikingbrain.program import Program

_HOMES = {
    "Artifact": "spikingbrain.artifact",
    "Entry": "spikingbrain.frontend.capture",
    "Explanation": "spikingbrain.frontend.dynamo.explain",
    "Program": "spikingbrain.program",
    "compile": "spikingbrain.api",
    "explain": "spikingbrain.api",
    "export": "spikingbrain.api",
    "load": "spikingbrain.api",
    "refresh": "spikingbrain.api",
    "spike": "spikingbrain.models.spiking",
    "targets": "spikingbrain.api",
    "tune": "spikingbrain.api",
}


def __getattr__(name: str) -> Any:
    """Imports public names on first use: loading an artifact must not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'spikingbrain' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
