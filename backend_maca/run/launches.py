"""Launches of kernels, written down with the memory before and after them, to be run again on another machine.

A file is a zip: ``launches.json``, the sources, and each array once (`.npy`, named by its digest). The tests write what
they launch on the emulator (``pytest --keep-launches FOLDER``); `replay.py` runs it on a card.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spikingbrain.errors import CorruptArtifact

FORMAT = 1
KEPT = 2  # launches of one kernel that differ in nothing but values
LARGEST = 4 << 20  # bytes of the arrays of one launch; larger ones are left out

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Argument:
    """A scalar (``bytes`` as C has them, in hexadecimal) or an array's digests before and after the launch.

    Attributes:
        same: the earlier argument whose memory this is, -1 if it is none.
    """

    bytes: str = ""
    before: str = ""
    after: str = ""
    same: int = -1


@dataclass(frozen=True)
class Launch:
    """One launch: the digest of its source, and the test that it comes from."""

    source: str
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[Argument, ...]
    test: str


class Writer:
    """Writes launches into a file; of those that differ in values alone the first few are kept."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._partial = path, path.with_suffix(".partial")
        self._zip = zipfile.ZipFile(self._partial, "w", zipfile.ZIP_DEFLATED)
        self._launches: list[Launch] = []
        self._names: set[str] = set()
        self._seen: dict[Any, int] = {}

    def wants(self, source: str, kernel: str, sizes: Any) -> bool:
        """Returns whether a launch is new: of a kernel with this text and of these sizes few were kept so far."""
        key = (_body(source, kernel), repr(sizes))
        self._seen[key] = self._seen.get(key, 0) + 1
        return self._seen[key] <= KEPT

    def add(
        self,
        source: str,
        kernel: str,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        before: Sequence[Any],
        after: Sequence[Any],
        test: str,
    ) -> None:
        """Writes a launch; ``before`` has ctypes values and copies of arrays, ``after`` the same memory afterwards.

        Arrays of ``after`` that are one memory are one object.
        """
        digest = hashlib.sha256(source.encode()).hexdigest()[:24]
        self._write(f"sources/{digest}.maca", source.encode())
        arguments: list[Argument] = []
        for old, new in zip(before, after, strict=True):
            if not isinstance(old, np.ndarray):
                arguments.append(Argument(bytes=bytes(old).hex()))
                continue
            same = next(i for i, other in enumerate(after) if other is new)
            arguments.append(
                Argument(same=same)
                if same < len(arguments)
                else Argument(before=self._array(old), after=self._array(new))
            )
        x, y, z = grid
        self._launches.append(
            Launch(digest, kernel, (x, y, z), threads, shared_bytes, tuple(arguments), test)
        )

    def close(self) -> None:
        """Ends the file; without it there is none."""
        record = {"format": FORMAT, "launches": [asdict(launch) for launch in self._launches]}
        self._write("launches.json", json.dumps(record).encode())
        self._zip.close()
        os.replace(self._partial, self._path)

    def _array(self, array: Array) -> str:
        buffer = io.BytesIO()
        bits = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
        np.save(buffer, bits, allow_pickle=False)
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:24]
        self._write(f"arrays/{digest}.npy", buffer.getvalue())
        return digest

    def _write(self, name: str, data: bytes) -> None:
        if name not in self._names:
            self._names.add(name)
            self._zip.writestr(name, data)


def kernels(source: str) -> list[str]:
    """Returns the names of a source's kernels."""
    return re.findall(r"__launch_bounds__\(\d+\)\s+(\w+)\(", source)


def _body(source: str, kernel: str) -> str:
    """Returns the text of a kernel, whatever its name."""
    found = re.search(rf"[^\n]*\n{re.escape(kernel)}\(.*?\n}}\n", source, re.DOTALL)
    return found[0].replace(kernel, "kernel") if found else source + kernel


class Launches(Sequence[Launch]):
    """Launches of one or more files, of different kernels first: one source of each test file, then the next of each."""

    def __init__(self, paths: Sequence[Path]):
        self._members: dict[str, zipfile.ZipFile] = {}
        sources: dict[str, list[Launch]] = {}
        for path in paths:
            file = zipfile.ZipFile(path)
            self._members.update(dict.fromkeys(file.namelist(), file))
            for launch in _read(file, path):
                sources.setdefault(launch.source, []).append(launch)
        by_file: dict[str, list[str]] = {}
        for source, launches in sources.items():
            by_file.setdefault(launches[0].test.partition("::")[0], []).append(source)
        turns = max(map(len, by_file.values()), default=0)
        order = [of[turn] for turn in range(turns) for of in by_file.values() if turn < len(of)]
        self._launches = [launch for source in order for launch in sources[source]]

    def __len__(self) -> int:
        return len(self._launches)

    def __getitem__(self, number: Any) -> Any:
        return self._launches[number]

    def __iter__(self) -> Iterator[Launch]:
        return iter(self._launches)

    def source(self, launch: Launch) -> str:
        """Returns the MACA C++ that has the kernel."""
        return self._read(f"sources/{launch.source}.maca").decode()

    def array(self, digest: str) -> Array:
        """Returns an array of an argument."""
        array: Array = np.load(io.BytesIO(self._read(f"arrays/{digest}.npy")), allow_pickle=False)
        return array

    def _read(self, name: str) -> bytes:
        return self._members[name].read(name)


def _read(file: zipfile.ZipFile, path: Path) -> Iterator[Launch]:
    try:
        record = json.loads(file.read("launches.json"))
        if record["format"] != FORMAT:
            raise CorruptArtifact(f"{path} holds launches of format {record['format']}, not {FORMAT}")
        for each in record["launches"]:
            arguments = tuple(Argument(**argument) for argument in each["arguments"])
            yield Launch(**{**each, "grid": tuple(each["grid"]), "arguments": arguments})
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptArtifact(f"{path} holds no launches", why=str(error)) from error


def scalar(text: str) -> ctypes.c_int64:
    """Returns a scalar argument; kernels read as many of its low bytes as they need."""
    return ctypes.c_int64(int.from_bytes(bytes.fromhex(text), "little", signed=len(text) == 16))
