"""Checkpoints in the form that the field publishes: a folder with `config.json` and weights in safetensors files.

Tensors are memory-mapped: reading a checkpoint costs no memory until its values are needed, and a model that takes them as
they are shares the pages of the files. What a model's parameters are called in a checkpoint is said by a table of `Entry`;
the adapters (`models.spikingbrain.checkpoint`, `models.llama.checkpoint`) hold one for each kind.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spikingbrain.models.errors import WeightsError
from spikingbrain.models.spiking.files import new_folder

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5_000_000_000  # of a file; larger models are split
# Of the folder that a model came from, what is copied beside its weights: these, and every file called tokenizer*.
COMPANIONS = (
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint and the parameter that it becomes, unchanged."""

    stored: str
    parameter: str


class Checkpoint:
    """An opened folder.

    Attributes:
        config: what `config.json` says.
        tensors: name -> shape.

    Raises WeightsError for a folder without config or weights, and for files that are damaged or absent.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.config: dict[str, Any] = self._json(CONFIG)
        self._files: dict[str, str] = {}
        self.tensors: dict[str, tuple[int, ...]] = {}
        for file in self._shards():
            with self._open(file) as shard:
                for name in shard.keys():  # noqa: SIM118 (it is no mapping)
                    self._files[name] = file
                    self.tensors[name] = tuple(shard.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Returns a tensor in its stored type, backed by the file."""
        with self._open(self._files[name]) as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raises one WeightsError that lists all tensors that are missing, misshapen or not wanted."""
        problems = []
        for name, shape in wanted.items():
            if name not in self.tensors:
                problems.append(f"{name}: missing")
            elif self.tensors[name] != shape:
                problems.append(f"{name}: has shape {list(self.tensors[name])}, the model has {list(shape)}")
        problems += [f"{name}: not part of the model" for name in self.tensors if name not in wanted]
        if problems:
            raise WeightsError(
                f"{len(problems)} tensors of the checkpoint do not fit the model:\n    "
                + "\n    ".join(problems),
                where=str(self.folder),
                why="the files are incomplete, or config.json describes another model",
                hint="the files and the config.json that were published together",
            )

    def _shards(self) -> list[str]:
        if (self.folder / INDEX).is_file():
            return sorted(set(self._json(INDEX).get("weight_map", {}).values()))
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        raise WeightsError(
            "no weights in the folder",
            where=str(self.folder),
            why=f"neither {SINGLE} nor {INDEX} is there",
            hint="a checkpoint in safetensors files; others can be converted with the package safetensors",
        )

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{file} cannot be read",
                where=str(self.folder),
                why=str(error),
                hint="fetching the file again",
            ) from error

    def _json(self, file: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"{file} cannot be read",
                where=str(self.folder),
                why=str(error),
                hint="the folder of a checkpoint",
            ) from error
        if not isinstance(content, dict):
            raise WeightsError(f"{file} holds no table", where=str(self.folder))
        return content


def setting(checkpoint: Checkpoint, *path: str, default: Any = None) -> Any:
    """Returns a value of config.json by its path; raises WeightsError if it is absent and there is no default."""
    value: Any = checkpoint.config
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None and default is None:
        raise WeightsError(
            f"config.json says nothing about {'.'.join(path)}",
            where=str(checkpoint.folder),
            why="the sizes of the model follow from it",
            hint="the config.json that was published with the weights",
        )
    return default if value is None else value


def fill(
    model: nn.Module, checkpoint: Checkpoint, entries: Iterable[Entry], dtype: torch.dtype | None = None
) -> None:
    """Gives a model made on the meta device its parameters, one by one; ``dtype`` None keeps the stored types."""
    entries = list(entries)
    parameters = dict(model.named_parameters())
    checkpoint.check({e.stored: tuple(parameters[e.parameter].shape) for e in entries})
    for entry in entries:
        tensor = checkpoint.read(entry.stored)
        # A copy that is cast releases the pages it was read from.
        replace_parameter(model, entry.parameter, tensor if dtype is None else tensor.to(dtype))


def replace_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(
        model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=value.is_floating_point())
    )


def save(
    folder: str | os.PathLike[str],
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    companions: str | os.PathLike[str] | None = None,
    files: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint: to a folder of another name first, which is then renamed.

    ``tensors`` may be made one at a time; a shard of them is held in memory. Tokenizer and generation settings are copied
    from the folder ``companions``; ``files`` are written beside them, name -> text. Raises WeightsError if the folder exists
    and is not empty.
    """
    folder = Path(folder)
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as beside:
        places: dict[str, str] = {}
        total = 0
        for number, shard in enumerate(_in_shards(tensors, shard_bytes)):
            file = f"shard-{number}"
            save_file(shard, beside / file, metadata={"format": "pt"})
            (beside / file).chmod(0o644)  # as any file of the user's
            places |= dict.fromkeys(shard, file)
            total += sum(t.nbytes for t in shard.values())
        _name_shards(beside, places, total)
        (beside / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
        if companions is not None:
            _copy_companions(Path(companions), beside)
        for name, text in (files or {}).items():
            (beside / name).write_text(text, encoding="utf-8")


def check_new(folder: str | os.PathLike[str]) -> None:
    """Raises WeightsError if there is something where a checkpoint is to be written."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise WeightsError("the folder is not empty", where=str(path), hint="a new folder")


def _in_shards(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > limit:
            yield shard
            shard = {}
        value = tensor.detach().contiguous()
        # Converted models hold a tensor twice where both branches begin alike; a file holds each by itself.
        twice = any(value.data_ptr() == other.data_ptr() for other in shard.values() if other.numel())
        shard[name] = value.clone() if twice else value
    yield shard


def _name_shards(folder: Path, places: Mapping[str, str], total: int) -> None:
    """Gives the files their published names, which hold the number of all, and writes the index."""
    files = sorted(set(places.values()), key=lambda file: int(file.removeprefix("shard-")))
    if len(files) <= 1:
        os.replace(folder / "shard-0", folder / SINGLE)
        return
    names = {file: f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i, file in enumerate(files)}
    for file, name in names.items():
        os.replace(folder / file, folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {t: names[f] for t, f in places.items()}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_companions(source: Path, folder: Path) -> None:
    for file in (*source.glob("tokenizer*"), *(source / name for name in COMPANIONS)):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
