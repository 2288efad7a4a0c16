"""The form of ``spikingbrain.linear_recurrence`` in linalg, for targets without a kernel of their own.

Time is cut into n chunks of C steps, the last one filled up with steps that change nothing. With F the product of the decays
from a chunk's start to a step, G that from after it to the chunk's end, A the whole product, and S the state that enters:

    o = triangle(q, k) v + (q F) S             state that leaves = A S + (k G)^T v

where ``triangle`` holds the products of queries and earlier keys, decayed (see ``recurrence_products``). Everything but S is
computed for all chunks at once. The entering states are a scan over chunks, in two levels, so that no loop on the host is
needed: each entry of a state is summed by itself, in order of time, inside blocks of chunks and over the blocks.

With a rank-one part the predictions x of a chunk, which are values that ``erase`` writes, depend on each other:
``x = (1 - triangle(predict, erase))^-1 (triangle(predict, k) v + (predict F) S) = X + W S``. The state that leaves is then a
matrix times S, and a loop on the host goes over the chunks. Decays of value channels beside a rank-one part would need an
inverse for each channel: those recurrences go step by step.

Letters as in ``recurrence_products``; also t time, h head, w a second key axis, c block of chunks. Sums are in the op's type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import arith, math, scf, tensor

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes import linalg_build as basic
from spikingbrain.passes.dialect_recurrences import DECAY_AXES
from spikingbrain.passes.kernels.letters import Array, At, Letters, index, pick, renamed
from spikingbrain.passes.kernels.recurrence_products import Decays, inverse, triangle, weighed

# A state is stored for every chunk: longer chunks need less memory, and more work inside. A decay for each key channel makes
# that work several products instead of one.
STEPS, STEPS_BY_CHANNEL = 64, 32
BLOCK = 16  # chunks whose states are summed in one go


def lower_recurrence_portable(op: Any, steps: int = 0) -> None:
    """Replaces a ``spikingbrain.linear_recurrence`` op by linalg ops on tensors.

    ``steps`` is the length of a chunk, a power of two; 0 takes the default. Raises UnsupportedOp when the number or the
    size of heads is dynamic.
    """
    operation = op.operation
    with operation.context, operation.location, ir.InsertionPoint(operation):
        results = _Recurrence(op, steps).lower()
        for old, new in zip(operation.results, results, strict=True):
            cast = tensor.CastOp(old.type, new).result if new.type != old.type else new
            old.replace_all_uses_with(cast)
        operation.erase()


class _Recurrence:
    """One op on its way: the sizes of its letters, and its operands by chunks."""

    def __init__(self, op: Any, steps: int):
        self.op = op
        self.exclusive, self.reverse = bool(op.exclusive.value), bool(op.reverse.value)
        self.axis: str = op.decay_axis.value
        sizes = _sizes(op)
        sizes["g"] = sizes["h"] // sizes["s"]
        self.by_step = op.erase is not None and self.axis == "value"
        if self.by_step:
            steps = 1
        elif not steps:
            steps = STEPS_BY_CHANNEL if self.axis in ("key", "value") else STEPS
        if isinstance(sizes["t"], int):
            steps = min(steps, 1 << max(sizes["t"] - 1, 0).bit_length())
        self.steps, self.levels = steps, steps.bit_length() - 1
        self.build = Letters(sizes, ir.RankedTensorType(op.q.type).element_type)
        sizes["w"] = sizes["k"]
        sizes["i"] = sizes["j"] = sizes["l"] = sizes["m"] = steps
        sizes["e"] = self.levels + 1
        sizes["n"] = _ceil_div(sizes["t"], steps)
        sizes["c"] = _ceil_div(sizes["n"], BLOCK)

    def lower(self) -> tuple[ir.Value, ir.Value]:
        """Returns the outputs and the final state."""
        if self.build.sizes["t"] == 0:
            return self.build.empty("bthv"), self._initial()[0]
        if self.by_step:
            out, final = self._step_by_step()
        else:
            out, final = self._chunked()
        return self._unpacked(out), final

    def _chunked(self) -> tuple[Array, ir.Value]:
        build, op, exclusive = self.build, self.op, self.exclusive
        q, k, v = self._queries("bnsgik"), self._packed(op.k, "bnsik"), self._packed(op.v, "bnsiv")
        decays = Decays(build, self.levels, self._factors("bnsi"))
        value_axis = decays.axis == "v"
        reads, writes, whole = decays.read(-1, exclusive), decays.after[-1], decays.whole()
        late_k, late_v = (k, build.times(v, writes)) if value_axis else (build.times(k, writes), v)
        update = build.contract(late_k, late_v, axes="bnskv")
        parts = [weighed(decays, triangle(decays, q, k, exclusive), v, exclusive)]
        if op.erase is None:
            entering, final = self._states(whole, update)
        else:
            erase, predict = self._packed(op.erase, "bnsik"), self._packed(op.predict, "bnsik")
            solved = inverse(build, self.levels, triangle(decays, predict, erase, True))
            known = weighed(decays, triangle(decays, predict, k, True), v, True)
            known = build.contract(renamed(solved, "i", "l"), renamed(known, "i", "j"), axes="bnslv")
            known = renamed(known, "l", "i")
            first = build.times(predict, decays.read(-1, True))
            depends = build.contract(renamed(solved, "i", "l"), renamed(first, "i", "j"), axes="bnslk")
            depends = renamed(depends, "l", "i")
            late_erase = build.times(erase, writes)
            update = build.contract(late_erase, known, axes="bnskv", start=update[0])
            change = build.contract(late_erase, renamed(depends, "k", "w"), axes="bnskw")
            entering, final = self._states_by_matrix(self._transition(whole, change), update)
            predicted = build.contract(depends, entering, axes="bnsiv", start=known[0])
            parts.append(weighed(decays, triangle(decays, q, erase, exclusive), predicted, exclusive))
        if value_axis:
            parts.append(build.times(build.contract(q, entering, axes="bnsgiv"), reads))
        else:
            parts.append(build.contract(build.times(q, reads), entering, axes="bnsgiv"))
        if op.bonus is not None:
            own = build.contract(q, (op.bonus, "sk"), k, axes="bnsgi")
            parts.append(build.contract(own, v, axes="bnsgiv"))
        return build.sum(*parts), final

    def _step_by_step(self) -> tuple[Array, ir.Value]:
        build, op = self.build, self.op
        rows = [self._queries("tbsgk"), self._packed(op.k, "tbsk"), self._packed(op.v, "tbsv")]
        rows += [self._packed(op.erase, "tbsk"), self._packed(op.predict, "tbsk")]
        decay = self._factors("tbs")
        assert decay is not None

        def step(t: ir.Value, state: ir.Value) -> tuple[ir.Value, ir.Value]:
            q, k, v, erase, predict, a = (build.row(array, t) for array in [*rows, decay])
            before = (state, "bskv")
            x = build.contract(predict, before, axes="bsv")
            after = build.times(before, a)
            after = build.contract(erase, x, axes="bskv", start=after[0])
            after = build.contract(k, v, axes="bskv", start=after[0])
            out = build.contract(q, before if self.exclusive else after, axes="bsgv")
            if op.bonus is not None:
                own = build.contract(q, (op.bonus, "sk"), k, axes="bsg")
                out = build.contract(own, v, axes="bsgv", start=out[0])
            return after[0], out[0]

        stack, final = self._stacked("t", self._initial()[0], "bsgv", step)
        return (stack, "tbsgv"), final

    # Operands

    def _queries(self, axes: str) -> Array:
        """Returns the queries with h split into s and g."""
        group = index(self.build.sizes["g"])
        head = lambda at: arith.addi(arith.muli(at("s"), group), at("g"))  # noqa: E731
        return self._gathered((self.op.q, "bthk"), axes, 0.0, head)

    def _packed(self, value: ir.Value, axes: str) -> Array:
        letters = "bts" + axes[-1] * (axes[-1] in "kv")
        return self._gathered((value, letters), axes, 0.0)

    def _factors(self, axes: str) -> Array | None:
        """Returns the decays as factors; 1 where a chunk is filled up."""
        if self.op.decay is None:
            return None
        letters = DECAY_AXES[self.axis].lower()
        log = bool(self.op.log_decay.value)
        axes += letters[3:]
        return self._gathered((self.op.decay, letters), axes, 1.0, of_value=math.exp if log else None)

    def _gathered(
        self,
        source: Array,
        axes: str,
        filling: float,
        head: Callable[[At], ir.Value] | None = None,
        of_value: Callable[[ir.Value], ir.Value] | None = None,
    ) -> Array:
        """Returns an operand in another order of axes, t by chunks where they are n and i, in the order of computation."""
        length, chunked = self.build.sizes["t"], "n" in axes

        def body(at: At) -> ir.Value:
            t = at("t") if not chunked else arith.addi(arith.muli(at("n"), index(self.steps)), at("i"))
            inside = arith.cmpi(arith.CmpIPredicate.ult, t, index(length))
            last = arith.subi(index(length), index(1))
            t = arith.minsi(t, last)
            place = {"t": arith.subi(last, t) if self.reverse else t}
            if head:
                place["h"] = head(at)
            value = pick(source, at, place)
            value = of_value(value) if of_value else value
            return arith.select(inside, value, self.build.number(filling)) if chunked else value

        return self.build.map([], axes, body)

    def _initial(self) -> Array:
        return (self.op.state, "bskv") if self.op.state is not None else self.build.filled("bskv", 0.0)

    def _unpacked(self, out: Array) -> ir.Value:
        """Returns the outputs ``bnsgiv`` (or ``tbsgv``) as ``bthv``, in the order of time."""
        last = arith.subi(index(self.build.sizes["t"]), index(1))
        group, steps = index(self.build.sizes["g"]), index(self.steps)

        def body(at: At) -> ir.Value:
            t = arith.subi(last, at("t")) if self.reverse else at("t")
            place = {"s": arith.divui(at("h"), group), "g": arith.remui(at("h"), group)}
            place |= {"t": t} if "t" in out[1] else {"n": arith.divui(t, steps), "i": arith.remui(t, steps)}
            return pick(out, at, place)

        return self.build.map([], "bthv", body)[0]

    # States at the seams of chunks

    def _states(self, decay: Array | None, update: Array) -> tuple[Array, ir.Value]:
        """Returns the state that enters each chunk, and the last: ``S_(n+1) = decay_n S_n + update_n``."""
        build, count, initial = self.build, self.build.sizes["n"], self._initial()
        none = index(0)
        if isinstance(count, int) and count <= BLOCK:
            entering = self._summed(
                "bnskv", update, decay, lambda at: pick(initial, at, {}), lambda at: (none, at("n"))
            )
            final = self._summed(
                "bskv", update, decay, lambda at: pick(initial, at, {}), lambda _: (none, index(count))
            )
            return entering, final[0]

        def block(at: At) -> tuple[ir.Value, ir.Value]:
            first = arith.muli(at("c"), index(BLOCK))
            return first, arith.minsi(arith.addi(first, index(BLOCK)), index(count))

        sums = self._summed("bcskv", update, decay, lambda _: build.number(0.0), block)
        products = None
        if decay is not None:
            axes = decay[1].replace("n", "c")
            products = self._summed(axes, None, decay, lambda _: build.number(1.0), block)
            products = renamed(products, "c", "n")
        sums = renamed(sums, "c", "n")
        blocks = self._summed(
            "bcskv", sums, products, lambda at: pick(initial, at, {}), lambda at: (none, at("c"))
        )
        final = self._summed(
            "bskv",
            sums,
            products,
            lambda at: pick(initial, at, {}),
            lambda _: (none, index(build.sizes["c"])),
        )

        def within(at: At) -> tuple[ir.Value, ir.Value]:
            return arith.muli(arith.divui(at("n"), index(BLOCK)), index(BLOCK)), at("n")

        entering = self._summed(
            "bnskv",
            update,
            decay,
            lambda at: pick(blocks, at, {"c": arith.divui(at("n"), index(BLOCK))}),
            within,
        )
        return entering, final[0]

    def _summed(
        self,
        axes: str,
        update: Array | None,
        decay: Array | None,
        start: Callable[[At], ir.Value],
        span: Callable[[At], tuple[ir.Value, ir.Value]],
    ) -> Array:
        """Returns ``x = decay_n x + update_n`` for n in a span, from a start, for each element by itself."""
        build = self.build

        def body(at: At) -> ir.Value:
            for letter in axes:  # asked for here: a loop inside the body cannot
                at(letter)
            low, high = span(at)
            loop = scf.ForOp(low, high, index(1), [start(at)])
            with ir.InsertionPoint(loop.body):
                value, place = loop.inner_iter_args[0], {"n": loop.induction_variable}
                if decay is not None:
                    value = _decayed(build, value, pick(decay, at, place))
                if update is not None:
                    value = arith.addf(value, pick(update, at, place))
                scf.YieldOp([value])
            result: ir.Value = loop.results[0]
            return result

        return build.map([], axes, body)

    def _transition(self, decay: Array | None, change: Array) -> Array:
        """Returns ``Diag(decay) + change``, ``nbskw``: what a chunk does to the state that enters it."""

        def body(at: At, value: ir.Value, *of_chunk: ir.Value) -> ir.Value:
            own = of_chunk[0] if of_chunk else self.build.number(1.0)
            diagonal = arith.cmpi(arith.CmpIPredicate.eq, at("k"), at("w"))
            return arith.addf(value, arith.select(diagonal, own, self.build.number(0.0)))

        return self.build.map([change, *([decay] if decay else [])], "nbskw", body)

    def _states_by_matrix(self, transition: Array, update: Array) -> tuple[Array, ir.Value]:
        """Returns the state that enters each chunk, and the last: ``S_(n+1) = transition_n S_n + update_n``."""
        build = self.build
        update = build.map([update], "nbskv", lambda _, value: value)

        def step(n: ir.Value, state: ir.Value) -> tuple[ir.Value, ir.Value]:
            added, _ = build.row(update, n)
            after, _ = build.contract(build.row(transition, n), (state, "bswv"), axes="bskv", start=added)
            return after, state

        stack, final = self._stacked("n", self._initial()[0], "bskv", step)
        return (stack, "nbskv"), final

    def _stacked(
        self,
        letter: str,
        state: ir.Value,
        axes: str,
        step: Callable[[ir.Value, ir.Value], tuple[ir.Value, ir.Value]],
    ) -> tuple[ir.Value, ir.Value]:
        """Runs ``state, row = step(i, state)`` over the size of a letter; returns the stacked rows and the last state.

        The loop is nested, about as long inside as outside: IREE copies a stack at every turn of the loop that fills it, which
        would make one loop quadratic. IREE 3.13 follows a dynamic size into a loop and out of it only where an op that is no
        loop makes the tensor: the state is copied between the two.
        """
        count = self.build.sizes[letter]
        if count == 1:
            final, only = step(index(0), state)
            shape = self.build.type(letter + axes)
            groups = basic.reassociation([[0, 1], *([d] for d in range(2, len(axes) + 1))])
            sizes = [n for a in axes if isinstance(n := self.build.sizes[a], ir.Value)]
            stack = tensor.ExpandShapeOp(shape, only, groups, sizes, list(shape.shape)).result
            return stack, final
        inner = _about_root(count)
        outer = arith.ceildivsi(index(count), inner)
        whole = Letters({**self.build.sizes, "x": outer, "y": inner}, self.build.element)
        zero, one = index(0), index(1)

        def copied(state: ir.Value) -> ir.Value:
            return whole.map([], "bskv", lambda at: pick((state, "bskv"), at, {}))[0]

        loop = scf.ForOp(zero, outer, one, [state, whole.empty("xy" + axes)])
        with ir.InsertionPoint(loop.body):
            first = arith.muli(loop.induction_variable, inner)
            turns = arith.minsi(inner, arith.subi(index(count), first))
            entering, stacks = loop.inner_iter_args
            nested = scf.ForOp(zero, turns, one, [copied(entering), whole.empty("y" + axes)])
            with ir.InsertionPoint(nested.body):
                carried, stack = nested.inner_iter_args
                carried, piece = step(arith.addi(first, nested.induction_variable), carried)
                stack = whole.with_row((stack, "y" + axes), nested.induction_variable, piece)
                scf.YieldOp([carried, stack])
            carried, part = nested.results
            stacks = whole.with_row((stacks, "xy" + axes), loop.induction_variable, part)
            scf.YieldOp([copied(carried), stacks])
        final, filled = loop.results
        blocks = (filled, "xy" + axes)

        def body(at: At) -> ir.Value:
            place = {"x": arith.divui(at(letter), inner), "y": arith.remui(at(letter), inner)}
            return pick(blocks, at, place)

        return self.build.map([], letter + axes, body)[0], final


def _sizes(op: Any) -> dict[str, Any]:
    """Returns the size of every letter of the operands: a number where any of them knows it."""
    operands = [(op.q, "bthk"), (op.k, "btsk"), (op.v, "btsv")]
    operands += [(op.decay, DECAY_AXES[op.decay_axis.value].lower()), (op.state, "bskv")]
    operands += [(op.o, "bthv"), (op.final_state, "bskv")]
    found: dict[str, Any] = {}
    for value, letters in operands:
        if value is None:
            continue
        for letter, size in zip(letters, ir.RankedTensorType(value.type).shape, strict=True):
            if size != ir.ShapedType.get_dynamic_size():
                found[letter] = size
    if missing := [name for name in "hskv" if name not in found]:
        raise UnsupportedOp(f"a recurrence of dynamic size {', '.join(missing)}", hint="static heads")
    for letter, axis in (("b", 0), ("t", 1)):
        found.setdefault(letter, basic.size(op.q, axis))
    return found


def _decayed(build: Letters, state: ir.Value, factor: ir.Value) -> ir.Value:
    """Returns an entry of a state times a product of decays; 0 stays 0 though the product be infinite."""
    zero = build.number(0.0)
    silent = arith.cmpf(arith.CmpFPredicate.OEQ, state, zero)
    result: ir.Value = arith.select(silent, zero, arith.mulf(state, factor))
    return result


def _ceil_div(size: Any, by: int) -> Any:
    if isinstance(size, int):
        return -(-size // by)
    return size if by == 1 else arith.ceildivsi(size, index(by))


def _about_root(count: int | ir.Value) -> ir.Value:
    """Returns a number near the square root of ``count``: the power of two that halves its digits, 8 at least."""
    if isinstance(count, int):
        return index(max(8, 1 << (count.bit_length() + 1) // 2))
    root = index(8)
    for digits in range(4, 12):
        many = arith.cmpi(arith.CmpIPredicate.uge, count, index(1 << (2 * digits - 1)))
        root = arith.select(many, index(1 << digits), root)
    return root
