"""Ops of mixtures of experts: each row of an activation goes through one of several stored layers."""

from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import ext

from spikingbrain.passes.dialect_base import SpikingBrain, after_declaration, fail, fits, shape


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
