"""The form of ``spikingbrain.attention`` in linalg, for targets without a kernel of their own.

Scores of each segment are one tensor ``[B, Hk, G, T, S]`` (G query heads per key head); visibility is decided
from the positions while they are scaled. The segments share maximum and sum, so that no keys are concatenated.
It costs T x S memory and computes invisible scores too: right everywhere, and the kernels' peer in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg, math, tensor

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes.kernels.attention_base import FLOOR, MASKED
from spikingbrain.passes.kernels.attention_bounds import MAX_POSITION

# Axes of loops are letters: b batch, k key head, g query head of its group, t query, s key, d channel.
Body = Callable[..., ir.Value]


def lower_attention_portable(op: Any) -> ir.Value:
    """Replaces a ``spikingbrain.attention`` op by linalg ops on tensors; returns the new result.

    Queries, keys and values may be of any float type, those of a cache codes; sums are in f32. Raises UnsupportedOp
    when the number or the size of heads is dynamic.
    """
    query, keys = (ir.RankedTensorType(v.type) for v in (op.query, op.keys))
    if any(t.is_dynamic_dim(axis) for t in (query, keys) for axis in (2, 3)):
        raise UnsupportedOp("attention with a dynamic number or size of heads", hint="static sizes")
    segments = [(op.keys, op.values, op.key_positions)]
    operation = op.operation
    with operation.context, operation.location, ir.InsertionPoint(operation):
        if op.cache_keys is not None:
            keys = _decoded(op.cache_keys, op.cache_key_scales)
            values = _decoded(op.cache_values, op.cache_value_scales)
            segments.insert(0, (keys, values, op.cache_positions))
        result = _attention(op, segments)
        op.out.replace_all_uses_with(result)
        operation.erase()
    return result


def _attention(op: Any, segments: Sequence[tuple[ir.Value, ir.Value, ir.Value]]) -> ir.Value:
    heads, head_size = ir.RankedTensorType(op.query.type).shape[2:]
    key_heads = ir.RankedTensorType(op.keys.type).shape[2]
    group = heads // key_heads
    f32, element = ir.F32Type.get(), ir.RankedTensorType(op.query.type).element_type
    sizes: dict[str, int | ir.Value] = {
        "b": _size(op.query, 0),
        "t": _size(op.query, 1),
        "k": key_heads,
        "g": group,
        "d": head_size,
    }
    query = _split_heads(op.query, sizes)

    scores = []
    for keys, _, positions in segments:
        here = {**sizes, "s": _size(keys, 1)}
        product = _reduce(
            [(query, "btkgd"), (keys, "bskd")], (_filled(0.0, "bkgts", here), "bkgts"), "d", _multiply_add
        )
        masked = _map(
            [(product, "bkgts"), (op.query_positions, "bt"), (positions, "bs")],
            (_empty("bkgts", here, f32), "bkgts"),
            lambda score, i, j, _: _masked_score(op, score, i, j),
        )
        scores.append(masked)

    # Each segment is reduced on its own: IREE 3.13 fuses a chain of reductions into a kernel that it then rejects.
    maxima = [
        _reduce(
            [(masked, "bkgts")],
            (_filled(FLOOR, "bkgt", sizes), "bkgt"),
            "s",
            lambda s, m: arith.maximumf(s, m),
        )
        for masked in scores
    ]
    maximum = _combined(maxima, "bkgt", sizes, lambda a, b, _: arith.maximumf(a, b))

    totals, sums = [], []
    for (keys, values, _), masked in zip(segments, scores, strict=True):
        here = {**sizes, "s": _size(keys, 1)}
        weights = _map(
            [(masked, "bkgts"), (maximum, "bkgt")],
            (_empty("bkgts", here, f32), "bkgts"),
            lambda score, m, _: _weight(score, m),
        )
        # In the order of the result: IREE 3.13 fuses this sum with the division and makes wrong SPIR-V of a transposed one.
        zeros = _filled(0.0, "btkg", sizes)
        totals.append(_reduce([(weights, "bkgts")], (zeros, "btkg"), "s", lambda p, t: arith.addf(p, t)))
        zeros = _filled(0.0, "btkgd", sizes)
        sums.append(_reduce([(weights, "bkgts"), (values, "bskd")], (zeros, "btkgd"), "s", _multiply_add))

    total = _combined(totals, "btkg", sizes, lambda a, b, _: arith.addf(a, b))
    summed = _combined(sums, "btkgd", sizes, lambda a, b, _: arith.addf(a, b))
    out = _map(
        [(summed, "btkgd"), (total, "btkg")],
        (_empty("btkgd", sizes, element), "btkgd"),
        lambda value, t, _: _narrow(_normalised(value, t), element),
    )
    return tensor.collapse_shape(op.out.type, out, _HEAD_SPLIT)


def _decoded(rows: ir.Value, scales: ir.Value | None) -> ir.Value:
    """Returns codes times their scales as f32, and rows that are no codes as they are."""
    if scales is None:
        return rows
    f32, shape = ir.F32Type.get(), ir.RankedTensorType(rows.type).shape
    sizes = dict(zip("bskd", (_size(rows, axis) for axis in range(len(shape))), strict=True))
    return _map(
        [(rows, "bskd"), (scales, "bsk")],
        (_empty("bskd", sizes, f32), "bskd"),
        lambda code, scale, _: arith.mulf(arith.sitofp(f32, code), scale),
    )


_HEAD_SPLIT = [[0], [1], [2, 3], [4]]


def _split_heads(query: ir.Value, sizes: dict[str, int | ir.Value]) -> ir.Value:
    """Returns the query as ``[B, T, Hk, G, D]``."""
    kind = ir.RankedTensorType(query.type)
    shape = [kind.shape[0], kind.shape[1], sizes["k"], sizes["g"], kind.shape[3]]
    dynamic = [sizes[letter] for letter in "bt" if isinstance(sizes[letter], ir.Value)]
    split = ir.RankedTensorType.get(shape, kind.element_type)
    return tensor.expand_shape(split, query, _HEAD_SPLIT, dynamic, shape)


# Bodies


def _multiply_add(a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
    return arith.addf(arith.mulf(_wide(a), _wide(b)), total)


def _masked_score(op: Any, score: ir.Value, query: ir.Value, key: ir.Value) -> ir.Value:
    i, j = _position(query), _position(key)
    seen = arith.andi(_compare("sge", j, _i32(0)), _compare("sle", j, i))
    if op.window.value:
        window, sinks = (min(a.value, MAX_POSITION) for a in (op.window, op.sinks))
        near = _compare("sgt", j, arith.subi(i, _i32(window)))
        seen = arith.andi(seen, arith.ori(near, _compare("slt", j, _i32(sinks))))
    return arith.select(seen, arith.mulf(score, _f32(op.scale.value)), _f32(MASKED))


def _weight(score: ir.Value, maximum: ir.Value) -> ir.Value:
    visible = arith.cmpf(arith.CmpFPredicate.OGT, score, _f32(FLOOR))
    return arith.select(visible, math.exp(arith.subf(score, maximum)), _f32(0.0))


def _normalised(value: ir.Value, total: ir.Value) -> ir.Value:
    some = arith.cmpf(arith.CmpFPredicate.OGT, total, _f32(0.0))
    return arith.select(some, arith.divf(value, total), _f32(0.0))


def _wide(value: ir.Value) -> ir.Value:
    f32 = ir.F32Type.get()
    return value if value.type == f32 else arith.extf(f32, value)


def _narrow(value: ir.Value, element: ir.Type) -> ir.Value:
    return value if value.type == element else arith.truncf(element, value)


def _position(value: ir.Value) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    return value if value.type == i32 else arith.trunci(i32, value)


def _compare(predicate: str, a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.cmpi(getattr(arith.CmpIPredicate, predicate), a, b)


def _f32(value: float) -> ir.Value:
    return arith.constant(ir.F32Type.get(), value)


def _i32(value: int) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(32), value)


# Loops

Accessed = tuple[ir.Value, str]  # a tensor and the letters of its axes


def _size(value: ir.Value, axis: int) -> int | ir.Value:
    kind = ir.RankedTensorType(value.type)
    if not kind.is_dynamic_dim(axis):
        return kind.shape[axis]
    return tensor.dim(value, arith.constant(ir.IndexType.get(), axis))


def _empty(axes: str, sizes: dict[str, int | ir.Value], element: ir.Type) -> ir.Value:
    return tensor.empty([sizes[letter] for letter in axes], element)


def _filled(value: float, axes: str, sizes: dict[str, int | ir.Value]) -> ir.Value:
    return linalg.fill(_f32(value), outs=[_empty(axes, sizes, ir.F32Type.get())])


def _combined(
    values: Sequence[ir.Value], axes: str, sizes: dict[str, int | ir.Value], body: Body
) -> ir.Value:
    """Returns one tensor from those of the segments."""
    if len(values) == 1:
        return values[0]
    out = _empty(axes, sizes, ir.F32Type.get())
    return _map([(value, axes) for value in values], (out, axes), body)


def _map(inputs: Sequence[Accessed], out: Accessed, body: Body) -> ir.Value:
    return _generic(inputs, out, out[1], "", body)


def _reduce(inputs: Sequence[Accessed], out: Accessed, over: str, body: Body) -> ir.Value:
    return _generic(inputs, out, out[1], over, body)


def _generic(inputs: Sequence[Accessed], out: Accessed, parallel: str, over: str, body: Body) -> ir.Value:
    """Builds a ``linalg.generic``, loops ``parallel`` then ``over``; the body gets inputs and output."""
    loops = parallel + over
    tensors = [*inputs, out]
    maps = [
        ir.AffineMapAttr.get(
            ir.AffineMap.get(len(loops), 0, [ir.AffineDimExpr.get(loops.index(letter)) for letter in axes])
        )
        for _, axes in tensors
    ]
    kinds = ["parallel"] * len(parallel) + ["reduction"] * len(over)
    op = linalg.GenericOp(
        result_tensors=[out[0].type],
        inputs=[value for value, _ in inputs],
        outputs=[out[0]],
        indexing_maps=ir.ArrayAttr.get(maps),
        iterator_types=ir.ArrayAttr.get([ir.Attribute.parse(f"#linalg.iterator_type<{k}>") for k in kinds]),
    )
    elements = [ir.RankedTensorType(value.type).element_type for value, _ in tensors]
    block = op.regions[0].blocks.append(*elements)
    with ir.InsertionPoint(block):
        linalg.YieldOp([body(*block.arguments)])
    return op.results[0]
