"""A recurrence written in chunks without a loop, as Mamba-2 (SSD) is: within chunks by scores, between chunks by states.

``y = within + across``: the first sums over the steps of the same chunk, the second over those of earlier ones, through a state
for each chunk. Both are opened down to the same tensors (queries, keys, values), and what remains is a weight for each pair of
steps i and j, an exponential of gates. The sum is the recurrence exactly if every pair j <= i is covered once, with the weight
``exp(c_i - c_j)``, c the running sum of the gates over all steps. That is checked for every pair (see ``spans.py``); a state that
enters, and the last one, likewise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spikingbrain.passes.recurrence.chunk_terms import (
    OPENED,
    Refused,
    Term,
    Weights,
    holds_sums,
    multiplied,
    products_of,
    read_term,
    used_labels,
)
from spikingbrain.passes.recurrence.constants import Array, Constants
from spikingbrain.passes.recurrence.form import Factor, Form, Product, Verdict
from spikingbrain.passes.recurrence.graph import Graph, Slot, Value
from spikingbrain.passes.recurrence.monomials import Label, Monomial
from spikingbrain.passes.recurrence.spans import NoSpan, Spans, gates_of, padding_of

Role = tuple[
    str, object
]  # ("query", "chunk" | "step"), ("key", "chunk" | "step"), ("result", dim), ("inner", "k")
Roles = tuple[Role | None, ...]


def find_chunked(graph: Graph, constants: Constants) -> Iterator[Verdict]:
    """Yields a verdict for each sum of a normalised graph that is a recurrence in chunks; it names all that it is made of."""
    users = graph.users()
    known: dict[Value, bool] = {}
    for v in graph.values:
        if v.op != "add" or len(v.inputs) != 2 or len(v.shape or ()) < 3 or "float" not in v.dtype:
            continue
        if not all(holds_sums(x, known) for x in v.inputs):
            continue
        try:
            form, inside = _Reader(v, constants).form(users)
        except (Refused, NoSpan):
            continue
        yield Verdict("raised", form.kind, [v, *sorted(inside - {v}, key=lambda x: x.number)], form=form)


@dataclass
class _Pair:
    """The product within chunks: what each of its tensors' axes is."""

    data: list[tuple[Value, Roles, int]]
    coefficient: float
    batch: dict[int, Role]  # of the gates' axes

    def side(self, side: str) -> list[tuple[Value, Roles, int]]:
        return [d for d in self.data if any(r and r[0] == side for r in d[1])]


class _Reader:
    def __init__(self, result: Value, constants: Constants) -> None:
        self.result, self.constants = result, constants
        monomials, self.inside = products_of(result, constants)
        self.spans, terms = self._read(monomials)
        self.within, self.across, self.initial = self._sorted(terms)
        alike = {v for v, _, _ in self.within.data}
        if sum(alike <= {f.value for f in m.factors} for m in monomials) != 2:
            raise Refused("no sum across chunks")  # of one chunk it is there, and zero
        self.time = self._times(terms)  # dims of the result: of chunks, if there are several, and of steps
        self.pair = self._pair()
        self.entering: tuple[Value, Roles] | None = None

    def _read(self, monomials: Sequence[Monomial]) -> tuple[Spans, list[Term]]:
        exponents = _exponents(monomials)
        gates = {g for e in exponents for g in gates_of(e)}
        if len(gates) > 1:
            raise Refused("decays of several gates")
        spans = Spans(next(iter(gates), None), self.constants)
        tables = spans.tables(exponents)
        return spans, [t for m in monomials if (t := read_term(m, tables, self.constants)) is not None]

    def _sorted(self, terms: Sequence[Term]) -> tuple[Term, Term | None, Term | None]:
        """Returns the product within chunks, the one across them, and that of a state that enters."""
        alike: dict[frozenset[Value], list[Term]] = {}
        for t in terms:
            alike.setdefault(frozenset(v for v, _, _ in t.data), []).append(t)
        groups = sorted(alike.values(), key=lambda g: -max(len(_summed(t)) for t in g))
        steps = sorted(groups[0], key=lambda t: len(_contracted(t))) if groups else []
        if not steps or len(steps) > 2 or len(groups) > 2 or any(len(g) > 1 for g in groups[1:]):
            raise Refused("not a sum within chunks and one across them")
        if len(_summed(steps[0])) != 1:
            raise Refused("no sum over the steps of a chunk")
        return steps[0], steps[1] if steps[1:] else None, groups[1][0] if groups[1:] else None

    def _times(self, terms: Sequence[Term]) -> tuple[int, ...]:
        found = sorted({d for t in terms for d, x in enumerate(t.out) if x in t.times()})
        if len(found) != (1 if self.across is None else 2) or found[-1] - found[0] != len(found) - 1:
            raise Refused("no axes of chunks and steps beside each other")
        return tuple(found)

    def _pair(self) -> _Pair:
        t = self.within
        (step,) = _summed(t)
        chunk = t.out[self.time[0]] if len(self.time) == 2 else None
        inner = {x for _, labels, _ in t.data for x in used_labels(labels)} - set(t.out) - {step}
        if len(inner) > 1:
            raise Refused("a sum over several axes of the keys")
        data = []
        for value, labels, power in t.data:
            side = "key" if step in labels else "query"
            names: dict[Label, Role] = {x: ("result", d) for d, x in enumerate(t.out) if x is not None}
            names |= dict.fromkeys(inner, ("inner", "k"))
            names[step] = ("key", "step")
            names[t.out[self.time[-1]]] = ("query", "step")
            if chunk is not None:
                names[chunk] = (side, "chunk")
            roles = tuple(None if x is None else names[x] for x in labels)
            held = {r for r in roles if r}
            if ("key", "step") in held and ("query", "step") in held:
                raise Refused("a tensor of two steps")
            if chunk is not None and len({(side, "step"), (side, "chunk")} & held) == 1:
                raise Refused("a tensor of chunks alone, or the same in each")
            data.append((value, roles, power))
        return _Pair(data, t.coefficient, self._batch(t))

    def _batch(self, t: Term) -> dict[int, Role]:
        """Returns what the gates' other axes are, all of them axes of the result."""
        found: dict[int, Role] = {}
        for axis, label in t.batch.items():
            if label is None or label not in t.out or t.out.index(label) in self.time:
                raise Refused("gates of an axis that the result lacks")
            found[axis] = ("result", t.out.index(label))
        return found

    # Checks

    def form(self, users: dict[Value, list[Value]]) -> tuple[Form, set[Value]]:
        """Returns the recurrence and the values it stands for; raises ``Refused``."""
        sums = next((s for s in self._sums() if self._weighs(s[0])), None)
        if sums is None:
            raise Refused("the weights are not those of a recurrence")
        final = next(self._finals(users, sums[0]), None)
        return self._written(*sums[1:], final), self.inside

    def _sums(self) -> Iterator[tuple[Array, tuple[int, ...], float]]:
        """Yields running sums of the gates, [chunks, steps] or [steps], the axes of the gates that these are, and their sign."""
        shape = self.result.shape or ()
        sizes = tuple(shape[d] for d in self.time)
        numbers = self.spans.numbers
        if self.spans.gates is None:
            yield np.zeros(sizes, dtype=np.int64), (), 1.0
            return
        axes = tuple(d for d, n in enumerate(numbers.shape) if n > 1)
        for order in (axes, axes[::-1]) if len(axes) == 2 else (axes,):
            if tuple(numbers.shape[d] for d in order) == sizes:
                laid = numbers.squeeze()
                c = (laid if order == axes else laid.T).cumsum().reshape(sizes)
                yield c, order, 1.0
                yield -c, order, -1.0

    def _weighs(self, c: Array) -> bool:
        """Whether every pair of steps has the weight that it has in a recurrence; ``c`` are the running sums of the gates."""
        return (
            self._weighs_within(c)
            and (self.across is None or self._weighs_across(self.across, c))
            and (self.initial is None or self._weighs_initial(self.initial, c))
        )

    def _weighs_within(self, c: Array) -> bool:
        t, (step,) = self.within, _summed(self.within)
        after = tuple(x for d in self.time if (x := t.out[d]) is not None)
        total = multiplied(
            [*t.tables, Weights(after, -c, _all(c)), Weights((*after[:-1], step), c, _all(c))],
            (*after, step),
        )
        steps = np.arange(c.shape[-1])
        return _is(total, np.broadcast_to(steps[:, None] >= steps, (*c.shape, c.shape[-1])))

    def _weighs_across(self, t: Term, c: Array) -> bool:
        found = self._matched(t, self.pair.data)
        if found is None or self._batch(t) != self.pair.batch or t.coefficient != self.pair.coefficient:
            return False
        after = tuple(x for d in self.time if (x := t.out[d]) is not None)
        before = tuple(used_labels((found["key", "chunk"], found["key", "step"])))
        if set(before) & set(t.out):
            return False
        total = _simplified([*t.tables, Weights(after, -c, _all(c)), Weights(before, c, _all(c))])
        chunks = np.arange(c.shape[0])
        earlier = (chunks[:, None] > chunks)[:, None, :, None]
        total = total.over((*after, *before))
        return _is(total, earlier) if total.keep.shape == earlier.shape else False

    def _weighs_initial(self, t: Term, c: Array) -> bool:
        found = self._matched(t, self.pair.side("query"), rest=1)
        if found is None or self._batch(t) != self.pair.batch or t.coefficient != self.pair.coefficient:
            return False
        after = tuple(x for d in self.time if (x := t.out[d]) is not None)
        total = _simplified([*t.tables, Weights(after, -c, _all(c))])
        names = {x: role for role, x in found.items()}
        value, labels, power = self._left(t, self.pair.side("query"))
        roles = tuple(None if x is None else names.get(x, ("result", -1)) for x in labels)
        if power != 1 or any(r and (r[0] not in ("result", "inner") or r[1] == -1) for r in roles):
            return False
        self.entering = (value, roles)
        return _is(total, np.ones(()))

    def _left(
        self, t: Term, data: Sequence[tuple[Value, Roles, int]]
    ) -> tuple[Value, tuple[Label, ...], int]:
        values = [v for v, _, _ in data]
        (left,) = [d for d in t.data if d[0] not in values]
        return left

    def _matched(
        self, t: Term, data: Sequence[tuple[Value, Roles, int]], rest: int = 0, final: bool = False
    ) -> dict[Role, Label] | None:
        """Returns the label of each role when a term is made of the tensors ``data``, and ``rest`` others; None if it isn't.

        The term has the axes of the result, or ``final`` of a state.
        """
        if len(t.data) != len(data) + rest:
            return None
        found: dict[Role, Label] = {}
        if not final:
            found = {("result", d): x for d, x in enumerate(t.out) if x is not None and d not in self.time}
            names = ("chunk", "step") if len(self.time) == 2 else ("step",)
            found |= {("query", n): t.out[d] for n, d in zip(names, self.time, strict=True)}
        unused = list(t.data)
        for value, roles, power in data:
            for candidate in unused:
                more = _agreed(roles, candidate[1], found) if candidate[::2] == (value, power) else None
                if more is not None:
                    found |= more
                    unused.remove(candidate)
                    break
            else:
                return None
        return found

    # The last state

    def _finals(
        self, users: dict[Value, list[Value]], c: Array
    ) -> Iterator[tuple[Value, tuple[Role | None, ...]]]:
        """Yields what reads the inside and is the state after all steps, with the roles of its axes."""
        around = {u for v in self.inside for u in users[v]} - self.inside
        for v in sorted(around, key=lambda x: x.number):
            if v.op in OPENED and v.dtype == self.result.dtype:
                try:
                    axes = self._final_axes(v, c)
                except (Refused, NoSpan):
                    continue
                if axes is not None:
                    yield v, axes

    def _final_axes(self, v: Value, c: Array) -> tuple[Role | None, ...] | None:
        monomials, _ = products_of(v, self.constants)
        tables = self.spans.tables(_exponents(monomials))
        terms = [t for m in monomials if (t := read_term(m, tables, self.constants)) is not None]
        keys = self.pair.side("key")
        steps = [t for t in terms if len(t.data) == len(keys)]
        others = [t for t in terms if len(t.data) == 1]
        if len(steps) != 1 or len(terms) != 1 + len(others) or len(others) != (self.entering is not None):
            return None
        axes = self._sums_up(steps[0], keys, c)
        if axes is None or (others and not self._carries(others[0], axes, c)):
            return None
        return axes

    def _sums_up(
        self, t: Term, keys: Sequence[tuple[Value, Roles, int]], c: Array
    ) -> tuple[Role | None, ...] | None:
        """Returns the roles of a value's axes if it is ``sum over j of exp(c_last - c_j) key_j value_j``."""
        found = self._matched(t, keys, final=True)
        if found is None or t.coefficient != self.pair.coefficient or not self._same_gates(t, found):
            return None
        names = ("chunk", "step") if len(self.time) == 2 else ("step",)
        before = tuple(found["key", n] for n in names)
        if set(t.out) & set(before) or set(found.values()) - set(before) - set(t.out):
            return None
        total = _simplified([*t.tables, Weights(tuple(used_labels(before)), c - c.flat[-1], _all(c))])
        back = {x: role for role, x in found.items()}
        if not _is(total, np.ones(())) or any(x is not None and x not in back for x in t.out):
            return None
        return tuple(None if x is None else back[x] for x in t.out)

    def _same_gates(self, t: Term, found: dict[Role, Label]) -> bool:
        return t.batch.keys() == self.pair.batch.keys() and all(
            found.get(self.pair.batch[axis]) == label for axis, label in t.batch.items()
        )

    def _carries(self, t: Term, axes: Sequence[Role | None], c: Array) -> bool:
        """Whether a term is the state that entered, decayed by all gates."""
        assert self.entering is not None
        ((value, labels, power),) = t.data
        found = {role: x for role, x in zip(axes, t.out, strict=True) if role is not None}
        total = multiplied(t.tables).simplest()
        return (
            (value, power) == (self.entering[0], 1)
            and t.coefficient == self.pair.coefficient
            and _agreed(self.entering[1], labels, found) == {}
            and self._same_gates(t, found)
            and not total.labels
            and bool(total.keep)
            and int(total.numbers) == int(c.flat[-1])
        )

    # Writing it down

    def _written(
        self, gates: tuple[int, ...], sign: float, final: tuple[Value, tuple[Role | None, ...]] | None
    ) -> Form:
        shape = self.result.shape or ()
        steps = int(np.prod([shape[d] for d in self.time]))
        keys = [d for d in self.pair.data if _holds(d, ("key", "step"))]
        sides = {
            "query": [d for d in self.pair.data if d not in keys],
            "key": [d for d in keys if _holds(d, ("inner", "k"))],
            "value": [d for d in keys if not _holds(d, ("inner", "k"))],
        }
        names = self._names(sides)
        products = {side: [self._factor(d, names) for d in data] for side, data in sides.items()}
        if not products["query"] or not (products["key"] or products["value"]):
            raise Refused("nothing that is read, or nothing that is kept")
        decay = [self._decay(gates, names)] if self.spans.gates is not None else []
        length = _unpadded([*products.values(), decay], steps)
        if length != steps:
            products = {s: [_stripped(f) for f in factors] for s, factors in products.items()}
            decay = [_stripped(f) for f in decay]

        def axes(roles: Sequence[Role | None]) -> tuple[str | None, ...]:
            return tuple(None if r is None else names[r] for r in roles)

        chunk = self.time[-1] - 1  # where there is one chunk, it may have no axis
        if len(self.time) == 1 and shape[chunk] != 1:
            chunk = -1
        roles: list[Role | None] = [("result", d) if size != 1 else None for d, size in enumerate(shape)]
        roles[self.time[-1]] = ("query", "step")
        return Form(
            result=self.result,
            axes=axes([r for d, r in enumerate(roles) if d != chunk]),
            kind="linear_recurrence",
            length=length,
            query=Product(self.pair.coefficient, tuple(products["query"])),
            key=Product(1.0, tuple(products["key"])),
            value=Product(1.0, tuple(products["value"])),
            decay_log=Product(sign, tuple(decay)) if decay else None,
            initial=Factor(self.entering[0], axes(self.entering[1])) if self.entering else None,
            final=Factor(final[0], axes(final[1])) if final else None,
        )

    def _names(self, sides: dict[str, list[tuple[Value, Roles, int]]]) -> dict[Role, str]:
        """Returns the letters of the roles: "v" the values' own, "g0", ... those of the queries alone, else "b0", ..."""
        held = {s: {r for _, roles, _ in data for r in roles if r} for s, data in sides.items()}
        held["decay"] = set(self.pair.batch.values())
        every = sorted(
            {r for rs in held.values() for r in rs if r[0] == "result"}, key=lambda r: int(str(r[1]))
        )
        names: dict[Role, str] = {("inner", "k"): "k"}
        names |= {(side, "step"): "t" for side in ("query", "key")}
        own = [
            r
            for r in every
            if r in held["value"] and not any(r in held[s] for s in ("query", "key", "decay"))
        ]
        if own:
            names[own[-1]] = "v"
        counts = {"b": 0, "g": 0}
        for r in every:
            if r not in names:
                alone = r in held["query"] and not any(r in held[s] for s in ("key", "value", "decay"))
                letter = "g" if alone else "b"
                names[r] = f"{letter}{counts[letter]}"
                counts[letter] += 1
        return names

    def _factor(self, data: tuple[Value, Roles, int], names: dict[Role, str]) -> Factor:
        value, roles, power = data
        chunk = next((d for d, r in enumerate(roles) if r and r[1] == "chunk"), None)
        axes = tuple(None if r is None else names.get(r, "chunk") for r in roles)
        return _whole(value, axes, chunk, power)

    def _decay(self, gates: tuple[int, ...], names: dict[Role, str]) -> Factor:
        value = self.spans.gates
        assert value is not None
        axes: list[str | None] = [None] * len(value.shape or ())
        for axis, role in self.pair.batch.items():
            axes[axis] = names[role]
        axes[gates[-1]] = "t"
        chunk = gates[0] if len(gates) == 2 else None
        if chunk is not None:
            axes[chunk] = "chunk"
        return _whole(value, tuple(axes), chunk, 1)


def _exponents(monomials: Sequence[Monomial]) -> list[Value]:
    values = [f.value for m in monomials for f in m.factors if f.value is not None and f.value.op == "exp"]
    return [v.inputs[0] for v in dict.fromkeys(values)]


def _contracted(t: Term) -> set[int]:
    """Returns the axes of its tensors that a term sums over."""
    return {x for _, labels, _ in t.data for x in used_labels(labels)} - set(t.out)


def _summed(t: Term) -> set[int]:
    """Returns those that tables tell to be times."""
    return _contracted(t) & t.times()


def _agreed(roles: Roles, labels: Sequence[Label], found: dict[Role, Label]) -> dict[Role, Label] | None:
    """Returns the labels of roles that were not known; None where they disagree with those that were."""
    more: dict[Role, Label] = {}
    if len(roles) != len(labels):
        return None
    for role, x in zip(roles, labels, strict=True):
        if (role is None) != (x is None):
            return None
        if role is not None and found.get(role, more.setdefault(role, x)) != x:
            return None
    more = {r: x for r, x in more.items() if r not in found}
    taken = [*found.values(), *more.values()]
    return more if len(set(taken)) == len(taken) else None


def _holds(data: tuple[Value, Roles, int], role: Role) -> bool:
    return role in data[1]


def _all(c: Array) -> Array:
    return np.ones(c.shape, dtype=bool)


def _is(total: Weights, keep: Array) -> bool:
    """Whether a table is one where ``keep`` and zero elsewhere."""
    same = np.broadcast_to(total.keep, np.broadcast_shapes(total.keep.shape, keep.shape)) == keep.astype(bool)
    return bool(same.all()) and not np.where(total.keep, total.numbers, 0).any()


def _simplified(tables: Sequence[Weights]) -> Weights:
    """Returns the product of tables without axes along which it doesn't change: those of equal axes are multiplied first."""
    waiting = list(tables)
    while True:
        groups: dict[frozenset[int], list[Weights]] = {}
        for t in waiting:
            groups.setdefault(frozenset(t.labels), []).append(t)
        made = [multiplied(g).simplest() for g in groups.values()]
        if len(made) == len(waiting) and all(
            a.labels == b.labels for a, b in zip(made, waiting, strict=True)
        ):
            return multiplied(made).simplest()
        waiting = made


def _whole(value: Value, axes: tuple[str | None, ...], chunk: int | None, power: int) -> Factor:
    """Returns a factor whose axes of chunks and steps are one again."""
    if chunk is None:
        return Factor(value, axes, power)
    shape = value.shape or ()
    if chunk + 1 >= len(axes) or axes[chunk + 1] != "t":
        raise Refused("chunks that do not stand before their steps")
    together = (*shape[:chunk], shape[chunk] * shape[chunk + 1], *shape[chunk + 2 :])
    rest = axes[:chunk] + axes[chunk + 1 :]
    if value.op == "view" and value.inputs[0].shape == together:
        return Factor(value.inputs[0], rest, power)
    return Factor(Value("view", [value], (Slot(0), together), together, value.dtype, ()), rest, power)


def _unpadded(sides: Sequence[Sequence[Factor]], steps: int) -> int:
    """Returns the number of steps without those behind the end, where all factors are padded alike."""
    widths = {_padding(f) for factors in sides for f in factors if "t" in f.axes}
    return steps - widths.pop() if len(widths) == 1 else steps


def _padding(f: Factor) -> int:
    """Returns how many zeros stand behind a factor's last step."""
    time = f.axes.index("t")
    pairs = padding_of(f.value)
    if (
        pairs is None
        or f.power != 1
        or any(any(p) for d, p in enumerate(pairs) if d != time)
        or pairs[time][0]
    ):
        return 0
    return pairs[time][1]


def _stripped(f: Factor) -> Factor:
    return replace(f, value=f.value.inputs[0]) if "t" in f.axes else f
