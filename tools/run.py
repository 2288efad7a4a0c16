"""``spikingbrain run``: generates text with an artifact, or with a model known by name (compiled at first use)."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import spikingbrain
from spikingbrain.generate import Sampling, Timing
from spikingbrain.tools import named_models
from spikingbrain.tools.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="an artifact file, or a model known by name such as smollm2")
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens at the most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    named_models.add_model_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="print the text only")


def run(args: argparse.Namespace) -> int:
    path, compiled = _artifact(args)
    start = time.perf_counter()
    program = spikingbrain.load(path)
    loaded = time.perf_counter() - start
    timing = Timing()
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    if not args.quiet:
        sys.stdout.write(args.prompt)
    for piece in program.generate(args.prompt, args.tokens, sampling=sampling, timing=timing):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    if not args.quiet:
        speed = f", {1 / timing.per_token:.1f} tokens/s" if timing.tokens else ""
        print(
            f"compile {compiled:.1f} s, load {loaded:.2f} s, first token {timing.first_token:.2f} s,"
            f" then {1e3 * timing.per_token:.1f} ms per token{speed}",
            file=sys.stderr,
        )
    return 0


def _artifact(args: argparse.Namespace) -> tuple[Path, float]:
    """Returns the artifact to run and the seconds it took to compile it."""
    path = Path(args.model)
    if path.is_file():
        return path, 0.0
    options = named_models.model_options(args)
    progress = Progress(args.quiet)
    place = named_models.obtain(args.model, args.target, options, progress)
    return place, progress.seconds
