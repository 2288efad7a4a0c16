"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)


def keep(path: Path, data: bytes) -> None:
    """Writes a file of a cache; where that cannot be done, the log says so and nothing is kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        log.warning("cannot keep %s: %s", path, error)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes ``data`` to a temporary name beside ``path`` and renames it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent or ".", prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
