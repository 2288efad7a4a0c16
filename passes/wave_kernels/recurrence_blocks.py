"""The wave kernels of linear recurrences over many tokens: products of 16 x 16 tiles, in two launches, or three.

Time is cut into chunks, these into blocks of 16 steps. The first launch, ``Entering``, moves the state through the blocks, a tile
of 16 x 16 entries in the registers of a wave, and keeps what enters each chunk. The second, ``Outputs``, answers the queries of
all chunks and heads at once. With E the product of a block's decays up to a step, H that of those after it, A that of all:

    o = (q E ... ) S + sum over earlier blocks ((q E ...) (k H)^T) v + (triangle of the block itself) v

where ``...`` are the products A of the blocks between. A block's own triangle needs the quotient of two such products,
``q_i E_i (k_j H_j) / A``. Where a channel's products leave the range in which that is exact (a decay of 0 always does),
the channel counts as 0 there, and each pair of steps multiplies its decays one by one. Nothing else is ever divided.

Decays of values stand on the other side: ``o = (((q S) A + (q k^T) (v H)) ... ) E + (triangle)``, block by block, where the
triangle is ``(q_i . k_j) v_j H_j E_i / A``. Where a quotient is not exact, a tile of columns takes the steps one by one.

A rank-one part is one more update, erase and what was predicted. ``Predictions`` says how that follows from the state at the
start of a block, ``EnteringDelta`` takes the place of ``Entering``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch_mlir import ir

from spikingbrain.passes.dialect_fused import Part, Read
from spikingbrain.passes.kernels.builders import (
    ceil_div,
    index,
    mul,
)
from spikingbrain.passes.kernels.recurrence_base import Problem
from spikingbrain.passes.kernels.recurrence_launch import Result, launch_kernel
from spikingbrain.passes.wave_kernels import recurrence_predictions
from spikingbrain.passes.wave_kernels.builders import (
    SHARED_BYTES,
    TILE,
    WAVE,
)
from spikingbrain.passes.wave_kernels.recurrence_entering import Entering
from spikingbrain.passes.wave_kernels.recurrence_entering_delta import SOLVED, EnteringDelta
from spikingbrain.passes.wave_kernels.recurrence_outputs import PAD
from spikingbrain.passes.wave_kernels.recurrence_outputs_of_keys import KeyOutputs
from spikingbrain.passes.wave_kernels.recurrence_outputs_of_values import ValueOutputs
from spikingbrain.passes.wave_kernels.recurrence_predictions import Predictions
from spikingbrain.passes.wave_kernels.recurrence_tiles import Schedule
from spikingbrain.target import Target

MOST_KEYS = 256  # a query's row in the registers of four lanes


def serves(problem: Problem) -> bool:
    """Tells whether a recurrence is one for tiles: long enough, of steps that no step before makes unknown, and not too wide."""
    is_long = problem.time is None or problem.time >= TILE
    if problem.rank_one:
        fits = (
            problem.decay_axis != "value"
            and recurrence_predictions.shared_bytes(_rows(problem)) <= SHARED_BYTES
        )
        return is_long and fits
    return is_long and problem.key_size <= MOST_KEYS


def plan(problem: Problem, target: Target) -> Schedule:
    """Returns the schedule for a recurrence that tiles serve."""
    rows, updates = _rows(problem), 1 + problem.rank_one
    of_decays = TILE * (2 * (TILE + PAD) + 1) if problem.decay_axis == "value" else 2 * rows
    part_bytes = 4 * (TILE * (rows + PAD) * updates + of_decays)
    chunk = TILE * min(target.tuning.chunk_steps // TILE, SHARED_BYTES // part_bytes)
    if problem.time is not None:
        chunk = min(chunk, -(-problem.time // TILE) * TILE)
    waves = min(target.tuning.chunk_waves, -(-problem.value_size // TILE))  # tiles beside each other
    return Schedule(chunk, rows, waves)


def _rows(problem: Problem) -> int:
    return -(-problem.key_size // TILE) * TILE


def launch(
    problem: Problem,
    schedule: Schedule,
    parts: Sequence[Part],
    state: ir.Value | None,
    y: Result,
    final: Result,
) -> list[ir.Value]:
    """Emits the launches at the insertion point; returns the outputs and the final state."""
    if problem.rank_one:
        return _launch_delta(problem, schedule, parts, state, y, final)
    batch, time = y.sizes
    chunks = ceil_div(time, schedule.chunk)
    sizes = list(ir.RankedTensorType(final.type).shape)
    count = ir.ShapedType.get_dynamic_size() if problem.time is None else -(-problem.time // schedule.chunk)
    kind = ir.RankedTensorType.get([sizes[0], count, *sizes[1:]], ir.F32Type.get())
    tiles = schedule.rows // TILE * -(-problem.value_size // (schedule.waves * TILE))
    entering, last = launch_kernel(
        problem,
        schedule,
        Entering,
        parts,
        state,
        [Result(kind, [batch, chunks]), final],
        [index(tiles), index(problem.states), batch],
        schedule.waves * WAVE,
    )
    grid = [chunks, index(problem.heads), batch]
    outputs = ValueOutputs if problem.decay_axis == "value" else KeyOutputs
    (o,) = launch_kernel(problem, schedule, outputs, parts, entering, [y], grid, schedule.parts * WAVE)
    return [o, last]


def _launch_delta(
    problem: Problem,
    schedule: Schedule,
    parts: Sequence[Part],
    state: ir.Value | None,
    y: Result,
    final: Result,
) -> list[ir.Value]:
    (batch, time), named = y.sizes, {part.name: part for part in parts}
    chunks = ceil_div(time, schedule.chunk)
    blocks = mul(chunks, schedule.parts)
    sizes = list(ir.RankedTensorType(final.type).shape)
    known = None if problem.time is None else -(-problem.time // schedule.chunk)

    def made(count: int, rows: int, columns: int, size: ir.Value) -> Result:
        count = ir.ShapedType.get_dynamic_size() if known is None else known * count
        kind = ir.RankedTensorType.get([sizes[0], count, sizes[1], rows, columns], ir.F32Type.get())
        return Result(kind, [batch, size])

    reads = [replace(named["predict"], name="q")] + [named[n] for n in ("k", "erase", "decay") if n in named]
    (solved,) = launch_kernel(
        replace(problem, heads=problem.states, exclusive=True, bonus=False),
        replace(schedule, chunk=TILE),
        Predictions,
        reads,
        None,
        [made(schedule.parts, recurrence_predictions.ROWS, TILE + schedule.rows, blocks)],
        [blocks, index(problem.states), batch],
        WAVE,
    )
    entering, last = launch_kernel(
        problem,
        schedule,
        EnteringDelta,
        [named["v"], Part(SOLVED, [Read(solved, None)])],
        state,
        [made(1, problem.key_size + schedule.chunk, problem.value_size, chunks), final],
        [index(-(-problem.value_size // (schedule.waves * TILE))), index(problem.states), batch],
        schedule.waves * WAVE,
    )
    reads = [part for part in parts if part.name != "predict"]
    grid = [chunks, index(problem.heads), batch]
    (o,) = launch_kernel(problem, schedule, KeyOutputs, reads, entering, [y], grid, schedule.parts * WAVE)
    return [o, last]
