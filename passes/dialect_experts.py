"""Ops of mixtures of experts: each row of an activation goes through one of several stored layers."""

from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import ext

from spikingbrain.passes.dialect_base import SpikingBrain, after_declaration, fail, fits, shape
from spikingbrain.passes.dialect_spikes import silent_share


class GroupedLinear(SpikingBrain.Operation, name="grouped_linear", traits=[ext.Pure]):
    """A dense projection of each row by the weight of the expert that the row is sent to.

    ``y[r, o] = sum_k x[r, k] * w[e, o, k]`` with ``e = expert[r]``, counted from the end where it is negative, as torch does; a
    row for an expert outside ``-N .. N - 1`` is NaN. No expert is computed for other rows than its own, and no weight is copied.
    The weights are ``[N, O, K]``, or packed by column blocks as ``[N, ceil(O / block), K, block]`` (columns beyond O are
    zero). There may be no rows.

        %y = "spikingbrain.grouped_linear"(%x, %w, %expert) {columns = 768 : i64}
               : (tensor<?x2048xf32>, tensor<64x12x2048x64xf32>, tensor<?xi64>) -> tensor<?x768xf32>
    """

    x: ext.Operand[ir.RankedTensorType]
    weight: ext.Operand[ir.RankedTensorType]
    expert: ext.Operand[ir.RankedTensorType]
    columns: ir.IntegerAttr
    y: ext.Result[ir.RankedTensorType]

    @staticmethod
    @after_declaration
    def verify_invariants(op: Any) -> bool:
        x, w, expert, y, n = shape(op.x), shape(op.weight), shape(op.expert), shape(op.y), op.columns.value
        if len({str(v.type.element_type) for v in (op.x, op.weight, op.y)}) > 1:
            return fail(op.operation, "takes and returns one element type apart from the experts")
        if str(op.expert.type.element_type) != "i64":
            return fail(op.operation, f"experts are i64, got {op.expert.type.element_type}")
        if len(w) not in (3, 4) or w[0] < 1:
            return fail(op.operation, f"weight must be [N, O, K] or [N, O/block, K, block], got {w}")
        stored = w[1] if len(w) == 3 else w[1] * w[3]
        if (len(w) == 3 and stored != n) or n > stored:
            return fail(op.operation, f"weight stores {stored} columns, columns = {n}")
        if len(x) != 2 or x[1] != w[2]:
            return fail(op.operation, f"input {x} must be [R, K] for weight {w}")
        if len(expert) != 1 or not fits(expert[0], x[0]):
            return fail(op.operation, f"experts {expert} must be [R], one for each row of {x}")
        if len(y) != 2 or y[1] != n or not fits(y[0], x[0]):
            return fail(op.operation, f"result shape {y} does not follow from {x} and {n} columns")
        return True


class SpikeGroupedLinear(SpikingBrain.Operation, name="spike_grouped_linear", traits=[ext.Pure]):
    """A dense projection of each row of spike counts by the integer weight of the expert that the row is sent to, exact.

    ``y[r, o] = threshold[r] * sum_g scale[e, o, g] * f32(sum_(k in group g) counts[r, k] * weight[e, o, k])`` with
    ``e = expert[r]``: the choice is that of ``grouped_linear``, the sums are those of ``spike_linear``. Codes lie in -8 .. 7 with
    ``bits = 4`` and in -128 .. 127 with 8, both in an i8 weight. ``silent`` is that of ``spike_linear``.

        %y = "spikingbrain.spike_grouped_linear"(%counts, %threshold, %w, %scale, %expert) {bits = 8 : i64}
               : (tensor<?x576xf32>, tensor<?xf32>, tensor<16x960x576xi8>, tensor<16x960x9xf32>,
                  tensor<?xi64>) -> tensor<?x960xf32>
    """

    counts: ext.Operand[ir.RankedTensorType]
    threshold: ext.Operand[ir.RankedTensorType]
    weight: ext.Operand[ir.RankedTensorType]
    scale: ext.Operand[ir.RankedTensorType]
    expert: ext.Operand[ir.RankedTensorType]
    bits: ir.IntegerAttr
    y: ext.Result[ir.RankedTensorType]

    @staticmethod
    @after_declaration
    def verify_invariants(op: Any) -> bool:
        values = (op.counts, op.threshold, op.weight, op.scale, op.expert, op.y)
        elements = [str(v.type.element_type) for v in values]
        if elements != ["f32", "f32", "i8", "f32", "i64", "f32"]:
            return fail(op.operation, f"takes f32, f32, i8, f32 and i64 and returns f32, got {elements}")
        if not 0 <= silent_share(op.operation) <= 1:
            return fail(op.operation, f"silent is a share, 0 to 1, got {silent_share(op.operation)}")
        if op.bits.value not in (4, 8):
            return fail(op.operation, f"a weight of i8 has no codes of {op.bits.value} bits")
        counts, threshold, w, scale, expert, y = map(shape, values)
        if len(w) != 3 or w[0] < 1 or len(counts) != 2 or counts[1] != w[2]:
            return fail(op.operation, f"weight {w} must be [N, O, K] for counts {counts}")
        if len(scale) != 3 or scale[:2] != w[:2] or scale[2] < 1 or w[2] % scale[2]:
            reason = f"scale {scale} must be [N, O, G] with G a divisor of K, weight is {w}"
            return fail(op.operation, reason)
        for name, given in (("threshold", threshold), ("experts", expert)):
            if len(given) != 1 or not fits(given[0], counts[0]):
                return fail(op.operation, f"{name} {given} must be [R], one for each row of {counts}")
        if len(y) != 2 or y[1] != w[1] or not fits(y[0], counts[0]):
            return fail(op.operation, f"result {y} does not follow from counts {counts} and {w[1]} columns")
        return True
