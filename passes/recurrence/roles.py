"""Gives the axes of a state their roles, and writes its step and reads in the normal form of ``form.py``.

The axis that reads sum over (and that a rank-one step multiplies) is the key. An axis that no factor ties to the key is the
value; the rest are batch. A state that is read in no such way, or whose update is no outer product, is an elementwise scan.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain.passes.recurrence.algebra import NonAffine
from spikingbrain.passes.recurrence.form import Factor, Product, Read, Recurrence
from spikingbrain.passes.recurrence.graph import Value
from spikingbrain.passes.recurrence.reads import find_reads
from spikingbrain.passes.recurrence.selective import logarithm, selective_form
from spikingbrain.passes.recurrence.state import State
from spikingbrain.passes.recurrence.synthesis import summed
from spikingbrain.passes.recurrence.terms import Axis, Contraction, Part, step_of


@dataclass
class Described:
    """A recurrence, the values that must be known for it, and those that are known by it."""

    recurrence: Recurrence
    needs: list[Value]
    gives: set[Value]


def describe(state: State, roots: list[Value], known: set[Value]) -> Described:
    """Returns the recurrence of one state, given what else is asked for; raises ``NonAffine``."""
    carry = state.carry
    algebra = state.algebra([carry.before, carry.after], state.opened)
    reads, whole = find_reads(
        algebra, roots, state.moving | {carry.before, carry.after}, state.foreign, known
    )
    if not whole and (reads or state.step.axis is not None):
        linear = _linear(state, reads)
        if linear is not None:
            return linear
    if not whole and reads:
        selective = _selective(state, reads)
        if selective is not None:
            return selective
    if not whole and not reads:
        linear = _unread(state)
        if linear is not None:
            return linear
    if state.step.axis is not None:
        raise NonAffine("the state", "is read whole, or along another axis than its step multiplies")
    if whole and _is_outer(state):
        raise NonAffine("the state", "is read whole at every step")
    return _scan(state)


def _linear(state: State, reads: list[Contraction]) -> Described | None:
    """Describes a state that is read along one axis as a linear recurrence; None when it is none."""
    step = state.step
    keys = {r.axis for r in reads} | ({step.axis} if step.axis is not None else set())
    if len(keys) != 1:
        return None
    key = keys.pop()
    assert key is not None
    queries = [q for r in reads for q in r.query]
    value = _value_axis(state, key, step.decay, queries)
    update = _split(state, key, value) if value is not None else None
    if update is None and step.axis is None and not _is_vector(state, key, queries):
        return None
    if update is None:
        value = None
        update = step.update
    return _written(state, key, value, update, reads)


def _value_axis(state: State, key: int, decay: list[Part], queries: list[Part]) -> int | None:
    """Returns the last axis that no factor ties to the key."""
    step = state.step
    tied: set[Axis] = set()
    for part in (*decay, *queries):
        for piece in part.pieces:
            if key in piece.held():
                tied |= piece.held()
    for pair in step.rank_one:
        for part in pair:
            tied |= part.held()
    held_by_decay = {a for p in decay for a in p.held()}
    if key in held_by_decay:
        tied |= held_by_decay
    for query in queries:
        tied |= query.held()
    sizes = state.sizes()
    free = [i for i in range(state.rank) if i != key and i not in tied and sizes[i] != 1]
    return free[-1] if free else None


def _is_vector(state: State, key: int, queries: list[Part]) -> bool:
    """Whether a state without a value axis is read as one vector per batch entry, with a query of its own."""
    sizes = state.sizes()
    wide = {i for i in range(state.rank) if sizes[i] != 1}
    own = all(not any(isinstance(a, str) for a in q.held()) and wide - {key} <= q.held() for q in queries)
    return bool(queries) and own


def _split(state: State, key: int, value: int) -> list[Part] | None:
    """Returns the update with no factor that has both axes, opening what must be; None when that can't be."""
    opened = set(state.opened)
    while True:
        algebra = state.algebra([state.carry.before], opened)
        try:
            update = step_of(algebra, state.carry.before, state.carry.after).update
        except NonAffine:
            return None
        dense = [p for part in update for p in part.pieces if {key, value} <= p.held()]
        if not dense:
            return update
        if not state.opens(dense[0].value, opened):
            return None
        opened.add(dense[0].value)


def _unread(state: State) -> Described | None:
    """A state that only its final value is asked of: a linear recurrence if its update is an outer product."""
    sizes = state.sizes()
    wide = [i for i in range(state.rank) if sizes[i] != 1]
    for key in wide:
        value = _value_axis(state, key, state.step.decay, [])
        update = _split(state, key, value) if value is not None else None
        if update and all(_is_split(part, key, value) for part in update):
            return _written(state, key, value, update, [])
    return None


def _is_split(part: Part, key: int, value: int | None) -> bool:
    """Whether the key and the value axis each have a factor, with an axis in it that the other's lack or both share."""
    return any(key in p.held() for p in part.pieces) and any(value in p.held() for p in part.pieces)


def _is_outer(state: State) -> bool:
    """Whether the update is an outer product, so that the states of all steps are much larger than what they are made of."""
    sizes = state.sizes()
    wide = [i for i in range(state.rank) if sizes[i] != 1]
    for key in wide:
        value = _value_axis(state, key, state.step.decay, [])
        update = _split(state, key, value) if value is not None else None
        if update and all(_is_split(part, key, value) for part in update):
            return True
    return False


def _selective(state: State, reads: list[Contraction]) -> Described | None:
    """Describes ``h' = exp(dt a) h + dt x b``, read by c: no tensor of channels times states is needed."""
    form = selective_form(state, reads)
    if form is None:
        return None
    key = reads[0].axis
    writer = _Writer(state, key, form.channel)
    r = Recurrence(state.carry, writer.axes(), "selective_scan")
    r.decay_log, r.key, r.value = (writer.product(p) for p in (form.log, form.key, form.value))
    for read in reads:
        extra = [writer.product(p) for p in read.extra]
        axes = tuple(writer.name(a) for a in read.axes)
        r.reads.append(Read(read.value, axes, writer.product(read.query[0]), False, extra))
    needs = [f.value for p in writer.products for f in p.factors]
    return Described(r, needs, {read.value for read in reads})


def _written(
    state: State, key: int, value: int | None, update: list[Part], reads: list[Contraction]
) -> Described:
    writer = _Writer(state, key, value)
    sides = writer.sides(update)
    if sides is None and value is not None:
        return _written(state, key, None, state.step.update, reads)
    if sides is None:
        raise NonAffine("add", "several updates that share no side")
    step = state.step
    r = Recurrence(state.carry, writer.axes(), "linear_recurrence", key=sides[0], value=sides[1])
    writer.decay(r)
    if step.rank_one:
        r.erase, r.predict = writer.rank_one()
    for read in reads:
        query = writer.product(writer.total(read.query, writer.sizes_with(read)))
        extra = [writer.product(p) for p in read.extra]
        axes = tuple(writer.name(a) for a in read.axes)
        r.reads.append(Read(read.value, axes, query, read.of is state.carry.before, extra))
    needs = [f.value for p in writer.products for f in p.factors]
    return Described(r, needs, {read.value for read in reads})


def _scan(state: State) -> Described:
    """Describes a state elementwise."""
    writer = _Writer(state, None, None)
    r = Recurrence(state.carry, writer.axes(), "linear_scan")
    writer.decay(r)
    r.update = [writer.product(part) for part in state.step.update]
    needs = [f.value for p in writer.products for f in p.factors]
    return Described(r, needs, {state.carry.before, state.carry.after})


class _Writer:
    """Parts with numbered axes as products with named ones."""

    def __init__(self, state: State, key: int | None, value: int | None) -> None:
        self.state, self.key, self.value = state, key, value
        self.dtype = state.carry.before.dtype
        self.products: list[Product] = []
        self.names: dict[Axis, str] = {}
        for i in range(state.rank):
            self.names[i] = (
                "k"
                if i == key
                else "v"
                if i == value
                else f"b{len(self.names) - (key in self.names) - (value in self.names)}"
            )

    def axes(self) -> tuple[str, ...]:
        return tuple(self.names[i] for i in range(self.state.rank))

    def name(self, axis: Axis) -> str | None:
        return axis if isinstance(axis, str) or axis is None else self.names[axis]

    def sizes_with(self, read: Contraction) -> dict[Axis, int]:
        sizes = self.state.sizes()
        for axis, size in zip(read.axes, read.value.shape or (), strict=True):
            sizes[axis] = size
        sizes[read.axis] = self.state.sizes()[read.axis]
        return sizes

    def total(self, parts: list[Part], sizes: dict[Axis, int] | None = None) -> Part:
        return summed(self.state.loop, parts, sizes or self.state.sizes(), self.dtype)

    def product(self, part: Part) -> Product:
        factors = tuple(Factor(p.value, tuple(self.name(a) for a in p.axes), p.power) for p in part.pieces)
        made = Product(part.scalar, factors)
        self.products.append(made)
        return made

    def decay(self, r: Recurrence) -> None:
        part = self.total(self.state.step.decay)
        if part.scalar == 1 and not part.pieces:
            return
        log = logarithm(self.state, part)
        if log is not None:
            r.decay_log = self.product(log)
        else:
            r.decay = self.product(part)

    def rank_one(self) -> tuple[Product, Product]:
        pairs = self.state.step.rank_one
        predicts, erases = {p for _, p in pairs}, {Part(1.0, e.pieces) for e, _ in pairs}
        if len(predicts) == 1:
            erase, predict = self.total([e for e, _ in pairs]), pairs[0][1]
        elif len(erases) == 1:
            erase = Part(1.0, pairs[0][0].pieces)
            predict = self.total([Part(e.scalar, p.pieces) for e, p in pairs])
        else:
            raise NonAffine("the step", "multiplies the state by a matrix of rank two or more")
        return self.product(erase), self.product(predict)

    def sides(self, update: list[Part]) -> tuple[Product, Product] | None:
        """Returns the update as one outer product; None when its terms share neither side."""
        if not update:
            return self.product(Part(0.0)), self.product(Part(1.0))
        keys, values = [], []
        for part in update:
            mine = tuple(p for p in part.pieces if self.key in p.held())
            keys.append(Part(1.0, mine))
            values.append(Part(part.scalar, tuple(p for p in part.pieces if p not in mine)))
        if len(set(keys)) == 1:
            return self.product(keys[0]), self.product(self.total(values))
        if len({Part(1.0, v.pieces) for v in values}) == 1:
            scaled = [Part(v.scalar, k.pieces) for k, v in zip(keys, values, strict=True)]
            return self.product(self.total(scaled)), self.product(Part(1.0, values[0].pieces))
        return None
