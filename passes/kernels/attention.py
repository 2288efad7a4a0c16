"""CPU kernels for ``spikingbrain.attention``, built over scf, vector and memref.

This module chooses between two schedules, plans their blocks and replaces the op by a launch. They share the
rule of visibility and the online softmax (a running maximum and sum, so that no score outlives its block of
keys):

* ``attention_prefill``, for many queries. The query heads that share a key head are stacked: one workgroup
  takes a block of (token, head) rows of one key head. The queries are transposed once, so that vector lanes
  are rows; then keys and probabilities enter every multiplication as broadcast scalars, neither keys nor values
  are transposed, and the softmax needs no operation across lanes. The output is accumulated in the result
  itself.
* ``attention_decode``, for one query per batch entry. All query heads of a key head share each loaded key and
  value. Lanes run along the head; the products of one vector's worth of keys are summed across lanes as one
  tree.

Key blocks that no query can see are skipped, and blocks that every query sees are not masked; both are
decided from the smallest and the largest position of the block. Positions must be below 2**31 - 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import func

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes.kernels.attention_base import SCRATCH_BYTES, Segment
from spikingbrain.passes.kernels.attention_bounds import MAX_POSITION, SHORT, emit_bounds
from spikingbrain.passes.kernels.attention_decode import DecodeKernel, key_heads_per_workgroup
from spikingbrain.passes.kernels.attention_prefill import PrefillKernel, scratch_bytes
from spikingbrain.passes.kernels.builders import ceil_div, converts_halves, has_fma, index, launch, mul, size
from spikingbrain.passes.wave_kernels.attention import launch_attention
from spikingbrain.target import Target

# Vectors of rows, and keys of a block: the first that fit the scratch. Measured on AVX-512: many keys to a block matter
# more than many rows, as the outputs are scaled once per block.
BLOCKS = ((3, 64), (2, 64), (3, 32), (2, 32), (1, 64), (1, 32), (1, 16))


@dataclass(frozen=True)
class Schedule:
    """How one attention op is blocked for one target.

    Attributes:
        lanes: values per vector, for rows (prefill) or keys (decode).
        head_lanes: values per vector along the head; divides the head size.
        row_vectors: vectors of rows whose scores are held in registers.
        key_tile: keys whose scores are held in registers.
        rows: (token, head) rows per workgroup, a multiple of ``row_vectors * lanes``.
        key_block: keys per step of the online softmax, a multiple of ``key_tile`` and ``lanes``.
        value_rows: rows whose outputs are held in registers.
        span_rows: rows that multiply the same keys of a block with their values; a multiple of ``value_rows`` and ``lanes``.
        value_vectors: vectors of each of these outputs.
        packed_keys: keys of a tile that are made f32 at a time; 0 where all are f32.
        fused: whether the target multiplies and adds in one instruction.
        decode_key_heads: key heads per workgroup of a decode kernel; 0 where it would need too much scratch.
        decode_keys: keys of a step of that kernel.
    """

    lanes: int
    head_lanes: int
    row_vectors: int
    key_tile: int
    rows: int
    key_block: int
    value_rows: int
    span_rows: int
    value_vectors: int
    packed_keys: int
    fused: bool
    decode_key_heads: int
    decode_keys: int


@dataclass(frozen=True)
class Problem:
    """The static facts of an attention op."""

    heads: int
    key_heads: int
    head_size: int
    scale: float
    window: int
    sinks: int
    time: int | None
    narrow_keys: bool  # whether some are halves or codes

    @property
    def group(self) -> int:
        return self.heads // self.key_heads


def emit_attention_launch(op: Any, target: Target) -> None:
    """Replaces a ``spikingbrain.attention`` op by the launch of a kernel for ``target``, or of two.

    The kernel function is created at the end of the module unless an equal one exists. Values in empty cache
    slots must be finite. Raises UnsupportedOp, with the module unchanged, when the target has neither vectors nor waves, or the
    op is of a kind that the kernels do not handle; ``attention_portable`` then does.
    """
    problem = _problem_of(op, target)
    operation = op.operation
    if target.wave_kernels:
        with operation.context, operation.location, ir.InsertionPoint(operation):
            op.out.replace_all_uses_with(launch_attention(op, problem, segments_of(op)[::-1], target.tuning))
            operation.erase()
        return
    schedule = plan(
        problem.heads, problem.key_heads, problem.head_size, target, problem.time, problem.narrow_keys
    )
    decode = problem.time == 1 and schedule.decode_key_heads > 0
    # The cache holds the older tokens: visiting it first changes the running maximum less often.
    segments = segments_of(op)[::-1]
    module = operation
    while module.name != "builtin.module":
        module = module.parent.operation
    with operation.context, operation.location, ir.InsertionPoint(operation):
        if not decode:
            segments = [_with_bounds(segment, schedule.key_block) for segment in segments]
        inputs = [op.query, op.query_positions, *(part for s in segments for part in s.parts)]
        types = [ir.IndexType.get()] * 3 + [
            ir.MemRefType.get(t.shape, t.element_type)
            for t in (ir.RankedTensorType(v.type) for v in [*inputs, op.out])
        ]
        name = _kernel_name(problem, schedule, types, decode)
        if name not in ir.SymbolTable(module):
            with ir.InsertionPoint(module.regions[0].blocks[0]):
                kernel = func.FuncOp(name, (types, []), visibility="private")
            with ir.InsertionPoint(kernel.add_entry_block()):
                kind = DecodeKernel if decode else PrefillKernel
                kind(problem, schedule, list(kernel.arguments), segments).build()
                func.ReturnOp([])
        batch, time = (size(op.query, axis) for axis in (0, 1))
        if decode:
            grid = [index(problem.key_heads // schedule.decode_key_heads), batch, index(1)]
        else:
            rows = mul(time, problem.group)
            grid = [ceil_div(rows, schedule.rows), index(problem.key_heads), batch]
        dynamic = ir.RankedTensorType(op.out.type).is_dynamic_dim
        sizes = [s for i, s in enumerate((batch, time)) if dynamic(i)]
        result = launch(name, op.out.type, grid, inputs, sizes)
        op.out.replace_all_uses_with(result.result)
        operation.erase()


def segments_of(op: Any) -> list[Segment]:
    """Returns the segments of keys of an attention op: the new tokens, and the cache if there is one."""
    new = Segment(op.keys, op.values, op.key_positions)
    if op.cache_keys is None:
        return [new]
    scales = (op.cache_key_scales, op.cache_value_scales)
    return [new, Segment(op.cache_keys, op.cache_values, op.cache_positions, *scales)]


def _with_bounds(segment: Segment, block: int) -> Segment:
    keys = ir.RankedTensorType(segment.keys.type)
    if not keys.is_dynamic_dim(1) and keys.shape[1] <= SHORT:
        return segment
    return replace(segment, bounds=emit_bounds(segment.positions, block))


def plan(
    heads: int,
    key_heads: int,
    head_size: int,
    target: Target,
    time: int | None = None,
    narrow_keys: bool = False,
) -> Schedule:
    """Returns the blocking for an op with ``time`` queries (None: unknown), and keys that may not be f32.

    Raises UnsupportedOp when the kernels cannot serve the target or the head size.
    """
    lanes, group = target.vector_lanes_f32, heads // key_heads
    if lanes < 4:
        raise UnsupportedOp(
            f"no attention kernel for target {target.name!r}",
            why="it has no vector registers",
            hint="the portable form",
        )
    head_lanes = next((n for n in (16, 8, 4) if n <= lanes and head_size % n == 0), 0)
    if not head_lanes:
        raise UnsupportedOp(
            f"no attention kernel for heads of {head_size}",
            why="the head size is not a multiple of 4",
            hint="the portable form",
        )
    many = target.vector_registers >= 32
    head_vectors = head_size // head_lanes
    value_vectors = next(n for n in ((4, 3, 2, 1) if many else (2, 1)) if head_vectors % n == 0)
    key_tile = 8 if many else 4
    packed_keys = key_tile if narrow_keys else 0
    few_rows = time is not None and time * group <= lanes
    for row_vectors, key_block in BLOCKS:
        if few_rows and row_vectors > 1:
            continue
        step = lanes * row_vectors
        if many:
            value_rows = min(lanes, 8 if value_vectors < 3 else 4)
        else:
            value_rows = 6 if step % 6 == 0 else 4
        rows = target.tuning.query_rows // step * step
        fitting = next(
            (
                n
                for n in range(rows, 0, -step)
                if scratch_bytes(head_size, n, key_block, packed_keys) <= SCRATCH_BYTES
            ),
            0,
        )
        if fitting and key_block % lanes == 0:
            return Schedule(
                lanes=lanes,
                head_lanes=head_lanes,
                row_vectors=row_vectors,
                key_tile=key_tile,
                rows=fitting,
                key_block=key_block,
                value_rows=value_rows,
                span_rows=lanes if lanes % value_rows == 0 else step,
                value_vectors=value_vectors,
                packed_keys=packed_keys,
                decode_key_heads=key_heads_per_workgroup(
                    key_heads, group, head_size, lanes, head_lanes, target.tuning.decode_keys
                ),
                decode_keys=target.tuning.decode_keys,
                fused=has_fma(target),
            )
    raise UnsupportedOp(
        f"no attention kernel for heads of {head_size}",
        why=f"a block of queries exceeds {SCRATCH_BYTES} bytes of scratch",
        hint="the portable form",
    )


def _problem_of(op: Any, target: Target) -> Problem:
    query, keys = (ir.RankedTensorType(v.type) for v in (op.query, op.keys))
    stored = [v for v in (op.keys, op.values, op.cache_keys, op.cache_values) if v is not None]
    types = [query, *(ir.RankedTensorType(v.type) for v in stored)]
    elements = [str(t.element_type) for t in types]
    known = ["f32", "bf16", "i8", *(["f16"] if target.wave_kernels or converts_halves(target) else [])]
    if elements[0] != "f32" or any(element not in known for element in elements):
        raise UnsupportedOp(
            "no attention kernel for these element types",
            why=f"queries must be f32, keys and values {', '.join(known)}, not {', '.join(elements)}",
            hint="the portable form",
        )
    if any(t.is_dynamic_dim(axis) for t in types for axis in (2, 3)):
        raise UnsupportedOp("no attention kernel for a dynamic number or size of heads", hint="static sizes")
    return Problem(
        heads=query.shape[2],
        key_heads=keys.shape[2],
        head_size=query.shape[3],
        scale=op.scale.value,
        window=min(op.window.value, MAX_POSITION),
        sinks=min(op.sinks.value, MAX_POSITION),
        time=None if query.is_dynamic_dim(1) else query.shape[1],
        narrow_keys=any(
            str(ir.RankedTensorType(v.type).element_type) != "f32"
            for v in (op.keys, op.cache_keys)
            if v is not None
        ),
    )


def _kernel_name(problem: Problem, schedule: Schedule, types: Sequence[ir.Type], decode: bool) -> str:
    facts = f"{problem} {schedule} {', '.join(map(str, types))}"
    digest = hashlib.sha256(facts.encode()).hexdigest()[:10]
    kind = "decode" if decode else "prefill"
    return f"attention_{kind}_{problem.heads}x{problem.key_heads}x{problem.head_size}_{digest}"
