"""Recurrences written without a loop (masked scores, cumulative sums, chunks) as calls of the recurrence ops."""

from __future__ import annotations

import math

import torch
from torch import fx

from spikingbrain.frontend.recurrences import products
from spikingbrain.frontend.recurrences.emit import Emitter, NotEmitted
from spikingbrain.frontend.recurrences.linear import item
from spikingbrain.frontend.recurrences.products import Groups
from spikingbrain.passes.recurrence.form import Form, Product
from spikingbrain.passes.recurrence.graph import Value

aten = torch.ops.aten


def emit_form(emit: Emitter, form: Form) -> tuple[fx.Node, fx.Node | None]:
    """Emits the op that a form is; returns what takes the place of its result, and of the state after all steps."""
    writer = _Writer(emit, form)
    return writer.result(), writer.final


class _Writer:
    def __init__(self, emit: Emitter, form: Form):
        self.emit, self.form = emit, form
        self.outside: dict[Value, fx.Node] = {}
        self.final: fx.Node | None = None
        self.dtype = getattr(torch, form.result.dtype)
        if not self.dtype.is_floating_point:
            raise NotEmitted(f"a state of {form.result.dtype}")
        self.sizes: dict[str, int] = {"t": form.length, "k": 1, "v": 1}
        items = [form.query, form.key, form.value, form.decay, form.decay_log, *form.update]
        ends = [f for f in (form.initial, form.final) if f is not None]
        for factor in [*products.factors_of(*items), *ends]:
            for label, size in zip(factor.axes, factor.value.shape or (), strict=True):
                if label is not None:
                    self.sizes[label] = size
        if len(form.axes) == len(form.result.shape or ()):
            for label, size in zip(form.axes, form.result.shape or (), strict=True):
                if label not in (None, "t"):
                    self.sizes[label] = size
        batch = sorted(a for a in self.sizes if a.startswith("b"))
        self.batch, self.states = batch[:1], batch[1:]

    def result(self) -> fx.Node:
        made = self._scan() if self.form.kind == "linear_scan" else self._recurrence()
        return self._shaped(products.cast(self.emit, made, self.dtype))

    def _shaped(self, made: fx.Node) -> fx.Node:
        """Returns all steps in the shape of the result, which may be in chunks, the last one filled up with zeros."""
        shape, held = list(self.form.result.shape or ()), list(made.meta["val"].shape)
        if held == shape:
            return made
        time = self.form.axes.index("t")
        behind = math.prod(shape) // (math.prod(held) // held[time]) - held[time]
        if behind:
            widths = [0, 0] * (len(held) - 1 - time) + [0, behind]
            made = self.emit.op(aten.constant_pad_nd.default, made, widths)
        return self.emit.op(aten.reshape.default, made, shape)

    def _recurrence(self) -> fx.Node:
        form, row = self.form, [self.batch, ["t"], self.states]
        queries = sorted(a for a in self.sizes if a.startswith("g"))
        query = self._product([*row, queries, ["k"]], form.query)
        b, t, s, g, k = query.meta["val"].shape
        query = self.emit.op(aten.reshape.default, query, [b, t, s * g, k])
        key, value = self._product([*row, ["k"]], form.key), self._product([*row, ["v"]], form.value)
        axis, decay, log = self._decay(row)
        state = [self.batch, self.states, ["k"], ["v"]]
        initial = self._product(state, Product(1.0, (form.initial,))) if form.initial else None
        call = self.emit.op(
            torch.ops.spikingbrain.linear_recurrence.default,
            *(query, key, value, decay, None, None, None, initial, axis, log, form.exclusive, False),
        )
        out = item(self.emit, call, 0)
        if form.final is not None:
            last = products.unmerged(self.emit, item(self.emit, call, 1), state, self.sizes, form.final.axes)
            self.final = products.cast(self.emit, last, self.dtype)
        out = self.emit.op(aten.reshape.default, out, [b, t, s, g, out.meta["val"].shape[3]])
        return products.unmerged(self.emit, out, [*row, queries, ["v"]], self.sizes, form.axes)

    def _decay(self, row: Groups) -> tuple[str, fx.Node | None, bool]:
        given = self.form.decay_log if self.form.decay_log is not None else self.form.decay
        if given is None:
            return "none", None, False
        sides = products.axes_of(given) & {"k", "v"}
        if len(sides) == 2:
            raise NotEmitted("a decay of its own for each element of the state")
        side = [*sides]
        axis = {"k": "key", "v": "value"}[side[0]] if side else "head"
        return axis, self._product([*row, *([side] if side else [])], given), self.form.decay_log is not None

    def _scan(self) -> fx.Node:
        rest = [*self.states, *(a for a in ("k", "v") if a in self.form.axes)]
        groups = [self.batch, ["t"], rest]
        update: fx.Node | None = None
        for term in self.form.update:
            made = self._product(groups, term)
            update = made if update is None else self.emit.op(aten.add.Tensor, update, made)
        log = self.form.decay_log is not None
        decay = self._product(groups, self.form.decay_log or self.form.decay or Product(1.0))
        call = self.emit.op(torch.ops.spikingbrain.linear_scan.default, decay, update, None, log, False)
        return products.unmerged(self.emit, item(self.emit, call, 0), groups, self.sizes, self.form.axes)

    def _product(self, groups: Groups, product: Product | None) -> fx.Node:
        given = product or Product(1.0)
        factors = [((self._node(f.value), f.axes), f.power) for f in given.factors]
        return products.product(self.emit, factors, given.scalar, groups, self.sizes, self.dtype)

    def _node(self, value: Value) -> fx.Node:
        if value.op == "constant" and not value.origin:  # a table that the analysis computed
            return self.emit.constant(torch.from_numpy(value.literals[0].copy()))
        return self.emit.value(value, self.outside)
