"""The wave kernel for ``spikingbrain.cache_write``: a block copies a row of one of some caches into its slot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes.kernels.builders import (
    Index,
    add,
    compare,
    floor_div,
    get,
    index,
    launch,
    loop,
    put,
    rem,
    size,
    when,
)
from spikingbrain.passes.wave_kernels.builders import WAVE, any_lane, choose, kernel, memref_of, thread

MOST_THREADS = 256


def emit_cache_writes(
    caches: Sequence[ir.Value], rows: Sequence[ir.Value], slots: ir.Value
) -> list[ir.Value]:
    """Emits the launch of ``result[b, slots[b, t]] = rows[b, t]`` for each cache at the insertion point; returns the results.

    Caches are ``[B, R, ...]`` of one type, their rows ``[B, T, ...]`` and ``slots`` ``[B, T]`` of i64; B, R and T may be dynamic.
    Of two rows for one slot the later stays; a row for a slot outside the cache is dropped. Each result is tied to its cache.
    """
    kinds = [ir.RankedTensorType(value.type) for value in (caches[0], rows[0], slots)]
    row, count = kinds[0].shape[2:], len(caches)
    if ir.ShapedType.get_dynamic_size() in row:
        raise ValueError(f"cache rows must have a static shape, got {kinds[0]}")
    shapes = ["x".join("d" if n < 0 else str(n) for n in kind.shape) for kind in kinds]
    name = "_".join(
        ["cache_write", *shapes, str(kinds[0].element_type), *([str(count)] if count > 1 else [])]
    )
    threads = min(MOST_THREADS, -(-math.prod(row) // WAVE) * WAVE)

    def body(block: list[ir.Value], memory: list[ir.Value]) -> None:
        for n in range(count):
            parts = [memory[n], memory[count + n], memory[-1]]
            if count == 1:
                _write_row(block, parts, row, threads)
            else:
                is_mine = compare("eq", block[2], index(n))
                when(is_mine, partial(_write_row, block, parts, row, threads))

    inputs = [*caches, *rows, slots]
    kernel(name, [memref_of(value.type) for value in inputs], threads, body)
    grid = [size(slots, 1), size(slots, 0), index(count)]
    return list(launch(name, [c.type for c in caches], grid, inputs, tied=list(range(count))).results)


def _write_row(
    block: Sequence[ir.Value], memory: Sequence[ir.Value], row: Sequence[int], threads: int
) -> None:
    time, batch = block[:2]
    cache, rows, slots = memory
    slot = get(slots, [batch, time])
    lane = rem(thread(), WAVE)

    def look(first: ir.Value, taken: ir.Value) -> list[ir.Value]:
        """Looks for the slot among 64 later rows."""
        at = add(first, lane)
        inside = compare("slt", at, size(slots, 1))
        (other,) = choose(inside, lambda: [get(slots, [batch, at])], [arith.constant(slot.type, -1)])
        return [arith.ori(taken, any_lane(arith.andi(inside, compare("eq", other, slot))))]

    no = arith.constant(ir.IntegerType.get_signless(1), 0)
    (taken,) = loop(add(time, 1), size(slots, 1), WAVE, look, [no])
    to = arith.index_cast(ir.IndexType.get(), slot)
    is_slot = arith.andi(compare("sge", to, index(0)), compare("slt", to, size(cache, 1)))
    count = arith.select(arith.andi(is_slot, compare("eq", taken, no)), index(math.prod(row)), index(0))

    def move(i: ir.Value) -> None:
        place: list[Index] = []
        for n in reversed(row):
            place.insert(0, rem(i, n))
            i = floor_div(i, n)
        put(get(rows, [batch, time, *place]), cache, [batch, to, *place])

    loop(thread(), count, threads, move)
