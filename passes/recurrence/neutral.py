"""Neutral elements: what a combination may be given in front of a sequence without changing its first element.

With one, an associative scan is a loop over all elements; without, its first element has to be set apart and joined again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from spikingbrain.passes.recurrence.graph import Slot, Value

_CANDIDATES = {"bool": (False, True)}
_MOST = 256  # combinations of candidates that are tried


def neutral_elements(
    left: Sequence[Value], right: Sequence[Value], results: Sequence[Value]
) -> tuple[float, ...] | None:
    """Returns numbers e such that combining (e, x) gives x, one for each of ``left``; None where algebra shows none.

    ``left`` and ``right`` are what a combination is given, ``results`` what it makes of them. As in all algebra here, zero
    times a value is zero: the value is taken to be finite.
    """
    choices = [_CANDIDATES.get(v.dtype, (0, 1)) for v in left]
    for found in itertools.islice(itertools.product(*choices), _MOST):
        known: dict[Value, Any] = dict(zip(left, found, strict=True))
        if all(_evaluated(r, known) is x for r, x in zip(results, right, strict=True)):
            return found
    return None


def _evaluated(value: Value, known: dict[Value, Any]) -> Any:
    """Returns a number, or the value that a value equals: itself, at least."""
    if value not in known:
        rule = _RULES.get(value.op)
        operands = _operands(value, known) if rule else None
        found = rule(*operands) if rule and operands is not None else None
        if isinstance(found, Value) and (found.shape, found.dtype) != (value.shape, value.dtype):
            found = None
        known[value] = value if found is None else found
    return known[value]


def _operands(value: Value, known: dict[Value, Any]) -> list[Any] | None:
    """Returns what an op is given, in order; None where it has further arguments."""
    found = []
    for literal in value.literals:
        if isinstance(literal, Slot):
            found.append(_evaluated(value.inputs[literal.index], known))
        elif isinstance(literal, (bool, int, float)):
            found.append(literal)
        else:
            return None
    return found if len(found) == _ARGUMENTS[value.op] else None


def _number(x: Any, wanted: float | None = None) -> bool:
    return not isinstance(x, Value) and (wanted is None or x == wanted)


def _add(a: Any, b: Any) -> Any:
    if _number(a) and _number(b):
        return a + b
    return b if _number(a, 0) else a if _number(b, 0) else None


def _sub(a: Any, b: Any) -> Any:
    if _number(a) and _number(b):
        return a - b
    return a if _number(b, 0) else None


def _mul(a: Any, b: Any) -> Any:
    if _number(a) and _number(b):
        return a * b
    if _number(a, 0) or _number(b, 0):
        return 0
    return b if _number(a, 1) else a if _number(b, 1) else None


def _where(condition: Any, a: Any, b: Any) -> Any:
    if _number(condition):
        return a if condition else b
    return a if a is b else None


def _or(a: Any, b: Any) -> Any:
    return b if a is False else a if b is False else True if a is True or b is True else None


def _and(a: Any, b: Any) -> Any:
    return b if a is True else a if b is True else False if a is False or b is False else None


def _not(a: Any) -> Any:
    return not a if isinstance(a, bool) else None


_RULES: dict[str, Callable[..., Any]] = {
    "add": _add,
    "sub": _sub,
    "rsub": lambda a, b: _sub(b, a),
    "mul": _mul,
    "where": _where,
    "logical_or": _or,
    "bitwise_or": _or,
    "logical_and": _and,
    "bitwise_and": _and,
    "logical_not": _not,
    "bitwise_not": _not,
}
_ARGUMENTS = dict.fromkeys(_RULES, 2) | {"where": 3, "logical_not": 1, "bitwise_not": 1}
