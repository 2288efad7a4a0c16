"""The forms of kernels: how the elements of an op are spread over blocks, waves and lanes.

- *thread*: one thread per result element, reduced axes in loops; any rank, the grid is a flat count;
- *wave*: one wave of 64 lanes per result element, for one long reduced axis (GEMV, norms, row maxima); lanes
  stride over the axis and combine by an xor butterfly.

No thread leaves early: out-of-range threads are predicated off, and collectives run with the whole wave.
"""

from __future__ import annotations

from collections.abc import Callable

from torch_mlir import ir
from torch_mlir.dialects import arith, gpu, scf

from spikingbrain.backend_maca.generic import BLOCK, COMBINERS, WAVE, Generic
from spikingbrain.backend_maca.index import index, less, product, split


def launch(
    op: ir.Operation,
    kind: str,
    names: dict[str, int],
    count: ir.Value,
    each: int,
    body: Callable[[ir.Value, ir.Value], None],
    unless: bool | ir.Value = False,
) -> None:
    """Emits a launch with one block per ``each`` elements; ``body(block, thread)`` fills it.

    Where ``unless`` holds there are no blocks.
    """
    one = index(1)
    if not isinstance(unless, bool):
        count = arith.select(unless, index(0), count)
    grid = arith.ceildivsi(count, index(each))
    launch = gpu.LaunchOp((grid, one, one), (index(BLOCK), one, one))
    number = names[kind] = names.get(kind, -1) + 1
    launch.attributes["module"] = ir.FlatSymbolRefAttr.get("kernels")
    launch.attributes["function"] = ir.FlatSymbolRefAttr.get(f"{kind}_{number}")
    block = launch.regions[0].blocks[0]
    with ir.InsertionPoint(block):
        body(block.arguments[0], block.arguments[3])
        gpu.terminator()
    op.erase()


def for_each(
    block: ir.Value, thread: ir.Value, sizes: list[ir.Value], element: Callable[[list[ir.Value]], None]
) -> None:
    """Emits the thread form: ``element`` at the coordinates of this thread, when it is in range."""
    flat = arith.addi(arith.muli(block, index(BLOCK)), thread)
    inside = scf.IfOp(less(flat, product(sizes)))
    with ir.InsertionPoint(inside.then_block):
        element(split(flat, sizes))
        scf.yield_([])


def thread_form(generic: Generic, block: ir.Value, thread: ir.Value) -> None:
    """One thread computes one element of the outputs; reduced loops run inside it, sums in registers."""

    def element(at: list[ir.Value]) -> None:
        def loop(sizes: list[ir.Value], reduced: list[ir.Value], values: list[ir.Value]) -> list[ir.Value]:
            if not sizes:
                return generic.compute(generic.coordinates(at, reduced), values)
            inner = scf.ForOp(index(0), sizes[0], index(1), values)
            with ir.InsertionPoint(inner.body):
                scf.yield_(loop(sizes[1:], [*reduced, inner.induction_variable], list(inner.inner_iter_args)))
            return list(inner.results)

        reduced_sizes = generic.sizes(parallel=False)
        first = generic.coordinates(at, [index(0)] * len(reduced_sizes))  # outputs do not depend on them
        generic.store(loop(reduced_sizes, [], generic.initial(first)), first)

    for_each(block, thread, generic.sizes(parallel=True), element)


def wave_form(generic: Generic, combiner: ir.Operation, block: ir.Value, thread: ir.Value) -> None:
    """One wave computes one element: lanes stride over the reduced axis, then a butterfly combines them."""
    sizes, (length,) = generic.sizes(parallel=True), generic.sizes(parallel=False)
    lane = arith.remsi(thread, index(WAVE))
    flat = arith.addi(arith.muli(block, index(BLOCK // WAVE)), arith.divsi(thread, index(WAVE)))
    inside = less(flat, product(sizes))
    at = split(flat, sizes)
    output = generic.outputs[0]
    kind = ir.MemRefType(output.type).element_type
    identity = COMBINERS[combiner.name]
    neutral = arith.constant(kind, identity if isinstance(kind, ir.F32Type) else int(identity))

    def combine(a: ir.Value, b: ir.Value) -> ir.Value:
        copy = combiner.clone().operation
        copy.operands[0], copy.operands[1] = a, b
        return copy.results[0]

    loop = scf.ForOp(lane, arith.select(inside, length, index(0)), index(WAVE), [neutral])
    with ir.InsertionPoint(loop.body):
        scf.yield_(generic.compute(generic.coordinates(at, [loop.induction_variable]), loop.inner_iter_args))
    total = loop.results[0]
    i32 = ir.IntegerType.get_signless(32)
    xor = ir.Attribute.parse("#gpu<shuffle_mode xor>")
    distance = WAVE // 2
    while distance:
        shuffle = gpu.ShuffleOp(total, arith.constant(i32, distance), arith.constant(i32, WAVE), xor)
        total = combine(total, shuffle.results[0])
        distance //= 2
    writes = arith.andi(inside, arith.cmpi(arith.CmpIPredicate.eq, lane, index(0)))
    only = scf.IfOp(writes)
    with ir.InsertionPoint(only.then_block):
        first = generic.coordinates(at, [index(0)])
        generic.store([combine(generic.load(generic.inputs_count, first), total)], first)
        scf.yield_([])
