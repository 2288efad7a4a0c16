"""The attention kernel for one query per batch entry."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, vector

from spikingbrain.passes.kernels.attention_base import (
    FLOOR,
    MASKED,
    SCRATCH_BYTES,
    AttentionKernel,
    Block,
    widened,
)
from spikingbrain.passes.kernels.builders import (
    LINE_BYTES,
    add,
    folded,
    get,
    i32_type,
    lane_sums,
    larger,
    load,
    loop,
    minimum,
    mul,
    prefetch,
    reduced_float,
    round_down,
    round_up,
    scratch,
    splat,
    store,
)

RUN_BYTES = 4096  # of contiguous keys, counted as f32, that a workgroup reads per token


def key_heads_per_workgroup(
    key_heads: int, group: int, head_size: int, lanes: int, head_lanes: int, block: int
) -> int:
    """Returns how many key heads one workgroup takes: enough for it to read memory in long runs.

    It is 0 where even one would need too much scratch. With two heads of 128 per workgroup instead of eight, reading
    a cache of 512 tokens took 1.16 times as long.
    """
    per_head = 2 * head_size + block + 3 * lanes
    fixed = 4 * (group * lanes * head_lanes + block) + 9 * LINE_BYTES
    for count in range(key_heads, 0, -1):
        run = 4 * count * head_size
        fits = fixed + 4 * count * group * per_head <= SCRATCH_BYTES
        if key_heads % count == 0 and fits and (run <= RUN_BYTES or count == 1):
            return count
    return 0


class DecodeKernel(AttentionKernel):
    """The decode schedule, as ``attention`` tells it. Head numbers count from the first head of the workgroup."""

    def build(self) -> None:
        p, s, float_type = self.problem, self.schedule, ir.F32Type.get()
        key_heads, self.batch, _ = self.workgroup
        self.key_head = mul(key_heads, s.decode_key_heads)
        heads = s.decode_key_heads * p.group
        (
            self.queries,  # scaled
            self.outputs,
            self.weights,  # scores of a block, then probabilities
            self.products,
            self.maxima,
            self.lane_maxima,
            self.sums,
            self.positions,
        ) = scratch(
            [
                ([heads, p.head_size], float_type),
                ([heads, p.head_size], float_type),
                ([heads, s.decode_keys], float_type),
                ([p.group, s.lanes, s.head_lanes], float_type),
                ([heads, s.lanes], float_type),
                ([heads, s.lanes], float_type),
                ([heads, s.lanes], float_type),
                ([s.decode_keys], i32_type()),
            ]
        )
        first_head = mul(self.key_head, p.group)
        self.query_position = self.position(self.query_positions, [self.batch, 0])

        def start(head: ir.Value) -> None:
            scale = splat(self.score_scale(), s.head_lanes)
            for d in self._channels():
                query = load(self.query, [self.batch, 0, add(first_head, head), d], s.head_lanes)
                store(arith.mulf(query, scale), self.queries, [head, d])
                store(splat(0.0, s.head_lanes), self.outputs, [head, d])
            store(splat(FLOOR, s.lanes), self.maxima, [head, 0])
            store(splat(FLOOR, s.lanes), self.lane_maxima, [head, 0])
            store(splat(0.0, s.lanes), self.sums, [head, 0])

        def visit(block: Block) -> None:
            begin, end = round_down(block.span.begin, s.lanes), block.span.end

            def over_tiles(body: Callable[[Block, ir.Value, ir.Value], None]) -> None:
                def tile(key: ir.Value) -> None:
                    loop(0, s.decode_key_heads, 1, functools.partial(body, block, key))

                loop(begin, end, s.lanes, tile)

            over_tiles(self._score_tile)
            loop(0, heads, 1, functools.partial(self._weigh_block, begin, end))
            over_tiles(self._accumulate_tile)

        def finish(head: ir.Value) -> None:
            total = reduced_float(arith.addf, load(self.sums, [head, 0], s.lanes))
            factor = splat(self.inverse(total), s.head_lanes)
            for d in self._channels():
                value = arith.mulf(load(self.outputs, [head, d], s.head_lanes), factor)
                store(value, self.out, [self.batch, 0, add(first_head, head), d])

        loop(0, heads, 1, start)
        self.visible_blocks(s.decode_keys, self.positions, self.query_position, self.query_position, visit)
        loop(0, heads, 1, finish)

    def _channels(self) -> range:
        return range(0, self.problem.head_size, self.schedule.head_lanes)

    def _ask_for(self, memory: ir.Value, row: Sequence[ir.Value]) -> None:
        """Prefetches a row: the values of a block while its keys are read, the next block's keys with its values.

        The rows of a workgroup's heads are a token apart, which no processor foresees.
        """
        step = 8 * LINE_BYTES // ir.MemRefType(memory.type).element_type.width
        for d in range(0, self.problem.head_size, step):
            prefetch(memory, [*row, d])

    def _score_tile(self, block: Block, key: ir.Value, key_head: ir.Value) -> None:
        """Stores the scores of ``lanes`` keys for the query heads of one key head."""
        p, s, segment = self.problem, self.schedule, block.segment
        first_head = mul(key_head, p.group)
        head_of_keys = add(self.key_head, key_head)
        query = [
            [load(self.queries, [add(first_head, g), d], s.head_lanes) for d in self._channels()]
            for g in range(p.group)
        ]

        # A loop with its results in scratch: unrolled over the keys, LLVM's schedule spills most registers.
        def one_key(i: ir.Value) -> None:
            place = minimum(add(add(block.start, key), i), block.last_key)
            at = [self.batch, place, head_of_keys]
            row = [widened(load(segment.keys, [*at, d], s.head_lanes)) for d in self._channels()]
            self._ask_for(segment.values, at)
            for g in range(p.group):
                total = arith.mulf(query[g][0], row[0])
                for q, k in zip(query[g][1:], row[1:], strict=True):
                    total = self.fma(q, k, total)
                if segment.key_scales is not None:
                    total = arith.mulf(total, splat(get(segment.key_scales, at), s.head_lanes))
                store(total, self.products, [g, i, 0])

        loop(0, s.lanes, 1, one_key)
        position = splat(self.query_position, s.lanes)
        seen = self.visible(load(self.positions, [key], s.lanes), position, position)
        for g in range(p.group):
            head = add(first_head, g)
            products = functools.partial(lambda g, i: load(self.products, [g, i, 0], s.head_lanes), g)
            score = lane_sums(products, s.lanes, s.head_lanes)
            score = arith.select(seen, score, splat(MASKED, s.lanes))
            store(score, self.weights, [head, key])
            largest = larger(score, load(self.lane_maxima, [head, 0], s.lanes))
            store(largest, self.lane_maxima, [head, 0])

    def _weigh_block(self, begin: ir.Value, end: ir.Value, head: ir.Value) -> None:
        """Turns one head's scores into probabilities and scales its sum and output to the new maximum."""
        s = self.schedule
        old = load(self.maxima, [head, 0], s.lanes)
        largest = load(self.lane_maxima, [head, 0], s.lanes)
        new = splat(reduced_float(larger, largest), s.lanes)
        factor = self.exp2(arith.subf(old, new))
        store(new, self.maxima, [head, 0])

        def probabilities(key: ir.Value, total: ir.Value) -> list[ir.Value]:
            probability = self.exp2(arith.subf(load(self.weights, [head, key], s.lanes), new))
            store(probability, self.weights, [head, key])
            return [arith.addf(total, probability)]

        total = arith.mulf(load(self.sums, [head, 0], s.lanes), factor)
        (total,) = loop(begin, end, s.lanes, probabilities, [total])
        store(total, self.sums, [head, 0])
        factor = splat(vector.extract(factor, [], [0]), s.head_lanes)
        for d in self._channels():
            output = arith.mulf(load(self.outputs, [head, d], s.head_lanes), factor)
            store(output, self.outputs, [head, d])

    def _accumulate_tile(self, block: Block, key: ir.Value, key_head: ir.Value) -> None:
        """Adds probabilities times values of ``lanes`` keys to the outputs of one key head's query heads."""
        p, s, segment = self.problem, self.schedule, block.segment
        first_head = mul(key_head, p.group)
        head_of_keys = add(self.key_head, key_head)
        channels = list(self._channels())
        group_tile = max(1, min(p.group, 16 // len(channels)))
        # A few independent sums per output hide the latency of the additions.
        keys_at_once = next(n for n in (4, 2, 1) if n * group_tile * len(channels) <= 16 or n == 1)
        end = minimum(add(key, s.lanes), round_up(block.span.end, keys_at_once))
        for first in range(0, p.group, group_tile):
            heads = [add(first_head, g) for g in range(first, min(first + group_tile, p.group))]
            outputs = [load(self.outputs, [head, d], s.head_lanes) for head in heads for d in channels]
            extra = [splat(0.0, s.head_lanes)] * (len(outputs) * (keys_at_once - 1))

            def products(
                at: ir.Value, *sums: ir.Value, heads: Sequence[ir.Value] = heads, asks: bool = first == 0
            ) -> list[ir.Value]:
                remaining, result = iter(sums), []
                for u in range(keys_at_once):
                    # Probabilities beyond the block's end are 0 up to a whole vector of keys.
                    place = minimum(add(add(block.start, at), u), block.last_key)
                    row_at = [self.batch, place, head_of_keys]
                    if asks:
                        after = minimum(add(place, self.schedule.decode_keys), block.last_key)
                        self._ask_for(segment.keys, [self.batch, after, head_of_keys])
                    row = [widened(load(segment.values, [*row_at, d], s.head_lanes)) for d in channels]
                    for head in heads:
                        weight = get(self.weights, [head, add(at, u)])
                        if segment.value_scales is not None:
                            weight = arith.mulf(weight, get(segment.value_scales, row_at))
                        probability = splat(weight, s.head_lanes)
                        result += [self.fma(probability, x, next(remaining)) for x in row]
                return result

            sums = loop(key, end, keys_at_once, products, [*outputs, *extra])
            for i, (head, d) in enumerate((head, d) for head in heads for d in channels):
                store(folded(arith.addf, sums[i :: len(outputs)]), self.outputs, [head, d])
