"""``tm_tensor.scan``: running sums, products and extremes; one block per row, in chunks of a block's length."""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.backend_maca.lower.bodies import copy_body
from spikingbrain.backend_maca.lower.index import index, less, product, split
from spikingbrain.backend_maca.lower.per_element import dynamic_sizes, unique_name
from spikingbrain.passes.kernels import builders
from spikingbrain.passes.wave_kernels.builders import barrier, choose, kernel, memref_of, shared, thread

BLOCK = 256


def lower_scan(op: ir.Operation) -> None:
    """Replaces a scan by a launch.

    Every chunk is combined in log2(BLOCK) steps in shared memory, then with what was carried from the chunks before.
    An exclusive one is the inclusive one of its elements moved on by one place, behind the initial value.
    """
    is_inclusive = ir.BoolAttr(op.attributes["inclusive"]).value
    axis = ir.IntegerAttr(op.attributes["dimension"]).value
    source, _, start = op.operands
    kind = ir.RankedTensorType(source.type)
    region = op.regions[0].blocks[0]

    def combine(a: ir.Value, b: ir.Value) -> ir.Value:
        return copy_body(region, [a, b])[0]

    def fill(block: list[ir.Value], buffers: list[ir.Value]) -> None:
        x, initial, out, total = buffers
        lane = thread()
        length = builders.size(x, axis)
        others = [builders.size(x, a) for a in range(kind.rank) if a != axis]
        row = split(block[0], others)
        last = arith.subi(length, index(1))
        cells = shared([2, BLOCK], kind.element_type)
        carried = shared([1], kind.element_type)

        def element(place: ir.Value) -> ir.Value:
            """Loads what is added at a place; behind the end the last one, where nobody looks."""
            place = arith.minsi(place, last)
            if is_inclusive:
                return builders.get(x, [*row[:axis], place, *row[axis:]])
            before = arith.maxsi(arith.subi(place, index(1)), index(0))
            value = builders.get(x, [*row[:axis], before, *row[axis:]])
            is_first = arith.cmpi(arith.CmpIPredicate.eq, place, index(0))
            return arith.select(is_first, builders.get(initial, row), value)

        def chunk(first: ir.Value) -> None:
            place = arith.addi(first, lane)
            inside = less(place, length)
            value = element(place)
            distance, side = 1, 0
            while distance < BLOCK:
                builders.put(value, cells, [side, lane])
                barrier()
                reaches = arith.cmpi(arith.CmpIPredicate.sge, lane, index(distance))
                before = builders.get(
                    cells, [side, arith.select(reaches, arith.subi(lane, index(distance)), lane)]
                )
                value = arith.select(reaches, combine(before, value), value)
                distance, side = 2 * distance, 1 - side
            later = arith.cmpi(arith.CmpIPredicate.sgt, first, index(0))
            (value,) = choose(later, lambda: [combine(builders.get(carried, [0]), value)], [value])
            barrier()
            ends = arith.cmpi(arith.CmpIPredicate.eq, place, last)
            full = arith.cmpi(arith.CmpIPredicate.eq, lane, index(BLOCK - 1))
            builders.when(full, lambda: builders.put(value, carried, [0]))
            builders.when(inside, lambda: builders.put(value, out, [*row[:axis], place, *row[axis:]]))
            builders.when(ends, lambda: builders.put(value, total, row))
            barrier()

        builders.loop(0, length, BLOCK, chunk)

    with ir.InsertionPoint(op), op.location:
        name = unique_name("scan")
        kernel(name, [memref_of(v.type) for v in (source, start, source, start)], BLOCK, fill)
        rows = product([builders.size(source, a) for a in range(kind.rank) if a != axis])
        grid = [rows, index(1), index(1)]
        results = [source.type, op.results[1].type]
        sizes = dynamic_sizes(source, [source.type])
        sizes += dynamic_sizes(start, [start.type])
        made = builders.launch(name, results, grid, [source, start], sizes, [-1, -1])
    for old, new in zip(op.results, made.results, strict=True):
        old.replace_all_uses_with(new)
    op.erase()
