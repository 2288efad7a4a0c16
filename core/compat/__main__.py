"""``python -m spikingbrain.compat script.py ARGUMENTS`` runs a script with stand-ins; without a script it lists them."""

from __future__ import annotations

import os
import runpy
import sys

from spikingbrain.compat import STAND_INS, install


def main(arguments: list[str]) -> int:
    given = install()
    if not arguments:
        for root, what in given.items():
            print(f"{root}: {what}")
        for module, names in STAND_INS.items():
            if names:
                print(f"  {module}: {', '.join(sorted(names))}")
        return 0
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
