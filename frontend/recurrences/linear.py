"""Affine recurrences of a loop as calls of the recurrence ops, and the rest of the loop for all steps at once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from spikingbrain.frontend.recurrences import products
from spikingbrain.frontend.recurrences.emit import Emitter, NotEmitted
from spikingbrain.frontend.recurrences.products import Groups, Labelled
from spikingbrain.passes.recurrence.form import Carry, Loop, Product, Read, Recurrence
from spikingbrain.passes.recurrence.graph import Value

aten = torch.ops.aten


@dataclass
class Steps:
    """A loop on its way to being gone.

    Attributes:
        known: values of the body for all steps at once, time first.
        outside: nodes of values from outside the loop.
        finals: for each carried value what it is after the loop.
    """

    emit: Emitter
    loop: Loop
    known: dict[Value, fx.Node] = field(default_factory=dict)
    outside: dict[Value, fx.Node] = field(default_factory=dict)
    finals: dict[Carry, fx.Node] = field(default_factory=dict)

    def start(self) -> None:
        """Emits the sequences that the steps read."""
        for value, token in self.loop.tokens.items():
            source = self._source(token.source)
            self.known[value] = self.emit.sequence(token, self.loop.start, self.loop.steps, source)

    def _source(self, value: Value) -> fx.Node:
        if value.op == "constant" and not value.origin:  # numbers that change with the step
            made = self.outside.get(value)
            if made is None:
                dtype = getattr(torch, value.dtype)
                numbers = [self.emit.op(aten.full.default, [1], n, dtype=dtype) for n in value.literals[0]]
                made = self.emit.op(aten.cat.default, numbers)
                self.outside[value] = made
            return made
        return self.emit.value(value, self.outside)

    def values(self, wanted: Sequence[Value]) -> list[fx.Node]:
        """Returns body values for all steps at once, as far as they change; see ``Emitter.vectorised``."""
        return self.emit.vectorised(wanted, self.loop, self.known, self.outside)

    def labelled(self, product: Product | None) -> list[tuple[Labelled, int]]:
        """Returns a product's factors with the axis of time, as pairs with their power."""
        if product is None:
            return []
        nodes = self.values([f.value for f in product.factors])
        found = []
        for factor, node in zip(product.factors, nodes, strict=True):
            varies = self.emit.varies(factor.value, self.loop, self.known)
            found.append(((node, ("t", *factor.axes) if varies else factor.axes), factor.power))
        return found


def emit_recurrence(steps: Steps, recurrence: Recurrence) -> None:
    """Emits one carried state's recurrence: afterwards ``steps`` knows its reads and its final value."""
    if recurrence.kind == "linear_scan":
        _Scan(steps, recurrence).emit_all()
    elif recurrence.kind == "selective_scan":
        _Selective(steps, recurrence).emit_all()
    else:
        _Linear(steps, recurrence).emit_all()


class _State:
    """What the three kinds share: the roles of the state's axes, its layout before and after."""

    def __init__(self, steps: Steps, recurrence: Recurrence):
        self.steps, self.emit, self.r = steps, steps.emit, recurrence
        before = recurrence.carry.before
        self.reverse = steps.loop.reverse
        self.dtype = getattr(torch, before.dtype)
        if not self.dtype.is_floating_point:
            raise NotEmitted(f"a state of {before.dtype}")
        self.sizes = dict(zip(recurrence.axes, before.shape or (), strict=True)) | {"t": steps.loop.steps}
        self.sizes.setdefault("v", 1)
        self.sizes.setdefault("k", 1)
        batch = [a for a in recurrence.axes if a.startswith("b")]
        self.batch, self.states = batch[:1], batch[1:]

    def initial(self, groups: Groups) -> fx.Node | None:
        """Returns the state before the loop in the layout ``groups``, None for zeros."""
        value = self.r.carry.initial
        if value.op == "full" and value.literals[1] == 0:
            return None
        node = self.emit.value(value, self.steps.outside)
        order = [label for group in groups for label in group]
        node = products.cast(self.emit, node, torch.float64 if self.dtype == torch.float64 else torch.float32)
        if tuple(node.meta["val"].shape) != tuple(self.r.carry.before.shape or ()):
            node = self.emit.op(aten.expand.default, node, list(self.r.carry.before.shape or ()))
        node = products.aligned(self.emit, (node, tuple(self.r.axes)), order)
        return products.merged(self.emit, node, groups, self.sizes)

    def finish(self, final: fx.Node, groups: Groups) -> None:
        """Notes the state after the loop, in its own layout and type."""
        node = products.unmerged(self.emit, final, groups, self.sizes, self.r.axes)
        self.steps.finals[self.r.carry] = products.cast(self.emit, node, self.dtype)

    def product(self, groups: Groups, *items: Product | None) -> fx.Node:
        """Returns the product of products, laid out by ``groups``."""
        factors = [pair for item in items for pair in self.steps.labelled(item)]
        scalar = 1.0
        for item in items:
            scalar *= item.scalar if item else 1.0
        return products.product(self.emit, factors, scalar, groups, self.sizes, self.dtype)

    def decay(self, groups: Groups) -> tuple[fx.Node | None, bool]:
        """Returns the decay laid out by ``groups``, and whether it is a logarithm."""
        if self.r.decay_log is not None:
            return self.product(groups, self.r.decay_log), True
        return (self.product(groups, self.r.decay), False) if self.r.decay is not None else (None, False)

    def answer(self, read: Read, node: fx.Node, axes: Sequence[str | None]) -> None:
        """Tells ``steps`` the value of a read: the state's part of it and what is added to that."""
        for extra in read.extra:
            factors = [x if power > 0 else self._inverse(x) for x, power in self.steps.labelled(extra)]
            added = products.contraction(self.emit, factors, extra.scalar, axes, self.sizes)
            node = self.emit.op(
                aten.add.Tensor, node, products.cast(self.emit, added, node.meta["val"].dtype)
            )
        self.steps.known[read.value] = products.cast(self.emit, node, getattr(torch, read.value.dtype))

    def _inverse(self, labelled: Labelled) -> Labelled:
        return self.emit.op(aten.reciprocal.default, labelled[0]), labelled[1]


class _Linear(_State):
    def emit_all(self) -> None:
        state = [self.batch, self.states, ["k"], ["v"]]
        row = [self.batch, ["t"], self.states]
        r, op = self.r, torch.ops.spikingbrain.linear_recurrence.default
        key = self.product([*row, ["k"]], r.key)
        value = self.product([*row, ["v"]], r.value)
        axis, decay, log = self._decay(row)
        erase = self.product([*row, ["k"]], r.erase) if r.erase else None
        predict = self.product([*row, ["k"]], r.predict) if r.predict else None
        initial = self.initial(state)
        final = None
        for exclusive in (False, True):
            reads = [read for read in r.reads if read.exclusive == exclusive]
            if not reads and (exclusive or r.reads):
                continue
            queries = [self._query(read, i, row) for i, read in enumerate(reads)]
            if queries:
                query, counts = self._joined([q for q, _ in queries])
            else:  # only the final state is wanted
                query, counts = self.emit.op(aten.zeros_like.default, key), []
            call = self.emit.op(
                op,
                query,
                key,
                value,
                decay,
                erase,
                predict,
                None,
                initial,
                axis,
                log,
                exclusive,
                self.reverse,
            )
            out = item(self.emit, call, 0)
            if final is None:
                final = item(self.emit, call, 1)
            self._answer(reads, queries, counts, out, row)
        if final is None:
            raise NotEmitted("a state that nothing reads")
        self.finish(final, state)

    def _decay(self, row: Groups) -> tuple[str, fx.Node | None, bool]:
        if self.r.decay is None and self.r.decay_log is None:
            return "none", None, False
        held = products.axes_of(self.r.decay_log if self.r.decay_log is not None else self.r.decay)
        sides = held & {"k", "v"}
        if sides == {"k", "v"}:
            raise NotEmitted("a decay of its own for each element of the state")
        axis = {"k": "key", "v": "value"}[sides.pop()] if sides else "head"
        groups = [*row] if axis == "head" else [*row, [{"key": "k", "value": "v"}[axis]]]
        decay, log = self.decay(groups)
        return axis, decay, log

    def _query(self, read: Read, number: int, row: Groups) -> tuple[fx.Node, list[str]]:
        """Returns a read's query [B, T, S, G, K] and the labels of its G."""
        own = sorted(a for a in products.axes_of(read.query) if a.startswith("g"))
        for factor in read.query.factors:
            for label, size in zip(factor.axes, factor.value.shape or (), strict=True):
                if label in own:
                    self.sizes[label] = size
        return self.product([*row, own, ["k"]], read.query), own

    def _joined(self, queries: Sequence[fx.Node]) -> tuple[fx.Node, list[int]]:
        """Returns the queries of all reads as groups of heads, [B, T, S * G, K], and how many each read has."""
        counts = [q.meta["val"].shape[3] for q in queries]
        both = queries[0] if len(queries) == 1 else self.emit.op(aten.cat.default, list(queries), 3)
        b, t, s, g, k = both.meta["val"].shape
        return self.emit.op(aten.reshape.default, both, [b, t, s * g, k]), counts

    def _answer(
        self,
        reads: Sequence[Read],
        queries: Sequence[tuple[fx.Node, list[str]]],
        counts: Sequence[int],
        out: fx.Node,
        row: Groups,
    ) -> None:
        """Tells ``steps`` the value of each read."""
        if not reads:
            return
        b, t, heads, v = out.meta["val"].shape
        total = sum(counts)
        split = self.emit.op(aten.reshape.default, out, [b, t, heads // total, total, v])
        start = 0
        for read, (_, own), count in zip(reads, queries, counts, strict=True):
            part = split
            if count != total:
                part = self.emit.op(aten.slice.Tensor, split, 3, start, start + count)
            start += count
            axes = ("t", *read.axes)
            node = products.unmerged(self.emit, part, [*row, own, ["v"]], self.sizes, axes)
            self.answer(read, node, axes)


class _Scan(_State):
    """An elementwise state: its value at every step is known afterwards, before and after the step."""

    def emit_all(self) -> None:
        rest = list(self.r.axes[1:])
        first = list(self.r.axes[:1])
        groups = [first, ["t"], rest]
        state = [first, rest]
        update: fx.Node | None = None
        for term in self.r.update:
            made = self.product(groups, term)
            update = made if update is None else self.emit.op(aten.add.Tensor, update, made)
        if update is None:
            update = self.product(groups, Product(0.0))
        decay, log = self.decay(groups)
        if decay is None:
            decay, log = self.product(groups, Product(1.0)), False
        initial = self.initial(state)
        call = self.emit.op(
            torch.ops.spikingbrain.linear_scan.default, decay, update, initial, log, self.reverse
        )
        states, final = item(self.emit, call, 0), item(self.emit, call, 1)
        carry = self.r.carry
        after = products.unmerged(self.emit, states, groups, self.sizes, ("t", *self.r.axes))
        after = products.cast(self.emit, after, self.dtype)
        self.steps.known[carry.after] = after
        self.steps.known[carry.before] = self._shifted(after)
        self.finish(final, state)

    def _shifted(self, after: fx.Node) -> fx.Node:
        """Returns the state before each step."""
        carry, count = self.r.carry, self.steps.loop.steps
        initial = products.cast(self.emit, self.emit.value(carry.initial, self.steps.outside), self.dtype)
        shape = [1, *(carry.before.shape or ())]
        initial = self.emit.op(aten.expand.default, self.emit.op(aten.unsqueeze.default, initial, 0), shape)
        if self.reverse:
            later = self.emit.op(aten.slice.Tensor, after, 0, 1, count)
            return self.emit.op(aten.cat.default, [later, initial], 0)
        earlier = self.emit.op(aten.slice.Tensor, after, 0, 0, count - 1)
        return self.emit.op(aten.cat.default, [initial, earlier], 0)


class _Selective(_State):
    """Mamba: ``h = exp(dt a) h + dt x b``, read by c. Channels have the label "v", their states "k"."""

    def emit_all(self) -> None:
        r = self.r
        row, state = [self.batch, ["t"]], [self.batch, ["v"], ["k"]]
        assert r.decay_log is not None and r.value is not None
        rates = [f for f in r.decay_log.factors if "k" in f.axes]
        steps = [f for f in r.decay_log.factors if "k" not in f.axes]
        rest = list(r.value.factors)
        for factor in steps:
            rest.remove(factor)
        step = self.product([*row, ["v"]], Product(1.0, tuple(steps)))
        rate = self.product([["v"], ["k"]], Product(r.decay_log.scalar, tuple(rates)))
        x = self.product([*row, ["v"]], Product(r.value.scalar, tuple(rest)))
        key = self.product([*row, ["k"]], r.key)
        initial, final = self.initial(state), None
        for read in r.reads:
            query = self.product([*row, ["k"]], read.query)
            call = self.emit.op(
                torch.ops.spikingbrain.selective_scan.default,
                x,
                step,
                rate,
                key,
                query,
                initial,
                self.reverse,
            )
            final = final or item(self.emit, call, 1)
            axes = ("t", *read.axes)
            node = products.unmerged(self.emit, item(self.emit, call, 0), [*row, ["v"]], self.sizes, axes)
            self.answer(read, node, axes)
        if final is None:
            raise NotEmitted("a state that nothing reads")
        self.finish(final, state)


def item(emit: Emitter, call: fx.Node, index: int) -> fx.Node:
    """Returns one of several results."""
    node = emit.graph.call_function(operator.getitem, (call, index))
    node.meta = {**call.meta, "val": call.meta["val"][index]}
    return node
