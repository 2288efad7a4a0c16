"""decompose-attention: attention that could not be raised becomes matmul, mask, softmax, matmul."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.casts import builtin_type, from_builtin, to_builtin


@dataclass(frozen=True)
class DecomposeAttention:
    """Spells out ``scaled_dot_product_attention`` in torch ops, the way torch's math backend computes it.

    In and out: torch dialect. Upstream would make it ``tm_tensor.attention``, which IREE runs seven times slower on
    a CPU than the plain form, and lowers wrongly for a mask of lower rank. Dropout is not handled and left alone.
    """

    name: ClassVar[str] = "decompose-attention"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "torch.aten.scaled_dot_product_attention"):
            if torch_ir.constant(op.operands[4]) != 0 or len(torch_ir.shape(op.operands[0]) or []) != 4:
                context.record(self, "refused", op, "dropout, or not [B, H, T, D]")
                continue
            with ir.InsertionPoint(op), op.location:
                op.results[0].replace_all_uses_with(_math_form(op))
            op.erase()


def _math_form(op: ir.Operation) -> ir.Value:
    query, key, value, mask, _, is_causal, scale, _ = list(op.operands)
    (b, heads, t, width), (_, key_heads, s, _) = torch_ir.shape(query) or [], torch_ir.shape(key) or []
    element = torch_ir.element_type(query)
    factor = 1 / math.sqrt(width) if torch_ir.is_none(scale) else torch_ir.constant(scale)
    if heads != key_heads:
        key, value = (_repeat_heads(v, heads // key_heads) for v in (key, value))
    # torch scales both factors by the root, to keep float16 products small
    root = _float(math.sqrt(float(factor or 0)))
    query = _create("torch.aten.mul.Scalar", query.type, query, root)
    key = _create("torch.aten.mul.Scalar", key.type, key, root)
    transposed = _vtensor([b, heads, width, s], element)
    key = _create("torch.aten.transpose.int", transposed, key, _int(-2), _int(-1))
    scores = _create("torch.aten.matmul", _vtensor([b, heads, t, s], element), query, key)
    if torch_ir.constant(is_causal):
        rows, columns = (
            _create("torch.aten.size.int", ir.Type.parse("!torch.int"), v, _int(d))
            for v, d in ((query, -2), (key, -1))
        )
        ones = _create(
            "torch.aten.ones",
            _vtensor([t, s], "i1"),
            _list(rows, columns),
            _int(11),
            _none(),
            _none(),
            _none(),
        )
        mask = _create("torch.aten.tril", ones.type, ones, _int(0))
    if not torch_ir.is_none(mask):
        if torch_ir.element_type(mask) == "i1":
            defaults = [_none() for _ in range(4)]
            lowest = _create("torch.aten.scalar_tensor", _vtensor([], element), _float(-math.inf), *defaults)
            scores = _create("torch.aten.where.self", scores.type, mask, scores, lowest)
        else:
            scores = _create("torch.aten.add.Tensor", scores.type, scores, mask, _int(1))
    weights = _create("torch.aten._safe_softmax", scores.type, scores, _int(-1), _none())
    return _create("torch.aten.matmul", op.results[0].type, weights, value)


def _repeat_heads(value: ir.Value, times: int) -> ir.Value:
    """Returns [B, Hk, S, D] as [B, Hk * times, S, D], each head repeated in place."""
    b, heads, s, d = torch_ir.shape(value) or []
    element = torch_ir.element_type(value)
    lifted = _create("torch.aten.unsqueeze", _vtensor([b, heads, 1, s, d], element), value, _int(2))
    keep = _int(-1)
    wide = _create(
        "torch.aten.expand",
        _vtensor([b, heads, times, s, d], element),
        lifted,
        _list(keep, keep, _int(times), keep, keep),
        _bool(False),
    )
    plain = to_builtin(wide)
    wanted = builtin_type(_vtensor([b, heads * times, s, d], element))
    i64 = ir.IntegerType.get_signless(64)
    groups = [[0], [1, 2], [3], [4]]
    collapsed = ir.Operation.create(
        "tensor.collapse_shape",
        [wanted],
        [plain],
        {
            "reassociation": ir.ArrayAttr.get(
                [ir.ArrayAttr.get([ir.IntegerAttr.get(i64, d) for d in g]) for g in groups]
            )
        },
    )
    return from_builtin(collapsed.result)


def _vtensor(sizes: Sequence[int], element: str) -> ir.Type:
    return ir.Type.parse(f"!torch.vtensor<[{','.join('?' if n < 0 else str(n) for n in sizes)}],{element}>")


def _create(name: str, result: ir.Type, *operands: ir.Value) -> ir.Value:
    return ir.Operation.create(name, [result], list(operands)).result


def _int(n: int) -> ir.Value:
    value = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), n)
    return ir.Operation.create(
        "torch.constant.int", [ir.Type.parse("!torch.int")], attributes={"value": value}
    ).result


def _float(x: float) -> ir.Value:
    value = ir.FloatAttr.get(ir.F64Type.get(), x)
    return ir.Operation.create(
        "torch.constant.float", [ir.Type.parse("!torch.float")], attributes={"value": value}
    ).result


def _bool(x: bool) -> ir.Value:
    value = ir.BoolAttr.get(x)
    return ir.Operation.create(
        "torch.constant.bool", [ir.Type.parse("!torch.bool")], attributes={"value": value}
    ).result


def _none() -> ir.Value:
    return ir.Operation.create("torch.constant.none", [ir.Type.parse("!torch.none")]).result


def _list(*items: ir.Value) -> ir.Value:
    return ir.Operation.create(
        "torch.prim.ListConstruct", [ir.Type.parse("!torch.list<int>")], list(items)
    ).result
