"""lower-grouped-linear: projections by experts become kernel launches, or gathering sums in linalg where there is no kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg, tensor

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.elementwise import VIEWS
from spikingbrain.passes.kernels.group_rows import Routings, known_expert
from spikingbrain.passes.kernels.grouped_linear import emit_grouped_linear
from spikingbrain.passes.kernels.spike_portable import spike_linear
from spikingbrain.passes.scan_axes import GENERIC
from spikingbrain.passes.wave_kernels import grouped_linear as wave
from spikingbrain.passes.wave_kernels import row_values
from spikingbrain.passes.wave_kernels.combination import find as find_combination
from spikingbrain.passes.wave_kernels.group_rows import Tiles
from spikingbrain.tuning import Tuning

_OP = "spikingbrain.grouped_linear"


@dataclass(frozen=True)
class LowerGroupedLinear:
    """Lowers ``spikingbrain.grouped_linear``: a packed weight to CPU kernels, a plain one to wave kernels or to linalg.

    Rows that go the same ways through several weights are sorted once. Wave kernels for few rows compute what nothing but
    projections reads: a norm, a gate; and add up the rows that a token sent to its experts. Floats of 16 bits are summed as f32.
    ``spike_grouped_linear`` becomes integer arithmetic in linalg.
    In: our dialect. Out: ``spikingbrain_control.launch`` and kernel functions, or ``linalg.generic``.
    """

    name: ClassVar[str] = "lower-grouped-linear"

    def run(self, module: ir.Module, context: PassContext) -> None:
        routings: dict[int, Routings] = {}  # by block
        tiles: dict[int, Tiles] = {}
        for op in torch_ir.operations(module, _OP):
            x, weight, expert = op.operands
            packed = len(ir.RankedTensorType(weight.type).shape) == 4
            reason = "" if packed else _refusal(op, context)
            form = f"linalg: {reason}" if reason else "kernel"
            with ir.InsertionPoint(op), op.location:
                old = op.results[0]
                if packed:
                    known = routings.setdefault(hash(op.block), {})
                    columns = op.attributes["columns"].value
                    rows = build.converted(x, ir.F32Type.get())
                    y = emit_grouped_linear(rows, weight, expert, columns, context.target, known)
                    y = build.converted(y, ir.RankedTensorType(x.type).element_type)
                elif reason:
                    y = _gathering(x, weight, expert, op.results[0].type)
                else:
                    y, old, more = _emit_waves(
                        op, tiles.setdefault(hash(op.block), {}), context.target.tuning
                    )
                    form += more
            old.replace_all_uses_with(y)
            context.record(self, "lowered", op, form)
            _erase_unused(old)
        for op in torch_ir.operations(module, "spikingbrain.spike_grouped_linear"):
            with ir.InsertionPoint(op), op.location:
                counts, threshold, weight, scale, expert = op.operands
                bits = op.attributes["bits"].value
                y = spike_linear(counts, threshold, weight, scale, None, bits, context.target, expert)
            op.results[0].replace_all_uses_with(y)
            context.record(self, "lowered", op, "linalg")
            op.erase()


def _emit_waves(op: ir.Operation, tiles: Tiles, tuning: Tuning) -> tuple[ir.Value, ir.Value, str]:
    """Emits wave kernels; returns their result, whose it is, and in words what else they compute."""
    x, weight, expert = op.operands
    is_few = wave.computes(ir.RankedTensorType(x.type).shape[0])
    computed, combination = (_computed(op), find_combination(op)) if is_few else (None, None)
    words = (", few rows computed in it" if computed else "") + (", combined in it" if combination else "")
    if combination is None:
        y = wave.emit_grouped_linear(x, weight, expert, tiles, tuning, computed)
        return y, op.results[0], words
    old = combination.end.results[0]
    with ir.InsertionPoint(combination.end), combination.end.location:
        y = wave.emit_combined(x, weight, expert, tuning, combination, computed)
        return build.unflatten_leading(y, old.type, y), old, words


def _computed(op: ir.Operation) -> row_values.RowValues | None:
    """Returns how the few rows of a projection are computed, if nothing but projections reads them."""
    x, block = op.operands[0], op.block
    names = ("spikingbrain.linear", _OP)
    return row_values.find(x, [o.operation for o in block.operations if o.operation.name in names])


def _erase_unused(value: ir.Value) -> None:
    """Erases what made a value that nothing reads any more, so that others may compute what they read with it."""
    made = torch_ir.defining(value)
    if made is None or made.name not in (GENERIC, _OP, *VIEWS) or any(list(r.uses) for r in made.results):
        return
    given = list(made.operands)
    made.erase()
    for operand in given:
        _erase_unused(operand)


def _refusal(op: ir.Operation, context: PassContext) -> str:
    """Returns why a product with plain weights has no kernel, or an empty text."""
    weight = ir.RankedTensorType(op.operands[1].type)
    if not context.target.wave_kernels:
        return "the target has no kernel for weights that are not packed"
    if str(weight.element_type) not in ("f32", "f16", "bf16"):
        return f"no kernel for {weight.element_type}"
    return wave.refusal(weight.shape[0])


def _gathering(x: ir.Value, weight: ir.Value, expert: ir.Value, type_: ir.Type) -> ir.Value:
    """Emits ``y[r, o] = sum_k x[r, k] * w[expert[r], o, k]``, each weight read where it is used."""
    result = ir.RankedTensorType(type_)
    element = result.element_type
    wide = ir.F32Type.get() if element.width < 32 else element
    experts = ir.RankedTensorType(weight.type).shape[0]
    zero, limit = build.constant_index(0), build.constant_index(experts)
    nan = arith.ConstantOp(wide, ir.FloatAttr.get(wide, math.nan)).result
    d = [ir.AffineDimExpr.get(i) for i in range(3)]
    maps = [ir.AffineMap.get(3, 0, e) for e in ([d[0], d[2]], [d[0]], [d[0], d[1]])]

    def widened(value: ir.Value) -> ir.Value:
        return value if wide == element else arith.extf(wide, value)

    def body(value: ir.Value, number: ir.Value, total: ir.Value) -> ir.Value:
        e = known_expert(number, experts)
        exists = arith.cmpi(arith.CmpIPredicate.ult, e, limit)
        at = [arith.select(exists, e, zero), linalg.IndexOp(1).result, linalg.IndexOp(2).result]
        product = arith.mulf(widened(value), widened(tensor.extract(weight, at)))
        return arith.addf(total, arith.select(exists, product, nan))

    sum_type = ir.RankedTensorType.get(result.shape, wide)
    init = build.filled(sum_type, build.dynamic_sizes(x), 0.0)
    y = build.generic([x, expert], init, maps, ["parallel", "parallel", "reduction"], body)
    if wide == element:
        return y
    same = ir.AffineMap.get_identity(2)
    empty = build.empty(result, build.dynamic_sizes(x))
    return build.generic(
        [y], empty, [same, same], ["parallel"] * 2, lambda value, _: arith.truncf(element, value)
    )
