"""Intervals of an entry point between the elements that the host reads, and the temporaries that live within one.

Where sizes depend on data, the memory of all temporaries cannot be laid out before a call. But the sizes of those that are
used between two reads only are known at the first of these: they share memory with each other, as all temporaries of an
entry point do that reads nothing, and with those of other intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spikingbrain.backend_maca.plan.plan import Size, every_step, has_value, is_safe
from spikingbrain.backend_maca.plan.unread import buffers_of


@dataclass(frozen=True)
class Interval:
    """Steps of an entry point, not those nested in them, from one read to the next.

    Attributes:
        begin: number of the first step.
        uses: temporary that is used here only, its sizes known by then -> the numbers of the first and the last step
            that use it.
        is_known: whether the sizes of all of them are known before the call begins.
    """

    begin: int
    uses: Mapping[int, tuple[int, int]]
    is_known: bool


def intervals(entry: Mapping[str, Any]) -> list[Interval]:
    """Returns the intervals of an entry point of a plan in which temporaries live; none where the host reads nothing.

    A loop or a branch with a read inside is an interval of its own: as its steps may run in any order, all that it uses
    lives throughout.
    """
    steps = entry["launches"]
    if not any("read" in step for step in every_step(steps)):
        return []
    begins, of = _cut(steps)
    kept = {o["buffer"] for o in entry["outputs"]}
    uses: dict[int, list[int]] = {}  # of a buffer, the steps
    given: dict[int, int] = {}  # value of the host -> the last step that gives it
    for place, step in enumerate(steps):
        for inner in every_step([step]):
            given.update(dict.fromkeys(values_given(inner), place))
            for i in buffers_of(inner):
                uses.setdefault(i, []).append(place)
    local: list[dict[int, tuple[int, int]]] = [{} for _ in begins]
    for i, places in uses.items():
        record, number = entry["buffers"][i], of[places[0]]
        if record["role"] != "temporary" or i in kept or number != of[places[-1]]:
            continue
        if all(_is_known(size, given, begins[number]) for size in record["shape"]):
            local[number][i] = (places[0], places[-1])
    made = []
    for begin, found in zip(begins, local, strict=True):
        sizes = [size for i in found for size in entry["buffers"][i]["shape"]]
        if found:
            made.append(Interval(begin, found, not any(map(has_value, sizes))))
    return made


def values_given(step: Mapping[str, Any]) -> Iterator[int]:
    """Yields the values of the host that a step gives, without those of steps inside it."""
    yield from (step[kind] for kind in ("loop", "read") if kind in step)
    yield from (value for value, _ in step.get("set", ()))


def _cut(steps: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Returns where intervals begin, and for each step the number of its own."""
    begins, of, is_over = [0], [], False
    for place, step in enumerate(steps):
        reads_inside = "read" not in step and any("read" in inner for inner in every_step([step]))
        if place and (is_over or reads_inside):
            begins.append(place)
        of.append(len(begins) - 1)
        is_over = reads_inside or "read" in step
    return begins, of


def _is_known(size: Size, given: Mapping[int, int], begin: int) -> bool:
    """Returns whether a size can be computed when an interval begins, whatever the arguments and the data."""
    return is_safe(size) and (not has_value(size) or all(given[v] < begin for v in _values_of(size)))


def _values_of(size: Size) -> Iterator[int]:
    if isinstance(size, list):
        if size[0] == "value":
            yield size[1]
        else:
            for part in size[1:]:
                yield from _values_of(part)
