"""raise-attention: scaled dot product attention over positions becomes ``spikingbrain.attention``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.casts import from_builtin, to_builtin
from spikingbrain.passes.visibility import NotShown, Visibility, analyse

_HEADS_LAST = [0, 2, 1, 3]  # [B, H, T, D] <-> [B, T, H, D]


@dataclass(frozen=True)
class RaiseAttention:
    """Raises ``scaled_dot_product_attention`` whose mask compares key and query positions.

    In: torch dialect, the op kept whole. Out: ``spikingbrain.attention`` on [B, T, H, D] between ``torch_c`` casts.
    A ``cat([cache, new], 1)`` of keys, values and positions alike becomes the two segments of the op, so that the
    concatenation is never made. Not handled: masks of other forms, additive masks, dropout, element types but f32;
    those keep the op, which upstream decomposes.
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


def _rewrite(op: ir.Operation) -> None:
    query, key, value, mask, dropout, is_causal, scale, grouped = list(op.operands)
    sizes = [torch_ir.shape(v) for v in (query, key, value)]
    if any(s is None or len(s) != 4 or -1 in (s[1], s[3]) for s in sizes):
        raise NotShown("query, key and value must be [B, H, T, D] with known heads and head size")
    (_, heads, _, width), (_, key_heads, _, key_width), (_, value_heads, _, value_width) = sizes  # type: ignore[misc]
    if any(torch_ir.element_type(v) != "f32" for v in (query, key, value)):
        raise NotShown(f"element type {torch_ir.element_type(query)}; only f32 is raised")
    if torch_ir.constant(dropout) != 0 or torch_ir.constant(is_causal) is not False:
        raise NotShown("dropout, or is_causal: spell the mask with positions")
    if not width == key_width == value_width or key_heads != value_heads or heads % key_heads:
        raise NotShown("heads of keys and values differ, or head sizes differ")
    if heads != key_heads and torch_ir.constant(grouped) is not True:
        raise NotShown("grouped heads without enable_gqa")
    if torch_ir.is_none(mask):
        raise NotShown("no mask: attention over all keys")
    factor = 1 / math.sqrt(width) if torch_ir.is_none(scale) else torch_ir.constant(scale)
    if factor is None:
        raise NotShown("the scale is not constant")
    visible = analyse(mask)
    if any(len(torch_ir.shape(p) or []) != 2 for p in (visible.query_positions, visible.key_positions)):
        raise NotShown("positions without a batch dimension")
    # Two dynamic sizes that meet here are equal, or torch.export had refused; only a static one can be broadcast.
    (b, _, t, _), (key_b, _, s, _), value_sizes = sizes  # type: ignore[misc]
    of_query, of_key = torch_ir.shape(visible.query_positions), torch_ir.shape(visible.key_positions)
    if b != key_b or sizes[1] != value_sizes or of_query != [b, t] or of_key != [b, s]:
        raise NotShown("sizes of positions, keys and values differ: broadcasting is not raised")

    with ir.InsertionPoint(op), op.location:
        segments = _segments(_heads_last(key), _heads_last(value), visible)
        new, *cache = segments
        operands = [_heads_last(query), visible.query_positions, *new, *(cache[0] if cache else [])]
        i64, f64 = ir.IntegerType.get_signless(64), ir.F64Type.get()
        plain = [to_builtin(v) for v in operands]
        attention = ir.Operation.create(
            "spikingbrain.attention",
            [plain[0].type],
            plain,
            {
                "scale": ir.FloatAttr.get(f64, float(factor)),
                "window": ir.IntegerAttr.get(i64, visible.window),
                "sinks": ir.IntegerAttr.get(i64, visible.sinks),
                "operandSegmentSizes": ir.DenseI32ArrayAttr.get([1] * 5 + [len(cache)] * 3 + [0] * 2),
            },
        )
        result = from_builtin(attention.result)
        _replace(op, result)


def _segments(key: ir.Value, value: ir.Value, visible: Visibility) -> list[list[ir.Value]]:
    """Returns [keys, values, positions] of the new tokens, then of the cache if the three are concatenated alike."""
    whole = [key, value, visible.key_positions]
    parts = [torch_ir.concatenation(v, 1) for v in whole]
    if any(p is None or len(p) != 2 for p in parts):
        return [whole]
    cache = [p[0] for p in parts if p]
    lengths = [(torch_ir.shape(v) or [-1, -1])[1] for v in cache]
    if lengths[0] < 0 or len(set(lengths)) != 1:  # equal lengths must be shown, not hoped for
        return [whole]
    return [[p[1] for p in parts if p], cache]


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
    i64, integer = ir.IntegerType.get_signless(64), ir.Type.parse("!torch.int")
    dims = [
        ir.Operation.create(
            "torch.constant.int", [integer], attributes={"value": ir.IntegerAttr.get(i64, d)}
        ).result
        for d in _HEADS_LAST
    ]
    listed = ir.Operation.create("torch.prim.ListConstruct", [ir.Type.parse("!torch.list<int>")], dims).result
    return ir.Operation.create("torch.aten.permute", [wanted], [value, listed]).result


def _replace(op: ir.Operation, result: ir.Value) -> None:
    """Replaces the op's [B, H, T, D] result by ``result`` ([B, T, H, D]), dropping the user's transpose back."""
    old = op.results[0]
    for use in list(old.uses):
        found = torch_ir.permutation(use.owner.operation.results[0]) if use.owner.operation.results else None
        if found and found[0] == old and found[1] == _HEADS_LAST:
            use.owner.operation.results[0].replace_all_uses_with(result)
    if list(old.uses):
        old.replace_all_uses_with(_permute(result))
