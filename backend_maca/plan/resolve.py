"""From a plan to steps with all sizes known, for arguments of certain shapes.

Loops over launches are written out; where the host reads an element to go on, the steps so far have to run first.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from spikingbrain.backend_maca.plan.intervals import Interval
from spikingbrain.backend_maca.plan.order import Order, Walk, streams_of
from spikingbrain.backend_maca.plan.plan import evaluate, has_value
from spikingbrain.backend_maca.plan.steps import Launch, Product, Steps
from spikingbrain.backend_maca.plan.workspace import Lifetime, Workspace, pack
from spikingbrain.errors import CallError


@dataclass(frozen=True)
class Read:
    """One element that the host needs to go on."""

    buffer: int
    shape: tuple[int, ...]
    at: tuple[int, ...]


MAX_GRID = (1 << 31) - 1  # blocks along an axis
_WIDTHS = {"bool": 1, "int8": 1, "int16": 2, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4}
Resolved = Generator[Launch | Product | Read | Interval, Any, None]
KEPT = 64  # workspaces of intervals, for sizes that come again


class Resolver:
    """Computes the sizes and walks the steps of one entry point; raises CallError where shapes do not fit together."""

    def __init__(self, plan: Mapping[str, Any], entry: str, shapes: Mapping[int, tuple[int, ...]]):
        self.kernels, self.host, self.entry, self.shapes = (
            plan["kernels"],
            plan["entries"][entry],
            entry,
            shapes,
        )
        self.values: dict[int, Any] = {}
        self.named: list[int] = []
        for formula in self.host["sizes"]:
            self.named.append(self.value(formula))
        self.largest: dict[int, tuple[int, ...]] = {}  # temporary buffer -> its largest shape so far
        self.order = Walk(streams_of(self.host["launches"]))
        for formula, message in self.host["checks"]:
            self._check(formula, message)

    def value(self, size: Any) -> Any:
        """Returns the value of a formula."""
        return evaluate(size, self.shapes, self.values, self.named)

    def sizes(self, of: Sequence[Any]) -> tuple[int, ...]:
        """Returns the values of several formulas."""
        return tuple(map(self.value, of))

    def shape(self, buffer: int) -> tuple[int, ...]:
        """Returns the shape of a buffer, as far as the values it depends on are known by now."""
        sizes = self.sizes(self.host["buffers"][buffer]["shape"])
        if min(sizes, default=0) < 0:
            raise CallError(
                f"arguments of '{self.entry}' do not fit together",
                why=f"a tensor would have sizes {list(sizes)}",
            )
        return sizes

    def note(self, step: Launch | Product) -> list[int]:
        """Notes how large the temporaries of a step are now; returns those that have become larger.

        A buffer of the body of a loop may have another size in each round; nothing in it lasts from one to the next.
        """
        grown = []
        for i in used_by(step):
            record, before = self.host["buffers"][i], self.largest.get(i)
            if record["role"] != "temporary" or (
                before is not None and not any(map(has_value, record["shape"]))
            ):
                continue
            shape = self.shape(i)
            if before is None or math.prod(shape) > math.prod(before):
                self.largest[i] = shape
                grown += [i] if before is not None else []
        return grown

    def outputs(self) -> list[tuple[int, tuple[int, ...]]]:
        """Returns for each result its buffer, and its shape, once all steps have been walked."""
        return [(o["buffer"], self.sizes(o["shape"])) for o in self.host["outputs"]]

    def workspace(self, interval: Interval) -> Workspace:
        """Returns where the temporaries of an interval lie that now begins."""
        lives = []
        for i, (first, last) in interval.uses.items():
            record = self.host["buffers"][i]
            shape = self.sizes(record["shape"])
            # a size below 0 is an error where a step uses it: a branch may not be taken
            if min(shape, default=0) >= 0:
                lives.append((i, Lifetime(math.prod(shape) * storage(record["dtype"]).itemsize, first, last)))
        return _pack(tuple(lives))

    def steps(self, intervals: Sequence[Interval] = ()) -> Resolved:
        """Yields launches and products in order, intervals as they begin, and reads, to which the caller sends the element."""
        begins = {interval.begin: interval for interval in intervals}
        for place, step in enumerate(self.host["launches"]):
            if place in begins:
                yield begins[place]
            self.order.enter(step)
            yield from self._walk([step])
            self.order.leave(place)

    def _walk(self, steps: Sequence[Mapping[str, Any]]) -> Resolved:
        for step in steps:
            if "kernel" in step:
                yield from self._launch(step)
            elif "library" in step:
                known = {name: list(self.sizes(step[name])) for name in ("sizes", "leading", "strides")}
                product = {**step, **known, "batch": self.value(step["batch"])}
                yield Product(product, tuple(a["buffer"] for a in step["arguments"]))
            elif "loop" in step:
                low, high, by = (self.value(step[bound]) for bound in ("from", "to", "by"))
                if by < 1:
                    raise CallError(f"a loop of '{self.entry}' does not end", why=f"it goes on by {by}")
                for count in range(low, high, by):
                    self.values[step["loop"]] = count
                    yield from self._walk(step["steps"])
            elif "while" in step:
                yield from self._walk(step["before"])
                while self.value(step["while"]):
                    yield from self._walk(step["steps"])
                    yield from self._walk(step["before"])
            elif "if" in step:
                yield from self._walk(step["then" if self.value(step["if"]) else "else"])
            elif "read" in step:
                self.values[step["read"]] = yield Read(
                    step["buffer"], self.sizes(step["shape"]), self.sizes(step["at"])
                )
            elif "set" in step:
                self.values.update([(number, self.value(size)) for number, size in step["set"]])
            else:
                self._check(step["check"], step["message"])

    def _launch(self, step: Mapping[str, Any]) -> Resolved:
        grid, kernel = self.sizes(step["grid"]), self.kernels[step["kernel"]]
        if 0 in grid:
            return
        if not all(0 < size <= MAX_GRID for size in grid):
            raise CallError(
                f"kernel '{step['kernel']}' cannot be launched",
                why=f"grid {list(grid)} is out of range",
                hint="fewer rows at a time",
            )
        arguments = [
            (a["buffer"], None)
            if "buffer" in a
            else (None, _bits(self.value(a["value"]), a.get("dtype", "")))
            for a in step["arguments"]
        ]
        widths = tuple(_WIDTHS.get(a.get("dtype", ""), 8) for a in step["arguments"])
        yield Launch(
            step["kernel"], grid, kernel["threads"], kernel["dynamic_bytes"], tuple(arguments), widths
        )

    def _check(self, formula: Any, message: str) -> None:
        if not self.value(formula):
            raise CallError(f"arguments of '{self.entry}' do not fit together", why=message)


def _bits(value: Any, dtype: str) -> int:
    """Returns the integer whose low bytes are a scalar argument, which is passed by address."""
    if dtype == "bfloat16":
        return int.from_bytes(struct.pack("<f", value), "little") >> 16  # nothing to round: it is one
    forms = {"float32": "f", "float64": "d", "float16": "e"}
    if dtype in forms:
        return int.from_bytes(struct.pack("<" + forms[dtype], value), "little")
    return int(value)


def resolve(plan: Mapping[str, Any], entry: str, shapes: Mapping[int, tuple[int, ...]]) -> Steps:
    """Returns all steps of an entry point that reads nothing to go on, with the workspace that they need."""
    resolver = Resolver(plan, entry, shapes)
    steps: list[Launch | Product] = []
    for step in cast("Iterator[Launch | Product]", resolver.steps()):
        resolver.note(step)
        resolver.order.add()
        steps.append(step)
    order = resolver.order.order()
    made = some_steps(resolver, steps, set(), last=True)
    kept = {i for i, _ in made.outputs}
    uses: dict[int, list[int]] = {}  # of a temporary, the steps
    for place, step in enumerate(steps):
        for i in used_by(step):
            if i in made.temporaries and i not in kept:
                uses.setdefault(i, []).append(place)
    lives = {}
    for i, places in uses.items():
        size = math.prod(made.temporaries[i]) * storage(resolver.host["buffers"][i]["dtype"]).itemsize
        lives[i] = _lifetime(size, places, order)
    if order.count > 1:
        made = dataclasses.replace(made, order=order)
    if not lives:
        return made
    born: dict[int, list[int]] = {}
    for i, life in lives.items():
        born.setdefault(life.first, []).append(i)
    return dataclasses.replace(made, workspace=pack(lives), born=born)


@functools.lru_cache(KEPT)
def _pack(lives: tuple[tuple[int, Lifetime], ...]) -> Workspace:
    return pack(dict(lives))


def _lifetime(size: int, places: Sequence[int], order: Order) -> Lifetime:
    """Returns the life of a buffer that the steps at ``places`` use."""
    if order.count == 1:
        return Lifetime(size, places[0], places[-1])
    begins = tuple(map(min, zip(*map(order.begins, places), strict=True)))
    ends = [0] * len(begins)
    for place in places:
        ends[order.streams[place]] = order.place(place)
    return Lifetime(size, places[0], places[-1], begins, ends)


def some_steps(
    resolver: Resolver,
    steps: list[Launch | Product],
    known: set[int],
    last: bool = False,
    workspace: Workspace | None = None,
) -> Steps:
    """Returns steps with the shapes of the buffers that are new in them, and the results after the last ones."""
    outputs = resolver.outputs() if last else []
    used = [i for step in steps for i in used_by(step)]
    new = dict.fromkeys(i for i in [*used, *(i for i, _ in outputs)] if i not in known)
    records = resolver.host["buffers"]
    temporaries = {
        i: resolver.largest[i] if i in resolver.largest else resolver.shape(i)
        for i in new
        if records[i]["role"] == "temporary"
    }
    born: dict[int, list[int]] = {}
    if workspace:
        unborn = {i for i in temporaries if i in workspace.offsets}
        for place, step in enumerate(steps):
            first = unborn.intersection(used_by(step))
            unborn -= first
            born[place] = sorted(first)
    return Steps(resolver.entry, temporaries, steps, outputs, workspace, born)


def used_by(step: Launch | Product) -> list[int]:
    """Returns the buffers that a step reads or writes."""
    return (
        list(step.buffers) if isinstance(step, Product) else [i for i, _ in step.arguments if i is not None]
    )


def number(element: Any, dtype: str) -> Any:
    """Returns an element of a buffer as a number of the host."""
    return float((np.uint32(element) << 16).view(np.float32)) if dtype == "bfloat16" else element.item()


def storage(dtype: str) -> np.dtype[Any]:
    """Returns the numpy type that holds a dtype; bfloat16 travels as its 16 bits."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)
