"""Decays that are exponentials, and the recurrence of Mamba: ``exp(dt * a)`` with an update ``dt * x * b``."""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain.passes.recurrence.algebra import NonAffine
from spikingbrain.passes.recurrence.graph import Value
from spikingbrain.passes.recurrence.state import State
from spikingbrain.passes.recurrence.terms import Contraction, Part, Piece, step_of


def logarithm(state: State, part: Part) -> Part | None:
    """Returns the logarithm of a decay that is the exponential of one value, or its reciprocal."""
    if len(part.pieces) != 1 or part.scalar != 1:
        return None
    piece = part.pieces[0]
    if piece.value in state.loop.tokens:
        inner = taken_apart(state, piece, {piece.value}) if state.opens(piece.value, set()) else None
        if inner is None or inner.scalar != 1 or len(inner.pieces) != 1:
            return None
        piece = inner.pieces[0]
    if piece.value.op != "exp":
        return None
    return Part(float(piece.power), (Piece(piece.value.inputs[0], piece.axes),))


def taken_apart(state: State, piece: Piece, opened: set[Value]) -> Part | None:
    """Returns a factor as the product that it is when the ``opened`` values are taken apart; None when it is a sum."""
    terms = state.algebra([], opened).terms(piece.value)
    if len(terms) != 1:
        return None
    labels = {x: a for x, a in zip(terms[0].out, piece.axes, strict=True) if x is not None}
    pieces = []
    for f in terms[0].factors:
        if f.value is None or any(x is not None and x not in labels for x in f.labels):
            return None
        axes = tuple(None if x is None else labels[x] for x in f.labels)
        pieces.append(Piece(f.value, axes, f.power * piece.power))
    return Part(terms[0].coefficient ** piece.power, tuple(pieces))


@dataclass
class Selective:
    """The parts of a selective scan; ``log`` and ``value`` both hold the factors of dt."""

    channel: int
    log: Part
    key: Part
    value: Part


def selective_form(state: State, reads: list[Contraction]) -> Selective | None:
    """Returns the form of Mamba's step, its states along the axis that the reads sum over; None when it is none."""
    key = reads[0].axis
    if any(r.axis != key or r.of is not state.carry.after or len(r.query) != 1 for r in reads):
        return None
    if len(state.step.decay) != 1 or len(state.step.update) != 1 or state.step.rank_one:
        return None
    log = logarithm(state, state.step.decay[0])
    opened = set(state.opened)
    log = _opened_log(state, log, key, opened) if log is not None else None
    if log is None:
        return None
    rates = [p for p in log.pieces if key in p.held()]
    steps = [p for p in log.pieces if key not in p.held()]
    channels = {a for p in rates for a in p.held()} - {key}
    if len(channels) != 1 or not steps:
        return None
    (channel,) = channels
    if not isinstance(channel, int):
        return None
    update = _opened_update(state, key, channel, {p.value for p in steps}, opened)
    if update is None:
        return None
    sizes = state.sizes()
    batch = {i for i in range(state.rank) if i not in (key, channel) and sizes[i] != 1}
    keys = tuple(p for p in update.pieces if key in p.held())
    values = tuple(p for p in update.pieces if key not in p.held())
    if len(batch) > 1 or any(
        channel in q.held() or any(isinstance(a, str) for a in q.held()) for r in reads for q in r.query
    ):
        return None
    return Selective(channel, log, Part(1.0, keys), Part(update.scalar, values))


def _is_fixed(state: State, value: Value) -> bool:
    """Whether a value is the same at every step."""
    body = set(state.loop.body)
    todo = [value]
    while todo:
        v = todo.pop()
        if v in state.loop.tokens or v is state.carry.before:
            return False
        todo += v.inputs if v in body else []
    return True


def _opened_log(state: State, log: Part, key: int, opened: set[Value]) -> Part | None:
    """Returns the log as factors of which those along the states are the same at every step."""
    part: Part | None = log
    while part is not None:
        moving = [p for p in part.pieces if key in p.held() and not _is_fixed(state, p.value)]
        if not moving:
            return part
        if not state.opens(moving[0].value, opened):
            return None
        opened.add(moving[0].value)
        inner = [taken_apart(state, p, opened) for p in part.pieces]
        scalar = part.scalar
        pieces: list[Piece] = []
        for p in inner:
            if p is None:
                return None
            scalar *= p.scalar
            pieces += p.pieces
        part = Part(scalar, tuple(pieces))
    return None


def _opened_update(
    state: State, key: int, channel: int, steps: set[Value], opened: set[Value]
) -> Part | None:
    """Returns the update as factors of either axis, those of dt among them."""
    while True:
        try:
            parts = step_of(
                state.algebra([state.carry.before], opened), state.carry.before, state.carry.after
            ).update
        except NonAffine:
            return None
        if len(parts) != 1:
            return None
        pieces = parts[0].pieces
        todo = [p.value for p in pieces if {key, channel} <= p.held()]
        if not todo and steps <= {p.value for p in pieces if p.power == 1}:
            return parts[0]
        if not todo:
            todo = [p.value for p in pieces if key not in p.held() and p.value not in steps]
        value = next((v for v in todo if state.opens(v, opened)), None)
        if value is None:
            return None
        opened.add(value)
