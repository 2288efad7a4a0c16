"""Which threads reach an op together: what barriers and the collectives of a wave rest on.

A value is uniform when all threads of the block hold the same number, or all lanes of each wave when only the wave
has to agree. What is not surely so counts as different.
"""

from __future__ import annotations

import itertools

from torch_mlir import ir

from spikingbrain.backend_maca.lower.mlir import constant, is_shared, nested
from spikingbrain.passes.wave_kernels.builders import WAVE

SAME_FOR_THE_BLOCK = ("gpu.block_id", "gpu.grid_dim", "memref.dim", "arith.constant")
STORES = {"memref.store": 1, "vector.store": 1}  # op -> the operand that is the buffer


def is_reached_together(op: ir.Operation, function: ir.Operation, *, wave: bool) -> bool:
    """Tells whether all threads of a block, or of each wave, reach an op together."""
    parent = op.operation.parent.operation
    while parent != function:
        if not _same_turns(parent, wave, frozenset()):
            return False
        parent = parent.parent.operation
    return True


def _same_turns(op: ir.Operation, wave: bool, assumed: frozenset[ir.Value]) -> bool:
    """Tells whether the threads take the same branches, or rounds, of an op with regions."""
    if op.name == "scf.if":
        return _same(op.operands[0], wave, assumed)
    if op.name == "scf.for":
        return all(_same(v, wave, assumed) for v in list(op.operands)[:3])
    if op.name == "scf.while":
        return _same(_terminator(op.regions[0].blocks[0]).operands[0], wave, assumed)
    return False


def _same(value: ir.Value, wave: bool, assumed: frozenset[ir.Value]) -> bool:
    """Tells whether threads hold the same value, given that they do for the ``assumed`` ones (those of loops around)."""
    if value in assumed:
        return True
    owner = value.owner
    if isinstance(owner, ir.Block):
        return _same_argument(value, owner, wave, assumed)
    if owner.name in SAME_FOR_THE_BLOCK:
        return True
    if owner.name == "memref.load":
        return all(_same(v, wave, assumed) for v in list(owner.operands)[1:]) and _is_settled(owner)
    if owner.name == "gpu.thread_id":
        return False
    if wave and owner.name in ("arith.divui", "arith.divsi", "arith.shrui", "arith.shrsi"):
        step = constant(owner.operands[1])
        part = step and (int(step) if "div" in owner.name else 1 << int(step))
        if part and part % WAVE == 0 and _is_thread(owner.operands[0]):
            return True  # the number of the wave
    if wave and owner.name == "gpu.ballot":
        return True
    if owner.name in ("scf.if", "scf.for", "scf.while"):
        return _same_result(value, owner, wave, assumed)
    pure = str(owner.name).startswith(("arith.", "math.", "vector."))
    return pure and owner.name != "vector.load" and all(_same(v, wave, assumed) for v in owner.operands)


def _is_thread(value: ir.Value) -> bool:
    owner = value.owner
    if isinstance(owner, ir.Block):
        return False
    if str(owner.name).startswith("arith.index_cast"):
        return _is_thread(owner.operands[0])
    return bool(owner.name == "gpu.thread_id" and "x" in str(owner.attributes["dimension"]))


def _same_argument(value: ir.Value, block: ir.Block, wave: bool, assumed: frozenset[ir.Value]) -> bool:
    loop = block.owner.operation
    if loop.name == "scf.for":
        if value == block.arguments[0]:
            return all(_same(v, wave, assumed) for v in list(loop.operands)[:3])
        return _same_carried(loop, list(block.arguments).index(value) - 1, wave, assumed)
    if loop.name == "scf.while":
        before, after = (region.blocks[0] for region in loop.regions)
        number = list(block.arguments).index(value)
        if block == after:
            return _same(_terminator(before).operands[1 + number], wave, assumed | {value})
        inner = assumed | {value}
        first = loop.operands[number]
        return _same(first, wave, assumed) and _same(_terminator(after).operands[number], wave, inner)
    return str(loop.name) == "gpu.func"


def _same_carried(loop: ir.Operation, number: int, wave: bool, assumed: frozenset[ir.Value]) -> bool:
    """Tells whether a value that an ``scf.for`` carries is the same: at first, in the next round if in one, and the rounds."""
    body = loop.regions[0].blocks[0]
    inner = assumed | {body.arguments[1 + number]}
    return (
        _same_turns(loop, wave, assumed)
        and _same(loop.operands[3 + number], wave, assumed)
        and _same(_terminator(body).operands[number], wave, inner)
    )


def _same_result(value: ir.Value, op: ir.Operation, wave: bool, assumed: frozenset[ir.Value]) -> bool:
    number = list(op.results).index(value)
    if op.name == "scf.for":
        return _same_carried(op, number, wave, assumed)
    if not _same_turns(op, wave, assumed):
        return False
    if op.name == "scf.while":
        return _same(_terminator(op.regions[0].blocks[0]).operands[1 + number], wave, assumed)
    ends = [_terminator(region.blocks[0]) for region in op.regions]
    return all(_same(end.operands[number], wave, assumed) for end in ends)


def _terminator(block: ir.Block) -> ir.Operation:
    *_, last = block.operations
    return last.operation


def _is_settled(load: ir.Operation) -> bool:
    """Tells whether no thread can change what a load reads while others read it.

    So it is for a buffer that the kernel never writes, and for shared memory that is not written between the barrier
    before the load and the next one.
    """
    buffer = load.operands[0]
    function = load.parent.operation
    while function.name != "gpu.func":
        function = function.parent.operation
    if isinstance(buffer.owner, ir.Block) and not any(_writes(op, buffer) for op in nested(function)):
        return True
    if not is_shared(buffer):
        return False
    place = load.operation
    while place != function:
        around = [view.operation for view in place.block.operations]
        at = around.index(place)
        barriers = [i for i, op in enumerate(around) if op.name == "gpu.barrier"]
        first = max((i for i in barriers if i < at), default=None)
        if first is not None:
            last = min((i for i in barriers if i > at), default=None)
            between = around[first:last] + (_behind(place, function) if last is None else [])
            return not any(_writes(op, buffer) for outer in between for op in [outer, *nested(outer)])
        place = place.parent.operation  # the barrier may stand before a loop that holds the load
    return False


def _behind(place: ir.Operation, function: ir.Operation) -> list[ir.Operation]:
    """Returns what may run behind the block of an op before the next barrier, the next round of a loop included."""
    found: list[ir.Operation] = []
    while (parent := place.parent.operation) != function:
        if parent.name == "scf.while":
            found.append(parent)
        around = [view.operation for view in place.block.operations]
        if parent.name == "scf.for":
            found += itertools.takewhile(lambda op: op.name != "gpu.barrier", around)
        around = [view.operation for view in parent.block.operations]
        for op in around[around.index(parent) + 1 :]:
            if op.name == "gpu.barrier":
                return found
            found.append(op)
        place = parent
    return found


def _writes(op: ir.Operation, buffer: ir.Value) -> bool:
    return op.name in STORES and op.operands[STORES[op.name]] == buffer
