"""One step of a loop as a pattern, and its search in the other steps.

A role is a value of the pattern: an op whose inputs are other roles, of the same step or of one before, or values that are
the same for all steps; or a token, whose position grows evenly. The pattern is guessed from two neighbouring steps. Every
other step is then compared with it value by value, so a wrong guess finds nothing and a found step is one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from spikingbrain.passes.recurrence.graph import Value
from spikingbrain.passes.recurrence.normalise import is_random, literal_key
from spikingbrain.passes.recurrence.tokens import Component, Key

LONGEST_DELAY = 4
SCALED = {
    "mul",
    "add",
    "sub",
    "rsub",
    "div",
    "pow",
}  # ops whose second argument may be a number that varies with t


class NoTemplate(Exception):
    """Raised where neighbouring steps are not the same computation; says how they differ."""


@dataclass(frozen=True)
class Ref:
    """An input of a role: ``role`` of ``delay`` steps before, or the value ``fixed``."""

    role: int = -1
    delay: int = 0
    fixed: Value | None = None


@dataclass(eq=False)
class Role:
    """One value of the pattern; ``sample`` is it in the step that the pattern was taken from."""

    sample: Value
    refs: list[Ref] = field(default_factory=list)
    family: Key | None = None
    stride: int = 0
    position: int = 0
    varies: bool = False  # the number among its literals changes with t
    stateful: bool = False

    def fits(self, v: Value) -> bool:
        """Whether a value is the same op on the same kind of operands."""
        s = self.sample
        if v.op != s.op or v.shape != s.shape or v.dtype != s.dtype or len(v.inputs) != len(s.inputs):
            return False
        return bool(literals_of(v, self.varies) == literals_of(s, self.varies))


def literals_of(v: Value, loosely: bool) -> Any:
    """Returns the literals as a key; loosely: whatever number a scaling op has."""
    key = literal_key(v.literals)
    if loosely and varying_number(v) is not None:
        return (key[0], "number", *key[2:])
    return key


def varying_number(v: Value) -> int | float | None:
    """Returns the number that the op adds or multiplies with."""
    if v.op in SCALED and len(v.inputs) == 1 and len(v.literals) > 1:
        number = v.literals[1]
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            return number
    return None


class Template:
    """The pattern taken at one step of a component.

    ``step_of`` gives the step of each value of the component; ``sample`` is the step that the pattern is taken from.
    """

    def __init__(
        self, component: Component, bodies: dict[int, list[Value]], step_of: dict[Value, int], sample: int
    ):
        self.component = component
        self.mixed = set(component.mixed)
        self.step_of = step_of
        self.sample = sample
        self.bodies = bodies
        self.roles: list[Role] = []
        try:
            self._build(loosely=False)
        except NoTemplate:
            self._build(loosely=True)

    def _build(self, loosely: bool) -> None:
        first = self._closure(self.sample)
        index = {v: i for i, v in enumerate(first)}
        images = [{v: v for v in first}]
        for step in range(self.sample + 1, self.sample + 1 + LONGEST_DELAY):
            if step not in self.bodies:
                break
            try:
                following = self._match(step - 1, step, loosely)
            except NoTemplate:
                if step == self.sample + 1:
                    raise
                break
            images.append({v: following[x] for v, x in images[-1].items()})
        if len(images) < 2:
            raise NoTemplate("there are too few steps")
        self.roles = [self._role(v, index, images) for v in first]
        for role in self.roles:
            role.stateful = any(r.delay or (r.role >= 0 and self.roles[r.role].stateful) for r in role.refs)

    def _role(self, v: Value, index: dict[Value, int], images: list[dict[Value, Value]]) -> Role:
        tokens = self.component.tokens
        if v in tokens:
            (family, position), (_, following) = tokens[v], tokens[images[1][v]]
            return Role(v, [], family, following - position, position)
        role = Role(v, varies=literal_key(v.literals) != literal_key(images[1][v].literals))
        for place, x in enumerate(v.inputs):
            if x in index:
                role.refs.append(Ref(index[x]))
                continue
            if not self._moves(x):
                role.refs.append(Ref(fixed=x))
                continue
            delay = self.sample - self.step_of[x]
            later = images[delay][v].inputs[place] if 0 < delay < len(images) else None
            if later not in index:
                raise NoTemplate(f"a step reads {x!r} of {delay} steps before")
            role.refs.append(Ref(index[later], delay))
        return role

    def _moves(self, x: Value) -> bool:
        return x in self.step_of

    def _closure(self, step: int) -> list[Value]:
        """Returns the values of a step: those that carry something, and what feeds them."""
        seen = set(self.bodies[step])
        todo = list(seen)
        while todo:
            v = todo.pop()
            if v in self.component.tokens:
                continue
            for x in v.inputs:
                if self._moves(x) and x not in self.mixed and x not in seen:
                    seen.add(x)
                    todo.append(x)
        return sorted(seen, key=lambda v: v.number)

    def _match(self, a: int, b: int, loosely: bool) -> dict[Value, Value]:
        """Returns which value of step b plays the part of each value of step a."""
        left, right = self._signatures(a, loosely), self._signatures(b, loosely)
        if [s for s, _ in left] != [s for s, _ in right]:
            raise NoTemplate(_difference([v for _, v in left], [v for _, v in right]))
        return {v: w for (_, v), (_, w) in zip(left, right, strict=True)}

    def _signatures(self, step: int, loosely: bool) -> list[tuple[int, Value]]:
        """Returns the values of a step with a number that says what they compute of tokens, fixed and carried values."""
        values = self._closure(step)
        tokens = self.component.tokens
        ranks: dict[Key, list[int]] = defaultdict(list)
        for v in values:
            if v in tokens:
                ranks[tokens[v][0]].append(tokens[v][1])
        mine: dict[Value, int] = {}

        def part(x: Value) -> tuple[Any, ...]:
            if x in mine:
                return ("in step", mine[x])
            if self._moves(x):
                return ("before", step - self.step_of[x], x.op, x.shape, x.dtype)
            return ("fixed", id(x))

        for v in values:
            if v in tokens:
                key, position = tokens[v]
                what: tuple[Any, ...] = (
                    "token",
                    id(key[0]),
                    key[1],
                    key[2],
                    sorted(ranks[key]).index(position),
                )
            else:
                what = (v.op, literals_of(v, loosely), v.shape, v.dtype, tuple(part(x) for x in v.inputs))
            mine[v] = hash(what)
        return sorted(((mine[v], v) for v in values), key=lambda pair: (pair[0], pair[1].number))


def _difference(left: Sequence[Value], right: Sequence[Value]) -> str:
    ops, others = sorted(v.op for v in left), sorted(v.op for v in right)
    for op in others:
        if op in ops:
            ops.remove(op)
    return f"neighbouring steps differ, by {', '.join(ops[:3])}" if ops else "neighbouring steps differ"


class Search:
    """Finds the values that play the roles in other steps."""

    def __init__(self, template: Template, users: dict[Value, list[Value]]) -> None:
        self.roles = template.roles
        self.users = users
        self.sample = template.sample
        self.tokens = template.component.places
        self.steps: dict[int, list[Value | None]] = {self.sample: [r.sample for r in self.roles]}
        self.slots: dict[tuple[int, int], Value] = {}  # what a role of a step before the run is, (role, step)
        self._note_slots(self.sample)

    def run(self) -> tuple[int, int]:
        """Returns the first step of the run and the one after its last; the last may lack values that nothing reads."""
        first = self.sample
        while self._backward(first - 1):
            first -= 1
        end = self.sample + 1
        while self._forward(end):
            end += 1
            if None in self.steps[end - 1]:
                break
        return first, end

    def value(self, role: int, step: int) -> Value | None:
        """Returns what plays a role in a step, also where the step is before the run."""
        return self.steps[step][role] if step in self.steps else self.slots.get((role, step))

    def _note_slots(self, step: int) -> bool:
        """Writes down what the step reads of steps before; False when that contradicts what is known."""
        for role, v in zip(self.roles, self.steps[step], strict=True):
            for place, ref in enumerate(role.refs):
                if ref.delay and v is not None:
                    key = (ref.role, step - ref.delay)
                    known = self.value(*key)
                    if known is not None and known is not v.inputs[place]:
                        return False
                    self.slots[key] = v.inputs[place]
        return True

    def _backward(self, step: int) -> bool:
        found: list[Value | None] = [self.slots.get((i, step)) for i in range(len(self.roles))]
        before: dict[tuple[int, int], Value] = {}
        for i in reversed(range(len(self.roles))):
            v, role = found[i], self.roles[i]
            if v is None:
                continue
            if not self._agrees(role, v, step, lambda ref: self._known(found, before, ref, step)):
                return False
            for place, ref in enumerate(role.refs):
                if ref.role >= 0 and not ref.delay:
                    found[ref.role] = v.inputs[place]
                elif ref.delay:
                    before[ref.role, ref.delay] = v.inputs[place]
        for i, role in enumerate(self.roles):
            if found[i] is None:
                found[i] = self._only(role, step, lambda ref: self._known(found, before, ref, step))
                v = found[i]
                if v is None:
                    return False
                for place, ref in enumerate(role.refs):
                    if ref.delay:
                        before[ref.role, ref.delay] = v.inputs[place]
        self.steps[step] = found
        if not self._note_slots(step):
            del self.steps[step]
            return False
        return True

    def _forward(self, step: int) -> bool:
        found: list[Value | None] = []
        for role in self.roles:
            v = self._only(role, step, lambda ref: self._known(found, {}, ref, step))
            missing = any(self._known(found, {}, ref, step) is None for ref in role.refs)
            found.append(None if missing else v)
        present = [v for v, role in zip(found, self.roles, strict=True) if v is not None and role.stateful]
        if not present or not all(self._reaches(role, step) for role in self.roles if role.family):
            return False
        self.steps[step] = found
        return True

    def _reaches(self, role: Role, step: int) -> bool:
        """Whether the sequence has an entry for the step (its value may be dead and gone)."""
        assert role.family is not None
        source, dim, width = role.family
        assert source.shape is not None
        return 0 <= self._position(role, step) < source.shape[dim] // max(1, width)

    def _position(self, role: Role, step: int) -> int:
        return role.position + role.stride * (step - self.sample)

    def _known(
        self, found: list[Value | None], before: dict[tuple[int, int], Value], ref: Ref, step: int
    ) -> Value | None:
        if ref.fixed is not None:
            return ref.fixed
        if not ref.delay:
            return found[ref.role] if ref.role < len(found) else None
        return before.get((ref.role, ref.delay)) or self.value(ref.role, step - ref.delay)

    def _agrees(self, role: Role, v: Value, step: int, known: Callable[[Ref], Value | None]) -> bool:
        """Whether ``v`` plays the role, as far as its inputs are known."""
        if role.family:
            return self.tokens.get((role.family, self._position(role, step))) is v
        if is_random(v.op) or not role.fits(v):
            return False
        return all(known(ref) in (None, x) for ref, x in zip(role.refs, v.inputs, strict=True))

    def _only(self, role: Role, step: int, known: Callable[[Ref], Value | None]) -> Value | None:
        """Returns the one value that reads what is known and plays the role."""
        if role.family:
            return self.tokens.get((role.family, self._position(role, step)))
        moving = [x for ref in role.refs if ref.fixed is None and (x := known(ref)) is not None]
        if not moving:
            return None
        fewest = min(moving, key=lambda x: len(self.users[x]))
        candidates = [v for v in self.users[fewest] if self._agrees(role, v, step, known)]
        if len(candidates) > 1 and role.varies:
            taken = {
                literal_key(r.sample.literals)
                for r in self.roles
                if not r.varies and r.sample.op == role.sample.op
            }
            candidates = [v for v in candidates if literal_key(v.literals) not in taken]
        return candidates[0] if len(candidates) == 1 else None
