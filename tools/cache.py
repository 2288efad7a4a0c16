"""``spikingbrain cache``: shows, limits or clears what is kept between runs."""

from __future__ import annotations

import argparse
import shutil

from spikingbrain import code_cache
from spikingbrain.artifact import cache_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="remove everything")
    parser.add_argument(
        "--limit",
        type=float,
        metavar="MB",
        help="remove the compiled code that was used least recently, until no more is left; "
        f"done after each compile with $SPIKINGBRAIN_CACHE_LIMIT, default {code_cache.LIMIT_MB}",
    )


def run(args: argparse.Namespace) -> int:
    folder = cache_folder()
    if args.clear:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"removed {folder}")
        return 0
    if args.limit is not None:
        code_cache.prune(int(args.limit * 1e6))
    print(folder)
    for part in sorted(folder.iterdir()) if folder.is_dir() else []:
        files = [part] if part.is_file() else [f for f in part.rglob("*") if f.is_file()]
        print(f"  {part.name:28}{len(files):6} files {sum(f.stat().st_size for f in files) / 1e6:10.1f} MB")
    if uses := code_cache.uses():
        since, hits, misses = uses
        print(f"  compile: {hits} hits and {misses} misses since {since}")
    return 0
