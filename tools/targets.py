"""``spikingbrain targets``: what can be compiled for, and what runs here."""

from __future__ import annotations

import argparse

import spikingbrain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", action="store_true", help="print names only")


def run(args: argparse.Namespace) -> int:
    statuses = spikingbrain.targets()
    if args.names:
        print("\n".join(s.target.name for s in statuses))
        return 0
    heading = ["target", "kind", "backend", "compiles", "runs here", "note"]
    answer = {True: "yes", False: "no"}
    rows = [
        [s.target.name, s.target.kind, s.target.backend, answer[s.compiles], answer[s.runs], s.note]
        for s in statuses
    ]
    widths = [max(map(len, column)) + 2 for column in zip(heading, *rows, strict=True)]
    for row in (heading, *rows):
        print("".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0
