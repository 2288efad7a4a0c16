"""The graph that the analysis of recurrences reads: op names, literals and shapes; no torch, no MLIR.

An adapter per representation makes it (``frontend/recurrences/``). Values are in single assignment form, without aliasing:
what writes in place has been rewritten before. Op names are those of ATen without the overload (``mul``, ``select``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Value:
    """One result of one op.

    Attributes:
        op: ``"input"`` for what the graph is given, ``"constant"`` for a tensor fixed at compile time, ``"opaque"`` for what
            must stay as it is and equals nothing, else the op's name.
        inputs: the values it reads, in order.
        literals: the op's arguments in order, ``Slot(i)`` where ``inputs[i]`` stands; tuples nest. Keyword arguments
            that matter follow as pairs ``(name, value)``. Of a constant: ``(numbers,)``, a numpy array (or a tuple of
            Python numbers, where the analysis makes it); anything else means that the numbers are not known.
        shape: sizes, None for results that are no tensor (of ``split``, ``unbind``).
        dtype: such as ``"float32"``.
        origin: what the adapter wants to find again. In a normalised graph: the values of the given graph that it stands
            for, in order (see ``normalise.py``).
        number: position in the graph, for stable order.
    """

    op: str
    inputs: list[Value]
    literals: tuple[Any, ...] = ()
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    origin: Any = None
    number: int = -1

    def __repr__(self) -> str:
        return f"%{self.number}:{self.op}"


@dataclass(frozen=True)
class Slot:
    """Stands for ``inputs[index]`` among a value's literals."""

    index: int


def argument(value: Value, position: int, name: str, default: Any) -> Any:
    """Returns the literal given by position, or else by name."""
    for literal in value.literals:
        if isinstance(literal, tuple) and len(literal) == 2 and literal[0] == name:
            return literal[1]
    if position >= len(value.literals):
        return default
    found = value.literals[position]
    keyword = isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], str)
    return default if keyword else found


@dataclass
class Graph:
    """Values in topological order, and those that something outside reads."""

    values: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)

    def add(self, value: Value) -> Value:
        value.number = len(self.values)
        self.values.append(value)
        return value

    def users(self) -> dict[Value, list[Value]]:
        """Returns for each value the values that read it."""
        found: dict[Value, list[Value]] = {v: [] for v in self.values}
        for v in self.values:
            for source in dict.fromkeys(v.inputs):
                found[source].append(v)
        return found
