"""Says of a loop what its carried values are: linear recurrences, elementwise scans, or neither.

The carried values are taken in the order in which they depend on each other, those that others need being known to them. The
last is described first, so that what it needs of the earlier ones is known when their turn comes.
"""

from __future__ import annotations

import networkx as nx

from spikingbrain.passes.recurrence.algebra import Algebra, NonAffine
from spikingbrain.passes.recurrence.form import Carry, Loop, Recurrence, Verdict
from spikingbrain.passes.recurrence.graph import Value
from spikingbrain.passes.recurrence.roles import describe
from spikingbrain.passes.recurrence.state import State
from spikingbrain.passes.recurrence.terms import Dense, Step, step_of

FLOATS = {"float16", "bfloat16", "float32", "float64"}


def classify(loop: Loop) -> Verdict:
    """Returns "raised" with a recurrence for every carried value, or "pointwise" or "loop" with the reason."""
    states = _Classification(loop)
    values = sorted(loop.values, key=lambda v: v.number)
    try:
        recurrences = states.run()
    except NonAffine as why:
        status = "pointwise" if states.is_pointwise() else "loop"
        return Verdict(status, str(why), values, loop)
    kinds = ", ".join(dict.fromkeys(r.kind for r in recurrences))
    return Verdict("raised", kinds, values, loop, recurrences)


class _Classification:
    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.bit = {c.before: 1 << i for i, c in enumerate(loop.carried)}
        self.mask: dict[Value, int] = dict(self.bit)

    def run(self) -> list[Recurrence]:
        for v in self.loop.body:
            self.depends_on(v)
        order = self._order()
        states = [self._state(c, self._unsolved(order[i:])) for i, c in enumerate(order)]
        roots = [s.value for s in self.loop.stacked]
        known: set[Value] = set()
        found: list[Recurrence] = []
        for i in reversed(range(len(states))):
            described = describe(states[i], roots, known)
            found.append(described.recurrence)
            roots += described.needs
            known |= described.gives
        self._check(roots, known)
        self._take_masks(found)
        return found[::-1]

    def _take_masks(self, found: list[Recurrence]) -> None:
        """Adds to the body what the algebra turned round: masks of ``where`` that change from step to step."""
        body = self.loop.body
        inside = set(body)
        read = [f.value for r in found for p in r.products() for f in p.factors]
        for v in [*read, *(i for value in body for i in value.inputs)]:
            if v.op == "logical_not" and v not in inside and v.inputs[0] in inside:
                v.number = len(body)
                body.append(v)
                inside.add(v)

    def depends_on(self, v: Value) -> int:
        """Returns which carried values a value of the body depends on, a bit for each."""
        if v not in self.mask:
            self.mask[v] = 0  # outside of the body nothing depends on them
        if v in self.body_inputs:
            for x in self.body_inputs.pop(v):
                self.mask[v] |= self.depends_on(x)
        return self.mask[v]

    @property
    def body_inputs(self) -> dict[Value, list[Value]]:
        if not hasattr(self, "_inputs"):
            self._inputs = {v: v.inputs for v in self.loop.body if v not in self.bit}
        return self._inputs

    def _unsolved(self, carries: list[Carry]) -> int:
        return sum(self.bit[c.before] for c in carries)

    def _order(self) -> list[Carry]:
        """Returns the carried values, each after those that its step needs."""
        carried = self.loop.carried
        graph = nx.DiGraph()
        graph.add_nodes_from(range(len(carried)))
        for j, c in enumerate(carried):
            graph.add_edges_from((i, j) for i in range(len(carried)) if self.depends_on(c.after) >> i & 1)
        for group in nx.strongly_connected_components(graph):
            if len(group) > 1:
                self._explain(group)
                raise NonAffine("the step", f"{len(group)} carried values depend on each other")
        graph.remove_edges_from(list(nx.selfloop_edges(graph)))
        return [carried[i] for i in nx.lexicographical_topological_sort(graph)]

    def _explain(self, group: set[int]) -> None:
        """Raises the reason of the first of a group that is not even affine in them together."""
        carried = [self.loop.carried[i] for i in sorted(group)]
        mine = sum(self.bit[c.before] for c in carried)
        algebra = Algebra(self.bit, {v for v, m in self.mask.items() if m & mine}, set(), {})
        for c in carried:
            for m in algebra.terms(c.after):
                if algebra.degree(m) > 1:
                    raise NonAffine("mul", "a product of carried values")

    def _state(self, carry: Carry, unsolved: int) -> State:
        mine = self.bit[carry.before]
        before = carry.before
        if before.dtype not in FLOATS or before.shape is None:
            raise NonAffine("the state", f"is of type {before.dtype}")
        moving = {v for v, m in self.mask.items() if m & mine}
        state = State(self.loop, carry, moving, lambda v: bool(self.mask.get(v, 0) & unsolved & ~mine))
        state.step = self._step(state)
        return state

    def _step(self, state: State) -> Step:
        while True:
            algebra = Algebra([state.carry.before], state.moving, state.opened, state.same)
            try:
                return step_of(algebra, state.carry.before, state.carry.after)
            except Dense as dense:
                if not state.open(dense.value):
                    raise NonAffine("matmul", str(dense)) from None

    def _check(self, roots: list[Value], known: set[Value]) -> None:
        """Sees to it that everything asked for can be computed from tokens and what the recurrences give."""
        seen: set[Value] = set()
        todo = list(roots)
        while todo:
            v = todo.pop()
            if v in seen or v in known:
                continue
            seen.add(v)
            if v in self.bit:
                raise NonAffine("the state", "is read whole")
            todo += v.inputs if self.mask.get(v, 0) else []

    def is_pointwise(self) -> bool:
        """Whether everything that depends on a carried value is computed element by element."""
        return all(v.op in ELEMENTWISE for v in self.loop.body if v not in self.bit and self.depends_on(v))


ELEMENTWISE = {
    *(
        "mul",
        "add",
        "sub",
        "rsub",
        "div",
        "neg",
        "abs",
        "sign",
        "pow",
        "square",
        "sqrt",
        "rsqrt",
        "reciprocal",
    ),
    *(
        "exp",
        "exp2",
        "expm1",
        "log",
        "log2",
        "log1p",
        "logaddexp",
        "sigmoid",
        "log_sigmoid",
        "tanh",
        "sin",
        "cos",
        "atan",
    ),
    *(
        "erf",
        "relu",
        "leaky_relu",
        "elu",
        "gelu",
        "silu",
        "softplus",
        "hardtanh",
        "hardsigmoid",
        "celu",
        "selu",
        "mish",
    ),
    *(
        "clamp",
        "clamp_min",
        "clamp_max",
        "minimum",
        "maximum",
        "heaviside",
        "remainder",
        "fmod",
        "copysign",
        "hypot",
    ),
    *(
        "ge",
        "gt",
        "le",
        "lt",
        "eq",
        "ne",
        "isnan",
        "isinf",
        "isfinite",
        "where",
        "masked_fill",
        "lerp",
        "addcmul",
        "addcdiv",
    ),
    *(
        "logical_not",
        "logical_and",
        "logical_or",
        "logical_xor",
        "bitwise_not",
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
    ),
    *(
        "round",
        "floor",
        "ceil",
        "trunc",
        "cast",
        "detach",
        "pointwise_function",
        "getitem",
        "unsqueeze",
        "squeeze",
        "expand",
        "atan2",
        "sinh",
        "cosh",
        "asin",
    ),
    *(
        "zeros_like",
        "ones_like",
        "full_like",
        "frac",
        "cos",
        "acos",
        "sinc",
        "sgn",
        "signbit",
        "fmax",
        "fmin",
        "xlogy",
    ),
}
