"""``spikingbrain standalone``: an artifact for MetaX cards as a program in C++ that needs no Python."""

from __future__ import annotations

import argparse
from pathlib import Path

from spikingbrain.artifact import Artifact


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, help="an artifact file with code for maca")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")


def run(args: argparse.Namespace) -> int:
    from spikingbrain.backend_maca.plan import host_program

    host_program.write(Artifact(args.artifact), args.output)
    print(
        f"{args.output}: build.sh builds ./program with mxcc; 'build.sh emulator' for the CPU, 'build.sh cuda' for nvcc"
    )
    return 0
