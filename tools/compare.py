"""``spikingbrain compare``: does a model compute the same compiled as in torch, and if not, which op and pass is it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from spikingbrain.tools import user_models
from spikingbrain.tools.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    user_models.add_model_arguments(parser)
    parser.add_argument(
        "--to",
        type=Path,
        default=Path("spikingbrain-repro"),
        metavar="FOLDER",
        help="where a reproducer goes",
    )
    parser.add_argument("--dynamic", action="store_true", help="compile for sizes that change")
    parser.add_argument("--json", action="store_true", help="the verdict, for programs")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    from spikingbrain.frontend.dynamo import compare, reproducer

    named = user_models.load(args.model)
    progress = Progress(args.quiet or args.json)
    found = compare.compare(
        named.model,
        named.args,
        named.kwargs,
        user_models.options(args),
        True if args.dynamic else None,
        progress,
    )
    if found and found.region:
        reproducer.write(found, args.to)
    if args.json:
        fields = ("what", "step", "kind", "op", "ops", "where")
        verdict = {name: getattr(found, name) for name in fields} if found else {}
        print(json.dumps({"same": found is None, **verdict}, indent=1))
    elif found is None:
        print("the same, within the tolerance of each element type")
    else:
        print(found)
        if found.region:
            print(f"  to see it again: python {args.to / 'repro.py'}")
    return 0 if found is None else 1
