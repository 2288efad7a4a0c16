"""fuse-recurrence: keys and values that are repeated for groups of heads are read where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch_mlir import ir
from torch_mlir.dialects import tensor

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.casts import to_builtin
from spikingbrain.passes.raise_recurrence import cast

_BY_STATE = ("k", "v", "decay", "erase", "predict")  # operands [B, T, S, ...]
_VIEWS = ("torch.aten.view", "torch.aten.reshape", "torch.aten._unsafe_view", "torch.aten.flatten.using_ints")


@dataclass(frozen=True)
class FuseRecurrence:
    """Lets heads share a state where each would have computed the same one.

    In and out: ``spikingbrain.linear_recurrence`` between ``torch_c`` casts, in torch dialect. Where everything that
    makes the states is ``x.repeat_interleave(G, 2)`` (an expand of ``x[:, :, :, None]`` that is flattened) and they begin at
    0, the op takes x, and G times as many queries per state; the final state is repeated behind it. Not handled: a state
    that is given, as its copies may differ, and a bonus.
    """

    name: ClassVar[str] = "fuse-recurrence"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "spikingbrain.linear_recurrence"):
            sources = _repeated(op.opview)
            if sources:
                _rewrite(op.opview, sources)
                context.record(self, "fused", op, "heads share states")
                op.erase()


def _repeated(op: Any) -> dict[str, ir.Value]:
    """Returns what is repeated to make each operand of the states, or nothing unless all are, equally often."""
    if op.bonus is not None or not (op.state is None or _is_zero(op.state)):
        return {}
    operands = {name: value for name in _BY_STATE if (value := getattr(op, name)) is not None}
    sources = {name: _source(value) for name, value in operands.items()}
    states = {None if s is None else (torch_ir.shape(s) or [])[2] for s in sources.values()}
    if None in states or len(states) != 1:
        return {}
    with ir.InsertionPoint(op.operation), op.operation.location:
        element = str(ir.RankedTensorType(op.q.type).element_type)
        return {name: to_builtin(cast(s, element)) for name, s in sources.items() if s is not None}


def _source(value: ir.Value) -> ir.Value | None:
    """Returns x where a tensor is ``x.repeat_interleave(G, 2)``, perhaps of another float type."""
    inner = torch_ir.defining(value, "torch_c.to_builtin_tensor")
    found = inner.operands[0] if inner else None
    while (
        found is not None and (narrow := torch_ir.before_cast(found)) is not None and _widens(narrow, found)
    ):
        found = narrow
    flattened = _flattened(found) if found is not None else None
    while flattened is not None and (op := torch_ir.defining(flattened, "torch.aten.clone")):
        flattened = op.operands[0]
    expand = torch_ir.defining(flattened, "torch.aten.expand") if flattened is not None else None
    if found is None or flattened is None or expand is None:
        return None
    unsqueeze = torch_ir.defining(expand.operands[0], "torch.aten.unsqueeze")
    before, after, whole = (torch_ir.shape(v) for v in (expand.operands[0], flattened, found))
    if unsqueeze is None or before is None or after is None or whole is None or len(after) < 4:
        return None
    axis = torch_ir.constant(unsqueeze.operands[1])
    as_is = [*before[:3], after[3], *before[4:]] == after and before[3] == 1
    joined = [*after[:2], after[2] * after[3], *after[4:]] == whole and -1 not in after[2:]
    if axis is None or int(axis) % len(before) != 3 or not (as_is and joined):
        return None
    return unsqueeze.operands[0]


def _flattened(value: ir.Value) -> ir.Value | None:
    """Returns what a view makes ``value`` of; the importer writes some views as ``tensor.collapse_shape``."""
    op = torch_ir.defining(value)
    if op is None:
        return None
    if op.name in _VIEWS:
        return op.operands[0]
    collapse = (
        torch_ir.defining(op.operands[0], "tensor.collapse_shape")
        if op.name == "torch_c.from_builtin_tensor"
        else None
    )
    plain = torch_ir.defining(collapse.operands[0], "torch_c.to_builtin_tensor") if collapse else None
    return plain.operands[0] if plain else None


def _widens(narrow: ir.Value, wide: ir.Value) -> bool:
    bits = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
    before, after = (bits.get(torch_ir.element_type(v), 0) for v in (narrow, wide))
    return 0 < before < after


def _is_zero(state: ir.Value) -> bool:
    inner = torch_ir.defining(state, "torch_c.to_builtin_tensor")
    op = torch_ir.defining(inner.operands[0]) if inner else None
    if op is None:
        return False
    full = op.name == "torch.aten.full" and torch_ir.constant(op.operands[1]) == 0
    return full or op.name in ("torch.aten.zeros", "torch.aten.new_zeros", "torch.aten.zeros_like")


def _rewrite(op: Any, sources: dict[str, ir.Value]) -> None:
    operation = op.operation
    with ir.InsertionPoint(operation), operation.location:
        whole = ir.RankedTensorType(op.final_state.type)
        batch, states, *matrix = whole.shape
        shared = ir.RankedTensorType(sources["k"].type).shape[2]
        small = ir.RankedTensorType.get([batch, shared, *matrix], whole.element_type)
        attributes = {a: operation.attributes[a] for a in ("decay_axis", "log_decay", "exclusive", "reverse")}
        present = [name in sources for name in _BY_STATE]
        attributes["operandSegmentSizes"] = ir.DenseI32ArrayAttr.get([1, *map(int, present), 0, 0])
        fused = ir.Operation.create(operation.name, [op.o.type, small], [op.q, *sources.values()], attributes)
        op.o.replace_all_uses_with(fused.results[0])
        if list(op.final_state.uses):
            repeated = _each_repeated(fused.results[1], states // shared, whole)
            op.final_state.replace_all_uses_with(repeated)


def _each_repeated(state: ir.Value, times: int, whole: ir.RankedTensorType) -> ir.Value:
    """Returns ``[B, S, K, V]`` as ``[B, S * times, K, V]``, each state repeated."""
    b, s, g, k, v = (ir.AffineDimExpr.get(d) for d in range(5))
    batch, shared, *matrix = ir.RankedTensorType(state.type).shape
    type_ = ir.RankedTensorType.get([batch, shared, times, *matrix], whole.element_type)
    init = build.empty(type_, build.dynamic_sizes(state))
    maps = [ir.AffineMap.get(5, 0, [b, s, k, v]), ir.AffineMap.get(5, 0, [b, s, g, k, v])]
    spread = build.generic([state], init, maps, ["parallel"] * 5, lambda value, _: value)
    return tensor.CollapseShapeOp(whole, spread, build.reassociation([[0], [1, 2], [3], [4]])).result
