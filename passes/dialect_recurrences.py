"""The ops of the dialect that carry a state through time: recurrences that are affine in their state."""

from collections.abc import Mapping
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import ext

from spikingbrain.passes.dialect_base import SpikingBrain, after_declaration, fail, shape

DECAY_AXES = {"none": "", "head": "BTS", "key": "BTSK", "value": "BTSV"}  # what the sizes of the decay are


class LinearRecurrence(SpikingBrain.Operation, name="linear_recurrence", traits=[ext.Pure]):
    """A recurrence over matrices that is affine in its state: linear attention, its gated forms, the delta rule.

    ``S_t = a_t * S_(t-1) + erase_t (predict_t^T S_(t-1)) + k_t v_t^T`` and ``o_t = S_t^T q_t``, or, when exclusive,
    ``o_t = S_(t-1)^T q_t + (q_t . (bonus * k_t)) v_t``; head h of q reads state ``h / G``, ``G = H / S``.

    With B batch entries, T steps, H heads, S states of K x V: ``q: [B, T, H, K]``, ``k: [B, T, S, K]``, ``v: [B, T, S, V]``,
    ``erase``, ``predict``: [B, T, S, K] (both or none), ``bonus: [S, K]`` (only when exclusive), ``state: [B, S, K, V]``
    (zeros when absent). ``decay_axis`` tells the decay's sizes: "none" (no operand, a = 1), "head" [B, T, S],
    "key" [B, T, S, K] or "value" [B, T, S, V]; ``a = exp(decay)`` with log_decay, ``a = decay`` without. Zero, negative
    and infinite decays are exact: ``exp(-inf)`` is 0. When reversed, time runs from T-1 to 0, and t-1 means the step
    before in that order. The second result is the state after the last step, the given one for T = 0. All are f32, or all f64.

        %o, %s = "spikingbrain.linear_recurrence"(%q, %k, %v, %g, %s0)
               {decay_axis = "key", log_decay = true, exclusive = false, reverse = false,
                operandSegmentSizes = array<i32: 1, 1, 1, 1, 0, 0, 0, 1>}
               : (tensor<?x?x8x16xf32>, tensor<?x?x4x16xf32>, tensor<?x?x4x32xf32>, tensor<?x?x4x16xf32>,
                  tensor<?x4x16x32xf32>) -> (tensor<?x?x8x32xf32>, tensor<?x4x16x32xf32>)
    """

    q: ext.Operand[ir.RankedTensorType]
    k: ext.Operand[ir.RankedTensorType]
    v: ext.Operand[ir.RankedTensorType]
    decay_axis: ir.StringAttr
    log_decay: ir.IntegerAttr
    exclusive: ir.IntegerAttr
    reverse: ir.IntegerAttr
    o: ext.Result[ir.RankedTensorType]
    final_state: ext.Result[ir.RankedTensorType]
    decay: ext.Operand[ir.RankedTensorType] | None = None
    erase: ext.Operand[ir.RankedTensorType] | None = None
    predict: ext.Operand[ir.RankedTensorType] | None = None
    bonus: ext.Operand[ir.RankedTensorType] | None = None
    state: ext.Operand[ir.RankedTensorType] | None = None

    @staticmethod
    @after_declaration
    def verify_invariants(op: Any) -> bool:
        axis = op.decay_axis.value
        if axis not in DECAY_AXES:
            return fail(op.operation, f"decay_axis is one of {', '.join(DECAY_AXES)}, not {axis!r}")
        if (op.decay is None) != (axis == "none"):
            return fail(
                op.operation, f"decay_axis {axis!r} with{'' if op.decay is not None else 'out'} a decay"
            )
        if (op.erase is None) != (op.predict is None):
            return fail(op.operation, "needs erase and predict together")
        if op.bonus is not None and not op.exclusive.value:
            return fail(op.operation, "has a bonus, which only exclusive reads add")
        fields = {
            "q": "BTHK",
            "k": "BTSK",
            "v": "BTSV",
            "decay": DECAY_AXES[axis],
            "erase": "BTSK",
            "predict": "BTSK",
            "bonus": "SK",
            "state": "BSKV",
            "o": "BTHV",
            "final_state": "BSKV",
        }
        return _sizes_fit(op, fields) and _heads_divide(op) and _types_fit(op, fields)


class LinearScan(SpikingBrain.Operation, name="linear_scan", traits=[ext.Pure]):
    """An elementwise recurrence over time: leaky integrators, HGRN, the RG-LRU.

    ``h_t = a_t * h_(t-1) + update_t`` for every channel, ``a = exp(decay)`` with log_decay, ``a = decay`` without.
    ``decay``, ``update`` and h are [B, T, C], ``state`` (zeros when absent) and the final state, the second result,
    [B, C]. When reversed, time runs from T-1 to 0. All are f32, or all f64.

        %h, %last = "spikingbrain.linear_scan"(%a, %b, %h0)
               {log_decay = false, reverse = false, operandSegmentSizes = array<i32: 1, 1, 1>}
               : (tensor<2x?x64xf32>, tensor<2x?x64xf32>, tensor<2x64xf32>) -> (tensor<2x?x64xf32>, tensor<2x64xf32>)
    """

    decay: ext.Operand[ir.RankedTensorType]
    update: ext.Operand[ir.RankedTensorType]
    log_decay: ir.IntegerAttr
    reverse: ir.IntegerAttr
    h: ext.Result[ir.RankedTensorType]
    final_state: ext.Result[ir.RankedTensorType]
    state: ext.Operand[ir.RankedTensorType] | None = None

    @staticmethod
    @after_declaration
    def verify_invariants(op: Any) -> bool:
        fields = {"decay": "BTC", "update": "BTC", "state": "BC", "h": "BTC", "final_state": "BC"}
        return _sizes_fit(op, fields) and _types_fit(op, fields)


class SelectiveScan(SpikingBrain.Operation, name="selective_scan", traits=[ext.Pure]):
    """The recurrence of Mamba, whose decay differs for every entry of the state and exists in no memory.

    ``h_t[c, n] = exp(dt_t[c] * a[c, n]) * h_(t-1)[c, n] + dt_t[c] * x_t[c] * b_t[n]``, ``y_t[c] = sum_n h_t[c, n] * c_t[n]``.
    ``x``, ``dt`` and y are [B, T, C], ``a`` is [C, N], ``b`` and ``c`` are [B, T, N], ``state`` (zeros when absent) and the
    final state, the second result, [B, C, N]. When reversed, time runs from T-1 to 0. All are f32, or all f64.

        %y, %last = "spikingbrain.selective_scan"(%x, %dt, %a, %b, %c)
               {reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0>}
               : (tensor<1x?x64xf32>, tensor<1x?x64xf32>, tensor<64x16xf32>, tensor<1x?x16xf32>,
                  tensor<1x?x16xf32>) -> (tensor<1x?x64xf32>, tensor<1x64x16xf32>)
    """

    x: ext.Operand[ir.RankedTensorType]
    dt: ext.Operand[ir.RankedTensorType]
    a: ext.Operand[ir.RankedTensorType]
    b: ext.Operand[ir.RankedTensorType]
    c: ext.Operand[ir.RankedTensorType]
    reverse: ir.IntegerAttr
    y: ext.Result[ir.RankedTensorType]
    final_state: ext.Result[ir.RankedTensorType]
    state: ext.Operand[ir.RankedTensorType] | None = None

    @staticmethod
    @after_declaration
    def verify_invariants(op: Any) -> bool:
        fields = {"x": "BTC", "dt": "BTC", "a": "CN", "b": "BTN", "c": "BTN"}
        fields |= {"state": "BCN", "y": "BTC", "final_state": "BCN"}
        return _sizes_fit(op, fields) and _types_fit(op, fields)


def _sizes_fit(op: Any, fields: Mapping[str, str]) -> bool:
    """Checks that sizes called by one letter agree; absent operands fit."""
    if "operandSegmentSizes" not in op.attributes:  # IRDL needs it only for two optional operands or more
        return fail(op.operation, "needs operandSegmentSizes, as its state is optional")
    known: dict[str, tuple[int, str]] = {}
    for name, letters in fields.items():
        value = getattr(op, name)
        if value is None:
            continue
        sizes = shape(value)
        if len(sizes) != len(letters):
            return fail(op.operation, f"{name} must be [{', '.join(letters)}], got {sizes}")
        for letter, size in zip(letters, sizes, strict=True):
            if size == ir.ShapedType.get_dynamic_size():
                continue
            other, of = known.setdefault(letter, (size, name))
            if size != other:
                return fail(op.operation, f"{name} has {letter} = {size}, {of} has {other}")
    return True


def _heads_divide(op: Any) -> bool:
    """Checks that the heads are known, and each state read by equally many."""
    heads, states = shape(op.q)[2], shape(op.k)[2]
    if ir.ShapedType.get_dynamic_size() in (heads, states) or states < 1 or heads % states:
        return fail(op.operation, f"{heads} heads cannot read {states} states in equal groups")
    return True


def _types_fit(op: Any, fields: Mapping[str, str]) -> bool:
    """Checks that all tensors are of one type, f32 or f64."""
    values = {name: value for name in fields if (value := getattr(op, name)) is not None}
    types = {name: str(ir.RankedTensorType(value.type).element_type) for name, value in values.items()}
    first = next(iter(types.values()))
    for name, type_ in types.items():
        if type_ not in ("f32", "f64"):
            return fail(op.operation, f"{name} is {type_}; the dialect computes in f32 or f64")
        if type_ != first:
            return fail(op.operation, f"{name} is {type_}, {next(iter(types))} {first}")
    return True
