"""Finds loops over time that tracing has unrolled, and rolls them up again.

The steps of a loop are told apart by the tokens that they read (``tokens.py``); what one of them computes is a pattern that
the others must match value by value (``template.py``). Here the matched steps become a ``Loop``, or are left unrolled when
something outside reads a value of one step that is neither joined over time nor the last.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import product

from spikingbrain.passes.recurrence.form import Carry, Loop, Stacked, Token, Verdict
from spikingbrain.passes.recurrence.graph import Graph, Slot, Value
from spikingbrain.passes.recurrence.template import (
    LONGEST_DELAY,
    NoTemplate,
    Role,
    Search,
    Template,
    varying_number,
)
from spikingbrain.passes.recurrence.tokens import LATE, Component, Key, find_components

PERIODS = (1, 2, 3, 4)
TRIMMED = 4  # how many steps at an end of a run may stay outside for what else reads their values
ROUNDS = 64  # loops that start from the last state of another are found one after the other


def find_loops(graph: Graph) -> list[Loop | Verdict]:
    """Returns the loops of a normalised graph, and a ``Verdict`` ("unrolled") for what looks like one and is left alone."""
    users = graph.users()
    consumed: set[Value] = set()
    joined: set[Value] = set()
    barred: set[Key] = set()
    loops: list[Loop] = []
    left: dict[Value, Verdict] = {}
    for _ in range(ROUNDS):
        failed: list[Component] = []
        before = len(loops)
        for component in find_components(graph, consumed, barred):
            result = _roll(component, users, set(graph.outputs))
            if isinstance(result, Loop) and any(s.joined in joined for s in result.stacked):
                result = Verdict(
                    "unrolled", "its values are joined with those of another loop", component.mixed
                )
            if isinstance(result, Loop):
                joined |= {s.joined for s in result.stacked}
                loops.append(result)
                consumed |= result.values
            else:
                failed.append(component)
                if _looks_like_a_loop(component):
                    left.setdefault(component.mixed[0], result)
        if len(loops) == before:
            families = {key for c in failed for key, _ in c.tokens.values()}
            if families <= barred:
                break
            barred |= families
    refused = [v for v in left.values() if not consumed.intersection(v.values)]
    return [*loops, *refused]


def _looks_like_a_loop(component: Component) -> bool:
    """Whether most positions have ops of their own; a few parts of one tensor that are added up don't count."""
    return 2 * len(component.mixed) >= 3 * len({position for _, position in component.tokens.values()})


def _roll(component: Component, users: dict[Value, list[Value]], outputs: set[Value]) -> Loop | Verdict:
    reason = "its steps differ"
    found: list[Loop] = []
    for base, reverse, late in product(component.bases(), (False, True), LATE):
        time = component.times(base, reverse, late)
        for period in PERIODS:
            step_of = {v: t // period for v, t in time.items()}
            try:
                found.append(_Run(component, step_of, period, reverse, users, outputs).loop())
            except NoTemplate as why:
                reason = str(why) if reason == "its steps differ" else reason
                continue
            break
        if found and len(found[-1].carried) == 1 and _covered(found[-1]) >= base:
            break
    if not found:
        return Verdict("unrolled", reason, component.mixed)
    most = max(map(_covered, found))
    return min(
        (loop for loop in found if _covered(loop) >= most - TRIMMED),
        key=lambda loop: (len(loop.carried), -_covered(loop)),
    )


def _covered(loop: Loop) -> int:
    return loop.steps * loop.period


@dataclass(eq=False)
class _Run:
    """One attempt: the steps as ``step_of`` tells them apart."""

    component: Component
    step_of: dict[Value, int]
    period: int
    reverse: bool
    users: dict[Value, list[Value]]
    outputs: set[Value]

    def loop(self) -> Loop:
        """Returns the loop; raises ``NoTemplate`` with the reason when there is none."""
        bodies: dict[int, list[Value]] = defaultdict(list)
        for v in self.component.mixed:
            bodies[self.step_of[v]].append(v)
        self.total = max(bodies, default=0) + 1
        self.alike = max(3, len(bodies) // 2)
        steps = sorted(bodies)
        middle = len(steps) // 2
        reason: NoTemplate | None = None
        best: Loop | None = None
        places = (middle, middle - 1, middle + 1, len(steps) // 4, 3 * len(steps) // 4)
        for sample in dict.fromkeys(steps[k] for k in places if 0 <= k < len(steps)):
            if sample + 1 not in bodies:
                continue
            try:
                loop = self._from(Template(self.component, bodies, self.step_of, sample))
            except NoTemplate as why:
                reason = reason or why
                continue
            if best is None or loop.steps > best.steps:
                best = loop
            if best.steps >= len(steps) - TRIMMED:
                break
        if best is None:
            raise reason or NoTemplate("there are too few steps")
        return best

    def _from(self, template: Template) -> Loop:
        self.roles = template.roles
        if not any(ref.delay for role in self.roles for ref in role.refs):
            raise NoTemplate("nothing is carried from step to step")
        if any(role.family and role.stride * (-1 if self.reverse else 1) < 0 for role in self.roles):
            raise NoTemplate("sequences are read in opposite directions")
        self.search = Search(template, self.users)
        first, end = self.search.run()
        for _ in range(2 * TRIMMED + 1):
            if end - first < self.alike:
                raise NoTemplate("too few of its steps are alike")
            wrong = self._wrong_step(first, end)
            if wrong is None:
                return self._emit(first, end)
            step, why = wrong
            most = TRIMMED // self.period
            if step - first < most:
                first = step + 1
            elif end - step <= most:
                end = step
            else:
                raise NoTemplate(why)
        raise NoTemplate("values of its steps are read elsewhere")

    # What outside the run reads

    def _wrong_step(self, first: int, end: int) -> tuple[int, str] | None:
        """Looks at every reader outside; returns a step whose values are read in a way that no loop has, and how."""
        self.joins: list[
            tuple[Value, list[tuple[int, int, int]]]
        ] = []  # each with (place, step, role) of its pieces
        self.delays = sorted({(r.role, r.delay) for role in self.roles for r in role.refs if r.delay})
        for role, delay in self.delays:
            start = self.search.value(role, first - delay)
            if (
                start is None
                or start.shape != self.roles[role].sample.shape
                or start.dtype != self.roles[role].sample.dtype
            ):
                return first, "the first value of the state has another shape or type"
        inside = {v for s in range(first, end) for v in self.search.steps[s] if v is not None}
        where: dict[Value, tuple[int, int]] = {}
        for s in range(first, end):
            for j, v in enumerate(self.search.steps[s]):
                if v is not None and self.roles[j].stateful:
                    where[v] = (s, j)
        joins: dict[Value, bool] = {}  # whether a reader outside joins values of several steps
        for v, (s, j) in where.items():
            final = self._is_final(s, j, end)
            for u in self.users[v]:
                if u in inside:
                    continue
                if u not in joins:
                    steps = (
                        {where[x][0] for x in u.inputs if x in where} if u.op in ("stack", "cat") else set()
                    )
                    joins[u] = len(steps) > 1
                if not joins[u] and not final:
                    return s, f"{u.op} outside the loop reads a value of one step"
            if v in self.outputs and not final:
                return s, "a value of one step is returned"
        joined = [u for u, several in joins.items() if several]
        for u in joined:
            places = [(i, *where[x]) for i, x in enumerate(u.inputs) if x in where]
            wrong = self._uneven(places, first, end)
            if wrong is not None:
                return wrong, f"{u.op} does not join the values of all steps in order"
            self.joins.append((u, places))
        return None

    def _is_final(self, step: int, role: int, end: int) -> bool:
        return (role, end - step) in self.delays

    def _uneven(self, places: list[tuple[int, int, int]], first: int, end: int) -> int | None:
        """Returns a step that a join has not like the others, None when each step has the same number of places in a row."""
        steps = [s for _, s, _ in places]
        each, rest = divmod(len(places), end - first)
        down = steps[0] > steps[-1]
        wanted = [s for s in range(first, end) for _ in range(max(1, each))]
        wanted = wanted[::-1] if down else wanted
        if rest or not each or steps != wanted:
            missing = set(range(first, end)) - set(steps)
            return min(missing, key=lambda s: min(s - first, end - 1 - s)) if missing else (first + end) // 2
        begin = places[0][0]
        pattern = [role for _, _, role in places[:each]]
        for k, (place, step, role) in enumerate(places):
            if place != begin + k or role != pattern[k % each]:
                return step
        return None

    # Writing the loop down

    def _emit(self, first: int, end: int) -> Loop:
        steps, values = end - first, self.search.steps
        self.body: list[Value] = []
        self.tokens: dict[Value, Token] = {}
        self.invariants: dict[Value, None] = {}
        self.before = {
            (role, delay): Value("carried", [], (), *self._kind(role), number=-1)
            for role, delay in self.delays
        }
        made: list[Value] = []
        for i, role in enumerate(self.roles):
            made.append(self._body_value(i, role, made, first, end))
        carried = [
            Carry(
                before=self.before[j, delay],
                after=made[j] if delay == 1 else self.before[j, delay - 1],
                initial=self._at(j, first - delay),
                final=self._final(j, end - delay, first, end),
            )
            for j, delay in self._all_delays()
        ]
        loop = Loop(
            values={
                v for s in range(first, end) for j, v in enumerate(values[s]) if v and self.roles[j].stateful
            },
            body=self.body,
            tokens=self.tokens,
            first=self.total - end if self.reverse else first,
            start=self.total - end if self.reverse else first,
            steps=steps,
            reverse=self.reverse,
            carried=carried,
            stacked=[self._stacked(u, places, made, first, end) for u, places in self.joins],
            invariants=list(self.invariants),
            period=self.period,
        )
        for number, v in enumerate([*self.before.values(), *self.body]):
            v.number = number
        self._check_order(loop)
        return loop

    def _check_order(self, loop: Loop) -> None:
        """Sees to it that what the loop reads is there before it: nothing of it may come from the loop itself."""
        given = [
            *loop.invariants,
            *(c.initial for c in loop.carried),
            *(t.source for t in loop.tokens.values()),
        ]
        begin = min(v.number for v in loop.values)
        seen: set[Value] = set()
        todo = given
        while todo:
            v = todo.pop()
            if v in loop.values:
                raise NoTemplate("a sequence that it reads is made of its own steps")
            if v not in seen and v.number > begin:
                seen.add(v)
                todo += v.inputs

    def _kind(self, role: int) -> tuple[tuple[int, ...] | None, str]:
        return self.roles[role].sample.shape, self.roles[role].sample.dtype

    def _at(self, role: int, step: int) -> Value:
        v = self.search.value(role, step)
        assert v is not None
        return v

    def _final(self, role: int, step: int, first: int, end: int) -> Value | None:
        """Returns a last value if anything but the loop and its joins reads it."""
        v = self.search.value(role, step)
        if v is None or v in self.outputs or step < first:
            return v
        own = {u for s in range(max(first, end - LONGEST_DELAY), end) for u in self.search.steps[s]}
        own |= {u for u, _ in self.joins}
        return v if any(u not in own for u in self.users[v]) else None

    def _all_delays(self) -> list[tuple[int, int]]:
        """Returns (role, delay) of everything carried; a value of d steps before is handed on d times."""
        longest: dict[int, int] = {}
        for role, delay in self.delays:
            longest[role] = max(delay, longest.get(role, 0))
        found = [(role, d) for role, n in longest.items() for d in range(1, n + 1)]
        for role, delay in found:
            self.before.setdefault((role, delay), Value("carried", [], (), *self._kind(role)))
        return found

    def _body_value(self, i: int, role: Role, made: list[Value], first: int, end: int) -> Value:
        sample = role.sample
        if role.family:
            if not role.stride:
                self.invariants[sample] = None
                return sample
            token = Value("token", [], (), sample.shape, sample.dtype, sample.origin)
            source, dim, width = role.family
            stride, base = self._in_time(role.position, role.stride)
            self.tokens[token] = Token(source, dim, base, stride, width)
            self.body.append(token)
            return token
        inputs = []
        for ref in role.refs:
            if ref.fixed is not None:
                self.invariants[ref.fixed] = None
                inputs.append(ref.fixed)
            else:
                inputs.append(self.before[ref.role, ref.delay] if ref.delay else made[ref.role])
        literals = sample.literals
        if role.varies:
            inputs.append(self._varying(i, first, end))
            literals = (literals[0], Slot(1), *literals[2:])
        v = Value(sample.op, inputs, literals, sample.shape, sample.dtype, sample.origin)
        self.body.append(v)
        return v

    def _in_time(self, position: int, stride: int) -> tuple[int, int]:
        """Returns (stride, offset) of ``position + stride * (step - sample)`` as a function of time."""
        offset = position - stride * self.search.sample
        if self.reverse:
            return -stride, offset + stride * (self.total - 1)
        return stride, offset

    def _varying(self, i: int, first: int, end: int) -> Value:
        """Returns the token of a sequence made of the numbers that a role has in each step."""
        held = [self.search.steps[s][i] for s in range(first, end)]
        numbers = [varying_number(v) for v in held if v is not None]
        if len(numbers) < len(held) or None in numbers:
            raise NoTemplate("a number that changes with the step is missing")
        begin = first
        if self.reverse:
            numbers.reverse()
            begin = self.total - end
        dtype = "int64" if all(isinstance(n, int) for n in numbers) else "float64"
        source = Value("constant", [], (tuple(numbers),), (len(numbers),), dtype, ())
        token = Value("token", [], (), (), dtype, ())
        self.tokens[token] = Token(source, 0, -begin)
        self.body.append(token)
        return token

    def _stacked(
        self, u: Value, places: list[tuple[int, int, int]], made: list[Value], first: int, end: int
    ) -> Stacked:
        each = len(places) // (end - first)
        dim = u.literals[1]
        down = len(places) > each and places[0][1] > places[-1][1]
        keeps_dim = u.op == "cat"
        pieces = [made[role] for _, _, role in places[:each]]
        value = pieces[0]
        if each > 1:
            slots = tuple(Slot(k) for k in range(each))
            shape = [*(pieces[0].shape or ())]
            if keeps_dim:
                shape[dim] = sum((p.shape or ())[dim] for p in pieces)
            else:
                shape.insert(dim, each)
            value = Value(u.op, pieces, (slots, dim), tuple(shape), u.dtype, ())
            self.body.append(value)
            keeps_dim = True
        return Stacked(
            value=value,
            joined=u,
            dim=dim,
            leading=u.inputs[: places[0][0]],
            trailing=u.inputs[places[-1][0] + 1 :],
            keeps_dim=keeps_dim,
            reversed=down != self.reverse,
        )
