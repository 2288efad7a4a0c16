"""Files and folders that are there whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spikingbrain.models.spiking.errors import SpikingError


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path``, and renames what was written there."""
    check_parent(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp's files are the owner's alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside ``path``, and renames it. Raises SpikingError if the folder is there with files in it."""
    check_new_folder(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_folder(path: Path) -> None:
    """Raises SpikingError unless a folder can be made at ``path``."""
    check_parent(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise SpikingError(f"{path} is there already", why="nothing is overwritten", hint="another name")


def check_parent(path: Path) -> None:
    """Raises SpikingError unless the folder that ``path`` is to lie in is there."""
    if not path.parent.is_dir():
        raise SpikingError(f"no folder {path.parent}", hint="make it first")
