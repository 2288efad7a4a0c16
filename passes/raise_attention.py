"""raise-attention: scaled dot product attention over positions becomes ``spikingbrain.attention``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.casts import from_builtin, to_builtin
from spikingbrain.passes.visibility import NotShown, Visibility, analyse

_HEADS_LAST = [0, 2, 1, 3]  # [B, H, T, D] <-> [B, T, H, D]
_DTYPES = {"f16": 5, "f32": 6, "bf16": 15}  # torch's numbers of the types that are raised


@dataclass(frozen=True)
class RaiseAttention:
    """Raises ``scaled_dot_product_attention`` whose mask compares key and query positions, or with ``is_causal``.

    In: torch dialect, the op kept whole. Out: ``spikingbrain.attention`` on [B, T, H, D] between ``torch_c`` casts.
    A ``cat([cache, new], 1)`` of keys, values and positions alike becomes the two segments of the op, so that the
    concatenation is never made. Keys and values that are f16 or bf16, or were until ``.float()``, are read as such;
    so are codes in a cache, ``codes.float() * scales.unsqueeze(-1)``. Queries of 16 bits are made f32 and the result
    is rounded: no arithmetic is in 16 bits. Not handled: masks of other forms, additive masks, dropout, f64; those
    keep the op, which decompose-attention spells out.
    """

    name: ClassVar[str] = "raise-attention"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "torch.aten.scaled_dot_product_attention"):
            try:
                _rewrite(op)
            except NotShown as reason:
                context.record(self, "refused", op, str(reason))
                continue
            context.record(self, "raised", op)
            op.erase()


@dataclass(frozen=True)
class _Stored:
    """Keys or values ``[B, S, Hk, D]`` as they lie in memory, codes with scales ``[B, S, Hk]``; torch tensors."""

    rows: ir.Value
    scales: ir.Value | None = None


@dataclass(frozen=True)
class _Segment:
    keys: _Stored
    values: _Stored
    positions: ir.Value  # [B, S], a builtin tensor

    @property
    def operands(self) -> list[ir.Value]:
        return [to_builtin(self.keys.rows), to_builtin(self.values.rows), self.positions]


def _rewrite(op: ir.Operation) -> None:
    query, key, value, mask, dropout, is_causal, scale, grouped = list(op.operands)
    sizes = [torch_ir.shape(v) for v in (query, key, value)]
    if any(s is None or len(s) != 4 or -1 in (s[1], s[3]) for s in sizes):
        raise NotShown("query, key and value must be [B, H, T, D] with known heads and head size")
    (b, heads, t, width), (key_b, key_heads, s, key_width), (_, value_heads, _, value_width) = sizes  # type: ignore[misc]
    element = torch_ir.element_type(query)
    if element not in _DTYPES:
        raise NotShown(f"element type {element}; {', '.join(_DTYPES)} are raised")
    causal = torch_ir.constant(is_causal)
    if torch_ir.constant(dropout) != 0 or causal is None:
        raise NotShown("dropout, or is_causal is not constant")
    if not width == key_width == value_width or key_heads != value_heads or heads % key_heads:
        raise NotShown("heads of keys and values differ, or head sizes differ")
    if heads != key_heads and torch_ir.constant(grouped) is not True:
        raise NotShown("grouped heads without enable_gqa")
    if causal != torch_ir.is_none(mask):
        raise NotShown("is_causal beside a mask" if causal else "no mask: attention over all keys")
    factor = 1 / math.sqrt(width) if torch_ir.is_none(scale) else torch_ir.constant(scale)
    if factor is None:
        raise NotShown("the scale is not constant")
    if b != key_b or sizes[1] != sizes[2]:
        raise NotShown("sizes of queries, keys and values differ: broadcasting is not raised")
    visible = None if causal else _visible(mask, [b, t], [b, s])

    with ir.InsertionPoint(op), op.location:
        of_query = to_builtin(_converted(_heads_last(query), "f32"))
        # Halves made f32 in front of the transpose, or behind it.
        keys, values = (_unwidened(_heads_last(_unwidened(v))) for v in (key, value))
        if visible:
            positions, segments = to_builtin(visible.query_positions), _segments(keys, values, visible)
        else:  # row t sees the keys up to t
            positions = _numbered(of_query)
            segments = [_Segment(_Stored(keys), _Stored(values), _numbered(to_builtin(keys)))]
        scales = [to_builtin(v) if v else None for v in _scales(segments)]
        operands = [of_query, positions, *(operand for segment in segments for operand in segment.operands)]
        i64, f64 = ir.IntegerType.get_signless(64), ir.F64Type.get()
        attention = ir.Operation.create(
            "spikingbrain.attention",
            [of_query.type],
            [*operands, *filter(None, scales)],
            {
                "scale": ir.FloatAttr.get(f64, float(factor)),
                "window": ir.IntegerAttr.get(i64, visible.window if visible else 0),
                "sinks": ir.IntegerAttr.get(i64, visible.sinks if visible else 0),
                "operandSegmentSizes": ir.DenseI32ArrayAttr.get(
                    [1] * 5 + [len(segments) - 1] * 3 + [int(v is not None) for v in scales]
                ),
            },
        )
        _replace(op, _converted(from_builtin(attention.result), element))


def _visible(mask: ir.Value, of_query: list[int], of_key: list[int]) -> Visibility:
    visible = analyse(mask)
    shapes = [torch_ir.shape(p) for p in (visible.query_positions, visible.key_positions)]
    if any(len(shape or []) != 2 for shape in shapes):
        raise NotShown("positions without a batch dimension")
    # Two dynamic sizes that meet here are equal, or torch.export had refused; only a static one can be broadcast.
    if shapes != [of_query, of_key]:
        raise NotShown("sizes of positions, keys and values differ: broadcasting is not raised")
    return visible


def _segments(keys: ir.Value, values: ir.Value, visible: Visibility) -> list[_Segment]:
    """Returns the new tokens, then the cache if keys, values and positions are concatenated alike."""
    whole = [keys, values, visible.key_positions]
    parts = [torch_ir.concatenation(v, 1) for v in whole]
    one = [_Segment(_Stored(keys), _Stored(values), to_builtin(visible.key_positions))]
    if any(p is None or len(p) != 2 for p in parts):
        return one
    cache, new = ([p[i] for p in parts if p] for i in range(2))
    lengths = [(torch_ir.shape(v) or [-1, -1])[1] for v in cache]
    if lengths[0] < 0 or len(set(lengths)) != 1:  # equal lengths must be shown, not hoped for
        return one
    return [
        _Segment(_Stored(_unwidened(new[0])), _Stored(_unwidened(new[1])), to_builtin(new[2])),
        _Segment(_stored(cache[0]), _stored(cache[1]), to_builtin(cache[2])),
    ]


def _scales(segments: list[_Segment]) -> list[ir.Value | None]:
    return [segments[1].keys.scales, segments[1].values.scales] if len(segments) > 1 else [None, None]


def _stored(value: ir.Value) -> _Stored:
    """Returns what lies in memory where ``value`` is made f32 from it, else the value."""
    product = torch_ir.defining(value, "torch.aten.mul.Tensor")
    for codes, scales in (product.operands, reversed(product.operands)) if product else ():
        rows, spread = torch_ir.before_cast(codes), torch_ir.defining(scales, "torch.aten.unsqueeze")
        if rows is None or spread is None or torch_ir.constant(spread.operands[1]) not in (3, -1):
            continue
        of_row = spread.operands[0]
        kinds = [torch_ir.element_type(v) for v in (rows, codes, of_row)]
        if kinds == ["si8", "f32", "f32"] and torch_ir.shape(of_row) == (torch_ir.shape(rows) or [])[:3]:
            return _Stored(rows, of_row)
    return _Stored(_unwidened(value))


def _unwidened(value: ir.Value) -> ir.Value:
    """Returns the halves that ``value`` is made from where they are made f32, else the value."""
    source = torch_ir.before_cast(value)
    if source is None or torch_ir.element_type(value) != "f32":
        return value
    return source if torch_ir.element_type(source) in _DTYPES else value


def _converted(value: ir.Value, element: str) -> ir.Value:
    """Returns a tensor with another float type."""
    if torch_ir.element_type(value) == element:
        return value
    text = str(value.type)
    wanted = ir.Type.parse(f"{text[: text.rindex(',')]},{element}>")
    false = ir.Operation.create(
        "torch.constant.bool", [ir.Type.parse("!torch.bool")], attributes={"value": ir.BoolAttr.get(False)}
    ).result
    none = ir.Operation.create("torch.constant.none", [ir.Type.parse("!torch.none")]).result
    operands = [value, _int(_DTYPES[element]), false, false, none]
    return ir.Operation.create("torch.aten.to.dtype", [wanted], operands).result


def _numbered(like: ir.Value) -> ir.Value:
    """Returns 0, 1, ... for the rows of each batch entry of a builtin tensor: [B, T] of i64."""
    i64 = ir.IntegerType.get_signless(64)
    shape = ir.RankedTensorType(like.type).shape[:2]
    sizes = [build.size(like, axis) for axis, n in enumerate(shape) if n == ir.ShapedType.get_dynamic_size()]
    init = build.empty(ir.RankedTensorType.get(shape, i64), sizes)
    identity = ir.AffineMap.get_identity(2)
    return build.generic(
        [],
        init,
        [identity],
        ["parallel"] * 2,
        lambda _: arith.IndexCastOp(i64, linalg.IndexOp(1).result).result,
    )


def _heads_last(value: ir.Value) -> ir.Value:
    """Returns [B, H, T, D] as [B, T, H, D]: the source of the user's own transpose where there is one."""
    found = torch_ir.permutation(value)
    if found and found[1] == _HEADS_LAST:
        return found[0]
    return _permute(value)


def _permute(value: ir.Value) -> ir.Value:
    sizes = torch_ir.shape(value) or []
    text = ",".join("?" if sizes[d] < 0 else str(sizes[d]) for d in _HEADS_LAST)
    wanted = ir.Type.parse(f"!torch.vtensor<[{text}],{torch_ir.element_type(value)}>")
    dims = [_int(d) for d in _HEADS_LAST]
    listed = ir.Operation.create("torch.prim.ListConstruct", [ir.Type.parse("!torch.list<int>")], dims).result
    return ir.Operation.create("torch.aten.permute", [wanted], [value, listed]).result


def _int(number: int) -> ir.Value:
    value = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), number)
    return ir.Operation.create(
        "torch.constant.int", [ir.Type.parse("!torch.int")], attributes={"value": value}
    ).result


def _replace(op: ir.Operation, result: ir.Value) -> None:
    """Replaces the op's [B, H, T, D] result by ``result`` ([B, T, H, D]), dropping the user's transpose back."""
    old = op.results[0]
    for use in list(old.uses):
        found = torch_ir.permutation(use.owner.operation.results[0]) if use.owner.operation.results else None
        if found and found[0] == old and found[1] == _HEADS_LAST:
            use.owner.operation.results[0].replace_all_uses_with(result)
    if list(old.uses):
        old.replace_all_uses_with(_permute(result))
