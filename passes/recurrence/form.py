"""What the analysis says about a loop or a written form: the contract with the adapters that rewrite graphs.

A ``Loop`` is a stretch of a graph that repeats one body over time. ``Recurrence`` describes states of it whose step is
affine, factor by factor, in the terms of ``spikingbrain.linear_recurrence`` (see ``passes/dialect.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from spikingbrain.passes.recurrence.graph import Value


@dataclass(frozen=True)
class Token:
    """A slice of a sequence that one step reads.

    At step t (counted in time, not in processing order) it is ``source`` at position ``t * stride + offset`` of ``dim``; with
    ``width`` > 0 the slice of ``width`` entries that begins at ``width`` times that position (the dim stays). ``source`` may
    be a ``"constant"`` that the analysis makes: numbers of a Python loop that change with t, token of shape ``()``.
    """

    source: Value
    dim: int
    offset: int = 0
    stride: int = 1
    width: int = 0


@dataclass(eq=False)
class Carry:
    """A value handed from one step to the next.

    Attributes:
        before: stands in the body for the value of the previous step (op ``"carried"``, in no graph).
        after: the body's value that becomes it (for a value of two steps ago: the ``before`` of another carry).
        initial: the value before the first re-rolled step, computed outside the loop.
        final: the graph's value after the last re-rolled step, None where nothing reads it.
    """

    before: Value
    after: Value
    initial: Value
    final: Value | None


@dataclass(eq=False)
class Stacked:
    """A value of each step that is joined over time.

    ``joined`` is the graph's value (stack, cat, or a chain of writes seen as one) along ``dim``; at time t it holds ``value``.
    ``leading`` and ``trailing`` are the pieces joined before and after those of the re-rolled steps, in the order of the
    join. ``keeps_dim``: pieces have the dim already (cat of windows, or several entries per step; ``leading`` and
    ``trailing`` have it only if ``joined`` is a cat). ``reversed``: the pieces were joined in the opposite order of time.
    """

    value: Value
    joined: Value
    dim: int
    leading: list[Value] = field(default_factory=list)
    trailing: list[Value] = field(default_factory=list)
    keeps_dim: bool = False
    reversed: bool = False


@dataclass(eq=False)
class Loop:
    """One loop over time, re-rolled.

    Attributes:
        values: the values of its steps, in the graph, that depend on what is carried. Slices and gates, which depend on one
            step's tokens alone, are not among them: something else may read them.
        body: values of the template step in order (tokens included, op ``"token"``; carried ``before`` values excluded).
            They are in no graph; their ``origin`` is that of the value in one of the steps. Period p > 1 means that the
            body spans p steps of the graph, read as one.
        tokens: the template's slices of sequences.
        first, steps: the re-rolled steps are those at times ``first .. first + steps - 1``; steps before and after (the
            prologue and epilogue) stay in the graph as they are.
        reverse: whether time runs down: the last of those steps comes first.
        carried: what goes from step to step.
        stacked: what is joined over time.
        invariants: values from outside the loop that the body reads whole.
    """

    values: set[Value]
    body: list[Value]
    tokens: dict[Value, Token]
    first: int
    start: int
    steps: int
    reverse: bool
    carried: list[Carry]
    stacked: list[Stacked]
    invariants: list[Value]
    period: int = 1


@dataclass(frozen=True)
class Factor:
    """One state-free tensor of a product and the role of each of its axes.

    ``axes[i]`` is a label: ``"t"``, ``"k"`` (key), ``"v"`` (value), ``"b0"``, ``"b1"``, ... (the state's other axes), or None
    where the size is 1. ``power`` is 1, or -1 for a divisor.
    """

    value: Value
    axes: tuple[str | None, ...]
    power: int = 1


@dataclass(frozen=True)
class Product:
    """``scalar`` times the product of the factors; axes that no factor has are broadcast."""

    scalar: float = 1.0
    factors: tuple[Factor, ...] = ()


@dataclass(eq=False)
class Read:
    """A value of the body that is linear in one state, contracted over its key axis (``query`` has label "k").

    ``value = state^T query + extra``, from the state after the step, or before it (``exclusive``). The axes of ``value`` are
    ``axes`` (labels as in Factor; ``"g0"``, ... for axes of the query alone: several queries per state). ``extra`` are the
    state-free terms, such as the bonus of RWKV.
    """

    value: Value
    axes: tuple[str | None, ...]
    query: Product
    exclusive: bool
    extra: list[Product] = field(default_factory=list)


@dataclass(eq=False)
class Recurrence:
    """One carried state whose step is affine, in canonical form.

    Attributes:
        carry: the state.
        axes: label of each axis of the state: "k", "v", "b0", ...; a state without a value axis has no "v". For an
            elementwise scan every axis is a "b".
        kind: "linear_recurrence" (outer product update, contracted reads), "linear_scan" (elementwise), "selective_scan"
            (full decay ``exp(dt * a)``, factored update, contracted reads).
        decay: the product that multiplies the old state, None for 1; ``decay_log`` where it is ``exp`` of a state-free
            value: then the log's factors instead.
        erase, predict: the rank-one part, both or none.
        key, value: the update's factors by side. For "linear_scan" the update is ``update``, a value of the body.
        reads: every value through which the rest of the body depends on the state. Empty means that all states
            themselves are stacked or handed on.
    """

    carry: Carry
    axes: tuple[str, ...]
    kind: str
    decay: Product | None = None
    decay_log: Product | None = None
    erase: Product | None = None
    predict: Product | None = None
    key: Product | None = None
    value: Product | None = None
    update: list[Product] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)

    def products(self) -> list[Product]:
        """Returns all products that it is made of."""
        own = (self.decay, self.decay_log, self.erase, self.predict, self.key, self.value)
        read = [p for r in self.reads for p in (r.query, *r.extra)]
        return [p for p in (*own, *self.update, *read) if p is not None]


@dataclass(eq=False)
class Form:
    """A recurrence that is written without a loop: masked scores, cumulative sums, chunks.

    All factors are values of the graph, and their axes have the label "t" where they change with time. Time runs up.

    Attributes:
        result: the value that is what the recurrence reads (its states, for a "linear_scan").
        axes: label of each axis of ``result``: "t", "b0", ..., "v", "g0", ... (of the query alone), None where the size is 1.
            "t" stands for two axes of a result in chunks, which is 0 behind the last step.
        kind: "linear_recurrence" or "linear_scan".
        length: the number of steps.
        query, key, value: of a linear recurrence, ``o_t = S_t^T q_t``, S gaining ``key value^T``; ``exclusive``: before that.
        decay, decay_log: as in ``Recurrence``; what they are at the first step doesn't matter.
        update: the terms of a linear scan's update.
        initial, final: of a linear recurrence, the state it starts from (None: zeros) and a value that is the state it ends with.
    """

    result: Value
    axes: tuple[str | None, ...]
    kind: str
    length: int
    query: Product | None = None
    key: Product | None = None
    value: Product | None = None
    decay: Product | None = None
    decay_log: Product | None = None
    exclusive: bool = False
    update: list[Product] = field(default_factory=list)
    initial: Factor | None = None
    final: Factor | None = None


@dataclass(eq=False)
class Verdict:
    """What became of one loop or form.

    Attributes:
        status: "raised" (``recurrences`` describe every carried value), "loop" (re-rolled, not affine: one loop over time),
            "pointwise" (the same, every op of the step elementwise), "unrolled" (left alone).
        reason: for a person: what it is, or why it is not raised (op, and why).
        values: where it is in the graph, for source lines.
        loop, form: the one that this is about; neither for what is left alone.
    """

    status: str
    reason: str
    values: list[Value]
    loop: Loop | None = None
    recurrences: list[Recurrence] = field(default_factory=list)
    form: Form | None = None
