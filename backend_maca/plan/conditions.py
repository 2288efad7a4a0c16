"""Conditions on sizes as truth tables of the few comparisons that they are made of: combined many times, they stay short."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from spikingbrain.backend_maca.plan.plan import Size

MOST = 4  # different comparisons; a condition of more counts as one that holds
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


@dataclass(frozen=True)
class Condition:
    """When something holds.

    Attributes:
        comparisons: formulas that are 0 or 1, as JSON, in order.
        table: bit i tells whether it holds where the comparisons that hold are the bits of i.
    """

    comparisons: tuple[str, ...]
    table: int

    def __or__(self, other: Condition) -> Condition:
        return _combined(self, other, lambda a, b: a | b) or ALWAYS

    def __and__(self, other: Condition) -> Condition:
        return _combined(self, other, lambda a, b: a & b) or ALWAYS

    def __invert__(self) -> Condition:
        return _reduced(self.comparisons, ~self.table & _full(len(self.comparisons)))

    @property
    def formula(self) -> Size:
        """Returns it as a formula that is 0 or 1."""
        if self.table in (0, _full(len(self.comparisons))):
            return int(self.table != 0)
        *fewer, last = self.comparisons
        without, with_it = (
            _reduced(tuple(fewer), _half(self.table, len(fewer) + 1, len(fewer), holds)) for holds in (0, 1)
        )
        comparison, low, high = json.loads(last), without.formula, with_it.formula
        if low == 0:
            return comparison if high == 1 else ["and", comparison, high]
        if high == 1:
            return ["or", comparison, low]
        if high == 0:
            return _opposite(comparison) if low == 1 else ["and", _opposite(comparison), low]
        return ["or", _opposite(comparison), high] if low == 1 else ["select", comparison, high, low]


ALWAYS = Condition((), 1)
NEVER = Condition((), 0)


def condition(formula: Size) -> Condition:
    """Returns when a formula is not 0; one of many comparisons is one comparison itself."""
    if found := _taken_apart(formula):
        return found
    truth = formula if _is_truth(formula) else ["ne", formula, 0]
    return Condition((json.dumps(truth),), 0b10)


def _taken_apart(formula: Size) -> Condition | None:
    """Returns when a formula of other conditions is not 0, None where it is none or has too many comparisons."""
    if not isinstance(formula, list):
        return ALWAYS if formula else NEVER
    name, *operands = formula
    if name == "eq" and operands[1] == 0 and _is_truth(operands[0]):
        return ~condition(operands[0])
    if name not in ("and", "or", "select") or not all(map(_is_truth, operands)):
        return None
    parts = [condition(operand) for operand in operands]
    if name != "select":
        return _combined(parts[0], parts[1], lambda a, b: a & b if name == "and" else a | b)
    chosen, first, second = parts
    yes, no = (_combined(*both, lambda a, b: a & b) for both in ((chosen, first), (~chosen, second)))
    return _combined(yes, no, lambda a, b: a | b) if yes and no else None


def _is_truth(formula: Size) -> bool:
    """Tells whether a formula is surely 0 or 1."""
    if not isinstance(formula, list):
        return formula in (0, 1)
    both = formula[0] in ("and", "or") and all(map(_is_truth, formula[1:]))
    return both or formula[0] in _COMPARISONS or (formula[0] == "select" and all(map(_is_truth, formula[2:])))


def _opposite(comparison: Size) -> Size:
    return ["eq", comparison, 0]


def _full(count: int) -> int:
    return (1 << (1 << count)) - 1


def _combined(first: Condition, second: Condition, how: Callable[[int, int], int]) -> Condition | None:
    """Returns what two conditions make together, None if that has too many comparisons."""
    comparisons = tuple(sorted({*first.comparisons, *second.comparisons}))
    if len(comparisons) > MOST:
        return None
    return _reduced(comparisons, how(_spread(first, comparisons), _spread(second, comparisons)))


def _reduced(comparisons: tuple[str, ...], table: int) -> Condition:
    """Returns the condition without comparisons that make no difference."""
    for place in range(len(comparisons)):
        without, with_it = (_half(table, len(comparisons), place, holds) for holds in (0, 1))
        if without == with_it:
            return _reduced(comparisons[:place] + comparisons[place + 1 :], without)
    return Condition(comparisons, table)


def _half(table: int, count: int, place: int, holds: int) -> int:
    """Returns the table of the other comparisons where that at ``place`` holds, or does not."""
    rows = [i for i in range(1 << count) if i >> place & 1 == holds]
    return sum((table >> i & 1) << number for number, i in enumerate(rows))


def _spread(of: Condition, comparisons: tuple[str, ...]) -> int:
    """Returns the table of a condition over more comparisons."""
    places = [comparisons.index(c) for c in of.comparisons]
    table = 0
    for i in range(1 << len(comparisons)):
        own = sum((i >> place & 1) << bit for bit, place in enumerate(places))
        table |= (of.table >> own & 1) << i
    return table
