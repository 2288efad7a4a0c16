"""How much memory a program will need, and how much there is: said before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain.artifact import CODE, WEIGHTS, Artifact, numpy_dtype
from spikingbrain.errors import OutOfMemory

# A forecast is no measurement: only a need that is clearly above what is available is refused.
CLEARLY = 1.1
_WORTH_ASKING = 256 << 20  # bytes; asking the system takes longer than making a small state


@dataclass(frozen=True)
class Forecast:
    """Bytes that an artifact will need.

    Attributes:
        weights: mapped from the file. What does not fit is read from the file again and again.
        code: of the compiled program, copied.
        state: of each tensor of the state, by field name, all texts together.
        batch: texts of the state.
    """

    weights: int
    code: int
    state: Mapping[str, int]
    batch: int

    @property
    def total(self) -> int:
        return self.weights + self.code + sum(self.state.values())

    @staticmethod
    def of(artifact: Artifact, batch: int = 1) -> Forecast:
        manifest = artifact.manifest
        members = manifest["members"]
        code = sum(facts["size"] for name, facts in members.items() if name.startswith(CODE))
        return Forecast(members[WEIGHTS]["size"], code, state_bytes(manifest.get("state", []), batch), batch)

    def check(self, what: str) -> None:
        """Raises OutOfMemory where clearly less is available."""
        texts = f"of {self.batch} texts" if self.batch > 1 else "of one text"
        parts = f"{gb(self.weights)} of weights, {gb(sum(self.state.values()))} of state {texts}"
        _refuse(
            what,
            self.total,
            f"{parts}; weights that do not fit would be read from the file again for each token",
            "smaller weights or a smaller --capacity; to load it all the same: load(..., check_memory=False),"
            " --no-memory-check",
        )


def state_bytes(layout: Sequence[Mapping[str, Any]], batch: int) -> dict[str, int]:
    """Returns the bytes of each tensor of so many texts' state, by field name."""
    found = {}
    for field in layout:
        size = math.prod(batch if isinstance(d, str) else d for d in field["shape"])
        found[field["name"]] = size * numpy_dtype(field["dtype"]).itemsize
    if any(isinstance(d, str) for field in layout for d in field["shape"]):
        return found
    return {name: size * batch for name, size in found.items()}  # each text has a state of its own


def check_state(layout: Sequence[Mapping[str, Any]], batch: int) -> None:
    """Raises OutOfMemory where clearly less than a new state needs is available."""
    need = sum(state_bytes(layout, batch).values())
    if need >= _WORTH_ASKING:
        texts = f"{batch} texts" if batch > 1 else "one text"
        _refuse(f"a state of {texts}", need, "", "fewer texts at a time, or a smaller --capacity or window")


def _refuse(what: str, need: int, why: str, hint: str) -> None:
    there = available()
    if there is not None and need > CLEARLY * there:
        raise OutOfMemory(
            f"{what} needs {gb(need)} of memory, and {gb(there)} are available", why=why, hint=hint
        )


def gb(count: int) -> str:
    """Returns a number of bytes in words."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def available(root: Path = Path("/")) -> int | None:
    """Returns the bytes that this process may still take without swapping; None where the system does not tell.

    That is what the machine has, or less if a control group (a container) limits it. Files in the page cache count as
    free. ``root`` is the folder that holds ``proc`` and ``sys``.
    """
    found = [_machine(root / "proc"), *_groups(root)]
    return min((bytes_ for bytes_ in found if bytes_ is not None), default=None)


def _machine(proc: Path) -> int | None:
    kilobytes = _table(proc / "meminfo").get("MemAvailable:")
    return None if kilobytes is None else kilobytes * 1024


def _groups(root: Path) -> Iterator[int | None]:
    """Yields what each control group that this process is in, and each one around it, leaves."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            mount /= "memory"
            names = (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
                "total_active_file",
            )
        else:
            continue
        group = mount / path.lstrip("/")
        # a container may see its own group as the root, while the path is the host's
        for folder in {mount, group, *(p for p in group.parents if p.is_relative_to(mount))}:
            yield _left(folder, *names)


def _left(group: Path, limit: str, used: str, *cached: str) -> int | None:
    highest, now = _number(group / limit), _number(group / used)
    if highest is None or now is None:
        return None
    statistics = _table(group / "memory.stat")
    return max(0, highest - now + sum(statistics.get(name, 0) for name in cached))


def _number(file: Path) -> int | None:
    """Returns the number in a file; None where there is no file, or another word such as "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _table(file: Path) -> dict[str, int]:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    return {words[0]: int(words[1]) for line in lines if len(words := line.split()) > 1}
