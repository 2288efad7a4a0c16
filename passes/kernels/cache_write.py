"""The CPU kernel for ``spikingbrain.cache_write``: copies rows into slots, in place.

The copy is the same on every processor, as the code generator splits wide moves to the registers there are:
the kernel asks for no target.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, func, memref, tensor

from spikingbrain.passes.kernels.builders import (
    compare,
    get,
    index,
    launch,
    load,
    loop,
    put,
    root_module,
    store,
    when,
)

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
    module = root_module()
    if name not in ir.SymbolTable(module.operation):
        with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]):
            build_cache_write(name, *inputs)
    one = index(1)
    batch = tensor.dim(slots, index(0))
    return launch(name, cache.type, [batch, one, one], [cache, rows, slots], tied=0).result


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
    index_type = ir.IndexType.get()
    memrefs = [ir.MemRefType.get(t.shape, t.element_type) for t in (cache_type, rows_type, slots_type)]
    function = func.FuncOp(name, ([index_type] * 3 + memrefs, []), visibility="private")
    entry = function.add_entry_block()
    with ir.InsertionPoint(entry):
        batch, _, _, cache, rows, slots = entry.arguments
        capacity = memref.dim(cache, index(1))

        def write(time: ir.Value) -> None:
            slot = arith.index_cast(index_type, get(slots, [batch, time]))
            inside = compare("ult", slot, capacity)  # a negative slot is a huge unsigned number
            lanes = MOVE_BITS // bits
            when(inside, lambda: _copy(rows, [batch, time], cache, [batch, slot], row_shape, lanes))

        first = index(0)
        loop(first, memref.dim(slots, index(1)), 1, write)
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
        put(get(source, source_at), target, target_at)
        return
    if len(shape) > 1:

        def part(at: ir.Value) -> None:
            _copy(source, [*source_at, at], target, [*target_at, at], shape[1:], lanes)

        loop(0, shape[0], 1, part)
        return

    def move(at: ir.Value, count: int) -> None:
        store(load(source, [*source_at, at], count), target, [*target_at, at])

    whole = shape[0] // lanes * lanes
    loop(0, whole, lanes, lambda at: move(at, lanes))
    while whole < shape[0]:
        lanes //= 2
        if whole + lanes <= shape[0]:
            move(index(whole), lanes)
            whole += lanes


def _bits(element: ir.Type) -> int:
    """Returns the size of an element that memory holds in whole bytes."""
    bits = element.width if isinstance(element, ir.IntegerType | ir.FloatType) else 0
    if bits < 8 or bits & (bits - 1):
        raise ValueError(f"no cache of {element}: its elements are not 8, 16, 32 or 64 bits wide")
    return bits
