"""Finds values that all lanes combine: shuffles at distances that halve or double, each followed by the same op.

They are printed as one loop, which compilers unroll.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_mlir import ir

from spikingbrain.backend_maca.lower.mlir import constant, nested

SHORTEST = 3  # steps that are worth a loop
COMBINING = (
    *("arith.addf", "arith.mulf", "arith.maximumf", "arith.minimumf", "arith.maxnumf", "arith.minnumf"),
    *("arith.addi", "arith.muli", "arith.maxsi", "arith.minsi", "arith.maxui", "arith.minui"),
    *("arith.andi", "arith.ori", "arith.xori"),
)


@dataclass(frozen=True)
class Butterfly:
    """Steps ``x = op(x, what lane ^ distance has of x)``, the first of ``first``; ``steps`` are (shuffle, op)."""

    steps: Sequence[tuple[ir.Operation, ir.Operation]]

    @property
    def first(self) -> ir.Value:
        return self.steps[0][0].operands[0]

    @property
    def last(self) -> tuple[ir.Operation, ir.Operation]:
        return self.steps[-1]

    @property
    def distances(self) -> list[int]:
        return [_distance(shuffle) for shuffle, _ in self.steps]

    @property
    def loop(self) -> str:
        """Returns the head of the loop over ``d``."""
        begin, *_, end = self.distances
        if begin > end:
            return f"for (int d = {begin}; d >= {end}; d >>= 1)"
        return f"for (int d = {begin}; d <= {end}; d <<= 1)"


def butterflies(function: ir.Operation) -> list[Butterfly]:
    """Returns those of a kernel, each as long as it can be."""
    found: list[Butterfly] = []
    seen: set[ir.Value] = set()
    for op in nested(function):
        if op.name == "gpu.shuffle" and op.results[0] not in seen:
            butterfly = Butterfly(_regular(_chain(op)))
            seen.update(shuffle.results[0] for shuffle, _ in butterfly.steps)
            found += [butterfly] if len(butterfly.steps) >= SHORTEST else []
    return found


def _chain(shuffle: ir.Operation | None) -> list[tuple[ir.Operation, ir.Operation]]:
    """Returns shuffles that each pass on what the one before has led to, and the ops that combine."""
    steps: list[tuple[ir.Operation, ir.Operation]] = []
    while shuffle is not None:
        users = _users(shuffle.results[0])
        own, block = shuffle.operands[0], shuffle.block
        if len(users) != 1 or users[0].name not in COMBINING or users[0].block != block:
            break
        if own not in list(users[0].operands):
            break
        steps.append((shuffle, users[0]))
        users = _users(users[0].results[0])  # nothing but the next step may use what lies between
        following = [user for user in users if user.name == "gpu.shuffle" and user.block == block]
        shuffle = following[0] if len(users) == 2 and len(following) == 1 else None
    return steps


def _regular(steps: list[tuple[ir.Operation, ir.Operation]]) -> list[tuple[ir.Operation, ir.Operation]]:
    """Returns the first steps, as far as their ops are alike and their distances all halve or all double."""
    forms = [(op.name, op.operands[0] == shuffle.operands[0]) for shuffle, op in steps]
    distances = [_distance(shuffle) for shuffle, _ in steps]
    count = 1
    while count < len(steps) and forms[count] == forms[0]:
        before, now = distances[count - 1 : count + 1]
        if before != 2 * now if distances[0] > distances[1] else now != 2 * before:
            break
        count += 1
    return steps[:count]


def _users(value: ir.Value) -> list[ir.Operation]:
    return [use.owner.operation for use in value.uses]


def _distance(shuffle: ir.Operation) -> int:
    return int(constant(shuffle.operands[1]) or -1)
