"""A carried value while it is being described: which values depend on it, and which others have been taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from spikingbrain.passes.recurrence.algebra import Algebra
from spikingbrain.passes.recurrence.form import Carry, Loop
from spikingbrain.passes.recurrence.graph import Value
from spikingbrain.passes.recurrence.sink import sunk
from spikingbrain.passes.recurrence.terms import Axis, Step


@dataclass(eq=False)
class State:
    """A carried value and what is known of it."""

    loop: Loop
    carry: Carry
    moving: set[Value]
    foreign: Callable[[Value], bool]
    opened: set[Value] = field(default_factory=set)
    same: dict[Value, Value] = field(default_factory=dict)
    step: Step = field(default_factory=Step)

    def algebra(self, states: Iterable[Value], opened: set[Value]) -> Algebra:
        return Algebra(states, self.moving, opened, self.same)

    def open(self, value: Value) -> bool:
        """Takes a value without state apart from now on; False when it has no inside."""
        if self.opens(value, self.opened):
            self.opened.add(value)
            return True
        return False

    def opens(self, value: Value, opened: set[Value]) -> bool:
        if value in opened:
            return False
        if value in self.loop.tokens:
            if value not in self.same:
                inner = sunk(self.loop, value)
                if inner is None:
                    return False
                self.same[value] = inner
            return True
        return self.algebra([], opened).can_open(value)

    @property
    def rank(self) -> int:
        return len(self.carry.before.shape or ())

    def sizes(self) -> dict[Axis, int]:
        return dict(enumerate(self.carry.before.shape or ()))
