"""One workspace for all temporary buffers of a call: those that never live at the same time share memory.

On several streams two buffers may share it where every use of one is surely done before any use of the other begins: it
does not help that the steps stand one after the other.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT = 256  # bytes: a line of every cache, and what libraries ask for


@dataclass(frozen=True)
class Lifetime:
    """A buffer from the step that first uses it to the one that last does, both included.

    Attributes:
        begins: for each stream, how many of its steps are surely done when the first use begins; on one stream not given.
        ends: for each stream, how many of its steps there are up to the last use.
    """

    size: int
    first: int
    last: int
    begins: Sequence[int] = ()
    ends: Sequence[int] = ()

    def before(self, other: Lifetime) -> bool:
        """Returns whether all uses of this buffer are surely done before any of the other one begins."""
        if not self.ends:
            return self.last < other.first
        return all(map(operator.le, self.ends, other.begins))


@dataclass(frozen=True)
class Workspace:
    """Where buffers lie.

    Attributes:
        offsets: buffer -> its first byte.
        size: bytes in all.
        least: bytes that live at once in the fullest step, as the steps stand; no plan needs fewer.
    """

    offsets: Mapping[int, int]
    size: int
    least: int


def pack(buffers: Mapping[int, Lifetime]) -> Workspace:
    """Places buffers, the largest first, each at the lowest offset where nothing lies that lives at the same time."""
    placed: list[tuple[int, int, Lifetime]] = []  # start, end
    offsets: dict[int, int] = {}
    order = sorted(buffers.items(), key=lambda item: (-item[1].size, item[1].first, item[0]))
    for number, life in order:
        size, start = aligned(life.size), 0
        near = [p for p in placed if not (p[2].before(life) or life.before(p[2]))]  # by start
        for low, high, _ in near:
            if start + size <= low:
                break
            start = max(start, high)
        offsets[number] = start
        placed.append((start, start + size, life))
        placed.sort(key=lambda p: p[:2])
    return Workspace(offsets, max((end for _, end, _ in placed), default=0), _least(list(buffers.values())))


def aligned(size: int) -> int:
    """Returns a size in whole lines, one at least."""
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT


def _least(lives: Sequence[Lifetime]) -> int:
    changes: dict[int, int] = {}
    for life in lives:
        changes[life.first] = changes.get(life.first, 0) + aligned(life.size)
        changes[life.last + 1] = changes.get(life.last + 1, 0) - aligned(life.size)
    most = now = 0
    for step in sorted(changes):
        now += changes[step]
        most = max(most, now)
    return most
