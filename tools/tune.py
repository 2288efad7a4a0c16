"""``spikingbrain tune``: a model becomes an artifact whose kernels have the settings that are fastest on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import spikingbrain
from spikingbrain.artifact import check_writable
from spikingbrain.errors import OptionError
from spikingbrain.tools import named_models
from spikingbrain.tools.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=f"{', '.join(named_models.MODELS)}, or the folder of a checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    parser.add_argument("--tokens", type=int, default=256, help="of the text that is read before one more is")
    parser.add_argument("--budget", type=float, help="seconds after which no further setting is searched")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each program")
    parser.add_argument("--settings", help="those to search, with commas between; else all that matter")
    named_models.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    named_models.known(args.model)
    check_writable(args.output)
    options = named_models.model_options(args)
    if options.batch > 1:
        raise OptionError(
            f"--batch {args.batch}: one text is timed",
            hint="spikingbrain compile --tuning FILE takes what was found",
        )
    room = named_models.ALIGN if args.window else args.capacity - 1
    if not 1 <= args.tokens <= room:
        raise OptionError(f"--tokens {args.tokens}", why=f"it must be 1 to {room}")
    progress = Progress()
    ready = named_models.load(args.model, options, progress)
    tokens = np.random.default_rng(0).integers(0, 256, (1, args.tokens + 1))  # small vocabularies are bytes
    artifact = spikingbrain.tune(
        ready.model,
        ready.entries,
        args.output,
        {"prefill": [tokens[:, :-1]], "decode": [tokens[:, -1:]]},
        state="state",
        target=args.target,
        settings=[s.strip() for s in args.settings.split(",")] if args.settings else None,
        rounds=args.rounds,
        budget=args.budget,
        tokenizer=ready.tokenizer,
        metadata=ready.metadata,
        progress=progress,
    )
    print(f"{args.output}: {describe(artifact.manifest)}, in {progress.seconds:.1f} s")
    return 0


def describe(manifest: Mapping[str, Any]) -> str:
    """Returns the settings of an artifact that was tuned, in words."""
    settings = manifest["options"].get("tuning", {})
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "the usual settings"
