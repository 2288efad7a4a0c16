"""The attention kernel for many queries."""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes.kernels.attention_base import FLOOR, MASKED, MAX_POSITION, AttentionKernel, Block
from spikingbrain.passes.kernels.builders import (
    LINE_BYTES,
    Index,
    add,
    compare,
    f32,
    floor_div,
    get,
    i32,
    i32_type,
    index,
    larger,
    load,
    loop,
    minimum,
    mul,
    put,
    rem,
    round_down,
    round_up,
    scratch,
    size,
    splat,
    store,
    sub,
    transposed,
    when,
)


def scratch_bytes(head_size: int, rows: int, key_block: int) -> int:
    """Returns the scratch of a kernel: transposed queries, scores, four values per row, positions."""
    return 4 * (rows * (head_size + key_block + 4) + key_block) + 8 * LINE_BYTES


class PrefillKernel(AttentionKernel):
    """The prefill schedule, as ``attention`` tells it. A row is a token and a query head of the key head."""

    def build(self) -> None:
        p, s = self.problem, self.schedule
        block, self.key_head, self.batch = self.workgroup
        self.first_row = mul(block, s.rows)
        self.row_count = minimum(sub(mul(size(self.query, 1), p.group), self.first_row), s.rows)
        float_type = ir.F32Type.get()
        (
            self.columns,  # queries, transposed and scaled
            self.scores,
            self.row_positions,
            self.maxima,
            self.sums,
            self.factors,
            positions,
        ) = scratch(
            [
                ([p.head_size, s.rows], float_type),
                ([s.key_block, s.rows], float_type),
                ([s.rows], i32_type()),
                *[([s.rows], float_type)] * 3,
                ([s.key_block], i32_type()),
            ]
        )
        first, last = self._gather_queries()

        def visit(block: Block) -> None:
            when(
                block.whole,
                lambda: self._score_block(block, None),
                lambda: self._score_block(block, positions),
            )
            self._accumulate_values(block)

        self.visible_blocks(s.key_block, positions, first, last, visit)
        self._normalise_rows()

    def _row(self, row: Index) -> tuple[ir.Value, ir.Value]:
        """Returns token and query head of a row of the block."""
        flat, group = add(self.first_row, row), self.problem.group
        head = mul(self.key_head, group)
        return (flat, head) if group == 1 else (floor_div(flat, group), add(head, rem(flat, group)))

    def _gather_queries(self) -> tuple[ir.Value, ir.Value]:
        """Fills the scratch of the block's queries; returns their smallest and largest position.

        Lanes beyond the last row repeat it, and are never stored to the result.
        """
        p, s = self.problem, self.schedule
        scale = f32(self.score_scale())
        whole_squares = p.head_size % s.lanes == 0

        def lanes_of(start: ir.Value, low: ir.Value, high: ir.Value) -> list[ir.Value]:
            tokens = []
            for lane in range(s.lanes):
                row = minimum(add(start, lane), sub(self.row_count, 1))
                token, head = self._row(row)
                tokens.append((token, head))
                position = self.position(self.query_positions, [self.batch, token])
                put(position, self.row_positions, [add(start, lane)])
                low, high = arith.minsi(low, position), arith.maxsi(high, position)
            if whole_squares:

                def square(d: ir.Value) -> None:
                    rows = [load(self.query, [self.batch, t, h, d], s.lanes) for t, h in tokens]
                    for i, column in enumerate(transposed(rows)):
                        scaled = arith.mulf(column, splat(scale, s.lanes))
                        store(scaled, self.columns, [add(d, i), start])

                loop(0, p.head_size, s.lanes, square)
            else:

                def column(d: ir.Value) -> None:
                    for lane, (token, head) in enumerate(tokens):
                        value = arith.mulf(get(self.query, [self.batch, token, head, d]), scale)
                        put(value, self.columns, [d, add(start, lane)])

                loop(0, p.head_size, 1, column)
            store(splat(FLOOR, s.lanes), self.maxima, [start])
            store(splat(0.0, s.lanes), self.sums, [start])
            return [low, high]

        def clear(row: ir.Value) -> None:
            token, head = self._row(row)
            for d in range(0, p.head_size, s.head_lanes):
                store(splat(0.0, s.head_lanes), self.out, [self.batch, token, head, d])

        filled = round_up(self.row_count, s.row_vectors * s.lanes)
        low, high = loop(0, filled, s.lanes, lanes_of, [i32(MAX_POSITION), i32(-1)])
        loop(0, self.row_count, 1, clear)
        return low, high

    def _score_block(self, block: Block, positions: ir.Value | None) -> None:
        """Leaves the block's unnormalised probabilities in scratch; updates all maxima and sums."""
        p, s = self.problem, self.schedule
        begin = round_down(block.begin, s.key_tile)

        def row_group(row: ir.Value, vectors: int) -> None:
            at = [add(row, v * s.lanes) for v in range(vectors)]
            old = [load(self.maxima, [a], s.lanes) for a in at]
            queries = [load(self.row_positions, [a], s.lanes) for a in at] if positions is not None else []

            def tile(key: ir.Value, *largest: ir.Value) -> list[ir.Value]:
                # Beyond the segment's end the last key is read again; its position in scratch is -1.
                places = [minimum(add(add(block.start, key), i), block.last_key) for i in range(s.key_tile)]

                def products(d: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                    columns = [load(self.columns, [d, a], s.lanes) for a in at]
                    result = []
                    for i in range(s.key_tile):
                        k = splat(get(block.keys, [self.batch, places[i], self.key_head, d]), s.lanes)
                        base = i * vectors
                        result += [self.fma(k, c, sums[base + v]) for v, c in enumerate(columns)]
                    return result

                zeros = [splat(0.0, s.lanes)] * (s.key_tile * vectors)
                scores = loop(0, p.head_size, 1, products, zeros)
                maxima = list(largest)
                for i in range(s.key_tile):
                    position = (
                        splat(get(positions, [add(key, i)]), s.lanes) if positions is not None else None
                    )
                    for v in range(vectors):
                        score = scores[i * vectors + v]
                        if position is not None:
                            seen = self.visible(position, queries[v], queries[v])
                            score = arith.select(seen, score, splat(MASKED, s.lanes))
                        maxima[v] = larger(score, maxima[v])
                        store(score, self.scores, [add(key, i), at[v]])
                return maxima

            new = loop(begin, block.end, s.key_tile, tile, old)

            def probabilities(key: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                result = []
                for v, total in enumerate(sums):
                    exponent = arith.subf(load(self.scores, [key, at[v]], s.lanes), new[v])
                    probability = self.exp2(exponent)
                    store(probability, self.scores, [key, at[v]])
                    result.append(arith.addf(total, probability))
                return result

            zeros = [splat(0.0, s.lanes)] * vectors
            sums = loop(block.begin, block.end, 1, probabilities, zeros)
            for v, a in enumerate(at):
                factor = self.exp2(arith.subf(old[v], new[v]))
                store(new[v], self.maxima, [a])
                store(factor, self.factors, [a])
                store(self.fma(load(self.sums, [a], s.lanes), factor, sums[v]), self.sums, [a])

        def row_groups() -> None:
            step = s.row_vectors * s.lanes
            loop(0, self.row_count, step, lambda row: row_group(row, s.row_vectors))

        if s.row_vectors == 1:
            row_groups()
        else:  # few rows, of a short time or at the end of a long one
            few = compare("sle", self.row_count, index(s.lanes))
            when(few, lambda: row_group(index(0), 1), row_groups)

    def _accumulate_values(self, block: Block) -> None:
        """Scales all outputs to the new maxima and adds the block's probabilities times its values."""
        s = self.schedule
        width = s.head_lanes * s.value_vectors

        def row_tile(row: ir.Value, rows: int) -> None:
            places = [self._row(add(row, i)) for i in range(rows)]

            def head_part(d: ir.Value) -> None:
                at = [add(d, v * s.head_lanes) for v in range(s.value_vectors)]
                sums = []
                for i, (token, head) in enumerate(places):
                    factor = splat(get(self.factors, [add(row, i)]), s.head_lanes)
                    for a in at:
                        value = load(self.out, [self.batch, token, head, a], s.head_lanes)
                        sums.append(arith.mulf(value, factor))

                def products(key: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                    place = [self.batch, add(block.start, key), self.key_head]
                    loaded = [load(block.values, [*place, a], s.head_lanes) for a in at]
                    result = []
                    for i in range(rows):
                        probability = splat(get(self.scores, [key, add(row, i)]), s.head_lanes)
                        base = i * s.value_vectors
                        result += [self.fma(probability, x, sums[base + v]) for v, x in enumerate(loaded)]
                    return result

                sums = loop(block.begin, block.end, 1, products, sums)
                for i, (token, head) in enumerate(places):
                    for v, a in enumerate(at):
                        store(sums[i * s.value_vectors + v], self.out, [self.batch, token, head, a])

            loop(0, self.problem.head_size, width, head_part)

        whole = round_down(self.row_count, s.value_rows)
        loop(0, whole, s.value_rows, lambda row: row_tile(row, s.value_rows))
        loop(whole, self.row_count, 1, lambda row: row_tile(row, 1))

    def _normalise_rows(self) -> None:
        s = self.schedule

        def row_body(row: ir.Value) -> None:
            token, head = self._row(row)
            factor = splat(self.inverse(get(self.sums, [row])), s.head_lanes)
            for d in range(0, self.problem.head_size, s.head_lanes):
                at = [self.batch, token, head, d]
                store(arith.mulf(load(self.out, at, s.head_lanes), factor), self.out, at)

        loop(0, self.row_count, 1, row_body)
