"""``spikingbrain compile``: a model known by name becomes an artifact file."""

from __future__ import annotations

import argparse
from pathlib import Path

from spikingbrain.tools import named_models
from spikingbrain.tools.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=f"one of {', '.join(named_models.MODELS)}")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    parser.add_argument("--dump", type=Path, help="folder for the IR after each pass and stage")
    named_models.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    progress = Progress()
    artifact = named_models.compile_named(
        args.model, args.output, args.target, named_models.model_options(args), progress, args.dump
    )
    size = args.output.stat().st_size / 1e6
    entries = ", ".join(artifact.manifest["entries"])
    print(f"{args.output}: {size:.0f} MB, entry points {entries}, compiled in {progress.seconds:.1f} s")
    return 0
