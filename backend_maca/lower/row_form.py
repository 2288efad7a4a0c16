"""The kernel of a group: a block has a row, or several short ones; threads are spread over what each op does in them."""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith, gpu, memref, scf

from spikingbrain.backend_maca.lower.forms import butterfly, combined, finish, partial
from spikingbrain.backend_maca.lower.generic import WAVE, Generic
from spikingbrain.backend_maca.lower.index import index, less, product, split
from spikingbrain.backend_maca.lower.places import Count
from spikingbrain.backend_maca.lower.rows import Group, Member, needs_barrier
from spikingbrain.passes.kernels import builders


def row_form(group: Group, rows: ir.Value, block: ir.Value, thread: ir.Value) -> None:
    """Emits the ops of a group for the rows of a block, of so many rows in all."""
    before: list[Member] = []
    for member in group.members:
        if before and needs_barrier(before, member):
            gpu.barrier()
            before = []
        if _emit(member, group, rows, block, thread):
            before = []
        before.append(member)


def _emit(member: Member, group: Group, rows: ir.Value, block: ir.Value, thread: ir.Value) -> bool:
    """Emits an op for the rows of a block; returns whether there was a barrier before its results were written."""
    generic, outer, threads = member.generic, member.outer(group.choice), group.threads
    assert outer is not None  # the group was made for these rows
    sizes = generic.sizes(parallel=True)
    inner = sizes[outer:]
    combiner = generic.wave_combiner()
    if combiner is None:
        _by_thread(generic, group.each, rows, block, sizes, outer, thread, threads)
        return False
    fixed = split(block, sizes[:outer])  # all loops before ``outer`` are parallel
    if all(size == Count() for size in member.inner(group.choice, parallel=True)):
        _by_block(generic, combiner, [*fixed, *[index(0)] * len(inner)], thread, threads)
        return True
    _by_wave(generic, combiner, fixed, inner, thread, threads)
    return False


def _by_thread(
    generic: Generic,
    each: int,
    rows: ir.Value,
    block: ir.Value,
    sizes: list[ir.Value],
    outer: int,
    thread: ir.Value,
    threads: int,
) -> None:
    """Threads stride over the elements of the rows; reduced loops run inside a thread."""
    inner = sizes[outer:]
    loop = scf.ForOp(thread, product([index(each), *inner]), index(threads))
    with ir.InsertionPoint(loop.body):
        number, *at = split(loop.induction_variable, [index(each), *inner])
        row = arith.addi(arith.muli(block, index(each)), number)

        def element() -> None:
            generic.element([*split(row, sizes[:outer]), *at])

        if each == 1:
            element()
        else:
            builders.when(less(row, rows), element)
        scf.yield_([])


def _by_wave(
    generic: Generic,
    combiner: ir.Operation,
    fixed: list[ir.Value],
    inner: list[ir.Value],
    thread: ir.Value,
    threads: int,
) -> None:
    """Waves stride over the sums of a row, lanes over what is summed."""
    (length,) = generic.sizes(parallel=False)
    lane, wave, count = arith.remsi(thread, index(WAVE)), arith.divsi(thread, index(WAVE)), product(inner)
    loop = scf.ForOp(index(0), count, index(threads // WAVE))
    with ir.InsertionPoint(loop.body):
        number = arith.addi(loop.induction_variable, wave)
        inside = less(number, count)
        at = [*fixed, *split(number, inner)]
        total = partial(generic, combiner, at, lane, arith.select(inside, length, index(0)), WAVE)
        total = butterfly(combiner, total)
        writes = arith.andi(inside, arith.cmpi(arith.CmpIPredicate.eq, lane, index(0)))
        only = scf.IfOp(writes)
        with ir.InsertionPoint(only.then_block):
            finish(generic, combiner, total, at)
            scf.yield_([])
        scf.yield_([])


def _by_block(
    generic: Generic, combiner: ir.Operation, at: list[ir.Value], thread: ir.Value, threads: int
) -> None:
    """All threads share one sum: a butterfly in each wave, then one over the waves' results."""
    (length,) = generic.sizes(parallel=False)
    lane, wave, waves = arith.remsi(thread, index(WAVE)), arith.divsi(thread, index(WAVE)), threads // WAVE
    total = butterfly(combiner, partial(generic, combiner, at, thread, length, threads))
    space = ir.Attribute.parse("#gpu.address_space<workgroup>")
    cells = memref.alloca(ir.MemRefType.get([waves], total.type, memory_space=space), [], [])
    leads = scf.IfOp(arith.cmpi(arith.CmpIPredicate.eq, lane, index(0)))
    with ir.InsertionPoint(leads.then_block):
        memref.store(total, cells, [wave])
        scf.yield_([])
    gpu.barrier()
    only = scf.IfOp(arith.cmpi(arith.CmpIPredicate.eq, thread, index(0)))
    with ir.InsertionPoint(only.then_block):
        total = memref.load(cells, [index(0)])
        for number in range(1, waves):
            total = combined(combiner, total, memref.load(cells, [index(number)]))
        finish(generic, combiner, total, at)
        scf.yield_([])
