"""Through which values the rest of a loop's body depends on a state: the highest that are sums over one of its axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from spikingbrain.passes.recurrence.algebra import Algebra, NonAffine
from spikingbrain.passes.recurrence.graph import Value
from spikingbrain.passes.recurrence.terms import Contraction, contraction_of


def find_reads(
    algebra: Algebra,
    roots: Iterable[Value],
    moving: set[Value],
    foreign: Callable[[Value], bool],
    known: set[Value],
) -> tuple[list[Contraction], bool]:
    """Returns the reads that ``roots`` need, and whether they need the state itself as well.

    ``moving``: what depends on the state, also by way of states of later steps. ``foreign`` tells whether a value depends on
    states that are not solved yet; such a value is no read. What is in ``known`` is found elsewhere.
    """
    reads: list[Contraction] = []
    whole = False
    seen: set[Value] = set()
    todo = list(roots)
    while todo:
        v = todo.pop()
        if v in seen or v in known or v not in moving:
            continue
        seen.add(v)
        if v in algebra.states:
            whole = True
            continue
        if not foreign(v):
            try:
                reads.append(contraction_of(algebra, v))
                continue
            except NonAffine:
                pass
        todo += v.inputs
    return sorted(reads, key=lambda r: r.value.number), whole
