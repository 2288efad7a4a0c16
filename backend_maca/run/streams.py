"""Puts the steps of a call into several streams of a card, which wait for each other by events."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

from spikingbrain.backend_maca.plan.order import Order
from spikingbrain.backend_maca.run.driver import Driver
from spikingbrain.errors import SpikingBrainError


class Streams:
    """The streams and events that calls need beside the caller's stream, made once and used by all calls on a card.

    A call leaves the caller's stream behind all it did: the next call, or whoever gets its memory, waits for nothing else.
    An event may be recorded anew while a stream still waits for what it stood for: a wait keeps what it was told.
    """

    def __init__(self, driver: Driver):
        self._driver = driver
        self._streams: list[int] = []
        self._events: list[int] = []

    def run(self, order: Order, caller: int, launch: Callable[[int, int], None]) -> None:
        """Calls ``launch(step, stream)`` for each step, and lets streams wait as the order says; with the driver ``here``.

        What is recorded as a graph has these waits as its edges.
        """
        while len(self._streams) < order.count - 1:
            self._streams.append(self._driver.new_stream())
        streams = [caller, *self._streams]
        call = _Call(self._driver, self._events)
        try:
            if order.forks:
                call.record(-1, caller)
            for stream in order.forks:
                call.wait(streams[stream], -1)
            awaited = order.awaited
            for step, number in enumerate(order.streams):
                for other in order.waits[step]:
                    call.wait(streams[number], other)
                launch(step, streams[number])
                if step in awaited:
                    call.record(step, streams[number])
        except BaseException:
            for stream in range(1, order.count):
                with contextlib.suppress(SpikingBrainError):  # the first error is the one to tell
                    call.record(stream, streams[stream])
                    call.wait(caller, stream)
            raise
        for step in order.joins:
            call.wait(caller, step)


class _Call:
    """The events of one call, by the step that each stands for."""

    def __init__(self, driver: Driver, events: list[int]):
        self._driver, self._events = driver, events
        self._of: dict[int, int] = {}

    def record(self, step: int, stream: int) -> None:
        event = self._of.setdefault(step, len(self._of))
        if event == len(self._events):
            self._events.append(self._driver.new_event(timed=False))
        self._driver.record(self._events[event], stream)

    def wait(self, stream: int, step: int) -> None:
        self._driver.wait(stream, self._events[self._of[step]])


@functools.cache
def streams_of(driver: Driver) -> Streams:
    """Returns the streams and events of a card."""
    return Streams(driver)
