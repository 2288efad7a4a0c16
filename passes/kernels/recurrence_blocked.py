"""The kernel for linear recurrences without a rank-one part, as ``recurrence`` tells it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes.kernels.builders import (
    Index,
    add,
    f32,
    folded,
    get,
    index,
    load,
    loop,
    minimum,
    mul,
    no_larger,
    prefetch,
    put,
    reduced,
    reduced_float,
    scratch,
    splat,
    store,
    sub,
    when,
)
from spikingbrain.passes.kernels.recurrence_base import Piece, RecurrenceKernel, each_tile, pieces

if TYPE_CHECKING:
    from spikingbrain.passes.kernels.recurrence import Problem

KEY_BLOCK = 32  # rows of the state whose keys and queries are prepared together

# A product of decays stays within 1e-13 .. 1e13 where it divides keys: the sum of its square and that of its inverse,
# over a chunk's tokens, tells. Keys, values and states up to 1e25 then keep clear of f32's range.
LARGEST_SQUARES = 1e26


def scratch_shapes(problem: Problem, tokens: int, columns: int) -> dict[str, list[int]]:
    """Returns the buffers of a kernel that takes so many tokens and columns at a time."""
    rows, group = min(KEY_BLOCK, problem.key_size), problem.group
    shapes = {
        "values": [tokens, columns],
        "outputs": [tokens, group, columns],
        "keys": [tokens, rows],
        "queries": [tokens, group, rows],
    }
    if problem.decay_axis == "value":
        shapes |= {"decays": [tokens, columns], "last": [columns]}
    elif problem.decay_axis != "none":
        shapes |= {"decays": [tokens, rows], "last": [rows]}
    if problem.bonus:
        shapes["weights"] = [tokens, group]
    return shapes


class BlockedKernel(RecurrenceKernel):
    """The blocked schedule.

    A chunk's steps are counted from its first; rows of a key block and columns of the workgroup likewise. Decays are
    handled in one of two ways. *Scaled*: with A the product of the chunk's decays so far, the kernel holds ``S / A``,
    which takes ``k / A`` and is read by ``q * A``. *Plain*: the state is multiplied by each decay.
    """

    def build(self) -> None:
        p, s = self.problem, self.schedule
        self.first_column = mul(self.block, s.columns)
        self.columns = pieces(s.columns, s.lanes)
        shapes = scratch_shapes(p, s.tokens, s.columns)
        buffers = scratch([(shape, ir.F32Type.get()) for shape in shapes.values()])
        self.buffers = dict(zip(shapes, buffers, strict=True))
        loop(0, self.length, s.tokens, self._chunk)

    def _chunk(self, first: ir.Value) -> None:
        p = self.problem
        count = minimum(sub(self.length, first), self.schedule.tokens)
        safe = None
        if p.decay_axis == "value":
            safe = self._gather_values_scaled(first, count)
            unsafe = arith.xori(safe, arith.constant(safe.type, 1))
            when(unsafe, lambda: self._gather_values(first, count))
        else:
            self._gather_values(first, count)
        if p.bonus:
            self._gather_weights(first, count)
        whole = p.key_size // KEY_BLOCK * KEY_BLOCK
        if whole:
            loop(0, whole, KEY_BLOCK, lambda row: self._key_block(first, count, row, KEY_BLOCK, safe))
        if p.key_size > whole:
            self._key_block(first, count, index(whole), p.key_size - whole, safe)
        self._scatter_outputs(first, count, safe)

    def _later(self, first: ir.Value, n: ir.Value) -> ir.Value:
        """Returns the token that is fetched ahead in a step: that of the next chunk."""
        return self.token(minimum(add(add(first, n), self.schedule.tokens), sub(self.length, 1)))

    # Values and outputs

    def _gather_values(self, first: ir.Value, count: ir.Value) -> None:
        """Copies the chunk's values to scratch, with the factors of a value decay, and clears its outputs."""

        def step(n: ir.Value) -> None:
            token, later = self.token(add(first, n)), self._later(first, n)

            def tile(piece: Piece, column: ir.Value) -> None:
                at = [self.batch, token, self.number, add(self.first_column, column)]
                prefetch(self.v, [self.batch, later, *at[2:]])
                self.each_query(lambda g: prefetch(self.o, [self.batch, later, self.head(g), at[3]], True))
                store(load(self.v, at, piece.lanes), self.buffers["values"], [n, column])
                if self.problem.decay_axis == "value":
                    factor = self.factor(load(self.decay, at, piece.lanes))
                    store(factor, self.buffers["decays"], [n, column])
                self._clear_outputs(n, piece, column)

            each_tile(self.columns, tile)

        loop(0, count, 1, step)

    def _clear_outputs(self, n: ir.Value, piece: Piece, column: ir.Value) -> None:
        zero = splat(0.0, piece.lanes)
        self.each_query(lambda g: store(zero, self.buffers["outputs"], [n, g, column]))

    def _gather_values_scaled(self, first: ir.Value, count: ir.Value) -> ir.Value:
        """Copies values divided by the decays so far; returns whether that is safe.

        The factors in scratch are what outputs are to be multiplied with.
        """
        safe = []

        def tile(piece: Piece, column: ir.Value) -> None:
            def step(n: ir.Value, *carried: ir.Value) -> list[ir.Value]:
                at = [self.batch, self.token(add(first, n)), self.number, add(self.first_column, column)]
                before, after, inverse, carried = self._decayed(load(self.decay, at, piece.lanes), carried)
                value = arith.mulf(load(self.v, at, piece.lanes), inverse)
                store(value, self.buffers["values"], [n, column])
                factor = before if self.problem.exclusive else after
                store(factor, self.buffers["decays"], [n, column])
                self._clear_outputs(n, piece, column)
                return carried

            _, total, squares = loop(0, count, 1, step, self._undecayed(piece.lanes))
            store(total, self.buffers["last"], [column])
            safe.append(self._is_safe(squares))

        for piece in self.columns:
            for i in range(piece.count):
                tile(piece, index(piece.start + i * piece.width))
        return folded(arith.andi, safe)

    def _gather_weights(self, first: ir.Value, count: ir.Value) -> None:
        """Leaves ``q . (bonus * k)`` of every step and query in scratch."""
        p = self.problem

        def step(n: ir.Value) -> None:
            token = self.token(add(first, n))

            def query(g: Index) -> None:
                weight = f32(0.0)
                for piece in pieces(p.key_size, self.schedule.lanes):

                    def tile(row: ir.Value, total: ir.Value, lanes: int = piece.lanes) -> list[ir.Value]:
                        bonus = load(self.bonus, [self.number, row], lanes)
                        key = load(self.k, [self.batch, token, self.number, row], lanes)
                        q = load(self.q, [self.batch, token, self.head(g), row], lanes)
                        return [self.fma(q, arith.mulf(bonus, key), total)]

                    end = piece.start + piece.count * piece.lanes
                    (total,) = loop(piece.start, end, piece.lanes, tile, [splat(0.0, piece.lanes)])
                    weight = arith.addf(weight, reduced_float(arith.addf, total))
                put(weight, self.buffers["weights"], [n, g])

            self.each_query(query)

        loop(0, count, 1, step)

    def _scatter_outputs(self, first: ir.Value, count: ir.Value, safe: ir.Value | None) -> None:
        def steps(scaled: bool) -> None:
            def step(n: ir.Value) -> None:
                token = self.token(add(first, n))

                def tile(piece: Piece, column: ir.Value) -> None:
                    to = add(self.first_column, column)

                    def query(g: Index) -> None:
                        output = load(self.buffers["outputs"], [n, g, column], piece.lanes)
                        if scaled:
                            factor = load(self.buffers["decays"], [n, column], piece.lanes)
                            output = arith.mulf(output, factor)
                        if self.problem.bonus:
                            value = load(self.v, [self.batch, token, self.number, to], piece.lanes)
                            weight = splat(get(self.buffers["weights"], [n, g]), piece.lanes)
                            output = self.fma(weight, value, output)
                        store(output, self.o, [self.batch, token, self.head(g), to])

                    self.each_query(query)

                each_tile(self.columns, tile)

            loop(0, count, 1, step)

        if safe is None:
            steps(False)
        else:
            when(safe, lambda: steps(True), lambda: steps(False))

    # Keys and queries

    def _key_block(
        self, first: ir.Value, count: ir.Value, row: ir.Value, rows: int, values_safe: ir.Value | None
    ) -> None:
        """Adds what a block of the state's rows gives to the outputs, and moves these rows on by a chunk."""

        def plain() -> None:
            self._gather_keys(first, count, row, rows)
            self._tiles(count, row, rows, scaled=False)

        if self.problem.decay_axis == "none":
            plain()
        elif self.problem.decay_axis == "value":
            self._gather_keys(first, count, row, rows)
            when(
                values_safe,
                lambda: self._tiles(count, row, rows, scaled=True),
                lambda: self._tiles(count, row, rows, scaled=False),
            )
        else:
            safe = self._gather_keys_scaled(first, count, row, rows)
            when(safe, lambda: self._tiles(count, row, rows, scaled=True), plain)

    def _decay_of_rows(self, token: ir.Value, row: Index, lanes: int) -> ir.Value:
        at = [self.batch, token, self.number]
        if self.problem.decay_axis == "head":
            return splat(get(self.decay, at), lanes)
        return load(self.decay, [*at, row], lanes)

    def _gather_keys(self, first: ir.Value, count: ir.Value, row: ir.Value, rows: int) -> None:
        """Copies the chunk's keys and queries to scratch, with the factors of a decay of rows."""

        def step(n: ir.Value) -> None:
            token, later = self.token(add(first, n)), self._later(first, n)

            def tile(piece: Piece, i: ir.Value) -> None:
                at = add(row, i)
                prefetch(self.k, [self.batch, later, self.number, at])
                self.each_query(lambda g: prefetch(self.q, [self.batch, later, self.head(g), at]))
                key = load(self.k, [self.batch, token, self.number, at], piece.lanes)
                store(key, self.buffers["keys"], [n, i])
                if self.problem.decay_axis in ("head", "key"):
                    factor = self.factor(self._decay_of_rows(token, at, piece.lanes))
                    store(factor, self.buffers["decays"], [n, i])

                def query(g: Index) -> None:
                    q = load(self.q, [self.batch, token, self.head(g), at], piece.lanes)
                    store(q, self.buffers["queries"], [n, g, i])

                self.each_query(query)

            each_tile(pieces(rows, self.schedule.lanes), tile)

        loop(0, count, 1, step)

    def _gather_keys_scaled(self, first: ir.Value, count: ir.Value, row: ir.Value, rows: int) -> ir.Value:
        """Copies keys divided, and queries multiplied, by the decays so far; returns whether that is safe."""
        safe = []

        def tile(piece: Piece, i: int) -> None:
            at = add(row, i)

            def step(n: ir.Value, *carried: ir.Value) -> list[ir.Value]:
                token, later = self.token(add(first, n)), self._later(first, n)
                prefetch(self.k, [self.batch, later, self.number, at])
                if self.problem.decay_axis == "key":
                    prefetch(self.decay, [self.batch, later, self.number, at])
                self.each_query(lambda g: prefetch(self.q, [self.batch, later, self.head(g), at]))
                decay = self._decay_of_rows(token, at, piece.lanes)
                before, after, inverse, carried = self._decayed(decay, carried)
                key = load(self.k, [self.batch, token, self.number, at], piece.lanes)
                store(arith.mulf(key, inverse), self.buffers["keys"], [n, i])
                factor = before if self.problem.exclusive else after

                def query(g: Index) -> None:
                    q = load(self.q, [self.batch, token, self.head(g), at], piece.lanes)
                    store(arith.mulf(q, factor), self.buffers["queries"], [n, g, i])

                self.each_query(query)
                return carried

            _, total, squares = loop(0, count, 1, step, self._undecayed(piece.lanes))
            store(total, self.buffers["last"], [i])
            safe.append(self._is_safe(squares))

        for piece in pieces(rows, self.schedule.lanes):
            for i in range(piece.count):
                tile(piece, piece.start + i * piece.lanes)
        return folded(arith.andi, safe)

    # Products of decays: carried are their logarithm (or themselves), their value, and the sum of squares

    def _undecayed(self, lanes: int) -> list[ir.Value]:
        one = splat(1.0, lanes)
        return [splat(0.0, lanes) if self.problem.log_decay else one, one, splat(0.0, lanes)]

    def _decayed(
        self, decay: ir.Value, carried: tuple[ir.Value, ...]
    ) -> tuple[ir.Value, ir.Value, ir.Value, list[ir.Value]]:
        """Returns the product before and after a step, the inverse of the latter, and what is carried on.

        Logarithms are summed, which is more exact than a product of powers.
        """
        total, before, squares = carried
        total = arith.addf(total, decay) if self.problem.log_decay else arith.mulf(total, decay)
        after = self.factor(total)
        inverse = arith.divf(splat(1.0, ir.VectorType(after.type).shape[0]), after)
        squares = self.fma(inverse, inverse, self.fma(after, after, squares))
        return before, after, inverse, [total, after, squares]

    def _is_safe(self, squares: ir.Value) -> ir.Value:
        lanes = ir.VectorType(squares.type).shape[0]
        return reduced("and", no_larger(squares, splat(LARGEST_SQUARES, lanes)))

    # The state

    def _tiles(self, count: ir.Value, row: ir.Value, rows: int, scaled: bool) -> None:
        s = self.schedule

        def visit(i: ir.Value, height: int) -> None:
            each_tile(
                pieces(s.columns, s.lanes, s.vectors),
                lambda piece, column: self._tile(count, row, i, height, piece, column, scaled),
            )

        for piece in pieces(rows, s.rows):  # lanes are rows here
            end = piece.start + piece.count * piece.lanes
            loop(piece.start, end, piece.lanes, functools.partial(visit, height=piece.lanes))

    def _tile(
        self,
        count: ir.Value,
        row: ir.Value,
        i: ir.Value,
        height: int,
        piece: Piece,
        column: ir.Value,
        scaled: bool,
    ) -> None:
        """Takes a tile of the state through the chunk, in registers.

        Every row is read and written once per chunk; outputs are summed in scratch.
        """
        p, lanes, buffers = self.problem, piece.lanes, self.buffers
        at = [add(column, n * lanes) for n in range(piece.vectors)]
        rows = [add(i, r) for r in range(height)]
        places = [[self.batch, self.number, add(row, r), add(self.first_column, a)] for r in rows for a in at]
        by_row = p.decay_axis in ("head", "key")

        def step(n: ir.Value, *carried: ir.Value) -> list[ir.Value]:
            state = list(carried)

            def read() -> None:
                def query(g: Index) -> None:
                    outputs = [load(buffers["outputs"], [n, g, a], lanes) for a in at]
                    for r in range(height):
                        q = splat(get(buffers["queries"], [n, g, rows[r]]), lanes)
                        part = state[r * piece.vectors : (r + 1) * piece.vectors]
                        outputs = [self.fma(q, x, o) for x, o in zip(part, outputs, strict=True)]
                    for output, a in zip(outputs, at, strict=True):
                        store(output, buffers["outputs"], [n, g, a])

                self.each_query(query)

            def update() -> None:
                values = [load(buffers["values"], [n, a], lanes) for a in at]
                decays = []
                if p.decay_axis == "value" and not scaled:
                    decays = [load(buffers["decays"], [n, a], lanes) for a in at]
                for r in range(height):
                    k = splat(get(buffers["keys"], [n, rows[r]]), lanes)
                    if by_row and not scaled:
                        decays = [splat(get(buffers["decays"], [n, rows[r]]), lanes)] * piece.vectors
                    for c, value in enumerate(values):
                        x = state[r * piece.vectors + c]
                        x = arith.mulf(decays[c], x) if decays else x
                        state[r * piece.vectors + c] = self.fma(k, value, x)

            for act in (read, update) if p.exclusive else (update, read):
                act()
            return state

        state = loop(0, count, 1, step, [load(self.state, place, lanes) for place in places])
        if scaled and by_row:
            factors = [splat(get(buffers["last"], [r]), lanes) for r in rows for _ in at]
            state = [arith.mulf(f, x) for f, x in zip(factors, state, strict=True)]
        elif scaled:
            factors = [load(buffers["last"], [a], lanes) for _ in rows for a in at]
            state = [arith.mulf(f, x) for f, x in zip(factors, state, strict=True)]
        for x, place in zip(state, places, strict=True):
            store(x, self.state, place)
