"""The order of steps on several streams: which are surely done before which.

Steps of one stream run one after the other. A step may also wait for steps of other streams; what is not said so may run
in any order. Stream 0 is the caller's: the others begin after what was put into it before, and it waits for them at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Order:
    """Where steps run and what they wait for.

    Attributes:
        streams: of each step.
        waits: of each step, the steps of other streams that have to be done first; none that others of them wait for.
        clocks: of each step, for each stream how many of its steps are done once this one is.
    """

    streams: Sequence[int]
    waits: Sequence[Sequence[int]]
    clocks: Sequence[Sequence[int]]

    @property
    def count(self) -> int:
        """Returns how many streams there are."""
        return max(self.streams, default=0) + 1

    def before(self, first: int, second: int) -> bool:
        """Returns whether a step is surely done when another one begins."""
        stream = self.streams[first]
        return first != second and self.clocks[first][stream] <= self.clocks[second][stream]

    def begins(self, step: int) -> tuple[int, ...]:
        """Returns for each stream how many of its steps are surely done when a step begins."""
        own = self.streams[step]
        return tuple(n - (stream == own) for stream, n in enumerate(self.clocks[step]))

    def place(self, step: int) -> int:
        """Returns how many steps its stream has up to a step."""
        return self.clocks[step][self.streams[step]]

    @property
    def forks(self) -> list[int]:
        """Returns the streams whose first step waits for none: they have to wait for the caller's."""
        firsts = {stream: step for step, stream in reversed(list(enumerate(self.streams)))}
        return sorted(stream for stream, step in firsts.items() if stream and not self.waits[step])

    @property
    def joins(self) -> list[int]:
        """Returns the steps that the caller's stream has to wait for at the end: the last ones of streams."""
        lasts = {stream: step for step, stream in enumerate(self.streams)}
        own = lasts.pop(0, None)
        return [step for step in lasts.values() if own is None or not self.before(step, own)]

    @property
    def awaited(self) -> set[int]:
        """Returns the steps that another stream waits for."""
        return {*self.joins, *(step for waits in self.waits for step in waits)}

    def run(self, choose: Callable[[Sequence[int]], int] = min) -> Iterator[int]:
        """Yields all steps in an order that the streams allow; ``choose`` takes one of those that may be next."""
        left: dict[int, list[int]] = {}
        for step in reversed(range(len(self.streams))):
            left.setdefault(self.streams[step], []).append(step)
        done: set[int] = set()
        while left:
            ready = [steps[-1] for steps in left.values() if done.issuperset(self.waits[steps[-1]])]
            step = choose(sorted(ready))
            done.add(step)
            left[self.streams[step]].pop()
            if not left[self.streams[step]]:
                del left[self.streams[step]]
            yield step


class Walk:
    """Makes the order of what a plan's steps launch, as they are walked.

    A step may launch nothing for some sizes, or a loop many times. One that waits for it waits for the last launch on its
    stream up to there, and for what those that launched nothing would have waited for.
    """

    def __init__(self, streams: int = 1) -> None:
        self._count, self._stream = streams, 0
        self._streams: list[int] = []
        self._waits: list[tuple[int, ...]] = []
        self._clocks: list[tuple[int, ...]] = []
        self._last: dict[int, int] = {}  # launch of a stream
        self._owed: dict[int, set[int]] = {}  # of a stream: what its next launch waits for
        self._done: dict[int, set[int]] = {}  # of a step of the plan: the launches that it stands for

    def enter(self, step: Mapping[str, Any]) -> None:
        """Begins a step of the plan."""
        self._stream = step.get("stream", 0)
        owed = self._owed.setdefault(self._stream, set())
        for number in step.get("after", ()):
            owed |= self._done[number]

    def add(self) -> None:
        """Adds a launch of the step."""
        stream, number = self._stream, len(self._streams)
        clock = list(self._clocks[self._last[stream]]) if stream in self._last else [0] * self._count
        waits = []
        for step in sorted(self._owed[stream], reverse=True):
            if clock[self._streams[step]] < self._clocks[step][self._streams[step]]:
                clock = list(map(max, clock, self._clocks[step]))
                waits.append(step)
        clock[stream] += 1
        self._streams.append(stream)
        self._waits.append(tuple(reversed(waits)))
        self._clocks.append(tuple(clock))
        self._last[stream], self._owed[stream] = number, set()

    def leave(self, number: int) -> None:
        """Ends a step of the plan, its ``number``."""
        stream = self._stream
        self._done[number] = {*self._owed[stream], *([self._last[stream]] if stream in self._last else [])}

    def order(self) -> Order:
        """Returns the order of all launches so far."""
        return Order(self._streams, self._waits, self._clocks)


def order_of(steps: Sequence[Mapping[str, Any]]) -> tuple[Order, list[int]]:
    """Returns the order of the steps of an entry point that run on the device, and their numbers in the plan."""
    walk, numbers = Walk(streams_of(steps)), []
    for number, step in enumerate(steps):
        walk.enter(step)
        if "set" not in step and "check" not in step:
            walk.add()
            numbers.append(number)
        walk.leave(number)
    return walk.order(), numbers


def streams_of(steps: Sequence[Mapping[str, Any]]) -> int:
    """Returns how many streams the steps of an entry point use."""
    return 1 + max((step.get("stream", 0) for step in steps), default=0)
