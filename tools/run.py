"""``spikingbrain run``: generates text with an artifact, or with a model known by name (compiled at first use)."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import spikingbrain
from spikingbrain.errors import OptionError
from spikingbrain.generate import Timing
from spikingbrain.tools import named_models
from spikingbrain.tools.progress import Progress
from spikingbrain.tools.sampling import add_sampling_arguments, sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="an artifact file, the folder of a checkpoint, or a model known by name such as smollm2"
    )
    parser.add_argument(
        "prompt", help="the text to continue; @FILE: the lines of a file, side by side with --batch"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    add_sampling_arguments(parser)
    named_models.add_model_arguments(parser)
    named_models.add_device_argument(parser)
    parser.add_argument("--no-memory-check", action="store_true", help="try even where memory is too small")
    parser.add_argument("--quiet", action="store_true", help="print the text only")


def run(args: argparse.Namespace) -> int:
    timing, chosen = Timing(), sampling(args)
    prompts = read_prompts(Path(args.prompt[1:])) if args.prompt.startswith("@") else []
    path, compiled = obtain(args)
    start = time.perf_counter()
    program = spikingbrain.load(path, device=args.device, check_memory=not args.no_memory_check)
    loaded = time.perf_counter() - start
    if prompts:
        texts = program.generate_batch(prompts, args.tokens, sampling=chosen, stop=args.stop)
        whole = texts if args.quiet else [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        print("\n\n".join(whole))
        return 0
    if not args.quiet:
        sys.stdout.write(args.prompt)
    options = {"sampling": chosen, "timing": timing, "stop": args.stop}
    for piece in program.generate(args.prompt, args.tokens, **options):
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


def read_prompts(file: Path) -> list[str]:
    """Returns the lines of a file that are not empty."""
    try:
        prompts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"@{file} cannot be read",
            why=str(error),
            hint="a file of texts in UTF-8, one a line; a prompt itself cannot begin with @",
        ) from error
    if not prompts:
        raise OptionError(f"@{file} has no line of text")
    return prompts


def obtain(args: argparse.Namespace) -> tuple[Path, float]:
    """Returns the artifact to run and the seconds it took to compile it."""
    path = Path(args.model)
    if path.is_file():
        named_models.no_shaping(args)
        return path, 0.0
    options = named_models.model_options(args)
    progress = Progress(args.quiet)
    target = args.device if args.device and args.target == "cpu" else args.target
    place = named_models.obtain(args.model, target, options, progress)
    return place, progress.seconds
