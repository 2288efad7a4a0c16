"""lower-scan: elementwise and selective recurrences become pointwise scans, kernel launches, or loops over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import arith, math

from spikingbrain.passes import dialect_scans, torch_ir
from spikingbrain.passes import linalg_build as build
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.dialect_scans import affine_map
from spikingbrain.passes.lower_pointwise_scan import moved, time_loop
from spikingbrain.passes.scan_ends import End, erase_passed, follow_result, follow_source


@dataclass(frozen=True)
class LowerScan:
    """Lowers ``spikingbrain.linear_scan`` and ``spikingbrain.selective_scan``.

    In: our dialect. Out: ``pointwise_scan`` for the elementwise recurrence, transpositions and reversals of time around it taken
    into its maps; for the selective one a launch with vector or wave kernels, or a ``time_loop`` of linalg ops, in which the
    decays of one step exist at a time.
    """

    name: ClassVar[str] = "lower-scan"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "spikingbrain.linear_scan"):
            with ir.InsertionPoint(op), op.location:
                _linear_scan(op)
            context.record(self, "lowered", op, "pointwise_scan")
            op.erase()
        for op in torch_ir.operations(module, "spikingbrain.selective_scan"):
            with ir.InsertionPoint(op), op.location:
                results, how = _selective_scan(op, context)
            for old, new in zip(op.results, results, strict=True):
                old.replace_all_uses_with(new)
            context.record(self, "lowered", op, how)
            op.erase()


def _linear_scan(op: ir.Operation) -> None:
    """Replaces the uses of a scan by those of a pointwise one over (t; b, c)."""
    view = op.opview
    backwards, place = bool(view.reverse.value), [1, 0, 2]
    sources = [follow_source(End(v, list(place), backwards), 2) for v in (view.decay, view.update)]
    state = view.state if view.state is not None else _zeros(view.final_state.type, view.update)

    def size(dim: int) -> ir.Value:
        return build.size(sources[1].value, sources[1].place.index(dim))

    end = follow_result(End(view.h, list(place), backwards), 2, size)
    places: list[list[int | None]] = [[1, 2], *(s.place for s in sources), end.place]
    scan = dialect_scans.create(
        [state],
        [s.value for s in sources],
        [],
        [end.value.type],
        [affine_map(3, p) for p in places],
        [*(s.backwards for s in sources), end.backwards],
    )
    with ir.InsertionPoint(scan.body):
        h, decay, update = scan.body.arguments
        factor = math.exp(decay) if view.log_decay.value else decay
        h = arith.addf(arith.mulf(factor, h), update)
        dialect_scans.close([h, h])
    view.final_state.replace_all_uses_with(scan.final[0])
    end.value.replace_all_uses_with(scan.stacked[0])
    erase_passed(end, op)


def _selective_scan(op: ir.Operation, context: PassContext) -> tuple[list[ir.Value], str]:
    if context.target.vector_bits:
        from spikingbrain.passes.kernels.scan_selective import emit_selective_scan, has_selective_kernel

        if has_selective_kernel(op.opview):
            return emit_selective_scan(op.opview, context.target), "kernel"
    elif context.target.wave_kernels:
        from spikingbrain.passes.wave_kernels import scan_selective as waves

        if waves.has_selective_kernel(op.opview):
            return waves.emit_selective_scan(op.opview), "kernel"
    return _selective_loop(op), "time_loop"


def _selective_loop(op: ir.Operation) -> list[ir.Value]:
    """Emits the loop; one step computes decays, state and read in linalg."""
    view = op.opview
    backwards = bool(view.reverse.value)
    in_time = [moved(v, [1, 0, 2], backwards, 0) for v in (view.x, view.dt, view.b, view.c)]
    state = view.state if view.state is not None else _zeros(view.final_state.type, view.x, view.a)
    y = ir.RankedTensorType(view.y.type)
    batch, steps, channels = y.shape
    loop = time_loop([state], in_time, [ir.RankedTensorType.get([steps, batch, channels], y.element_type)])
    row = ir.RankedTensorType.get([batch, channels], y.element_type)
    b, c, n = (ir.AffineDimExpr.get(i) for i in range(3))
    maps = {
        letters: ir.AffineMap.get(3, 0, [{"b": b, "c": c, "n": n}[letter] for letter in letters])
        for letters in ("bcn", "bc", "bn", "cn")
    }
    with ir.InsertionPoint(loop.regions[0].blocks[0]):
        h, x, dt, write, read = loop.regions[0].blocks[0].arguments

        def update(s: ir.Value, x: ir.Value, dt: ir.Value, w: ir.Value, a: ir.Value, _: ir.Value) -> ir.Value:
            decay = math.exp(arith.mulf(dt, a))
            return arith.addf(arith.mulf(decay, s), arith.mulf(arith.mulf(dt, x), w))

        out = build.empty(h.type, build.dynamic_sizes(h))
        lines = [maps[k] for k in ("bcn", "bc", "bc", "bn", "cn", "bcn")]
        h = build.generic([h, x, dt, write, view.a], out, lines, ["parallel"] * 3, update)
        zero = build.filled(row, build.dynamic_sizes(x), 0.0)
        value = build.generic(
            [h, read],
            zero,
            [maps["bcn"], maps["bn"], maps["bc"]],
            ["parallel", "parallel", "reduction"],
            lambda s, r, total: arith.addf(total, arith.mulf(s, r)),
        )
        dialect_scans.close([h, value])
    return [moved(loop.results[1], [1, 0, 2], backwards, 1), loop.results[0]]


def _zeros(type_: ir.Type, *sources: ir.Value) -> ir.Value:
    """Emits an initial state of zeros: [B, C] for a source [B, T, C], [B, C, N] with a second one, [C, N]."""
    given = [(sources[0], 0), (sources[0], 2), *((s, 1) for s in sources[1:])]
    shape = ir.RankedTensorType(type_).shape
    sizes = [build.size(v, axis) for (v, axis), n in zip(given, shape, strict=True) if n < 0]
    return build.filled(type_, sizes, 0.0)
