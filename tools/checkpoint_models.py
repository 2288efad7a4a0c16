"""Models in a checkpoint's folder: what the command line makes of `spikingbrain run FOLDER "..."`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikingbrain.errors import OptionError

if TYPE_CHECKING:
    from torch import nn

_MODELS, _RECURRENCES, _SPIKING = (f"spikingbrain.models{name}" for name in ("", ".recurrences", ".spiking"))
LLAMA, SPIKINGBRAIN = f"{_MODELS}.llama", f"{_MODELS}.spikingbrain"
# model_type in config.json -> the packages of the model's source, its own first
SOURCES = {
    "gla_swa": (SPIKINGBRAIN, _MODELS, _RECURRENCES, _SPIKING),
    "spikingbrain_hybrid": (SPIKINGBRAIN, _MODELS, _RECURRENCES, _SPIKING),
    "llama": (LLAMA, _MODELS, _SPIKING),
    "qwen2": (LLAMA, _MODELS, _SPIKING),
}


def is_checkpoint(text: str) -> bool:
    return (Path(text) / "config.json").is_file()


def sources(text: str) -> tuple[str, ...]:
    """Returns the packages that a folder's model is written in; raises OptionError for a kind that is not known."""
    kind = _json(Path(text) / "config.json").get("model_type")
    if kind not in SOURCES:
        raise OptionError(
            f"{text} holds a model of the type {kind!r}",
            why=f"known are {', '.join(SOURCES)}",
            hint="one of these",
        )
    return SOURCES[kind]


def identity(text: str) -> list[Any]:
    """Returns what tells a folder's content from another's without reading it all."""
    files = sorted(file for file in Path(text).iterdir() if file.is_file())
    return [str(Path(text).resolve()), [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]]


def load(text: str, window: int | None, sinks: int, dtype: str) -> tuple[nn.Module, bool]:
    """Returns the model of a folder, in a type of torch by name, and whether it already spikes.

    ``window`` and ``sinks`` choose the attention of a Llama; a SpikingBrain brings its own.
    """
    import torch

    from spikingbrain.models.llama import checkpoint as llama_checkpoint
    from spikingbrain.models.spikingbrain import checkpoint
    from spikingbrain.models.spikingbrain.spiking_checkpoint import is_spiking, load_spiking

    kind = getattr(torch, dtype)
    if sources(text)[0] == LLAMA:
        return llama_checkpoint.load(text, kind, window=window, sinks=sinks), False
    if window is not None or sinks:
        raise OptionError(
            "--window and --sinks are for a Llama", why="this model has them in its config.json"
        )
    if is_spiking(text):
        if kind != torch.float32:
            raise OptionError(
                f"--dtype {dtype} with a spiking checkpoint",
                why="its weights are integers, what lies between them is float32",
                hint="leave --dtype out",
            )
        return load_spiking(text, dtype=kind), True
    return checkpoint.load(text, kind), False


def tokenizer(text: str) -> str | None:
    """Returns the text of the folder's tokenizer.json, made of vocab.json and merges.txt if need be; None without any."""
    from spikingbrain.models.spikingbrain.tokenizer import tokenizer_json

    return tokenizer_json(text)


def stop_tokens(text: str) -> list[int]:
    """Returns the tokens that end a text, as generation_config.json or config.json say."""
    for name in ("generation_config.json", "config.json"):
        file = Path(text) / name
        found = _json(file).get("eos_token_id") if file.is_file() else None
        if found is not None:
            return list(found) if isinstance(found, list) else [found]
    return []


def chat(text: str) -> dict[str, str]:
    """Returns the template of conversations and the special tokens that it may name; empty where there is none."""
    file, config = Path(text) / "chat_template.jinja", Path(text) / "tokenizer_config.json"
    known = _json(config) if config.is_file() else {}
    template = file.read_text(encoding="utf-8") if file.is_file() else known.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    if template is None:
        return {}
    tokens = {name: known.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    texts = {name: t["content"] if isinstance(t, dict) else t for name, t in tokens.items()}
    return {"template": template, **{name: t for name, t in texts.items() if t is not None}}


def _json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OptionError(f"{file} cannot be read", why=str(error)) from error
    return content
