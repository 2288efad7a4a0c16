"""The kernel of a group: one block per row, threads spread over what each op does in the row."""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith, gpu, memref, scf

from spikingbrain.backend_maca.lower.forms import butterfly, combined, finish, partial
from spikingbrain.backend_maca.lower.generic import WAVE, Generic
from spikingbrain.backend_maca.lower.index import index, less, product, split
from spikingbrain.backend_maca.lower.places import Count
from spikingbrain.backend_maca.lower.rows import Group, Member, needs_barrier

SMALL, LARGE = 256, 1024  # threads
LONG_ROW = 2048  # elements from which a block has many threads


def threads_of(group: Group) -> int:
    """Returns the threads of a block: many where rows are long."""
    longest = 0
    for member in group.members:
        total = 1
        for size in member.loops[member.outer(group.choice) or 0 :]:
            total *= size.number
        longest = max(longest, total)
    return LARGE if longest > LONG_ROW else SMALL


def row_form(group: Group, row: ir.Value, thread: ir.Value, threads: int) -> None:
    """Emits the ops of a group for one row."""
    before: list[Member] = []
    for member in group.members:
        if before and needs_barrier(before, member):
            gpu.barrier()
            before = []
        if _emit(member, group.choice, row, thread, threads):
            before = []
        before.append(member)


def _emit(member: Member, rows: Count, row: ir.Value, thread: ir.Value, threads: int) -> bool:
    """Emits an op for one row; returns whether there was a barrier before its results were written."""
    generic, outer = member.generic, member.outer(rows)
    assert outer is not None  # the group was made for these rows
    sizes = generic.sizes(parallel=True)
    inner, fixed = sizes[outer:], split(row, sizes[:outer])  # all loops before ``outer`` are parallel
    combiner = generic.wave_combiner()
    if combiner is None:
        _by_thread(generic, fixed, inner, thread, threads)
        return False
    if all(size == Count() for n, size in enumerate(member.loops) if n >= outer and generic.parallel[n]):
        _by_block(generic, combiner, [*fixed, *[index(0)] * len(inner)], thread, threads)
        return True
    _by_wave(generic, combiner, fixed, inner, thread, threads)
    return False


def _by_thread(
    generic: Generic, fixed: list[ir.Value], inner: list[ir.Value], thread: ir.Value, threads: int
) -> None:
    """Threads stride over the elements of a row; reduced loops run inside a thread."""
    loop = scf.ForOp(thread, product(inner), index(threads))
    with ir.InsertionPoint(loop.body):
        generic.element([*fixed, *split(loop.induction_variable, inner)])
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
