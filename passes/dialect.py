"""The ``spikingbrain`` dialect: what the compiler knows that linear algebra does not say.

Each op is documented as a sentence, an equation and an example in its docstring; ``docs/dialect.md`` is
generated from here, and the tests run the examples.

Layouts are fixed: activations are ``[B, T, H, D]`` (batch, time, heads, head size), so that one token's
values are contiguous. Shapes are ranked; batch and time may be dynamic.
"""

import contextlib
import threading
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import ext
from torch_mlir.dialects import torch as torch_dialect  # noqa: F401  (registers the passes)
from torch_mlir.passmanager import PassManager

from spikingbrain.passes.dialect_base import SpikingBrain, after_declaration, fail, fits, shape
from spikingbrain.passes.dialect_experts import GroupedLinear, SpikeGroupedLinear  # noqa: F401
from spikingbrain.passes.dialect_fused import verify_fused_recurrence
from spikingbrain.passes.dialect_recurrences import LinearRecurrence, LinearScan, SelectiveScan  # noqa: F401
from spikingbrain.passes.dialect_scans import verify_pointwise_scan
from spikingbrain.passes.dialect_spikes import SpikeEncode, SpikeLinear  # noqa: F401

_load_lock = threading.Lock()  # Dialect.load() from two threads at once crashes the process


class Parameter(SpikingBrain.Operation, name="parameter", traits=[ext.Pure]):
    """A weight, named, with the steps that make its stored form from the model's tensors.

    ``value = recipe(sources)``: the tensors of the model named in ``sources`` go through the transforms of
    ``recipe`` (see ``passes/recipes.py``) when the artifact is written; passes never hold weights.

        %w = "spikingbrain.parameter"() {sources = ["layers.0.q.weight", "layers.0.k.weight"],
               recipe = ["concat axis=0", "pack_columns block=16"]} : () -> tensor<48x576x16xf32>
    """

    sources: ir.ArrayAttr
    recipe: ir.ArrayAttr
    value: ext.Result[ir.RankedTensorType]

    @staticmethod
    @after_declaration
    def verify_invariants(op: Any) -> bool:
        if not len(op.sources):
            return fail(op.operation, "needs at least one source tensor")
        if not all(isinstance(a, ir.StringAttr) for a in [*op.sources, *op.recipe]):
            return fail(op.operation, "lists sources and recipe steps as strings")
        return True


class Linear(SpikingBrain.Operation, name="linear", traits=[ext.Pure]):
    """A dense projection with a stored weight.

    ``y[..., n] = sum_k x[..., k] * w[n, k]``, with ``x: [..., K]``. The weight is ``[N, K]``, or packed by
    column blocks as ``[ceil(N / block), K, block]`` (columns beyond N are zero).

        %y = "spikingbrain.linear"(%x, %w) {columns = 960 : i64}
               : (tensor<1x?x576xf32>, tensor<60x576x16xf32>) -> tensor<1x?x960xf32>
    """

    x: ext.Operand[ir.RankedTensorType]
    weight: ext.Operand[ir.RankedTensorType]
    columns: ir.IntegerAttr
    y: ext.Result[ir.RankedTensorType]

    @staticmethod
    @after_declaration
    def verify_invariants(op: Any) -> bool:
        x, w, y, n = shape(op.x), shape(op.weight), shape(op.y), op.columns.value
        if len(w) not in (2, 3):
            return fail(op.operation, f"weight must be [N, K] or [N/block, K, block], got rank {len(w)}")
        stored = w[0] if len(w) == 2 else w[0] * w[2]
        if (len(w) == 2 and stored != n) or n > stored:
            return fail(op.operation, f"weight stores {stored} columns, columns = {n}")
        if not fits(x[-1], w[1]):
            return fail(op.operation, f"input has {x[-1]} channels, weight has {w[1]}")
        if len(x) != len(y) or y[-1] != n or not all(map(fits, x[:-1], y[:-1])):
            return fail(op.operation, f"result shape {y} does not follow from {x} and {n} columns")
        return True


class Embedding(SpikingBrain.Operation, name="embedding", traits=[ext.Pure]):
    """Rows of a stored table.

    ``y[..., k] = table[ids[...], k]``; a row for an id outside ``0 .. rows - 1`` is NaN, of integer codes 0. The table is
    ``[rows, K]``, or packed by blocks of rows as ``[ceil(rows / block), K, block]``, the form in which a head tied to it is
    stored.

        %y = "spikingbrain.embedding"(%ids, %table) {rows = 49152 : i64}
               : (tensor<1x?xi64>, tensor<768x576x64xf32>) -> tensor<1x?x576xf32>
    """

    ids: ext.Operand[ir.RankedTensorType]
    table: ext.Operand[ir.RankedTensorType]
    rows: ir.IntegerAttr
    y: ext.Result[ir.RankedTensorType]

    @staticmethod
    @after_declaration
    def verify_invariants(op: Any) -> bool:
        ids, table, y, rows = shape(op.ids), shape(op.table), shape(op.y), op.rows.value
        if len(table) not in (2, 3):
            return fail(
                op.operation, f"table must be [rows, K] or [rows/block, K, block], got rank {len(table)}"
            )
        stored = table[0] if len(table) == 2 else table[0] * table[2]
        if (len(table) == 2 and stored != rows) or not rows <= stored:
            return fail(op.operation, f"table stores {stored} rows, rows = {rows}")
        if len(y) != len(ids) + 1 or y[-1] != table[1] or not all(map(fits, ids, y[:-1])):
            return fail(
                op.operation, f"result shape {y} does not follow from ids {ids} and rows of {table[1]}"
            )
        return True


class Attention(SpikingBrain.Operation, name="attention", traits=[ext.Pure]):
    """Softmax attention over keys that carry their positions; no T x T mask exists.

    ``o[b,t,h] = sum_s p[s] * v[b,s,h/G]``, ``p = softmax over visible s of scale * q[b,t,h] . k[b,s,h/G]``,
    ``G = H / Hk``. With ``i = query_positions[b,t]`` and ``j = key_positions[b,s]``, key s is visible when
    ``0 <= j <= i and (j > i - window or j < sinks)``; ``window = 0`` means unlimited. A query that sees no key
    yields 0. Keys come in up to two segments, a cache and the new tokens; an empty slot has position -1.
    Keys and values may be f16 or bf16; the arithmetic is that of f32. Those of the cache may be codes of 8 bits, which
    count in steps of a scale per slot and head, ``k[b,s,h] = key_scales[b,s,h] * codes[b,s,h]``.

        %o = "spikingbrain.attention"(%q, %qpos, %k, %v, %kpos, %k_cache, %v_cache, %pos_cache)
               {scale = 0.125 : f64, window = 256 : i64, sinks = 1 : i64,
                operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 1, 1, 1, 0, 0>}
               : (tensor<1x?x9x64xf32>, tensor<1x?xi64>, tensor<1x?x3x64xf32>, tensor<1x?x3x64xf32>, tensor<1x?xi64>,
                  tensor<1x257x3x64xf16>, tensor<1x257x3x64xf16>, tensor<1x257xi64>) -> tensor<1x?x9x64xf32>
    """

    query: ext.Operand[ir.RankedTensorType]
    query_positions: ext.Operand[ir.RankedTensorType]
    keys: ext.Operand[ir.RankedTensorType]
    values: ext.Operand[ir.RankedTensorType]
    key_positions: ext.Operand[ir.RankedTensorType]
    scale: ir.FloatAttr
    window: ir.IntegerAttr
    sinks: ir.IntegerAttr
    out: ext.Result[ir.RankedTensorType]
    cache_keys: ext.Operand[ir.RankedTensorType] | None = None
    cache_values: ext.Operand[ir.RankedTensorType] | None = None
    cache_positions: ext.Operand[ir.RankedTensorType] | None = None
    cache_key_scales: ext.Operand[ir.RankedTensorType] | None = None
    cache_value_scales: ext.Operand[ir.RankedTensorType] | None = None

    @staticmethod
    @after_declaration
    def verify_invariants(op: Any) -> bool:
        q, cache = shape(op.query), [op.cache_keys, op.cache_values, op.cache_positions]
        if len(q) != 4 or shape(op.out) != q:
            return fail(op.operation, "query and result must both be [B, T, H, D]")
        positions = [op.query_positions, op.key_positions, op.cache_positions]
        if any(str(p.type.element_type) != "i64" for p in positions if p is not None):
            return fail(op.operation, "positions must be i64")
        of_query = shape(op.query_positions)
        if len(of_query) != 2 or not (fits(of_query[0], q[0]) and fits(of_query[1], q[1])):
            return fail(op.operation, f"query positions {of_query} do not match queries {q}")
        if op.window.value < 0 or op.sinks.value < 0:
            return fail(op.operation, "window and sinks must not be negative")
        if any(cache) and not all(cache):
            return fail(op.operation, "needs cache keys, values and positions together")
        for k, v, p in [[op.keys, op.values, op.key_positions], *([cache] if all(cache) else [])]:
            ks, ps = shape(k), shape(p)
            if len(ks) != 4 or ks != shape(v):
                return fail(op.operation, "keys and values must both be [B, S, Hk, D]")
            if ks[3] != q[3] or q[2] % ks[2] or not fits(ks[0], q[0]):
                return fail(
                    op.operation, f"keys {ks} do not fit queries {q}: batch, grouped heads, head size"
                )
            if len(ps) != 2 or not (fits(ps[0], ks[0]) and fits(ps[1], ks[1])):
                return fail(op.operation, f"key positions {ps} do not match keys {ks}")
        for codes, scales in (
            (op.cache_keys, op.cache_key_scales),
            (op.cache_values, op.cache_value_scales),
        ):
            coded = codes is not None and str(codes.type.element_type) == "i8"
            if coded != (scales is not None):
                return fail(op.operation, "codes of 8 bits, and nothing else, need scales")
            if coded and (shape(scales) != shape(codes)[:3] or str(scales.type.element_type) != "f32"):
                return fail(op.operation, f"scales must be f32, one for each of {shape(codes)[:3]}")
        return True


class CacheWrite(SpikingBrain.Operation, name="cache_write", traits=[ext.Pure]):
    """Writes the rows of new tokens into cache slots.

    ``result = cache``, then ``result[b, slots[b,t]] = rows[b,t]`` for t in order. Where the cache is not used
    afterwards the write happens in place.

        %c = "spikingbrain.cache_write"(%cache, %rows, %slots)
               : (tensor<1x258x3x64xf32>, tensor<1x?x3x64xf32>, tensor<1x?xi64>) -> tensor<1x258x3x64xf32>
    """

    cache: ext.Operand[ir.RankedTensorType]
    rows: ext.Operand[ir.RankedTensorType]
    slots: ext.Operand[ir.RankedTensorType]
    result_: ext.Result[ir.RankedTensorType]

    @staticmethod
    @after_declaration
    def verify_invariants(op: Any) -> bool:
        c, r, s = shape(op.cache), shape(op.rows), shape(op.slots)
        if op.cache.type != op.result_.type:
            return fail(op.operation, "result must have the type of the cache")
        if len(c) < 2 or len(c) != len(r) or c[2:] != r[2:] or not fits(c[0], r[0]):
            return fail(op.operation, f"rows {r} do not fit a cache of {c}")
        if len(s) != 2 or not (fits(s[0], r[0]) and fits(s[1], r[1])):
            return fail(op.operation, f"slots {s} do not match rows {r}")
        if (
            str(op.slots.type.element_type) != "i64"
            or op.rows.type.element_type != op.cache.type.element_type
        ):
            return fail(op.operation, "slots must be i64, rows of the cache's element type")
        return True


# Ops whose operands differ in type cannot be declared through IRDL (it wants the operands of one variadic field to
# have one type), so the three below form an unregistered dialect that `verify` checks.


def _verify_time_loop(op: ir.Operation) -> str:
    """Runs a region once per time step: the general form of a scan.

    ``carried_(t+1), y_t = body(carried_t, x_t)`` for t = 0 .. T-1 (or T-1 .. 0 when reversed), where ``x_t`` is the
    slice of each scanned tensor at t of its first axis, and the ``y_t`` are stacked on a new first axis. Operands
    are the ``carried`` initial values, then the scanned tensors; results are the final values, then the stacked
    ones. The body takes and yields the same, slices in place of stacks. At T = 0 the carried values return unchanged.

        %last, %ys = "spikingbrain_control.time_loop"(%s0, %xs) ({
          ^bb0(%s: tensor<4xf32>, %x: tensor<4xf32>):
            %s1 = arith.addf %s, %x : tensor<4xf32>
            %y = arith.mulf %s1, %s1 : tensor<4xf32>
            "spikingbrain_control.yield"(%s1, %y) : (tensor<4xf32>, tensor<4xf32>) -> ()
          }) {carried = 1 : i64, reverse = false}
               : (tensor<4xf32>, tensor<?x4xf32>) -> (tensor<4xf32>, tensor<?x4xf32>)
    """
    if "carried" not in op.attributes or "reverse" not in op.attributes:
        return "needs the attributes carried and reverse"
    n = op.attributes["carried"].value
    initial, scanned = list(op.operands)[:n], list(op.operands)[n:]
    final, stacked = list(op.results)[:n], list(op.results)[n:]
    body = op.regions[0].blocks[0]
    terminator = body.operations[len(body.operations) - 1].operation
    if not scanned:
        return "needs a scanned tensor: its first axis is the time axis"
    if [v.type for v in initial] != [v.type for v in final]:
        return "final values must have the types of the carried ones"
    steps = shape(scanned[0])[0]
    for v in [*scanned, *stacked]:
        if not fits(shape(v)[0], steps):
            return f"time axes differ: {shape(v)[0]} and {steps}"
    if terminator.name != "spikingbrain_control.yield":
        return "body must end in spikingbrain_control.yield"
    slices = lambda values: [(shape(v)[1:], v.type.element_type) for v in values]  # noqa: E731
    whole = lambda values: [(shape(v), v.type.element_type) for v in values]  # noqa: E731
    if whole(body.arguments) != whole(initial) + slices(scanned):
        return "body must take every carried value and one slice of every scanned tensor"
    if whole(terminator.operands) != whole(final) + slices(stacked):
        return "body must yield every carried value and one slice of every stacked result"
    return ""


def _verify_launch(op: ir.Operation) -> str:
    """Runs a kernel function over a grid of workgroups.

    Operands are three grid sizes (index), the input tensors, then the dynamic sizes (index) of the results in order.
    ``callee`` names a private function of the module whose arguments are: three workgroup ids (index), then one
    memref per input, then one per result; memrefs are contiguous, row-major, at offset 0, with the shape of their
    tensor. ``tied[i]`` is the position of the input that result i updates in place, or -1: a tied result adds no
    argument (the kernel writes into the input's memref) and no sizes. A launch with the attribute
    ``spikingbrain.multiplies`` says what it computes, ``x w^T``, or ``x w^T + r`` of three inputs, so that a backend
    with a library for products may call that instead; an input that is tied, the last one, is memory and no operand.

        %y = "spikingbrain_control.launch"(%gx, %one, %one, %x, %w, %m) {callee = @linear_k576_n960, tied = [-1]}
               : (index, index, index, tensor<?x576xf32>, tensor<60x576x16xf32>, index) -> tensor<?x960xf32>
    """
    if "callee" not in op.attributes or "tied" not in op.attributes:
        return "needs the attributes callee and tied"
    inputs = launch_inputs(op)
    tied = [a.value for a in op.attributes["tied"]]
    if [str(v.type) for v in list(op.operands)[:3]] != ["index"] * 3:
        return "needs three grid sizes"
    if len(tied) != len(op.results):
        return "needs one entry of tied per result"
    fresh = [r for i, r in zip(tied, op.results, strict=True) if i < 0]
    for i, result in zip(tied, op.results, strict=True):
        if i >= len(inputs) or (i >= 0 and inputs[i].type != result.type):
            return f"a result cannot be tied to input {i}"
    wanted = sum(size == ir.ShapedType.get_dynamic_size() for r in fresh for size in shape(r))
    got = len(op.operands) - 3 - len(inputs)
    return "" if wanted == got else f"needs {wanted} result sizes, got {got}"


MULTIPLIES = "spikingbrain.multiplies"


def launch_inputs(op: ir.Operation) -> list[ir.Value]:
    """Returns the input tensors of a ``launch``."""
    return [v for v in op.operands if isinstance(v.type, ir.RankedTensorType)]


CONTROL_OPS = {
    "spikingbrain_control.time_loop": _verify_time_loop,
    "spikingbrain_control.pointwise_scan": verify_pointwise_scan,
    "spikingbrain_control.fused_recurrence": verify_fused_recurrence,
    "spikingbrain_control.launch": _verify_launch,
}


class WrongOp(ValueError):
    """Raised for a control op that is not valid."""

    def __init__(self, op: ir.Operation, reason: str):
        location = op.location
        self.line = location.start_line if isinstance(location, ir.FileLineColLoc) else 0
        super().__init__(f"'{op.name}' op {reason} at {location}")


def verify(module: ir.Module) -> None:
    """Verifies a module, the control ops included.

    Raises ``ir.MLIRError`` for ops that a dialect knows, WrongOp for the first control op that is wrong.
    """
    module.operation.verify()
    wrong: list[WrongOp] = []

    def check(op: ir.Operation) -> ir.WalkResult:
        if op.name in CONTROL_OPS and (reason := CONTROL_OPS[op.name](op.operation)):
            wrong.append(WrongOp(op.operation, reason))
        return ir.WalkResult.INTERRUPT if wrong else ir.WalkResult.ADVANCE

    module.operation.walk(check)
    if wrong:
        raise wrong[0]


def load(context: ir.Context | None = None) -> ir.Context:
    """Returns ``context`` (a new one by default) with our dialect, and what lowered torch ops may hold.

    Calling it twice is harmless.
    """
    if context is None:
        context = ir.Context()
    context.allow_unregistered_dialects = True  # the IREE ops and types that backends print
    with _load_lock, context, ir.Location.unknown(), contextlib.suppress(ext.DialectAlreadyLoadedError):
        SpikingBrain.load()
    with context, ir.Location.unknown():
        # torch-mlir's dialect for scatters and sorts is only registered once a pass that makes it has run.
        PassManager.parse("builtin.module(func.func(convert-torch-to-tmtensor))").run(
            ir.Module.create().operation
        )
    return context
