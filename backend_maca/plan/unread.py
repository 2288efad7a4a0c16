"""Launches whose results nothing reads, for some sizes: they get no blocks there.

Where sizes choose between kernels, the one that runs may compute itself what another launch prepares for the others: rows of a
norm, for few of them. That launch then need not run. Whether it does is a formula like all other sizes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spikingbrain.backend_maca.plan.conditions import ALWAYS, NEVER, Condition, condition
from spikingbrain.backend_maca.plan.plan import Size, every_step, has_value

if TYPE_CHECKING:
    from spikingbrain.backend_maca.source.printer import Kernel


def skip_unread(plan: Mapping[str, Any], kernels: Mapping[str, Kernel]) -> None:
    """Gives the launches of a plan no blocks where all that they write is temporary and no later step that runs reads it."""
    by_name = {k.name: k for k in kernels.values()}
    for entry in plan["entries"].values():
        kept = {n for n, b in enumerate(entry["buffers"]) if b["role"] != "temporary"}
        _skip(entry["launches"], kept | {o["buffer"] for o in entry["outputs"]}, by_name)


def _skip(steps: Sequence[dict[str, Any]], kept: set[int], kernels: Mapping[str, Kernel]) -> None:
    read: dict[int, Condition] = {}  # when a buffer is read later
    for step in reversed(steps):
        if "kernel" not in step and "library" not in step:
            for inner in every_step([step]):
                read |= dict.fromkeys(buffers_of(inner), ALWAYS)
            continue
        written = written_by(step, kernels)
        readers = [read[buffer] for buffer in written if buffer in read]
        if "kernel" in step and readers and not written & kept:
            when = functools.reduce(operator.or_, readers)
            if when not in (ALWAYS, NEVER):
                step["grid"] = [["select", when.formula, step["grid"][0], 0], *step["grid"][1:]]
        runs = runs_when(step)
        for buffer in buffers_of(step):
            read[buffer] = read.get(buffer, NEVER) | runs


def runs_when(step: Mapping[str, Any]) -> Condition:
    """Returns when a launch has blocks, or a product has rows, as far as a choice of sizes says so."""
    sizes = step["grid"] if "kernel" in step else step["sizes"][:2]
    return functools.reduce(operator.and_, map(_is_some, sizes))


def _is_some(size: Size) -> Condition:
    """Returns when a size is not 0, as far as a choice in it says so."""
    if not isinstance(size, list):
        return ALWAYS
    if size[0] in ("ceildiv", "mul"):
        parts = [c for part in size[1:] if (c := _is_some(part)) != ALWAYS]
        return parts[0] if len(parts) == 1 else ALWAYS
    if size[0] != "select" or 0 not in size[2:] or has_value(size[1]):
        return ALWAYS
    _, chosen, first, second = size
    holds = condition(chosen) if second == 0 else ~condition(chosen)
    return holds & _is_some(first if second == 0 else second)


def buffers_of(step: Mapping[str, Any]) -> list[int]:
    """Returns the buffers that a step reads or writes, without those of steps inside it."""
    found = [a["buffer"] for a in step.get("arguments", ()) if "buffer" in a]
    return [*found, step["buffer"]] if "read" in step else found


def written_by(step: Mapping[str, Any], kernels: Mapping[str, Kernel]) -> set[int]:
    """Returns the buffers that a launch or a product writes; ``kernels`` by their names."""
    if "library" in step:
        return {step["arguments"][-1]["buffer"]}
    kernel = kernels[step["kernel"]]
    pairs = zip(kernel.arguments, step["arguments"], strict=True)
    return {
        a["buffer"]
        for (number, axis), a in pairs
        if axis is None and number in kernel.written and "buffer" in a
    }
