"""The CPU kernel for ``spikingbrain.cache_write``: copies rows into slots, in place.

The copy is the same on every processor, as the code generator splits wide moves to the registers there are:
the kernel asks for no target.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, func, memref, scf, tensor, vector

LAUNCH = "spikingbrain_control.launch"
MOVE_BITS = 512


def emit_cache_write(cache: ir.Value, rows: ir.Value, slots: ir.Value) -> ir.Value:
    """Emits the launch of ``result[b, slots[b, t]] = rows[b, t]`` at the insertion point; returns the result.

    ``cache`` is ``[B, R, ...]``, ``rows`` ``[B, T, ...]`` and ``slots`` ``[B, T]`` of i64; B, R and T may be
    dynamic. Of two rows for one slot the later stays; a row for a slot outside the cache is dropped. The
    result is tied to the cache: written in place where nothing uses the cache afterwards, else into a copy.
    """
    inputs = [ir.RankedTensorType(value.type) for value in (cache, rows, slots)]
    shapes = ["x".join("d" if size < 0 else str(size) for size in t.shape) for t in inputs]
    name = "_".join(["cache_write", *shapes, str(inputs[0].element_type)])
    module = ir.InsertionPoint.current.block.owner
    while module.operation.parent is not None:
        module = module.operation.parent
    if name not in ir.SymbolTable(module.operation):
        with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]):
            build_cache_write(name, *inputs)
    one = _index(1)
    batch = tensor.DimOp(slots, _index(0)).result
    launch = ir.Operation.create(
        LAUNCH,
        results=[cache.type],
        operands=[batch, one, one, cache, rows, slots],
        attributes={
            "callee": ir.FlatSymbolRefAttr.get(name),
            "tied": ir.ArrayAttr.get([ir.IntegerAttr.get(ir.IntegerType.get_signless(64), 0)]),
        },
    )
    return launch.result


def build_cache_write(
    name: str,
    cache_type: ir.RankedTensorType,
    rows_type: ir.RankedTensorType,
    slots_type: ir.RankedTensorType,
) -> func.FuncOp:
    """Builds the kernel function at the insertion point: one workgroup per batch entry, its rows in order."""
    row_shape = cache_type.shape[2:]
    if ir.ShapedType.get_dynamic_size() in row_shape:
        raise ValueError(f"cache rows must have a static shape, got {cache_type}")
    bits = _bits(cache_type.element_type)
    index = ir.IndexType.get()
    memrefs = [ir.MemRefType.get(t.shape, t.element_type) for t in (cache_type, rows_type, slots_type)]
    function = func.FuncOp(name, ([index] * 3 + memrefs, []), visibility="private")
    entry = function.add_entry_block()
    with ir.InsertionPoint(entry):
        batch, _, _, cache, rows, slots = entry.arguments
        capacity = memref.DimOp(cache, _index(1)).result
        times = scf.ForOp(_index(0), memref.DimOp(slots, _index(1)).result, _index(1))
        with ir.InsertionPoint(times.body):
            time = times.induction_variable
            slot = arith.IndexCastOp(index, memref.LoadOp(slots, [batch, time]).result).result
            # A negative slot is a huge unsigned number.
            inside = arith.CmpIOp(arith.CmpIPredicate.ult, slot, capacity).result
            write = scf.IfOp(inside)
            with ir.InsertionPoint(write.then_block):
                _copy(rows, [batch, time], cache, [batch, slot], row_shape, MOVE_BITS // bits)
                scf.YieldOp([])
            scf.YieldOp([])
        func.ReturnOp([])
    return function


def _copy(
    source: ir.Value,
    source_at: list[ir.Value],
    target: ir.Value,
    target_at: list[ir.Value],
    shape: Sequence[int],
    lanes: int,
) -> None:
    """Copies ``shape`` elements between two places, the last axis in moves of ``lanes`` elements at most."""
    if not shape:
        memref.StoreOp(memref.LoadOp(source, source_at).result, target, target_at)
        return
    if len(shape) > 1:
        loop = scf.ForOp(_index(0), _index(shape[0]), _index(1))
        with ir.InsertionPoint(loop.body):
            at = loop.induction_variable
            _copy(source, [*source_at, at], target, [*target_at, at], shape[1:], lanes)
            scf.YieldOp([])
        return
    element = ir.MemRefType(source.type).element_type

    def move(at: ir.Value, count: int) -> None:
        kind = ir.VectorType.get([count], element)
        vector.StoreOp(vector.LoadOp(kind, source, [*source_at, at]).result, target, [*target_at, at])

    whole = shape[0] // lanes * lanes
    loop = scf.ForOp(_index(0), _index(whole), _index(lanes))
    with ir.InsertionPoint(loop.body):
        move(loop.induction_variable, lanes)
        scf.YieldOp([])
    while whole < shape[0]:
        lanes //= 2
        if whole + lanes <= shape[0]:
            move(_index(whole), lanes)
            whole += lanes


def _index(value: int) -> ir.Value:
    return arith.ConstantOp(ir.IndexType.get(), value).result


def _bits(element: ir.Type) -> int:
    """Returns the size of an element that memory holds in whole bytes."""
    bits = element.width if isinstance(element, ir.IntegerType | ir.FloatType) else 0
    if bits < 8 or bits & (bits - 1):
        raise ValueError(f"no cache of {element}: its elements are not 8, 16, 32 or 64 bits wide")
    return bits
