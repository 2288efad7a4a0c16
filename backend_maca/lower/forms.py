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

from spikingbrain.backend_maca.lower.generic import BLOCK, COMBINERS, WAVE, Generic
from spikingbrain.backend_maca.lower.index import index, less, product, split


def launch(
    op: ir.Operation,
    kind: str,
    names: dict[str, int],
    count: ir.Value,
    each: int,
    body: Callable[[ir.Value, ir.Value], None],
    unless: bool | ir.Value = False,
    threads: int = BLOCK,
) -> None:
    """Emits a launch with one block per ``each`` elements; ``body(block, thread)`` fills it.

    Where ``unless`` holds there are no blocks.
    """
    one = index(1)
    if not isinstance(unless, bool):
        count = arith.select(unless, index(0), count)
    grid = arith.ceildivsi(count, index(each))
    launch = gpu.LaunchOp((grid, one, one), (index(threads), one, one))
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
    for_each(block, thread, generic.sizes(parallel=True), generic.element)


def wave_form(generic: Generic, combiner: ir.Operation, block: ir.Value, thread: ir.Value) -> None:
    """One wave computes one element: lanes stride over the reduced axis, then a butterfly combines them."""
    sizes, (length,) = generic.sizes(parallel=True), generic.sizes(parallel=False)
    lane = arith.remsi(thread, index(WAVE))
    flat = arith.addi(arith.muli(block, index(BLOCK // WAVE)), arith.divsi(thread, index(WAVE)))
    inside = less(flat, product(sizes))
    at = split(flat, sizes)
    total = partial(generic, combiner, at, lane, arith.select(inside, length, index(0)), WAVE)
    total = butterfly(combiner, total)
    writes = arith.andi(inside, arith.cmpi(arith.CmpIPredicate.eq, lane, index(0)))
    only = scf.IfOp(writes)
    with ir.InsertionPoint(only.then_block):
        finish(generic, combiner, total, at)
        scf.yield_([])


# Parts of reductions, for this form and that of rows.


def partial(
    generic: Generic, combiner: ir.Operation, at: list[ir.Value], first: ir.Value, end: ir.Value, step: int
) -> ir.Value:
    """Returns what one thread makes of its part of the reduced axis."""
    kind = ir.MemRefType(generic.outputs[0].type).element_type
    identity = COMBINERS[combiner.name]
    neutral = arith.constant(kind, identity if isinstance(kind, ir.F32Type) else int(identity))
    loop = scf.ForOp(first, end, index(step), [neutral])
    with ir.InsertionPoint(loop.body):
        scf.yield_(generic.compute(generic.coordinates(at, [loop.induction_variable]), loop.inner_iter_args))
    return loop.results[0]


def combined(combiner: ir.Operation, a: ir.Value, b: ir.Value) -> ir.Value:
    """Combines two values as a reduction does."""
    copy = combiner.clone().operation
    copy.operands[0], copy.operands[1] = a, b
    return copy.results[0]


def butterfly(combiner: ir.Operation, total: ir.Value) -> ir.Value:
    """Returns, in every lane, the values of all lanes combined."""
    i32 = ir.IntegerType.get_signless(32)
    xor = ir.Attribute.parse("#gpu<shuffle_mode xor>")
    distance = WAVE // 2
    while distance:
        shuffle = gpu.ShuffleOp(total, arith.constant(i32, distance), arith.constant(i32, WAVE), xor)
        total = combined(combiner, total, shuffle.results[0])
        distance //= 2
    return total


def finish(generic: Generic, combiner: ir.Operation, total: ir.Value, at: list[ir.Value]) -> None:
    """Stores a result, combined with what the output holds."""
    loops = generic.coordinates(at, [index(0)])
    (start,) = generic.initial(loops)
    generic.store([total if start is None else combined(combiner, start, total)], loops)
