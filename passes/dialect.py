"""The ``spikingbrain`` dialect: what the compiler knows that linear algebra does not say.

Each op is documented as a sentence, an equation and an example in its docstring; ``docs/dialect.md`` is
generated from here, and the tests run the examples.

Layouts are fixed: activations are ``[B, T, H, D]`` (batch, time, heads, head size), so that one token's
values are contiguous. Shapes are ranked; batch and time may be dynamic.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Optional

from torch_mlir import ir
from torch_mlir.dialects import ext

_load_lock = threading.Lock()  # Dialect.load() from two threads at once crashes the process


class SpikingBrain(ext.Dialect, name="spikingbrain"):
    """Ops on tensors that keep the meaning of a language model's building blocks."""


def _fail(op: ir.Operation, message: str) -> bool:
    op.location.emit_error(f"'{op.name}' {message}")
    return False


def _shape(value: ir.Value) -> list[int]:
    return list(ir.RankedTensorType(value.type).shape)


def _fits(a: int, b: int) -> bool:
    """Returns whether two sizes can be equal, a dynamic one being equal to anything."""
    dynamic = ir.ShapedType.get_dynamic_size()
    return a == b or dynamic in (a, b)


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
    def verify_invariants(op: Any) -> bool:
        if not len(op.sources):
            return _fail(op.operation, "needs at least one source tensor")
        if not all(isinstance(a, ir.StringAttr) for a in [*op.sources, *op.recipe]):
            return _fail(op.operation, "lists sources and recipe steps as strings")
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
    def verify_invariants(op: Any) -> bool:
        x, w, y, n = _shape(op.x), _shape(op.weight), _shape(op.y), op.columns.value
        if len(w) not in (2, 3):
            return _fail(op.operation, f"weight must be [N, K] or [N/block, K, block], got rank {len(w)}")
        stored = w[0] if len(w) == 2 else w[0] * w[2]
        if len(w) == 2 and stored != n or not n <= stored:
            return _fail(op.operation, f"weight stores {stored} columns, columns = {n}")
        if not _fits(x[-1], w[1]):
            return _fail(op.operation, f"input has {x[-1]} channels, weight has {w[1]}")
        if len(x) != len(y) or y[-1] != n or not all(map(_fits, x[:-1], y[:-1])):
            return _fail(op.operation, f"result shape {y} does not follow from {x} and {n} columns")
        return True


class Attention(SpikingBrain.Operation, name="attention", traits=[ext.Pure]):
    """Softmax attention over keys that carry their positions; no T x T mask exists.

    ``o[b,t,h] = sum_s p[s] * v[b,s,h/G]``, ``p = softmax over visible s of scale * q[b,t,h] . k[b,s,h/G]``,
    ``G = H / Hk``. With ``i = query_positions[b,t]`` and ``j = key_positions[b,s]``, key s is visible when
    ``0 <= j <= i and (j > i - window or j < sinks)``; ``window = 0`` means unlimited. A query that sees no key yields 0. Keys and values come
    in one or more segments (a cache, then the new tokens), each with its positions; an empty cache slot has
    position -1.

        %o = "spikingbrain.attention"(%q, %qpos, %k_cache, %k, %v_cache, %v, %pos_cache, %pos)
               {scale = 0.125 : f64, window = 256 : i64, sinks = 1 : i64, ...} : (...) -> tensor<1x?x9x64xf32>
    """

    query: ext.Operand[ir.RankedTensorType]
    query_positions: ext.Operand[ir.RankedTensorType]
    keys: Sequence[ext.Operand[ir.RankedTensorType]]
    values: Sequence[ext.Operand[ir.RankedTensorType]]
    key_positions: Sequence[ext.Operand[ir.RankedTensorType]]
    scale: ir.FloatAttr
    window: ir.IntegerAttr
    sinks: ir.IntegerAttr
    out: ext.Result[ir.RankedTensorType]

    @staticmethod
    def verify_invariants(op: Any) -> bool:
        q, segments = _shape(op.query), len(op.keys)
        if not (segments and segments == len(op.values) == len(op.key_positions)):
            return _fail(op.operation, "needs as many keys as values and key positions, at least one of each")
        if len(q) != 4 or _shape(op.out) != q:
            return _fail(op.operation, "query and result must both be [B, T, H, D]")
        if op.window.value < 0 or op.sinks.value < 0:
            return _fail(op.operation, "window and sinks must not be negative")
        for k, v, p in zip(op.keys, op.values, op.key_positions, strict=True):
            ks, ps = _shape(k), _shape(p)
            if len(ks) != 4 or ks != _shape(v):
                return _fail(op.operation, "keys and values must both be [B, S, Hk, D]")
            if ks[3] != q[3] or q[2] % ks[2]:
                return _fail(op.operation, f"{q[2]} heads of {q[3]} do not group over {ks[2]} heads of {ks[3]}")
            if len(ps) != 2 or not (_fits(ps[0], ks[0]) and _fits(ps[1], ks[1])):
                return _fail(op.operation, f"key positions {ps} do not match keys {ks}")
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
    def verify_invariants(op: Any) -> bool:
        c, r, s = _shape(op.cache), _shape(op.rows), _shape(op.slots)
        if op.cache.type != op.result_.type:
            return _fail(op.operation, "result must have the type of the cache")
        if len(c) < 2 or len(c) != len(r) or c[2:] != r[2:] or not _fits(c[0], r[0]):
            return _fail(op.operation, f"rows {r} do not fit a cache of {c}")
        if len(s) != 2 or not (_fits(s[0], r[0]) and _fits(s[1], r[1])):
            return _fail(op.operation, f"slots {s} do not match rows {r}")
        return True


class TimeLoop(SpikingBrain.Operation, name="time_loop"):
    """Runs a region once per time step: the general form of a scan.

    ``carried_(t+1), y_t = body(carried_t, x_t)`` for t = 0 .. T-1 (or T-1 .. 0 when reversed), where ``x_t`` is the slice
    of each scanned tensor at t of its first axis, and the ``y_t`` are stacked on a new first axis. The region takes
    the carried values, then one slice of each scanned tensor, and yields the new carried values, then
    one slice of each stacked result. At T = 0 the carried values are returned unchanged.

        %s, %ys = "spikingbrain.time_loop"(%s0, %xs) ({ ^bb0(%s: tensor<4xf32>, %x: tensor<4xf32>): ...
               "spikingbrain.yield"(%s1, %y) : (tensor<4xf32>, tensor<4xf32>) -> () })
               {reverse = false, ...} : (tensor<4xf32>, tensor<?x4xf32>) -> (tensor<4xf32>, tensor<?x4xf32>)
    """

    carried: Sequence[ext.Operand[ir.RankedTensorType]]
    scanned: Sequence[ext.Operand[ir.RankedTensorType]]
    reverse: ir.BoolAttr
    final: Sequence[ext.Result[ir.RankedTensorType]]
    stacked: Sequence[ext.Result[ir.RankedTensorType]]
    body: ext.Region

    @staticmethod
    def verify_invariants(op: Any) -> bool:
        if not len(op.scanned):
            return _fail(op.operation, "needs a scanned tensor: its first axis is the time axis")
        if [v.type for v in op.carried] != [v.type for v in op.final]:
            return _fail(op.operation, "final values must have the types of the carried ones")
        steps = _shape(op.scanned[0])[0]
        for v in [*op.scanned, *op.stacked]:
            if not _fits(_shape(v)[0], steps):
                return _fail(op.operation, f"time axes differ: {_shape(v)[0]} and {steps}")
        return True

    @staticmethod
    def verify_region_invariants(op: Any) -> bool:
        arguments = list(op.body.blocks[0].arguments)
        if len(arguments) != len(op.carried) + len(op.scanned):
            return _fail(op.operation, "body must take every carried value and one slice of every scanned one")
        for value, argument in zip(op.carried, arguments, strict=False):
            if value.type != argument.type:
                return _fail(op.operation, f"body takes {argument.type} for a carried {value.type}")
        terminator = op.body.blocks[0].operations[len(op.body.blocks[0].operations) - 1]
        if terminator.operation.name != "spikingbrain.yield":
            return _fail(op.operation, "body must end in spikingbrain.yield")
        if len(terminator.operation.operands) != len(op.final) + len(op.stacked):
            return _fail(op.operation, "body must yield every carried value and one slice of every stacked result")
        return True


class Yield(SpikingBrain.Operation, name="yield", traits=[ir.IsTerminatorTrait]):
    """Ends the body of a ``time_loop``: the new carried values, then the slices of the stacked results."""

    results_: Sequence[ext.Operand[ir.RankedTensorType]]


class Launch(SpikingBrain.Operation, name="launch"):
    """Runs a kernel function over a grid of workgroups.

    ``callee`` names a private function of the module whose arguments are: three workgroup ids (index), then one
    memref per input, then one per result. Memrefs are contiguous, row-major, at offset 0, and have the shape of their tensor.
    ``tied[i]`` is the position of the input that result i updates in place, or -1: a tied result adds no
    argument, the kernel writes into the input's memref. ``result_sizes`` are the dynamic sizes of the results that are not tied,
    in order.

        %y = "spikingbrain.launch"(%gx, %one, %one, %x, %w, %m) {callee = @linear_576x960, tied = [-1], ...}
               : (index, index, index, tensor<?x576xf32>, tensor<60x576x16xf32>, index) -> tensor<?x960xf32>
    """

    grid: Sequence[ext.Operand[ir.IndexType]]
    inputs: Sequence[ext.Operand[ir.RankedTensorType]]
    result_sizes: Sequence[ext.Operand[ir.IndexType]]
    callee: ir.FlatSymbolRefAttr
    tied: ir.ArrayAttr
    outputs: Sequence[ext.Result[ir.RankedTensorType]]

    @staticmethod
    def verify_invariants(op: Any) -> bool:
        if len(op.grid) != 3:
            return _fail(op.operation, "needs three grid sizes")
        tied = [a.value for a in op.tied]
        if len(tied) != len(op.outputs):
            return _fail(op.operation, "needs one entry of tied per result")
        for index, result in zip(tied, op.outputs, strict=True):
            if index >= len(op.inputs) or (index >= 0 and op.inputs[index].type != result.type):
                return _fail(op.operation, f"a result cannot be tied to input {index}")
        dynamic = sum(
            size == ir.ShapedType.get_dynamic_size()
            for index, result in zip(tied, op.outputs, strict=True)
            if index < 0
            for size in _shape(result)
        )
        if dynamic != len(op.result_sizes):
            return _fail(op.operation, f"needs {dynamic} result sizes, got {len(op.result_sizes)}")
        return True


def load(context: Optional[ir.Context] = None) -> ir.Context:  # noqa: UP045
    """Returns ``context`` (a new one by default) with the dialect loaded; calling it twice is harmless."""
    if context is None:
        context = ir.Context()
    context.allow_unregistered_dialects = True  # the IREE ops and types that backends print
    with _load_lock, context, ir.Location.unknown():
        try:
            SpikingBrain.load()
        except ext.DialectAlreadyLoadedError:
            pass
    return context
