"""Mirrors the packages as one import tree of links, ``build/tree/spikingbrain``, for tools that read files.

Folders at the top of the repository are packages below ``spikingbrain``. Python learns that from the installation;
mypy and import-linter do not, so they are pointed at this tree, which is made anew each time (milliseconds).
"""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from pathlib import Path


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    tree = root / "build" / "tree"
    folders = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(tree, ignore_errors=True)
    for package, folder in folders.items():
        place = tree.joinpath(*package.split("."))
        place.mkdir(parents=True, exist_ok=True)
        for file in (root / folder).iterdir():
            if file.suffix == ".py" or file.name == "py.typed":
                (place / file.name).symlink_to(os.path.relpath(file, place))
    print(tree)
    return 0


if __name__ == "__main__":
    sys.exit(main())
