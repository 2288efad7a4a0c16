"""Where in a long segment of keys a block of queries needs to look: a table of bounds, and how it is searched.

The table holds two rows for the blocks of a segment: the largest position among the keys of a block and all before
it, and the smallest that is not negative among those of a block and all after it. Both rows never fall, whatever the
order of the positions. So one search finds the first block that can hold a key within a window, and one the last
that can hold a key which is not in the future. Where positions ascend these are the blocks that are visible, and
time grows as tokens times window; where they do not, a few blocks too many are looked at.
"""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith, func

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
    root_module,
    size,
    sub,
)

MAX_POSITION = 2**31 - 1
LARGEST, SMALLEST = 0, 1  # rows of the table
SHORT = 1024  # keys of a segment that needs no table
_SEARCH_STEPS = 26  # halvings: of as many blocks as there can be


def emit_bounds(positions: ir.Value, block: int) -> ir.Value:
    """Emits the launch that makes the table ``[B, 2, ceil(S / block) + 1]`` of i32 from positions ``[B, S]`` of i64.

    Ops of one block of code that ask for the same table share one launch.
    """
    kind = ir.RankedTensorType(positions.type)
    sizes = "x".join("d" if kind.is_dynamic_dim(i) else str(kind.shape[i]) for i in range(2))
    name = f"attention_bounds_{sizes}_{block}"
    for use in positions.uses:
        op = use.owner.operation
        made = op.name == "spikingbrain_control.launch" and op.attributes["callee"].value == name
        if made and op.block == ir.InsertionPoint.current.block:
            return op.result
    module = root_module()
    blocks = kind.shape[1] if kind.is_dynamic_dim(1) else -(-kind.shape[1] // block) + 1
    table = ir.RankedTensorType.get([kind.shape[0], 2, blocks], i32_type())
    if name not in ir.SymbolTable(module.operation):
        with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]):
            _build(name, kind, table, block)
    batch, entries = size(positions, 0), add(ceil_div(size(positions, 1), block), 1)
    dynamic = [n for axis, n in ((0, batch), (2, entries)) if table.is_dynamic_dim(axis)]
    return launch(name, table, [batch, index(1), index(1)], [positions], dynamic).result


def _build(name: str, positions: ir.RankedTensorType, table: ir.RankedTensorType, block: int) -> None:
    memrefs = [ir.MemRefType.get(t.shape, t.element_type) for t in (positions, table)]
    kernel = func.FuncOp(name, ([ir.IndexType.get()] * 3 + memrefs, []), visibility="private")
    entry = kernel.add_entry_block()
    with ir.InsertionPoint(entry):
        batch, _, _, source, bounds = entry.arguments
        count = ceil_div(size(source, 1), block)

        def forward(number: ir.Value, largest: ir.Value) -> list[ir.Value]:
            start = mul(number, block)
            end = minimum(add(start, block), size(source, 1))

            def key(at: ir.Value, smallest: ir.Value, largest: ir.Value) -> list[ir.Value]:
                position = arith.trunci(i32_type(), get(source, [batch, at]))
                held = arith.select(compare("slt", position, i32(0)), i32(MAX_POSITION), position)
                return [arith.minsi(smallest, held), arith.maxsi(largest, position)]

            smallest, largest = loop(start, end, 1, key, [i32(MAX_POSITION), largest])
            put(smallest, bounds, [batch, SMALLEST, number])
            put(largest, bounds, [batch, LARGEST, number])
            return [largest]

        def backward(done: ir.Value, smallest: ir.Value) -> list[ir.Value]:
            at = [batch, SMALLEST, sub(sub(count, 1), done)]
            smallest = arith.minsi(smallest, get(bounds, at))
            put(smallest, bounds, at)
            return [smallest]

        for row in (SMALLEST, LARGEST):
            put(i32(MAX_POSITION), bounds, [batch, row, count])
        loop(0, count, 1, forward, [i32(-1)])
        loop(0, count, 1, backward, [i32(MAX_POSITION)])
        func.ReturnOp([])


def count_below(bounds: ir.Value, batch: ir.Value, row: int, limit: ir.Value) -> Index:
    """Returns how many blocks of a row have a bound below ``limit``; these come first."""
    entries = size(bounds, 2)

    def halve(step: ir.Value, found: ir.Value) -> list[ir.Value]:
        more = add(found, arith.shrui(index(1 << (_SEARCH_STEPS - 1)), step))
        below = compare("slt", get(bounds, [batch, row, sub(minimum(more, entries), 1)]), limit)
        return [arith.select(below, more, found)]

    return loop(0, _SEARCH_STEPS, 1, halve, [index(0)])[0]
