"""``spikingbrain compile``: a model known by name becomes an artifact file."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from spikingbrain import tuning
from spikingbrain.artifact import Artifact, check_writable
from spikingbrain.tools import named_models
from spikingbrain.tools.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=f"{', '.join(named_models.MODELS)}, or the folder of a checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    parser.add_argument("--dump", type=Path, help="folder for the IR after each pass and stage")
    parser.add_argument(
        "--tuning",
        type=Path,
        metavar="FILE",
        help="settings of kernels: an artifact of 'spikingbrain tune', or JSON",
    )
    named_models.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    progress = Progress()
    named_models.known(args.model)
    check_writable(args.output)
    options = named_models.model_options(args)
    if args.tuning:
        options = dataclasses.replace(options, tuning=tuning.read(args.tuning))
    if args.dump:
        named_models.compile_named(args.model, args.output, args.target, options, progress, args.dump)
    else:
        named_models.hand_out(named_models.obtain(args.model, args.target, options, progress), args.output)
    artifact = Artifact(args.output)
    size = args.output.stat().st_size / 1e6
    entries = ", ".join(artifact.manifest["entries"])
    print(f"{args.output}: {size:.0f} MB, entry points {entries}, in {progress.seconds:.1f} s")
    return 0
