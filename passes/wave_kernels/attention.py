"""Wave kernels for ``spikingbrain.attention``: how ops are spread over waves, and their launches.

Many queries take one launch: a wave has a tile of rows. One token has few rows: its keys are shared by several waves where
they may be many, and a second launch combines what these found. Memory is what keys and queries take, times one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch_mlir import ir

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes.kernels.attention_base import Segment
from spikingbrain.passes.kernels.attention_bounds import SHORT
from spikingbrain.passes.kernels.builders import ceil_div, index, launch, mul, size
from spikingbrain.passes.wave_kernels.attention_bounds import emit_bounds
from spikingbrain.passes.wave_kernels.attention_tiles import KEYS, Schedule, Tiles, combine
from spikingbrain.passes.wave_kernels.builders import TILE, WAVE, kernel, memref_of
from spikingbrain.tuning import Tuning

if TYPE_CHECKING:
    from spikingbrain.passes.kernels.attention import Problem

LARGEST_HEAD = 256  # queries and outputs of a row lie in the registers of four lanes
FEW_KEYS = 512  # that one wave visits by itself
MOST_SHARES = 32  # of many keys, for one token: each wave is a block, so that they spread


def plan(problem: Problem, segments: Sequence[Segment], tuning: Tuning) -> Schedule:
    """Returns the schedule for an op. Raises UnsupportedOp for heads that exceed the registers."""
    if problem.head_size > LARGEST_HEAD:
        raise UnsupportedOp(
            f"no attention kernel for heads of {problem.head_size}",
            why=f"a row has registers for {LARGEST_HEAD} channels",
            hint="the portable form",
        )
    counts = [ir.RankedTensorType(segment.keys.type).shape[1] for segment in segments]
    known = all(count != ir.ShapedType.get_dynamic_size() for count in counts)
    if problem.time == 1 and not (known and sum(counts) <= FEW_KEYS):
        return Schedule(1, min(MOST_SHARES, -(-sum(counts) // tuning.share_keys)) if known else MOST_SHARES)
    few_rows = problem.time is not None and problem.time * problem.group <= TILE
    return Schedule(1 if few_rows else tuning.attention_waves, 1)  # neighbouring tiles read the same keys


def launch_attention(op: Any, problem: Problem, segments: Sequence[Segment], tuning: Tuning) -> ir.Value:
    """Emits the launches for an op at the insertion point; returns the result."""
    schedule = plan(problem, segments, tuning)
    if problem.time != 1:
        segments = [_with_bounds(segment) for segment in segments]
    batch, time = (size(op.query, axis) for axis in (0, 1))
    inputs = [op.query, op.query_positions, *(part for s in segments for part in s.parts)]
    dynamic = [
        n for axis, n in enumerate((batch, time)) if ir.RankedTensorType(op.out.type).is_dynamic_dim(axis)
    ]
    rows = mul(time, problem.group)
    units = mul(ceil_div(rows, TILE), schedule.shares)
    grid = [ceil_div(units, schedule.waves), index(problem.key_heads), batch]
    if schedule.shares == 1:
        name = _tiles(problem, schedule, inputs, segments, [op.out.type])
        return launch(name, op.out.type, grid, inputs, dynamic).result
    f32, (outer, *_) = ir.F32Type.get(), ir.RankedTensorType(op.out.type).shape
    shape = [outer, problem.key_heads, schedule.shares, problem.group]
    found = [ir.RankedTensorType.get([*shape, last], f32) for last in (problem.head_size, 2)]
    sizes = [batch] * 2 if ir.RankedTensorType(op.out.type).is_dynamic_dim(0) else []
    name = _tiles(problem, schedule, inputs, segments, found)
    parts = list(launch(name, found, grid, inputs, sizes, [-1, -1]).results)
    memrefs = [memref_of(t) for t in [*found, op.out.type]]
    name = _name("combine", problem, memrefs)
    kernel(name, memrefs, WAVE, lambda block, memory: combine(problem, block, *memory))
    return launch(name, op.out.type, [rows, index(problem.key_heads), batch], parts, dynamic).result


def _with_bounds(segment: Segment) -> Segment:
    keys = ir.RankedTensorType(segment.keys.type)
    if not keys.is_dynamic_dim(1) and keys.shape[1] <= SHORT:
        return segment
    return replace(segment, bounds=emit_bounds(segment.positions, KEYS))


def _tiles(
    problem: Problem,
    schedule: Schedule,
    inputs: Sequence[ir.Value],
    segments: Sequence[Segment],
    results: Sequence[ir.Type],
) -> str:
    """Adds the kernel of tiles to the module, unless there is an equal one; returns its name."""
    memrefs = [memref_of(t) for t in [*(v.type for v in inputs), *results]]
    name = _name("decode" if problem.time == 1 else "prefill", problem, memrefs, schedule)

    def build(block: list[ir.Value], memory: list[ir.Value]) -> None:
        query, positions, *parts = memory[: len(inputs)]
        rest = iter(parts)
        held = [segment.like(rest) for segment in segments]
        Tiles(problem, schedule, block, query, positions, held, memory[len(inputs) :]).build()

    kernel(name, memrefs, schedule.waves * WAVE, build)
    return name


def _name(kind: str, problem: Problem, memrefs: Sequence[ir.Type], schedule: Schedule | None = None) -> str:
    facts = f"{problem} {schedule} {', '.join(map(str, memrefs))}"
    digest = hashlib.sha256(facts.encode()).hexdigest()[:10]
    return f"attention_{kind}_{problem.heads}x{problem.key_heads}x{problem.head_size}_{digest}"
