"""The attention kernel for many queries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes.kernels.attention_base import (
    FLOOR,
    MASKED,
    AttentionKernel,
    Block,
    Segment,
    Span,
    is_narrow,
    widened,
)
from spikingbrain.passes.kernels.attention_bounds import MAX_POSITION
from spikingbrain.passes.kernels.builders import (
    LINE_BYTES,
    Index,
    add,
    compare,
    f32,
    floor_div,
    folded,
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
    reduced,
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


def scratch_bytes(head_size: int, rows: int, key_block: int, packed_keys: int) -> int:
    """Returns the scratch of a kernel.

    That is transposed queries, scores, four values per row, positions, the spans of at most a vector of rows per row,
    and keys as f32.
    """
    return (
        4 * (rows * (head_size + key_block + 4 + 1) + key_block + packed_keys * head_size) + 10 * LINE_BYTES
    )


class PrefillKernel(AttentionKernel):
    """The prefill schedule, as ``attention`` tells it. A row is a token and a query head of the key head."""

    def build(self) -> None:
        p, s = self.problem, self.schedule
        block, self.key_head, self.batch = self.workgroup
        self.first_row = mul(block, s.rows)
        self.row_count = minimum(sub(mul(size(self.query, 1), p.group), self.first_row), s.rows)
        float_type, groups = ir.F32Type.get(), s.rows // s.span_rows
        (
            self.columns,  # queries, transposed and scaled
            self.scores,
            self.row_positions,
            self.maxima,
            self.sums,
            self.factors,
            self.spans,  # begin and end of the keys that some rows see of the block
            self.positions,  # of the block's keys
            self.packed,
        ) = scratch(
            [
                ([p.head_size, s.rows], float_type),
                ([s.key_block, s.rows], float_type),
                ([s.rows], i32_type()),
                *[([s.rows], float_type)] * 3,
                ([groups, 2], i32_type()),
                ([s.key_block], i32_type()),
                ([s.packed_keys, p.head_size], float_type),
            ]
        )
        first, last = self._gather_queries()

        def visit(block: Block) -> None:
            self._score_block(block)
            self._accumulate_values(block)

        self.visible_blocks(s.key_block, self.positions, first, last, visit)
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

    def _score_block(self, block: Block) -> None:
        """Leaves the block's unnormalised probabilities in scratch; updates spans, maxima and sums."""
        s = self.schedule

        def rows(masked: bool) -> None:
            loop(0, self.row_count, s.span_rows, functools.partial(self._note_span, masked))

            def several() -> None:
                step = s.row_vectors * s.lanes
                loop(0, self.row_count, step, lambda row: self._score_rows(block, row, s.row_vectors, masked))

            if s.row_vectors == 1:
                several()
            else:  # few rows, of a short time or at the end of a long one
                few = compare("sle", self.row_count, index(s.lanes))
                when(few, lambda: self._score_rows(block, index(0), 1, masked), several)

        when(block.whole, lambda: rows(False), lambda: rows(True))

    def _note_span(self, masked: bool, row: ir.Value) -> None:
        """Notes which keys of the block some of ``span_rows`` rows see."""
        s = self.schedule
        span = Span(index(0), index(s.key_block))
        if masked:
            parts = [load(self.row_positions, [add(row, i)], s.lanes) for i in range(0, s.span_rows, s.lanes)]
            bounds = (
                reduced("minsi", folded(arith.minsi, parts)),
                reduced("maxsi", folded(arith.maxsi, parts)),
            )
            span = self.span(self.positions, s.key_block, *bounds)
        for i, bound in enumerate((span.begin, span.end)):
            put(arith.index_cast(i32_type(), bound), self.spans, [floor_div(row, s.span_rows), i])

    def _score_rows(self, block: Block, row: ir.Value, vectors: int, masked: bool) -> None:
        """Does so for a few vectors of rows."""
        s, span = self.schedule, block.span
        at = [add(row, v * s.lanes) for v in range(vectors)]
        old = [load(self.maxima, [a], s.lanes) for a in at]
        queries = [load(self.row_positions, [a], s.lanes) for a in at] if masked else []
        tile = functools.partial(self._score_tile, block, at, queries)
        begin = round_down(span.begin, s.key_tile)
        new = loop(begin, span.end, s.key_tile, tile, old)

        def probabilities(key: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            result = []
            for v, total in enumerate(sums):
                exponent = arith.subf(load(self.scores, [key, at[v]], s.lanes), new[v])
                probability = self.exp2(exponent)
                store(probability, self.scores, [key, at[v]])
                result.append(arith.addf(total, probability))
            return result

        zeros = [splat(0.0, s.lanes)] * vectors
        sums = loop(span.begin, span.end, 1, probabilities, zeros)
        for v, a in enumerate(at):
            factor = self.exp2(arith.subf(old[v], new[v]))
            store(new[v], self.maxima, [a])
            store(factor, self.factors, [a])
            store(self.fma(load(self.sums, [a], s.lanes), factor, sums[v]), self.sums, [a])

    def _score_tile(
        self,
        block: Block,
        at: Sequence[ir.Value],
        queries: Sequence[ir.Value],
        key: ir.Value,
        *largest: ir.Value,
    ) -> list[ir.Value]:
        """Stores the scores of ``key_tile`` keys, masked if there are positions of ``queries``; returns new maxima."""
        p, s = self.problem, self.schedule
        # Beyond the segment's end the last key is read again; its position in scratch is -1.
        places = [minimum(add(add(block.start, key), i), block.last_key) for i in range(s.key_tile)]
        value_at = self._key_values(block.segment, places)

        def products(d: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            columns = [load(self.columns, [d, a], s.lanes) for a in at]
            result = []
            for i in range(s.key_tile):
                k = splat(value_at(i, d), s.lanes)
                base = i * len(at)
                result += [self.fma(k, c, sums[base + v]) for v, c in enumerate(columns)]
            return result

        zeros = [splat(0.0, s.lanes)] * (s.key_tile * len(at))
        scores = loop(0, p.head_size, 1, products, zeros)
        maxima = list(largest)
        for i in range(s.key_tile):
            position = splat(get(self.positions, [add(key, i)]), s.lanes) if queries else None
            for v in range(len(at)):
                score = scores[i * len(at) + v]
                if position is not None:
                    seen = self.visible(position, queries[v], queries[v])
                    score = arith.select(seen, score, splat(MASKED, s.lanes))
                maxima[v] = larger(score, maxima[v])
                store(score, self.scores, [add(key, i), at[v]])
        return maxima

    def _key_values(
        self, segment: Segment, places: Sequence[ir.Value]
    ) -> Callable[[int, ir.Value], ir.Value]:
        """Returns a function from one of a tile's keys and a channel to a value, after it has made them f32."""
        p, s = self.problem, self.schedule
        if not is_narrow(segment.keys):
            return lambda i, d: get(segment.keys, [self.batch, places[i], self.key_head, d])

        def pack(d: ir.Value) -> None:
            for i, place in enumerate(places):
                row = self.read(segment.keys, segment.key_scales, [self.batch, place, self.key_head], d)
                store(row, self.packed, [i, d])

        loop(0, p.head_size, s.head_lanes, pack)
        return lambda i, d: get(self.packed, [i, d])

    def read(
        self, source: ir.Value, scales: ir.Value | None, row: Sequence[Index], channel: Index
    ) -> ir.Value:
        """Returns a vector of a row's channels as f32, codes times their scale."""
        lanes = self.schedule.head_lanes
        value = widened(load(source, [*row, channel], lanes))
        return value if scales is None else arith.mulf(value, splat(get(scales, row), lanes))

    def _accumulate_values(self, block: Block) -> None:
        """Scales all outputs to the new maxima and adds the block's probabilities times its values."""
        s, segment = self.schedule, block.segment
        width = s.head_lanes * s.value_vectors

        def row_tile(rows: int, span: Span, row: ir.Value) -> None:
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
                    loaded = [self.read(segment.values, segment.value_scales, place, a) for a in at]
                    result = []
                    for i in range(rows):
                        probability = splat(get(self.scores, [key, add(row, i)]), s.head_lanes)
                        base = i * s.value_vectors
                        result += [self.fma(probability, x, sums[base + v]) for v, x in enumerate(loaded)]
                    return result

                sums = loop(span.begin, span.end, 1, products, sums)
                for i, (token, head) in enumerate(places):
                    for v, a in enumerate(at):
                        store(sums[i * s.value_vectors + v], self.out, [self.batch, token, head, a])

            loop(0, self.problem.head_size, width, head_part)

        def group(row: ir.Value) -> None:
            bounds = [get(self.spans, [floor_div(row, s.span_rows), i]) for i in range(2)]
            span = Span(*(arith.index_cast(ir.IndexType.get(), bound) for bound in bounds))

            def some() -> None:
                end = minimum(add(row, s.span_rows), self.row_count)
                full = add(row, round_down(sub(end, row), s.value_rows))
                loop(row, full, s.value_rows, functools.partial(row_tile, s.value_rows, span))
                loop(full, end, 1, functools.partial(row_tile, 1, span))

            when(compare("slt", span.begin, span.end), some)

        loop(0, self.row_count, s.span_rows, group)

    def _normalise_rows(self) -> None:
        s = self.schedule

        def row_body(row: ir.Value) -> None:
            token, head = self._row(row)
            factor = splat(self.inverse(get(self.sums, [row])), s.head_lanes)
            for d in range(0, self.problem.head_size, s.head_lanes):
                at = [self.batch, token, head, d]
                store(arith.mulf(load(self.out, at, s.head_lanes), factor), self.out, at)

        loop(0, self.row_count, 1, row_body)
