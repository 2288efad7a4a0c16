"""Sums over the space that a loop only adds up: done once, after the loop, on what each point has added up.

``s_(t+1) = s_t + sum_p e_t[p]`` is ``s_0 + sum_p (sum_t e_t[p])``. Gradients of what a body closes over are such sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.scan_axes import (
    GENERIC,
    RESHAPES,
    NotPointwise,
    inputs_of,
    is_inside,
    iterators,
    maps_of,
    uniform,
)

_ADDS = ("arith.addf", "arith.addi")


@dataclass
class _Sum:
    """A carried value that only sums: which, the op that adds, the ops of the sum up to it, what they sum."""

    number: int
    adds: ir.Operation
    chain: list[ir.Operation]
    summand: ir.Value


def defer_sums(loop: ir.Operation) -> ir.Operation:
    """Returns the loop, replaced by one without such sums; the same loop where it has none.

    Raises NotPointwise where a reduction is left, which makes deferring useless.
    """
    block, carried = loop.regions[0].blocks[0], loop.attributes["carried"].value
    _merge(block)
    found = [s for i in range(carried) if (s := _find(loop, block, i))]
    inside = [o.operation for o in block.operations]
    deferred = [op for s in found for op in s.chain]
    for op in inside:
        if op.name == GENERIC and set(iterators(op)) - {"parallel"} and op not in deferred:
            raise NotPointwise("it reduces along an axis")
    sizes = [_known_sizes(s.summand, block) for s in found]
    if not found:
        return loop
    if any(s is None for s in sizes):
        raise NotPointwise("what it sums has a size known only inside")
    terminator = inside[-1]
    operands, types = list(loop.operands), [r.type for r in loop.results]
    with ir.InsertionPoint(loop), loop.location:
        for s, known in zip(found, sizes, strict=True):
            operands[s.number] = _zeros(s.summand.type, known or [])
            types[s.number] = s.summand.type
        attributes = {n: loop.attributes[n] for n in loop.attributes}
        made = ir.Operation.create(loop.name, types, operands, attributes, regions=1)
    block.append_to(made.regions[0])
    for s in found:
        argument = block.arguments[s.number]
        with ir.InsertionPoint(terminator), s.adds.location:
            initial = loop.operands[s.number]
            _move_behind(s, initial, made)
            argument.set_type(s.summand.type)
            terminator.operands[s.number] = _added(argument, s.summand)
    results = list(made.results)
    for s in found:
        results[s.number] = s.adds.results[0]
    for old, new in zip(loop.results, results, strict=True):
        old.replace_all_uses_with(new)
    loop.erase()
    return made


def _find(loop: ir.Operation, block: ir.Block, number: int) -> _Sum | None:
    argument = block.arguments[number]
    terminator = block.operations[len(block.operations) - 1].operation
    adds = torch_ir.defining(terminator.operands[number], GENERIC)
    if adds is None or not is_inside(adds.results[0], block) or not _only(argument, adds):
        return None
    if len(inputs_of(adds)) != 2 or not _is_addition(adds) or not _only(adds.results[0], terminator):
        return None
    if any(m != maps_of(adds)[-1] for m in maps_of(adds)):
        return None
    value = next((v for v in inputs_of(adds) if v != argument), argument)
    chain = _chain(value, adds, block)
    if not chain or not is_inside(chain[0].operands[0], block):
        return None
    return _Sum(number, adds, [*chain, adds], chain[0].operands[0])


def _merge(block: ir.Block) -> None:
    """Makes the sum of two sums taken alike one sum: of a value that a step uses twice, the gradient comes in two parts."""
    for op in [o.operation for o in block.operations]:
        if op.name != GENERIC or len(inputs_of(op)) != 2 or not _is_addition(op):
            continue
        if set(iterators(op)) - {"parallel"} or any(m != maps_of(op)[-1] for m in maps_of(op)):
            continue
        kept, other = (_chain(v, op, block) for v in inputs_of(op))
        if not kept or not _alike(kept, other):
            continue
        with ir.InsertionPoint(op), op.location:
            kept[0].operands[0] = _added(kept[0].operands[0], other[0].operands[0])
        for part in kept:
            part.move_before(op)
        op.results[0].replace_all_uses_with(kept[-1].results[0])
        for part in [op, *reversed(other)]:
            part.erase()


def _chain(value: ir.Value, user: ir.Operation, block: ir.Block) -> list[ir.Operation]:
    """Returns the ops that make ``value`` by summing over axes and reshaping, each read by the next alone; none without a sum."""
    chain: list[ir.Operation] = []
    while (op := torch_ir.defining(value)) is not None and is_inside(value, block) and _only(value, user):
        if op.name not in RESHAPES and not _sums(op):
            break
        chain.insert(0, op)
        value, user = op.operands[0], op
    return chain if any(op.name == GENERIC for op in chain) else []


def _sums(op: ir.Operation) -> bool:
    """Returns whether an op sums the elements of a tensor along some axes."""
    if op.name != GENERIC or len(inputs_of(op)) != 1 or "reduction" not in iterators(op):
        return False
    first = uniform(op.operands[1])
    whole = maps_of(op)[0] == ir.AffineMap.get_identity(len(iterators(op)))
    return _is_addition(op) and first is not None and first.value == 0 and whole


def _alike(chain: Sequence[ir.Operation], other: Sequence[ir.Operation]) -> bool:
    """Returns whether two chains do the same to tensors of one type."""
    return len(chain) == len(other) and all(map(_same, chain, other))


def _same(a: ir.Operation, b: ir.Operation) -> bool:
    if a.name != b.name or a.operands[0].type != b.operands[0].type or a.results[0].type != b.results[0].type:
        return False
    if a.name == GENERIC:
        return maps_of(a) == maps_of(b)
    sizes = list(a.operands)[1:] == list(b.operands)[1:]
    return bool(a.attributes["reassociation"] == b.attributes["reassociation"]) and sizes


def _only(value: ir.Value, user: ir.Operation) -> bool:
    """Returns whether ``user`` uses a value, once, and nothing else does."""
    uses = list(value.uses)
    return len(uses) == 1 and uses[0].owner.operation == user


def _is_addition(op: ir.Operation) -> bool:
    block = op.regions[0].blocks[0]
    ops = [o.operation for o in block.operations]
    if len(ops) != 2 or ops[0].name not in _ADDS:
        return False
    return set(ops[0].operands) == set(list(block.arguments)[:2]) and ops[1].operands[0] == ops[0].results[0]


def _known_sizes(value: ir.Value, block: ir.Block) -> list[ir.Value] | None:
    """Returns the dynamic sizes of a body's tensor, where they are known outside."""
    shape = ir.RankedTensorType(value.type).shape
    if all(n >= 0 for n in shape):
        return []
    op = torch_ir.defining(value, GENERIC)
    if op is None:
        return None
    out = op.operands[len(op.operands) - len(op.results)]
    empty = torch_ir.defining(out, "tensor.empty")
    if empty is None:
        return _known_sizes(out, block)
    if any(is_inside(v, block) for v in empty.operands):
        return None
    return list(empty.operands)


def _move_behind(s: _Sum, initial: ir.Value, loop: ir.Operation) -> None:
    """Moves the reduction and the addition behind the loop, there to read its result and the initial value."""
    argument = loop.regions[0].blocks[0].arguments[s.number]
    for use in list(argument.uses):
        use.owner.operation.operands[use.operand_number] = initial
    s.chain[0].operands[0] = loop.results[s.number]
    last = loop
    for op in s.chain:
        op.move_after(last)
        last = op


def _added(a: ir.Value, b: ir.Value) -> ir.Value:
    rank = len(ir.RankedTensorType(a.type).shape)
    element = ir.RankedTensorType(a.type).element_type
    add = arith.addf if isinstance(element, ir.FloatType) else arith.addi
    return build.generic(
        [a, b], b, [ir.AffineMap.get_identity(rank)] * 3, ["parallel"] * rank, lambda x, y, _: add(x, y)
    )


def _zeros(type_: ir.Type, sizes: list[ir.Value]) -> ir.Value:
    element = ir.RankedTensorType(type_).element_type
    floating = isinstance(element, ir.FloatType)
    zero = ir.FloatAttr.get(element, 0.0) if floating else ir.IntegerAttr.get(element, 0)
    filled: ir.Value = linalg.fill(arith.ConstantOp(element, zero).result, outs=[build.empty(type_, sizes)])
    return filled
