"""The wave kernel for ``spikingbrain.cache_write``: a block copies a row into its slot, in place."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
)
from spikingbrain.passes.wave_kernels.builders import WAVE, any_lane, choose, kernel, memref_of, thread

MOST_THREADS = 256


def emit_cache_write(cache: ir.Value, rows: ir.Value, slots: ir.Value) -> ir.Value:
    """Emits the launch of ``result[b, slots[b, t]] = rows[b, t]`` at the insertion point; returns the result.

    ``cache`` is ``[B, R, ...]``, ``rows`` ``[B, T, ...]`` and ``slots`` ``[B, T]`` of i64; B, R and T may be dynamic. Of two rows
    for one slot the later stays; a row for a slot outside the cache is dropped. The result is tied to the cache.
    """
    kinds = [ir.RankedTensorType(value.type) for value in (cache, rows, slots)]
    row = kinds[0].shape[2:]
    if ir.ShapedType.get_dynamic_size() in row:
        raise ValueError(f"cache rows must have a static shape, got {kinds[0]}")
    shapes = ["x".join("d" if n < 0 else str(n) for n in kind.shape) for kind in kinds]
    name = "_".join(["cache_write", *shapes, str(kinds[0].element_type)])
    threads = min(MOST_THREADS, -(-math.prod(row) // WAVE) * WAVE)
    kernel(
        name,
        [memref_of(kind) for kind in kinds],
        threads,
        lambda block, memory: _write_row(block, memory, row, threads),
    )
    return launch(
        name, cache.type, [size(slots, 1), size(slots, 0), index(1)], [cache, rows, slots], tied=0
    ).result


def _write_row(
    block: Sequence[ir.Value], memory: Sequence[ir.Value], row: Sequence[int], threads: int
) -> None:
    time, batch, _ = block
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
