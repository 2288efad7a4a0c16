"""Runs torch's op database through the backend and holds the outcome to ``expected.toml``.

python tests/conformance/run.py                               # all that is in tried.txt; exits with 1 where it is not as expected
python tests/conformance/run.py --update                      # writes expected.toml and tried.txt instead
python tests/conformance/run.py --ops 'add,nn.functional.*' --modes f32,grad --update
python tests/conformance/run.py --read a.log,b.log --update   # what --log has kept of earlier runs
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import sweep
import table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Conformance with torch's op database.")
    parser.add_argument("--ops", default="*", help="names, with wildcards, separated by commas")
    parser.add_argument(
        "--modes", default="", help=f"of {', '.join(table.MODES)}; without: those tried before"
    )
    parser.add_argument("--update", action="store_true", help="write what was found as what is expected")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--log", default="", help="a file for every result")
    parser.add_argument("--read", default="", help="logs to take results from, instead of running")
    args = parser.parse_args(argv)
    if args.read:
        done = table.read([Path(p) for p in args.read.split(",")])
    else:
        jobs = table.jobs(args.ops.split(","), args.modes.split(",") if args.modes else [])
        with open(args.log or os.devnull, "a") as log:
            done = sweep.run(jobs, args.processes, log)
    if args.update:
        return table.update(done)
    complaints = table.complaints(done)
    print(*complaints, sep="\n")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
