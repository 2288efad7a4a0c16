"""Ops of adaptive-threshold spiking: activations as integer spike counts, linears as sums of integers.

Source: SpikingBrain technical report (arXiv 2509.05276), section on spiking, and the published W8ASpike checkpoint.
"""

from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import ext

from spikingbrain.passes.dialect_base import SpikingBrain, after_declaration, fail, fits, shape

LARGEST_CODE = {4: 8, 8: 128, 16: 32768}  # bits of a weight's code -> largest magnitude of a code


class SpikeEncode(SpikingBrain.Operation, name="spike_encode", traits=[ext.Pure]):
    """Counts the spikes that a neuron with a threshold of its own for each row fires.

    ``threshold = clamp(mean_k |x[..., k]| / k, lower, upper)``, ``counts[..., k] = round_half_even(x[..., k] / threshold)``.
    The mean is accumulated in f64 and rounded to f32; the divisions are those of f32. Counts are whole numbers of either sign,
    held in f32, without a bound: a NaN in a row makes its threshold and all its counts NaN, an infinity stays one.

        %counts, %threshold = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64}
               : (tensor<1x?x576xf32>) -> (tensor<1x?x576xf32>, tensor<1x?xf32>)
    """

    x: ext.Operand[ir.RankedTensorType]
    k: ir.FloatAttr
    lower: ir.FloatAttr
    upper: ir.FloatAttr
    counts: ext.Result[ir.RankedTensorType]
    threshold: ext.Result[ir.RankedTensorType]

    @staticmethod
    @after_declaration
    def verify_invariants(op: Any) -> bool:
        x, counts, threshold = shape(op.x), shape(op.counts), shape(op.threshold)
        if not all(str(v.type.element_type) == "f32" for v in (op.x, op.counts, op.threshold)):
            return fail(op.operation, "computes in f32")
        if not x or x[-1] < 1:
            return fail(op.operation, f"needs a known number of channels, at least one, got {x}")
        if counts != x or threshold != x[:-1]:
            return fail(op.operation, f"counts {counts} and threshold {threshold} do not follow from x {x}")
        if not op.k.value > 0 or not 0 < op.lower.value <= op.upper.value:
            return fail(op.operation, "needs k > 0 and 0 < lower <= upper")
        return True


class SpikeLinear(SpikingBrain.Operation, name="spike_linear", traits=[ext.Pure]):
    """A dense projection of spike counts by integer weights, exact.

    ``y[..., n] = threshold * sum_g scale[n, g] * f32(sum_(k in group g) counts[..., k] * weight[n, k]) + bias[n]``: the K
    channels are cut into G groups of K / G. The inner sum is of integers and exact, the outer one in f32. Codes lie in
    -8 .. 7 with ``bits = 4`` and in -128 .. 127 with 8, both in an i8 weight; an i16 weight has 16. A NaN or an infinite
    count makes of its row what IEEE arithmetic makes of it. The bias may be absent.

    ``silent`` is the share of counts that are 0, where someone has measured it. It changes no result: targets may then store
    weights by channel and add those of the channels that fire.

        %y = "spikingbrain.spike_linear"(%counts, %threshold, %w, %scale, %bias) {bits = 8 : i64}
               : (tensor<1x?x576xf32>, tensor<1x?xf32>, tensor<960x576xi8>, tensor<960x9xf32>,
                  tensor<960xf32>) -> tensor<1x?x960xf32>
    """

    counts: ext.Operand[ir.RankedTensorType]
    threshold: ext.Operand[ir.RankedTensorType]
    weight: ext.Operand[ir.RankedTensorType]
    scale: ext.Operand[ir.RankedTensorType]
    bits: ir.IntegerAttr
    y: ext.Result[ir.RankedTensorType]
    bias: ext.Operand[ir.RankedTensorType] | None = None

    @staticmethod
    @after_declaration
    def verify_invariants(op: Any) -> bool:
        if not 0 <= silent_share(op.operation) <= 1:
            return fail(op.operation, f"silent is a share, 0 to 1, got {silent_share(op.operation)}")
        operands = list(
            op.operation.operands
        )  # by name they need operandSegmentSizes, which one optional operand does not
        if len(operands) < 4:
            return True
        floats, weight_type = [*operands[:2], *operands[3:], op.y], operands[2].type
        if not all(str(v.type.element_type) == "f32" for v in floats):
            return fail(op.operation, "takes and returns f32 apart from the weight")
        if str(weight_type.element_type) not in ("i8", "i16"):
            return fail(op.operation, f"weight must hold i8 or i16, got {weight_type.element_type}")
        if op.bits.value not in {"i8": (4, 8), "i16": (16,)}[str(weight_type.element_type)]:
            reason = f"a weight of {weight_type.element_type} has no codes of {op.bits.value} bits"
            return fail(op.operation, reason)
        counts, threshold, weight, scale, *bias = map(shape, operands)
        y = shape(op.y)
        if len(weight) != 2 or not counts or counts[-1] != weight[1]:
            return fail(op.operation, f"weight {weight} must be [N, K] for counts {counts}")
        if len(scale) != 2 or scale[0] != weight[0] or scale[1] < 1 or weight[1] % scale[1]:
            return fail(
                op.operation, f"scale {scale} must be [N, G] with G a divisor of K, weight is {weight}"
            )
        if bias and bias[0] != weight[:1]:
            return fail(op.operation, f"bias must be [N], got {bias[0]} for weight {weight}")
        if len(threshold) != len(counts) - 1 or not all(map(fits, threshold, counts[:-1])):
            return fail(op.operation, f"threshold {threshold} does not match counts {counts}")
        if len(y) != len(counts) or y[-1] != weight[0] or not all(map(fits, y[:-1], counts[:-1])):
            return fail(
                op.operation, f"result {y} does not follow from counts {counts} and {weight[0]} columns"
            )
        return True


def silent_share(op: ir.Operation) -> float:
    """Returns the measured share of a product's counts that are 0; 0 where nobody measured it."""
    return float(op.attributes["silent"].value) if "silent" in op.attributes else 0.0
