"""Native code of kernels by a compiler on this machine, kept in the cache."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from spikingbrain.errors import PassFailed
from spikingbrain.files import keep


def compiled(
    kept: Path, command: Sequence[str], source: tuple[str, str], result: str, hint: str = ""
) -> bytes:
    """Returns native code: what is kept, else what a command makes in a folder of its own, which then is kept.

    Args:
        kept: the file of the cache.
        command: the compiler, and its arguments that name ``source`` and ``result``.
        source: a file's name and its text.
        result: the file that the command writes.
        hint: what to try where the compiler refuses the source.

    Raises:
        PassFailed: the compiler refuses the source, or there is no place for its files.
    """
    try:
        return kept.read_bytes()
    except OSError:
        pass
    compiler = Path(command[0]).name
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / source[0]).write_text(source[1])
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise PassFailed(
                    f"{compiler} refuses the generated kernels", why=done.stderr.strip()[:2000], hint=hint
                )
            code = (folder / result).read_bytes()
    except OSError as error:
        raise PassFailed(
            f"{compiler} has no place for its files",
            why=str(error),
            hint="set TMPDIR to a folder with free space",
        ) from error
    keep(kept, code)
    return code
