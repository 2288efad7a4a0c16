"""Graphs of modules for the tests of ``passes/recurrence``, and a slow evaluation of them in which loops run as loops."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from spikingbrain.frontend.recurrences.adapter import adapt
from spikingbrain.frontend.recurrences.emit import call_of
from spikingbrain.passes.recurrence.form import Factor, Loop, Product, Recurrence, Verdict
from spikingbrain.passes.recurrence.form import Form as Written
from spikingbrain.passes.recurrence.graph import Graph, Value
from spikingbrain.passes.recurrence.normalise import normalise

sys.path.append(str(Path(__file__).parents[1] / "recurrences"))
from forms import FORMS, Form

__all__ = ["FORMS", "Evaluation", "Form", "Traced", "close", "trace"]


class Traced:
    """A module as a normalised graph, with the tensors that it is given in ``example``."""

    def __init__(self, module: torch.nn.Module, example: Sequence[Tensor], keep_detach: bool = True) -> None:
        self.expected = pytree.tree_leaves(module(*example))
        program = torch.export.export(module, tuple(example), strict=False).run_decompositions({})
        raw, values = adapt(program.graph_module, keep_detach)
        self.given: dict[Value, Tensor] = {}
        leaves = iter(pytree.tree_leaves(tuple(example)))
        held = {**program.state_dict, **program.constants}
        for spec in program.graph_signature.input_specs:
            node = next(n for n in program.graph.nodes if n.name == spec.arg.name)
            value = values[node]
            self.given[value] = held[spec.target] if spec.target in held else next(leaves)
            if spec.target in program.constants:
                value.op, value.literals = "constant", (self.given[value].numpy(),)
        self.raw = raw
        self.graph: Graph = normalise(raw)

    def tensor(self, value: Value) -> Tensor:
        """Returns what an input of the normalised graph was given."""
        return next(self.given[raw] for raw in value.origin if raw in self.given)


def trace(form: Form, length: int | None = None) -> Traced:
    return Traced(form.module(), form.example(length))


class Evaluation:
    """Computes a graph; what ``loops`` carry, return and join is computed by their bodies, step by step."""

    def __init__(self, traced: Traced, loops: Sequence[Loop] = (), verdicts: Sequence[Verdict] = ()) -> None:
        self.traced = traced
        self.recurrences = {id(v.loop): v.recurrences for v in verdicts}
        self.known: dict[Value, Any] = {}
        self.loops = list(loops)
        self.within = {v: loop for loop in loops for v in loop.values}
        self.joined = {s.joined: loop for loop in loops for s in loop.stacked}
        self.bodies = {id(v) for loop in loops for v in loop.body}

    def outputs(self) -> list[Tensor]:
        return [self(v) for v in self.traced.graph.outputs]

    def __call__(self, v: Value) -> Any:
        if v not in self.known:
            loop = self.joined.get(v) or self.within.get(v)
            if loop is not None:
                self.run(loop)
                assert v in self.known, f"{v} of a loop is read outside"
            else:
                self.known[v] = self.compute(v, [self(x) for x in v.inputs])
        return self.known[v]

    def compute(self, v: Value, inputs: list[Any]) -> Any:
        if v.op == "input":
            return self.traced.tensor(v)
        if v.op == "constant":
            return torch.as_tensor(v.literals[0], dtype=getattr(torch, v.dtype))
        target, args, kwargs = call_of(v, inputs)
        return target(*args, **kwargs)

    def token(self, loop: Loop, token: Value, time: int) -> Tensor:
        t = loop.tokens[token]
        position = time * t.stride + t.offset
        assert position >= 0
        source = self(t.source)
        if t.width:
            return source.narrow(t.dim, position * t.width, t.width)
        return source.select(t.dim, position)

    def run(self, loop: Loop) -> None:
        before = {c.before: self(c.initial) for c in loop.carried}
        pieces: dict[int, list[Tensor]] = {i: [] for i in range(len(loop.stacked))}
        times = range(loop.first, loop.first + loop.steps)
        for time in reversed(times) if loop.reverse else times:
            now: dict[Value, Any] = dict(before)
            for v in loop.body:
                if v in loop.tokens:
                    now[v] = self.token(loop, v, time)
                else:
                    now[v] = self.compute(v, [now[x] if x in now else self(x) for x in v.inputs])
                if v.shape is not None:
                    assert tuple(now[v].shape) == v.shape, v
            for i, s in enumerate(loop.stacked):
                pieces[i].append(now[s.value])
            for r in self.recurrences.get(id(loop), []):
                self.check_step(r, now)
            before = {c.before: now[c.after] for c in loop.carried}
        for c in loop.carried:
            if c.final is not None:
                self.known[c.final] = before[c.before]
        for i, s in enumerate(loop.stacked):
            steps = pieces[i][::-1] if s.reversed != loop.reverse else pieces[i]
            around = [[self(v) for v in outer] for outer in (s.leading, s.trailing)]
            if s.joined.op == "stack":
                around = [[v.unsqueeze(s.dim) for v in outer] for outer in around]
            if not s.keeps_dim:
                steps = [v.unsqueeze(s.dim) for v in steps]
            self.known[s.joined] = torch.cat([*around[0], *steps, *around[1]], s.dim)

    # The normal form against the step itself

    def check_step(self, r: Recurrence, now: dict[Value, Any]) -> None:
        """Raises AssertionError unless the recurrence says what the step does to the state, and its reads what they read."""
        state = now[r.carry.before].double()
        axes = list(r.axes)
        decay: Tensor | float = self.product(r.decay, axes, now, state) if r.decay is not None else 1.0
        if r.decay_log is not None:
            decay = self.product(r.decay_log, axes, now, state).exp()
        after = decay * state
        if r.kind == "linear_scan":
            for term in r.update:
                after = after + self.product(term, axes, now, state)
        else:
            after = after + self.product(r.key, axes, now, state) * self.product(r.value, axes, now, state)
        if r.erase is not None:
            predicted = (self.product(r.predict, axes, now, state) * state).sum(axes.index("k"), keepdim=True)
            after = after + self.product(r.erase, axes, now, state) * predicted
        close(after, now[r.carry.after], f"state {axes}")
        for read in r.reads:
            of = now[r.carry.before if read.exclusive else r.carry.after].double()
            sizes: dict[str | None, int] = dict(zip(axes, of.shape, strict=True))
            sizes |= {a: n for a, n in zip(read.axes, read.value.shape or (), strict=True) if a is not None}
            value = self.contraction(read.query, (of, axes), read.axes, now, sizes)
            for extra in read.extra:
                value = value + self.contraction(extra, None, read.axes, now, sizes)
            close(value, now[read.value], f"read {read.axes}")

    def factor(self, f: Factor, now: dict[Value, Any]) -> Tensor:
        x = (now[f.value] if f.value in now else self(f.value)).double()
        assert x.dim() == len(f.axes)
        return x if f.power == 1 else x**f.power

    def product(self, p: Product | None, axes: Sequence[str], now: dict[Value, Any], like: Tensor) -> Tensor:
        """Returns a product with the axes of the state."""
        assert p is not None
        total = torch.full((1,) * len(axes), p.scalar, dtype=torch.float64)
        for f in p.factors:
            x = self.factor(f, now)
            held = [a for a in f.axes if a is not None]
            x = x.reshape([n for n, a in zip(x.shape, f.axes, strict=True) if a is not None])
            x = x.permute([held.index(a) for a in axes if a in held])
            total = total * x.reshape([like.shape[i] if a in held else 1 for i, a in enumerate(axes)])
        return total

    def contraction(
        self,
        p: Product,
        state: tuple[Tensor, Sequence[str]] | None,
        axes: Sequence[str | None],
        now: dict[Value, Any],
        sizes: dict[str | None, int],
    ) -> Tensor:
        """Returns the product (times a state) summed over what ``axes`` lacks."""
        letter: dict[str, str] = {}
        operands, names = [], []
        for x, labels in [*([state] if state else []), *((self.factor(f, now), f.axes) for f in p.factors)]:
            held = [a for a in labels if a is not None]
            operands.append(x.reshape([n for n, a in zip(x.shape, labels, strict=True) if a is not None]))
            names.append("".join(letter.setdefault(a, chr(97 + len(letter))) for a in held))
        there = [a for a in axes if a in letter]
        value = torch.tensor(p.scalar, dtype=torch.float64)
        if operands:
            equation = f"{','.join(names)}->{''.join(letter[a] for a in there if a)}"
            value = p.scalar * torch.einsum(equation, *operands)
        return value.reshape([sizes[a] if a in there else 1 for a in axes])

    # Forms without a loop

    def check_form(self, form: Written) -> None:
        """Raises AssertionError unless the recurrence, run step by step, gives the value that the form stands for."""
        ends = [Product(1.0, (f,)) for f in (form.initial, form.final) if f]
        parts = (form.query, form.key, form.value, form.decay, form.decay_log, *form.update, *ends)
        held: dict[str, int] = {"t": form.length}
        for f in (f for p in parts if p for f in p.factors):
            held |= {
                a: n
                for a, n in zip(f.axes, f.value.shape or (), strict=True)
                if a and (n > 1 or a not in held)
            }
        state_axes = sorted(a for a in held if a[0] in "bkv")
        rows = []
        state = torch.zeros([held[a] for a in state_axes], dtype=torch.float64)
        if form.initial is not None:
            state = state + self.at(Product(1.0, (form.initial,)), state_axes, held, 0)
        read_axes = [a for a in form.axes if a not in (None, "t")]
        for t in range(form.length):
            before = state
            if form.decay is not None:
                state = state * self.at(form.decay, state_axes, held, t)
            if form.decay_log is not None:
                state = state * self.at(form.decay_log, state_axes, held, t).exp()
            if form.kind == "linear_scan":
                state = state + sum(self.at(p, state_axes, held, t) for p in form.update)
                rows.append(state)
                continue
            state = state + self.at(form.key, state_axes, held, t) * self.at(form.value, state_axes, held, t)
            every = sorted(held.keys() - {"t"})
            read = before if form.exclusive else state
            wide = read.reshape([held[a] if a in state_axes else 1 for a in every])
            out = wide * self.at(form.query, every, held, t)
            gone = [i for i, a in enumerate(every) if a not in read_axes]
            rows.append(out.sum(gone) if gone else out)
        left = [
            a
            for a in (state_axes if form.kind == "linear_scan" else sorted(held.keys() - {"t"}))
            if a in read_axes
        ]
        joined = torch.stack(rows)
        order = ["t", *left]
        joined = joined.permute([order.index(a) for a in form.axes if a is not None])
        wanted = self(form.result)
        behind = wanted.numel() // (joined.numel() // form.length) - form.length
        time = [a for a in form.axes if a is not None].index("t")
        joined = torch.cat(
            [
                joined,
                joined.narrow(time, 0, 1).expand(*joined.shape[:time], behind, *joined.shape[time + 1 :]) * 0,
            ],
            time,
        )
        close(joined.reshape(wanted.shape), wanted, f"form {form.axes}")
        if form.final is not None:
            final = self.at(Product(1.0, (form.final,)), state_axes, held, 0)
            close(state.expand(final.shape), final, f"final state of form {form.axes}")

    def at(self, p: Product | None, axes: Sequence[str], sizes: dict[str, int], t: int) -> Tensor:
        """Returns a product at time t, broadcast to ``axes``."""
        assert p is not None
        total = torch.full([sizes[a] for a in axes], p.scalar, dtype=torch.float64)
        for f in p.factors:
            x = torch.as_tensor(self(f.value)).double()
            names = list(f.axes)
            if "t" in names:
                x = x.select(names.index("t"), t)
                names.remove("t")
            flat = x.reshape([n for n, a in zip(x.shape, names, strict=True) if a is not None])
            held = [a for a in names if a is not None]
            flat = flat.permute([held.index(a) for a in axes if a in held])
            flat = flat.reshape([sizes[a] if a in held else 1 for a in axes])
            total = total * (flat if f.power == 1 else flat**f.power)
        return total


def close(found: Tensor, wanted: Tensor, what: str) -> None:
    slack = 1e-2 if wanted.dtype in (torch.bfloat16, torch.float16) else 2e-5
    wanted = wanted.double()
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    error = float((found.double() - wanted).abs().max()) if wanted.numel() else 0.0
    assert error <= slack * max(1.0, scale), f"{what}: off by {error} of {scale}"
