"""How long a call may take on a C550, told from its plan and the work of its kernels: a model, not a measurement.

A launch takes the time to start it, and then the longest of

- device memory: what the kernel touches, each buffer once at most, by the bandwidth of memory;
- cache, shared memory, arithmetic, matrix instructions: what the blocks of the busiest processor do, by its rate;

longer where fewer waves are in flight than hide latencies, as shared memory, registers and threads of a block allow, plus
its barriers. A product of the library takes what its bytes or its multiplications do. Rates are those of ``Card``. Launches
count one after the other, on whatever streams they are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spikingbrain.backend_maca.plan.plan import evaluate
from spikingbrain.backend_maca.plan.resolve import resolve, storage, used_by
from spikingbrain.backend_maca.plan.steps import Launch, Product
from spikingbrain.errors import CallError

UNSEEN = 4  # rounds of a loop whose number depends on data
WAVE = 64


@dataclass(frozen=True)
class Card:
    """A C500 or C550. Bandwidth, launch time and the rate of bf16 were measured by others; what is marked is assumed.

    Attributes:
        rates: operations per second of matrix instructions, by type.
        cache_bandwidth: of all processors, assumed.
        arithmetic: operations per second, assumed.
        waves: on a processor, that hide latencies; assumed.
        barrier: seconds, assumed.
    """

    processors: int = 104
    bandwidth: float = 1.4e12
    cache_bandwidth: float = 5e12
    shared_bandwidth: float = 104 * 32 * 4 * 1.6e9  # banks of 4 bytes, by the clock
    arithmetic: float = 104 * 4 * 64 * 1.6e9
    rates: tuple[tuple[str, float], ...] = (("bf16", 190e12), ("f16", 190e12), ("i8", 380e12), ("f32", 47e12))
    launch: float = 3e-6
    barrier: float = 5e-8
    shared_bytes: int = 64 << 10
    registers: int = 131072
    threads: int = 2048
    blocks: int = 16
    waves: float = 8

    def resident(self, threads: int, shared_bytes: int, registers: int) -> int:
        """Returns how many blocks a processor has at a time, at least 1."""
        limits = (
            self.blocks,
            self.threads // threads,
            self.shared_bytes // max(1, shared_bytes),
            self.registers // (threads * min(registers, 256)),
        )
        return max(1, min(limits))


def estimate(
    plan: Mapping[str, Any],
    work: Mapping[str, Any],
    shapes: Mapping[str, Sequence[tuple[int, ...]]],
    card: Card | None = None,
) -> dict[str, float]:
    """Returns the seconds of each entry point in ``shapes``, the shapes of its arguments; further inputs have sizes of 1.

    ``work`` is what ``work_of`` returns. Raises CallError for an entry point whose launches depend on data.
    """
    card = card or Card()
    return {entry: _of_entry(plan, work, entry, given, card) for entry, given in shapes.items()}


def _of_entry(
    plan: Mapping[str, Any],
    work: Mapping[str, Any],
    entry: str,
    given: Sequence[tuple[int, ...]],
    card: Card,
) -> float:
    host = plan["entries"][entry]
    if not host["static"]:
        raise CallError(f"no model of '{entry}'", why="what it launches depends on data")
    records = host["buffers"]
    inputs = [i for i, record in enumerate(records) if record["role"] == "input"]
    shapes = {i: tuple(n if isinstance(n, int) else 1 for n in records[i]["shape"]) for i in inputs}
    shapes.update(zip(inputs, given, strict=False))
    steps = resolve(plan, entry, shapes)
    all_shapes = {i: tuple(r["shape"]) for i, r in enumerate(records)} | shapes | dict(steps.temporaries)
    sizes = {
        i: math.prod(n if isinstance(n, int) else 1 for n in shape) * storage(records[i]["dtype"]).itemsize
        for i, shape in all_shapes.items()
    }
    total = 0.0
    for step in steps.steps:
        touched = sum(sizes[i] for i in set(used_by(step)))
        if isinstance(step, Product):
            operations = 2 * math.prod(step.step["sizes"]) * step.step["batch"]
            total += card.launch + max(touched / card.bandwidth, operations / _rate(card, records, step))
        else:
            own = plan["kernels"][step.kernel]["shared_bytes"] + step.shared_bytes
            total += _of_launch(step, work[step.kernel], touched, own, card)
    return total


def _rate(card: Card, records: Sequence[Mapping[str, Any]], step: Product) -> float:
    kinds = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "i8"}
    return dict(card.rates)[kinds.get(records[step.buffers[0]]["dtype"], "f32")]


def _of_launch(launch: Launch, work: Mapping[str, Any], touched: int, shared_bytes: int, card: Card) -> float:
    dims: dict[int, dict[int, int]] = {}
    values: dict[int, int] = {}
    for (number, axis), (_, value) in zip(work["arguments"], launch.arguments, strict=True):
        if value is not None and axis is not None:
            dims.setdefault(number, {})[axis] = value
        elif value is not None:
            values[number] = value
    done = _done(work["body"], dims, values)
    blocks, block_waves = math.prod(launch.grid), launch.threads // WAVE
    resident = card.resident(launch.threads, shared_bytes, work["registers"])
    most = -(-blocks // card.processors)  # that a processor has in all
    in_flight = min(1.0, min(blocks / card.processors, resident) * block_waves / card.waves)
    hidden = min(1.0, min(most, resident) * block_waves / card.waves)
    traffic = launch.threads * (done["read"] + done["written"])  # of a block
    each = {
        "cache": traffic / card.cache_bandwidth,
        "shared": launch.threads * done["shared"] / card.shared_bandwidth,
        "arithmetic": launch.threads * done["arithmetic"] / card.arithmetic,
        **{kind: block_waves * done[f"matrix {kind}"] / rate for kind, rate in card.rates},
    }
    computing = most * card.processors * max(each.values()) / hidden
    memory = min(touched, blocks * traffic) / card.bandwidth / in_flight
    return card.launch + max(memory, computing) + done["barriers"] * -(-most // resident) * card.barrier


def _done(node: Mapping[str, Any], dims: Mapping[int, Any], values: Mapping[int, int]) -> Counter[str]:
    """Returns what a part of a record counts, for the arguments of a launch."""

    def value(size: Any) -> int | None:
        try:
            return None if size is None else evaluate(size, dims, values)
        except CallError:
            return None

    def times(found: Counter[str], factor: float) -> Counter[str]:
        return Counter({what: amount * factor for what, amount in found.items()})

    total = Counter({what: amount for what, amount in node.items() if what not in ("loops", "branches")})
    for low, high, by, body in node.get("loops", ()):
        bounds = [value(low), value(high), value(by)]
        first, last, step = (b if b is not None else 0 for b in bounds)
        rounds = UNSEEN if None in bounds or step < 1 else max(0, -(-(last - first) // step))
        total.update(times(_done(body, dims, values), rounds))
    for condition, *ways in node.get("branches", ()):
        taken = value(condition)
        found = [_done(way, dims, values) for way in ways]
        if taken is not None:
            found = found[:1] if taken else found[1:]
        elif likely := [way for way in found if not way["f64"]]:  # where exactness needs f64, it rarely does
            found = likely
        for way in found:
            total.update(times(way, 1 / len(found)))
    return total
