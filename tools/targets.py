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
    print(f"{'target':12}{'kind':6}{'backend':9}{'compiles':10}{'runs here':11}note")
    for s in statuses:
        yes = {True: "yes", False: "no"}
        print(
            f"{s.target.name:12}{s.target.kind:6}{s.target.backend:9}{yes[s.compiles]:10}{yes[s.runs]:11}{s.note}"
        )
    return 0
