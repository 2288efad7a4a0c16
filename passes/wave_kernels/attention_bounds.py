"""The table of ``kernels.attention_bounds``, made and searched by waves: 64 blocks of keys at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, math

from spikingbrain.passes.kernels.attention_bounds import LARGEST, MAX_POSITION, SMALLEST
from spikingbrain.passes.kernels.builders import (
    Index,
    add,
    ceil_div,
    compare,
    get,
    i32,
    i32_type,
    index,
    launch,
    loop,
    minimum,
    mul,
    put,
    rem,
    size,
    sub,
    when,
)
from spikingbrain.passes.wave_kernels.builders import (
    WAVE,
    choose,
    from_lane_xor,
    kernel,
    memref_of,
    thread,
    votes,
)


def emit_bounds(positions: ir.Value, block: int) -> ir.Value:
    """Emits the launch that makes the table ``[B, 2, ceil(S / block) + 1]`` of i32 from positions ``[B, S]`` of i64.

    Ops of one block of code that ask for the same table share one launch.
    """
    kind = ir.RankedTensorType(positions.type)
    name = f"attention_bounds_{'x'.join('d' if n < 0 else str(n) for n in kind.shape)}_{block}"
    for use in positions.uses:
        op = use.owner.operation
        made = op.name == "spikingbrain_control.launch" and op.attributes["callee"].value == name
        if made and op.block == ir.InsertionPoint.current.block:
            return op.result
    blocks = kind.shape[1] if kind.is_dynamic_dim(1) else -(-kind.shape[1] // block) + 1
    table = ir.RankedTensorType.get([kind.shape[0], 2, blocks], i32_type())

    def build(place: list[ir.Value], memory: list[ir.Value]) -> None:
        source, bounds = memory
        for row in (LARGEST, SMALLEST):
            _fill(row, place[0], source, bounds, block)

    kernel(name, [memref_of(kind), memref_of(table)], WAVE, build)
    batch, entries = size(positions, 0), add(ceil_div(size(positions, 1), block), 1)
    dynamic = [n for axis, n in ((0, batch), (2, entries)) if table.is_dynamic_dim(axis)]
    return launch(name, table, [batch, index(1), index(1)], [positions], dynamic).result


def _fill(row: int, batch: ir.Value, source: ir.Value, bounds: ir.Value, block: int) -> None:
    """Fills a row of the table, 64 blocks at a time: a lane looks at one, then each learns of those before it."""
    count, lane = ceil_div(size(source, 1), block), thread()
    combine, none = (arith.maxsi, i32(-1)) if row == LARGEST else (arith.minsi, i32(MAX_POSITION))

    def several(first: ir.Value, before: ir.Value) -> list[ir.Value]:
        number = add(first, lane)
        inside = compare("slt", number, count)
        block_of = number if row == LARGEST else sub(sub(count, 1), number)
        (upto,) = choose(inside, lambda: [_bound(block_of)], [none])
        total, distance = upto, 1
        while distance < WAVE:
            other = from_lane_xor(total, distance)
            is_later = compare("ne", arith.andi(lane, index(distance)), index(0))
            upto = arith.select(is_later, combine(upto, other), upto)
            total = combine(total, other)
            distance *= 2
        when(inside, lambda: put(combine(upto, before), bounds, [batch, row, block_of]))
        return [combine(before, total)]

    def _bound(block_of: ir.Value) -> ir.Value:
        start = mul(block_of, block)

        def key(at: ir.Value, bound: ir.Value) -> list[ir.Value]:
            position = arith.trunci(i32_type(), get(source, [batch, at]))
            if row == SMALLEST:
                position = arith.select(compare("slt", position, i32(0)), none, position)
            return [combine(bound, position)]

        return loop(start, minimum(add(start, block), size(source, 1)), 1, key, [none])[0]

    loop(0, count, WAVE, several, [none])
    when(
        compare("eq", lane, index(0)),
        lambda: put(i32(MAX_POSITION), bounds, [batch, row, count]),
    )


STRIDES: Sequence[int] = (WAVE * WAVE, WAVE, 1)  # of the lanes of a search: of as many blocks as there can be


def count_below(bounds: ir.Value, batch: ir.Value, row: int, limit: ir.Value) -> Index:
    """Returns how many blocks of a row have a bound below ``limit``; these come first. The same in all lanes."""
    entries, lane, found = size(bounds, 2), rem(thread(), WAVE), index(0)
    for stride in STRIDES:
        at = add(found, sub(mul(add(lane, 1), stride), 1))
        bound = get(bounds, [batch, row, minimum(at, sub(entries, 1))])
        is_below = arith.andi(compare("slt", at, entries), compare("slt", bound, limit))
        count = arith.index_cast(ir.IndexType.get(), math.ctpop(votes(is_below)))
        found = add(found, mul(count, stride))
    return found
