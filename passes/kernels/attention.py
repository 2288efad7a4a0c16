"""CPU kernels for ``spikingbrain.attention``, built over scf, vector and memref.

Two schedules share the rule of visibility and the online softmax (a running maximum and sum, so that no
score outlives its block of keys):

* *prefill*, for many queries. The query heads that share a key head are stacked: one workgroup takes a block
  of (token, head) rows of one key head. The queries are transposed once, so that vector lanes are rows; then
  keys and probabilities enter every multiplication as broadcast scalars, neither keys nor values are
  transposed, and the softmax needs no operation across lanes. The output is accumulated in the result itself.
* *decode*, for one query per batch entry. All query heads of a key head share each loaded key and value.
  Lanes run along the head; the products of one vector's worth of keys are summed across lanes as one tree.

Key blocks that no query can see are skipped, and blocks that every query sees are not masked; both are
decided from the smallest and the largest position of the block. Positions must be below 2**31 - 1.
"""

from __future__ import annotations

import array
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import arith, func, memref, scf, tensor, vector

from spikingbrain.errors import UnsupportedOp
from spikingbrain.target import Target

SCRATCH_BYTES = 32 << 10  # IREE allows a dispatch 32 KB of stack unless told otherwise
ROW_LIMIT = 64  # more query rows per block gained nothing
DECODE_KEY_BLOCK = 128  # keys per step of the online softmax in decode
DECODE_RUN_BYTES = 1024  # of contiguous keys that a decode workgroup reads per token
LINE_BYTES = 64

MAX_POSITION = 2**31 - 1
MASKED = -3.0e38  # score of a key that is not visible
FLOOR = -1.0e30  # first value of the running maximum; exp2(MASKED - FLOOR) is exactly 0

# 2**r on [-1/2, 1/2] with relative error 1e-7, exact at 0; highest power first.
EXP2 = (0.0013264727, 0.0096715126, 0.055507337, 0.24022242, 0.69314698, 1.0)
ROUNDER = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits of a float
SMALLEST_EXPONENT = -127.0  # with an exponent field of 0, so that the result is exactly 0


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
        value_vectors: vectors of each of these outputs.
        fused: whether the target multiplies and adds in one instruction.
        decode_key_heads: key heads per workgroup of a decode kernel; 0 where it would need too much scratch.
    """

    lanes: int
    head_lanes: int
    row_vectors: int
    key_tile: int
    rows: int
    key_block: int
    value_rows: int
    value_vectors: int
    fused: bool
    decode_key_heads: int


@dataclass(frozen=True)
class _Problem:
    """The static facts of an attention op."""

    heads: int
    key_heads: int
    head_size: int
    scale: float
    window: int
    sinks: int
    time: int | None

    @property
    def group(self) -> int:
        return self.heads // self.key_heads


def emit_attention_launch(op: Any, target: Target) -> ir.Operation:
    """Replaces a ``spikingbrain.attention`` op by the launch of a kernel for ``target``; returns the launch.

    The kernel function is created at the end of the module unless an equal one exists. Values in empty cache
    slots must be finite. Raises UnsupportedOp, with the module unchanged, when the target has no vectors or the
    op is of a kind that the kernels do not handle; ``attention_portable`` then does.
    """
    problem = _problem_of(op)
    schedule = plan(problem.heads, problem.key_heads, problem.head_size, target, problem.time)
    decode = problem.time == 1 and schedule.decode_key_heads > 0
    inputs = [op.query, op.query_positions, op.keys, op.values, op.key_positions]
    if op.cache_keys is not None:
        inputs += [op.cache_keys, op.cache_values, op.cache_positions]
    operation = op.operation
    module = operation
    while module.name != "builtin.module":
        module = module.parent.operation
    with operation.context, operation.location:
        types = [ir.IndexType.get()] * 3 + [
            ir.MemRefType.get(t.shape, t.element_type)
            for t in (ir.RankedTensorType(v.type) for v in [*inputs, op.out])
        ]
        name = _kernel_name(problem, schedule, types, decode)
        if name not in ir.SymbolTable(module):
            with ir.InsertionPoint(module.regions[0].blocks[0]):
                kernel = func.FuncOp(name, (types, []), visibility="private")
            with ir.InsertionPoint(kernel.add_entry_block()):
                _Kernel(problem, schedule, list(kernel.arguments)).build(decode)
                func.ReturnOp([])
        with ir.InsertionPoint(operation):
            batch, time = (_size(op.query, axis) for axis in (0, 1))
            if decode:
                grid = [_index(problem.key_heads // schedule.decode_key_heads), batch, _index(1)]
            else:
                rows = _mul(time, problem.group)
                grid = [_ceil_div(rows, schedule.rows), _index(problem.key_heads), batch]
            dynamic = ir.RankedTensorType(op.out.type).is_dynamic_dim
            launch = ir.Operation.create(
                "spikingbrain_control.launch",
                results=[op.out.type],
                operands=[*grid, *inputs, *(s for i, s in enumerate((batch, time)) if dynamic(i))],
                attributes={
                    "callee": ir.FlatSymbolRefAttr.get(name),
                    "tied": ir.ArrayAttr.get([ir.IntegerAttr.get(ir.IntegerType.get_signless(64), -1)]),
                },
            )
        op.out.replace_all_uses_with(launch.result)
        operation.erase()
    return launch


def plan(heads: int, key_heads: int, head_size: int, target: Target, time: int | None = None) -> Schedule:
    """Returns the blocking for an op with ``time`` queries (None: unknown).

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
    # Measured on AVX-512 and AVX2: three vectors of rows against as many keys as registers hold is best.
    few_rows = time is not None and time * group <= lanes
    for row_vectors, key_block in ((3, 64), (3, 32), (2, 32), (1, 64), (1, 32), (1, 16)):
        if few_rows and row_vectors > 1:
            continue
        step = lanes * row_vectors
        rows = ROW_LIMIT // step * step
        fitting = next(
            (n for n in range(rows, 0, -step) if _scratch_bytes(head_size, n, key_block) <= SCRATCH_BYTES), 0
        )
        if fitting and key_block % lanes == 0:
            return Schedule(
                lanes=lanes,
                head_lanes=head_lanes,
                row_vectors=row_vectors,
                key_tile=8 if many else 4,
                rows=fitting,
                key_block=key_block,
                value_rows=6,
                value_vectors=value_vectors,
                decode_key_heads=_decode_key_heads(key_heads, group, head_size, lanes, head_lanes),
                fused=target.arch == "aarch64" or bool(target.features & {"fma", "avx512f"}),
            )
    raise UnsupportedOp(
        f"no attention kernel for heads of {head_size}",
        why=f"a block of queries exceeds {SCRATCH_BYTES} bytes of scratch",
        hint="the portable form",
    )


def _scratch_bytes(head_size: int, rows: int, key_block: int) -> int:
    """Returns the scratch of a prefill kernel: transposed queries, scores, four values per row, positions."""
    return 4 * (rows * (head_size + key_block + 4) + key_block) + 8 * LINE_BYTES


def _decode_key_heads(key_heads: int, group: int, head_size: int, lanes: int, head_lanes: int) -> int:
    """Returns how many key heads one decode workgroup takes: enough for it to read memory in long runs.

    With one head of 64 per workgroup, reading 4096 keys took 1.3 times as long as from contiguous rows.
    """
    per_head = 2 * head_size + DECODE_KEY_BLOCK + 3 * lanes
    fixed = 4 * (group * lanes * head_lanes + DECODE_KEY_BLOCK) + 9 * LINE_BYTES
    for count in range(key_heads, 0, -1):
        run = 4 * count * head_size
        fits = fixed + 4 * count * group * per_head <= SCRATCH_BYTES
        if key_heads % count == 0 and fits and (run <= DECODE_RUN_BYTES or count == 1):
            return count
    return 0


def _problem_of(op: Any) -> _Problem:
    query = ir.RankedTensorType(op.query.type)
    keys = ir.RankedTensorType(op.keys.type)
    types = [query, keys, ir.RankedTensorType(op.values.type)]
    types += [ir.RankedTensorType(v.type) for v in (op.cache_keys, op.cache_values) if v is not None]
    if any(str(t.element_type) != "f32" for t in types):
        raise UnsupportedOp(
            "no attention kernel for these element types",
            why=f"queries, keys and values must be f32, not {', '.join(str(t.element_type) for t in types)}",
            hint="the portable form",
        )
    if any(t.is_dynamic_dim(axis) for t in types for axis in (2, 3)):
        raise UnsupportedOp("no attention kernel for a dynamic number or size of heads", hint="static sizes")
    return _Problem(
        heads=query.shape[2],
        key_heads=keys.shape[2],
        head_size=query.shape[3],
        scale=op.scale.value,
        window=min(op.window.value, MAX_POSITION),
        sinks=min(op.sinks.value, MAX_POSITION),
        time=None if query.is_dynamic_dim(1) else query.shape[1],
    )


def _kernel_name(problem: _Problem, schedule: Schedule, types: Sequence[ir.Type], decode: bool) -> str:
    facts = f"{problem} {schedule} {', '.join(map(str, types))}"
    digest = hashlib.sha256(facts.encode()).hexdigest()[:10]
    kind = "decode" if decode else "prefill"
    return f"attention_{kind}_{problem.heads}x{problem.key_heads}x{problem.head_size}_{digest}"


# Small words for the builders. Sizes and indices may be Python integers wherever an index value is meant.

Index = Any  # int or an index value


def _index(value: Index) -> ir.Value:
    return arith.constant(ir.IndexType.get(), value) if isinstance(value, int) else value


def _add(a: Index, b: Index) -> ir.Value:
    return arith.addi(_index(a), _index(b))


def _sub(a: Index, b: Index) -> ir.Value:
    return arith.subi(_index(a), _index(b))


def _mul(a: Index, b: Index) -> ir.Value:
    return arith.muli(_index(a), _index(b))


def _min(a: Index, b: Index) -> ir.Value:
    return arith.minsi(_index(a), _index(b))


def _floor_div(a: Index, b: Index) -> ir.Value:
    return arith.divui(_index(a), _index(b))


def _rem(a: Index, b: Index) -> ir.Value:
    return arith.remui(_index(a), _index(b))


def _round_down(a: Index, b: int) -> ir.Value:
    return _mul(_floor_div(a, b), b)


def _ceil_div(a: Index, b: int) -> ir.Value:
    return _floor_div(_add(a, b - 1), b)


def _round_up(a: Index, b: int) -> ir.Value:
    return _mul(_ceil_div(a, b), b)


def _size(value: ir.Value, axis: int) -> ir.Value:
    """Returns a size of a tensor or memref, as a constant where it is static."""
    shaped = ir.ShapedType(value.type)
    if not shaped.is_dynamic_dim(axis):
        return _index(shaped.get_dim_size(axis))
    dim = tensor.dim if isinstance(value.type, ir.RankedTensorType) else memref.dim
    return dim(value, _index(axis))


def _f32(value: float) -> ir.Value:
    return arith.constant(ir.F32Type.get(), value)


def _i32(value: int) -> ir.Value:
    return arith.constant(_i32_type(), value)


def _i32_type() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _splat(value: float | int | ir.Value, lanes: int) -> ir.Value:
    if isinstance(value, float | int):
        value = _f32(value) if isinstance(value, float) else _i32(value)
    return vector.broadcast(ir.VectorType.get([lanes], value.type), value)


def _load(source: ir.Value, at: Sequence[Index], lanes: int) -> ir.Value:
    element = ir.MemRefType(source.type).element_type
    return vector.load(ir.VectorType.get([lanes], element), source, [_index(i) for i in at])


def _store(value: ir.Value, target: ir.Value, at: Sequence[Index]) -> None:
    vector.store(value, target, [_index(i) for i in at])


def _get(source: ir.Value, at: Sequence[Index]) -> ir.Value:
    return memref.load(source, [_index(i) for i in at])


def _put(value: ir.Value, target: ir.Value, at: Sequence[Index]) -> None:
    memref.store(value, target, [_index(i) for i in at])


def _scratch(shapes: Sequence[tuple[Sequence[int], ir.Type]]) -> list[ir.Value]:
    """Returns buffers on the stack, each at the start of a cache line: vectors across two lines cost double.

    The alignment attribute of ``memref.alloca`` is printed in a form that IREE 3.13 does not read, so the
    buffers are views of one block of bytes.
    """
    starts, total = [], 0
    for shape, _ in shapes:
        starts.append(total)
        total += -(-math.prod(shape) * 4 // LINE_BYTES) * LINE_BYTES
    byte = ir.IntegerType.get_signless(8)
    block = memref.alloca(ir.MemRefType.get([total + LINE_BYTES], byte), [], [])
    address = memref.extract_aligned_pointer_as_index(block)
    shift = arith.andi(_sub(0, address), _index(LINE_BYTES - 1))
    return [
        memref.view(ir.MemRefType.get(shape, element), block, _add(shift, start), [])
        for (shape, element), start in zip(shapes, starts, strict=True)
    ]


def _loop(
    low: Index,
    high: Index,
    step: Index,
    body: Callable[..., Sequence[ir.Value] | None],
    carried: Sequence[ir.Value] = (),
) -> list[ir.Value]:
    """Builds a loop; ``body(i, *carried)`` returns the next carried values. Returns the last ones."""
    loop = scf.ForOp(_index(low), _index(high), _index(step), list(carried))
    with ir.InsertionPoint(loop.body):
        scf.YieldOp(list(body(loop.induction_variable, *loop.inner_iter_args) or []))
    return list(loop.results)


def _when(condition: ir.Value, body: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
    branch = scf.IfOp(condition, [], has_else=otherwise is not None)
    with ir.InsertionPoint(branch.then_block):
        body()
        scf.YieldOp([])
    if otherwise is not None:
        with ir.InsertionPoint(branch.else_block):
            otherwise()
            scf.YieldOp([])


def _compare(predicate: str, a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.cmpi(getattr(arith.CmpIPredicate, predicate), a, b)


def _greater(a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.cmpf(arith.CmpFPredicate.OGT, a, b)


def _larger(a: ir.Value, b: ir.Value) -> ir.Value:
    """Returns the larger of two floats; the pattern of one max instruction, without its rules for NaN."""
    return arith.select(_greater(a, b), a, b)


def _folded(combine: Callable[[ir.Value, ir.Value], ir.Value], values: Sequence[ir.Value]) -> ir.Value:
    return functools.reduce(combine, values)


def _reduced(kind: str, value: ir.Value) -> ir.Value:
    """Returns one scalar from all lanes of a vector."""
    element = ir.VectorType(value.type).element_type
    return vector.reduction(element, ir.Attribute.parse(f"#vector.kind<{kind}>"), value)


def _reduced_float(combine: Callable[[ir.Value, ir.Value], ir.Value], value: ir.Value) -> ir.Value:
    """Returns one float from all lanes, in halves; ``vector.reduction`` keeps order, lane by lane."""
    width = ir.VectorType(value.type).shape[0]
    while width > 1:
        width //= 2
        value = combine(
            vector.shuffle(value, value, list(range(width))),
            vector.shuffle(value, value, list(range(width, 2 * width))),
        )
    return vector.extract(value, [], [0])


def _lane_numbers(lanes: int, first: int) -> ir.Value:
    kind = ir.VectorType.get([lanes], _i32_type())
    return arith.constant(kind, array.array("i", range(first, first + lanes)))


def _shuffled_halves(a: ir.Value, b: ir.Value, stride: int) -> tuple[ir.Value, ir.Value]:
    """Returns a and b after one transposition step, which swaps blocks of ``stride`` lanes."""
    lanes = ir.VectorType(a.type).shape[0]
    low = [i if not i & stride else lanes + i - stride for i in range(lanes)]
    high = [i + stride if not i & stride else lanes + i for i in range(lanes)]
    return vector.shuffle(a, b, low), vector.shuffle(a, b, high)


def _transposed(rows: Sequence[ir.Value]) -> list[ir.Value]:
    """Returns the columns of a square of vectors."""
    rows, stride = list(rows), len(rows) // 2
    while stride:
        for i in range(len(rows)):
            if not i & stride:
                rows[i], rows[i + stride] = _shuffled_halves(rows[i], rows[i + stride], stride)
        stride //= 2
    return rows


def _lane_sums(vectors: Callable[[int], ir.Value], lanes: int, width: int) -> ir.Value:
    """Returns a vector of ``lanes`` sums: lane i sums the ``width`` lanes of ``vectors(i)``.

    Pairs are added along a tree, walked depth first so that few vectors live at a time.
    """

    def tree(base: int, first: int, stride: int) -> ir.Value:
        if stride == width:
            return vectors(base + first)
        a, b = tree(base, first, stride * 2), tree(base, first + stride, stride * 2)
        return arith.addf(*_shuffled_halves(a, b, stride))

    parts = [tree(base, 0, 1) for base in range(0, lanes, width)]
    while len(parts) > 1:  # heads narrower than a vector of keys: join the pieces
        both = list(range(2 * ir.VectorType(parts[0].type).shape[0]))
        parts = [vector.shuffle(a, b, both) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@dataclass(frozen=True)
class _Block:
    """A block of keys in a kernel: where it starts, which part is visible, and whether to all queries."""

    keys: ir.Value
    values: ir.Value
    start: ir.Value
    begin: ir.Value  # first key that is visible to some query, from the block's start
    end: ir.Value  # one past the last
    whole: ir.Value

    @property
    def last_key(self) -> ir.Value:
        return _sub(_size(self.keys, 1), 1)


class _Kernel:
    """The body of one kernel function; emits at the current insertion point."""

    def __init__(self, problem: _Problem, schedule: Schedule, arguments: Sequence[ir.Value]):
        self.problem, self.schedule = problem, schedule
        self.workgroup = arguments[:3]
        self.query, self.query_positions, *rest, self.out = arguments[3:]
        segments = [rest[i : i + 3] for i in range(0, len(rest), 3)]
        # The cache holds the older tokens: visiting it first changes the running maximum less often.
        self.segments = segments[::-1]

    def build(self, decode: bool) -> None:
        if decode:
            key_heads, self.batch, _ = self.workgroup
            self.key_head = _mul(key_heads, self.schedule.decode_key_heads)
            self._decode()
        else:
            block, self.key_head, self.batch = self.workgroup
            self._prefill(_mul(block, self.schedule.rows))

    # Arithmetic

    def _fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return vector.fma(a, b, c) if self.schedule.fused else arith.addf(arith.mulf(a, b), c)

    def _exp2(self, x: ir.Value) -> ir.Value:
        """Returns 2**x for a vector of x <= 0; exactly 0 below about -126.5."""
        lanes = ir.VectorType(x.type).shape[0]
        x = _larger(x, _splat(SMALLEST_EXPONENT, lanes))
        rounded = arith.addf(x, _splat(ROUNDER, lanes))
        r = arith.subf(x, arith.subf(rounded, _splat(ROUNDER, lanes)))
        power = _splat(EXP2[0], lanes)
        for coefficient in EXP2[1:]:
            power = self._fma(power, r, _splat(coefficient, lanes))
        bits = arith.bitcast(ir.VectorType.get([lanes], _i32_type()), rounded)
        bits = arith.addi(arith.shli(bits, _splat(23, lanes)), _splat(0x3F800000, lanes))
        return arith.mulf(power, arith.bitcast(x.type, bits))

    def _score_scale(self) -> float:
        return self.problem.scale * math.log2(math.e)  # scores are kept as exponents of 2

    # Positions and visibility

    def _position(self, source: ir.Value, at: Sequence[Index]) -> ir.Value:
        return arith.trunci(_i32_type(), _get(source, at))

    def _read_positions(
        self, source: ir.Value, start: ir.Value, count: ir.Value, block: int, scratch: ir.Value
    ) -> None:
        """Copies a block of key positions to scratch, -1 beyond ``count``."""
        lanes = self.schedule.lanes
        narrow = ir.VectorType.get([lanes], _i32_type())

        def whole() -> None:
            for i in range(0, block, lanes):
                wide = _load(source, [self.batch, _add(start, i)], lanes)
                _store(arith.trunci(narrow, wide), scratch, [i])

        def part() -> None:
            def copy(i: ir.Value) -> None:
                _put(self._position(source, [self.batch, _add(start, i)]), scratch, [i])

            for i in range(0, block, lanes):
                _store(_splat(-1, lanes), scratch, [i])
            _loop(0, count, 1, copy)

        _when(_compare("eq", count, _index(block)), whole, part)

    def _visible(self, key: ir.Value, upper: ir.Value, lower: ir.Value) -> ir.Value:
        """Returns the lanes where 0 <= key <= upper and key > lower - window, sinks included; vectors of i32.

        With both bounds the position of one query, that is the rule; with the bounds of several queries it
        tells which keys all of them see, or some may see.
        """
        lanes = ir.VectorType(key.type).shape[0]
        seen = arith.andi(_compare("sge", key, _splat(0, lanes)), _compare("sle", key, upper))
        if self.problem.window:
            near = _compare("sgt", key, arith.subi(lower, _splat(self.problem.window, lanes)))
            if self.problem.sinks:
                near = arith.ori(near, _compare("slt", key, _splat(self.problem.sinks, lanes)))
            seen = arith.andi(seen, near)
        return seen

    def _visible_blocks(
        self,
        block: int,
        positions: ir.Value,
        first: ir.Value,
        last: ir.Value,
        body: Callable[[_Block], None],
    ) -> None:
        """Visits every key block that some query between positions ``first`` and ``last`` may see.

        Emits ``body(block)`` with the positions of the block in scratch.
        """
        lanes = self.schedule.lanes

        def visit(segment: Sequence[ir.Value], start: ir.Value) -> None:
            keys, values, key_positions = segment
            count = _min(_sub(_size(keys, 1), start), block)
            self._read_positions(key_positions, start, count, block, positions)
            low, high = _splat(first, lanes), _splat(last, lanes)
            parts = [_load(positions, [i], lanes) for i in range(0, block, lanes)]
            some = [self._visible(part, high, low) for part in parts]

            def found() -> None:
                order = [_lane_numbers(lanes, i) for i in range(0, block, lanes)]
                begins = [arith.select(m, n, _splat(block, lanes)) for m, n in zip(some, order, strict=True)]
                ends = [arith.select(m, n, _splat(-1, lanes)) for m, n in zip(some, order, strict=True)]
                begin = _reduced("minsi", _folded(arith.minsi, begins))
                end = arith.addi(_reduced("maxsi", _folded(arith.maxsi, ends)), _i32(1))
                whole = _folded(arith.andi, [self._visible(part, low, high) for part in parts])
                index = ir.IndexType.get()
                body(
                    _Block(
                        keys,
                        values,
                        start,
                        arith.index_cast(index, begin),
                        arith.index_cast(index, end),
                        _reduced("and", whole),
                    )
                )

            _when(_reduced("or", _folded(arith.ori, some)), found)

        for segment in self.segments:
            _loop(0, _size(segment[0], 1), block, functools.partial(visit, segment))

    # Prefill

    def _prefill(self, first_row: ir.Value) -> None:
        p, s = self.problem, self.schedule
        f32, i32 = ir.F32Type.get(), _i32_type()
        self.first_row = first_row
        self.row_count = _min(_sub(_mul(_size(self.query, 1), p.group), first_row), s.rows)
        (
            self.columns,  # queries, transposed and scaled
            self.scores,
            self.row_positions,
            self.maxima,
            self.sums,
            self.factors,
            positions,
        ) = _scratch(
            [
                ([p.head_size, s.rows], f32),
                ([s.key_block, s.rows], f32),
                ([s.rows], i32),
                *[([s.rows], f32)] * 3,
                ([s.key_block], i32),
            ]
        )
        first, last = self._gather_queries()

        def visit(block: _Block) -> None:
            _when(
                block.whole,
                lambda: self._score_block(block, None),
                lambda: self._score_block(block, positions),
            )
            self._accumulate_values(block)

        self._visible_blocks(s.key_block, positions, first, last, visit)
        self._normalise_rows()

    def _row(self, row: Index) -> tuple[ir.Value, ir.Value]:
        """Returns token and query head of a row of the block."""
        flat, group = _add(self.first_row, row), self.problem.group
        head = _mul(self.key_head, group)
        return (flat, head) if group == 1 else (_floor_div(flat, group), _add(head, _rem(flat, group)))

    def _gather_queries(self) -> tuple[ir.Value, ir.Value]:
        """Fills the scratch of the block's queries; returns their smallest and largest position.

        Lanes beyond the last row repeat it, and are never stored to the result.
        """
        p, s = self.problem, self.schedule
        scale = _f32(self._score_scale())
        whole_squares = p.head_size % s.lanes == 0

        def lanes_of(start: ir.Value, low: ir.Value, high: ir.Value) -> list[ir.Value]:
            tokens = []
            for lane in range(s.lanes):
                row = _min(_add(start, lane), _sub(self.row_count, 1))
                token, head = self._row(row)
                tokens.append((token, head))
                position = self._position(self.query_positions, [self.batch, token])
                _put(position, self.row_positions, [_add(start, lane)])
                low, high = arith.minsi(low, position), arith.maxsi(high, position)
            if whole_squares:

                def square(d: ir.Value) -> None:
                    rows = [_load(self.query, [self.batch, t, h, d], s.lanes) for t, h in tokens]
                    for i, column in enumerate(_transposed(rows)):
                        scaled = arith.mulf(column, _splat(scale, s.lanes))
                        _store(scaled, self.columns, [_add(d, i), start])

                _loop(0, p.head_size, s.lanes, square)
            else:

                def column(d: ir.Value) -> None:
                    for lane, (token, head) in enumerate(tokens):
                        value = arith.mulf(_get(self.query, [self.batch, token, head, d]), scale)
                        _put(value, self.columns, [d, _add(start, lane)])

                _loop(0, p.head_size, 1, column)
            _store(_splat(FLOOR, s.lanes), self.maxima, [start])
            _store(_splat(0.0, s.lanes), self.sums, [start])
            return [low, high]

        def clear(row: ir.Value) -> None:
            token, head = self._row(row)
            for d in range(0, p.head_size, s.head_lanes):
                _store(_splat(0.0, s.head_lanes), self.out, [self.batch, token, head, d])

        filled = _round_up(self.row_count, s.row_vectors * s.lanes)
        low, high = _loop(0, filled, s.lanes, lanes_of, [_i32(MAX_POSITION), _i32(-1)])
        _loop(0, self.row_count, 1, clear)
        return low, high

    def _score_block(self, block: _Block, positions: ir.Value | None) -> None:
        """Leaves the block's unnormalised probabilities in scratch; updates all maxima and sums."""
        p, s = self.problem, self.schedule
        begin = _round_down(block.begin, s.key_tile)

        def row_group(row: ir.Value, vectors: int) -> None:
            at = [_add(row, v * s.lanes) for v in range(vectors)]
            old = [_load(self.maxima, [a], s.lanes) for a in at]
            queries = [_load(self.row_positions, [a], s.lanes) for a in at] if positions is not None else []

            def tile(key: ir.Value, *largest: ir.Value) -> list[ir.Value]:
                # Beyond the segment's end the last key is read again; its position in scratch is -1.
                index = [_min(_add(_add(block.start, key), i), block.last_key) for i in range(s.key_tile)]

                def products(d: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                    columns = [_load(self.columns, [d, a], s.lanes) for a in at]
                    result = []
                    for i in range(s.key_tile):
                        k = _splat(_get(block.keys, [self.batch, index[i], self.key_head, d]), s.lanes)
                        base = i * vectors
                        result += [self._fma(k, c, sums[base + v]) for v, c in enumerate(columns)]
                    return result

                zeros = [_splat(0.0, s.lanes)] * (s.key_tile * vectors)
                scores = _loop(0, p.head_size, 1, products, zeros)
                maxima = list(largest)
                for i in range(s.key_tile):
                    position = (
                        _splat(_get(positions, [_add(key, i)]), s.lanes) if positions is not None else None
                    )
                    for v in range(vectors):
                        score = scores[i * vectors + v]
                        if position is not None:
                            seen = self._visible(position, queries[v], queries[v])
                            score = arith.select(seen, score, _splat(MASKED, s.lanes))
                        maxima[v] = _larger(score, maxima[v])
                        _store(score, self.scores, [_add(key, i), at[v]])
                return maxima

            new = _loop(begin, block.end, s.key_tile, tile, old)

            def probabilities(key: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                result = []
                for v, total in enumerate(sums):
                    exponent = arith.subf(_load(self.scores, [key, at[v]], s.lanes), new[v])
                    probability = self._exp2(exponent)
                    _store(probability, self.scores, [key, at[v]])
                    result.append(arith.addf(total, probability))
                return result

            zeros = [_splat(0.0, s.lanes)] * vectors
            sums = _loop(block.begin, block.end, 1, probabilities, zeros)
            for v, a in enumerate(at):
                factor = self._exp2(arith.subf(old[v], new[v]))
                _store(new[v], self.maxima, [a])
                _store(factor, self.factors, [a])
                _store(self._fma(_load(self.sums, [a], s.lanes), factor, sums[v]), self.sums, [a])

        def row_groups() -> None:
            step = s.row_vectors * s.lanes
            _loop(0, self.row_count, step, lambda row: row_group(row, s.row_vectors))

        if s.row_vectors == 1:
            row_groups()
        else:  # few rows, of a short time or at the end of a long one
            few = _compare("sle", self.row_count, _index(s.lanes))
            _when(few, lambda: row_group(_index(0), 1), row_groups)

    def _accumulate_values(self, block: _Block) -> None:
        """Scales all outputs to the new maxima and adds the block's probabilities times its values."""
        s = self.schedule
        width = s.head_lanes * s.value_vectors

        def row_tile(row: ir.Value, rows: int) -> None:
            places = [self._row(_add(row, i)) for i in range(rows)]

            def head_part(d: ir.Value) -> None:
                at = [_add(d, v * s.head_lanes) for v in range(s.value_vectors)]
                sums = []
                for i, (token, head) in enumerate(places):
                    factor = _splat(_get(self.factors, [_add(row, i)]), s.head_lanes)
                    for a in at:
                        value = _load(self.out, [self.batch, token, head, a], s.head_lanes)
                        sums.append(arith.mulf(value, factor))

                def products(key: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                    index = [self.batch, _add(block.start, key), self.key_head]
                    loaded = [_load(block.values, [*index, a], s.head_lanes) for a in at]
                    result = []
                    for i in range(rows):
                        probability = _splat(_get(self.scores, [key, _add(row, i)]), s.head_lanes)
                        base = i * s.value_vectors
                        result += [self._fma(probability, x, sums[base + v]) for v, x in enumerate(loaded)]
                    return result

                sums = _loop(block.begin, block.end, 1, products, sums)
                for i, (token, head) in enumerate(places):
                    for v, a in enumerate(at):
                        _store(sums[i * s.value_vectors + v], self.out, [self.batch, token, head, a])

            _loop(0, self.problem.head_size, width, head_part)

        whole = _round_down(self.row_count, s.value_rows)
        _loop(0, whole, s.value_rows, lambda row: row_tile(row, s.value_rows))
        _loop(whole, self.row_count, 1, lambda row: row_tile(row, 1))

    def _normalise_rows(self) -> None:
        s = self.schedule

        def row_body(row: ir.Value) -> None:
            token, head = self._row(row)
            factor = _splat(self._inverse(_get(self.sums, [row])), s.head_lanes)
            for d in range(0, self.problem.head_size, s.head_lanes):
                at = [self.batch, token, head, d]
                _store(arith.mulf(_load(self.out, at, s.head_lanes), factor), self.out, at)

        _loop(0, self.row_count, 1, row_body)

    def _inverse(self, total: ir.Value) -> ir.Value:
        """Returns 1 / total, and 0 for the total of a query that saw no key."""
        return arith.select(_greater(total, _f32(0.0)), arith.divf(_f32(1.0), total), _f32(0.0))

    # Decode. Head numbers below count from the first head of the workgroup.

    def _decode(self) -> None:
        p, s, f32 = self.problem, self.schedule, ir.F32Type.get()
        heads = s.decode_key_heads * p.group
        (
            self.queries,  # scaled
            self.outputs,
            self.weights,  # scores of a block, then probabilities
            self.products,
            self.maxima,
            self.lane_maxima,
            self.sums,
            self.positions,
        ) = _scratch(
            [
                ([heads, p.head_size], f32),
                ([heads, p.head_size], f32),
                ([heads, DECODE_KEY_BLOCK], f32),
                ([p.group, s.lanes, s.head_lanes], f32),
                ([heads, s.lanes], f32),
                ([heads, s.lanes], f32),
                ([heads, s.lanes], f32),
                ([DECODE_KEY_BLOCK], _i32_type()),
            ]
        )
        first_head = _mul(self.key_head, p.group)
        self.query_position = self._position(self.query_positions, [self.batch, 0])

        def start(head: ir.Value) -> None:
            scale = _splat(self._score_scale(), s.head_lanes)
            for d in self._channels():
                query = _load(self.query, [self.batch, 0, _add(first_head, head), d], s.head_lanes)
                _store(arith.mulf(query, scale), self.queries, [head, d])
                _store(_splat(0.0, s.head_lanes), self.outputs, [head, d])
            _store(_splat(FLOOR, s.lanes), self.maxima, [head, 0])
            _store(_splat(FLOOR, s.lanes), self.lane_maxima, [head, 0])
            _store(_splat(0.0, s.lanes), self.sums, [head, 0])

        def visit(block: _Block) -> None:
            begin = _round_down(block.begin, s.lanes)

            def over_tiles(body: Callable[[_Block, ir.Value, ir.Value], None]) -> None:
                def tile(key: ir.Value) -> None:
                    _loop(0, s.decode_key_heads, 1, functools.partial(body, block, key))

                _loop(begin, block.end, s.lanes, tile)

            over_tiles(self._score_tile)
            _loop(0, heads, 1, functools.partial(self._weigh_block, begin, block.end))
            over_tiles(self._accumulate_tile)

        def finish(head: ir.Value) -> None:
            total = _reduced_float(arith.addf, _load(self.sums, [head, 0], s.lanes))
            factor = _splat(self._inverse(total), s.head_lanes)
            for d in self._channels():
                value = arith.mulf(_load(self.outputs, [head, d], s.head_lanes), factor)
                _store(value, self.out, [self.batch, 0, _add(first_head, head), d])

        _loop(0, heads, 1, start)
        self._visible_blocks(
            DECODE_KEY_BLOCK, self.positions, self.query_position, self.query_position, visit
        )
        _loop(0, heads, 1, finish)

    def _channels(self) -> range:
        return range(0, self.problem.head_size, self.schedule.head_lanes)

    def _score_tile(self, block: _Block, key: ir.Value, key_head: ir.Value) -> None:
        """Stores the scores of ``lanes`` keys for the query heads of one key head."""
        p, s = self.problem, self.schedule
        first_head = _mul(key_head, p.group)
        head_of_keys = _add(self.key_head, key_head)
        query = [
            [_load(self.queries, [_add(first_head, g), d], s.head_lanes) for d in self._channels()]
            for g in range(p.group)
        ]

        # A loop with its results in scratch: unrolled over the keys, LLVM's schedule spills most registers.
        def one_key(i: ir.Value) -> None:
            place = _min(_add(_add(block.start, key), i), block.last_key)
            at = [self.batch, place, head_of_keys]
            row = [_load(block.keys, [*at, d], s.head_lanes) for d in self._channels()]
            for g in range(p.group):
                total = arith.mulf(query[g][0], row[0])
                for q, k in zip(query[g][1:], row[1:], strict=True):
                    total = self._fma(q, k, total)
                _store(total, self.products, [g, i, 0])

        _loop(0, s.lanes, 1, one_key)
        position = _splat(self.query_position, s.lanes)
        seen = self._visible(_load(self.positions, [key], s.lanes), position, position)
        for g in range(p.group):
            head = _add(first_head, g)
            load = functools.partial(lambda g, i: _load(self.products, [g, i, 0], s.head_lanes), g)
            score = _lane_sums(load, s.lanes, s.head_lanes)
            score = arith.select(seen, score, _splat(MASKED, s.lanes))
            _store(score, self.weights, [head, key])
            largest = _larger(score, _load(self.lane_maxima, [head, 0], s.lanes))
            _store(largest, self.lane_maxima, [head, 0])

    def _weigh_block(self, begin: ir.Value, end: ir.Value, head: ir.Value) -> None:
        """Turns one head's scores into probabilities and scales its sum and output to the new maximum."""
        s = self.schedule
        old = _load(self.maxima, [head, 0], s.lanes)
        largest = _load(self.lane_maxima, [head, 0], s.lanes)
        new = _splat(_reduced_float(_larger, largest), s.lanes)
        factor = self._exp2(arith.subf(old, new))
        _store(new, self.maxima, [head, 0])

        def probabilities(key: ir.Value, total: ir.Value) -> list[ir.Value]:
            probability = self._exp2(arith.subf(_load(self.weights, [head, key], s.lanes), new))
            _store(probability, self.weights, [head, key])
            return [arith.addf(total, probability)]

        total = arith.mulf(_load(self.sums, [head, 0], s.lanes), factor)
        (total,) = _loop(begin, end, s.lanes, probabilities, [total])
        _store(total, self.sums, [head, 0])
        factor = _splat(vector.extract(factor, [], [0]), s.head_lanes)
        for d in self._channels():
            output = arith.mulf(_load(self.outputs, [head, d], s.head_lanes), factor)
            _store(output, self.outputs, [head, d])

    def _accumulate_tile(self, block: _Block, key: ir.Value, key_head: ir.Value) -> None:
        """Adds probabilities times values of ``lanes`` keys to the outputs of one key head's query heads."""
        p, s = self.problem, self.schedule
        first_head = _mul(key_head, p.group)
        head_of_keys = _add(self.key_head, key_head)
        channels = list(self._channels())
        group_tile = max(1, min(p.group, 16 // len(channels)))
        # A few independent sums per output hide the latency of the additions.
        keys_at_once = next(n for n in (4, 2, 1) if n * group_tile * len(channels) <= 16 or n == 1)
        end = _min(_add(key, s.lanes), _round_up(block.end, keys_at_once))
        for first in range(0, p.group, group_tile):
            heads = [_add(first_head, g) for g in range(first, min(first + group_tile, p.group))]
            outputs = [_load(self.outputs, [head, d], s.head_lanes) for head in heads for d in channels]
            extra = [_splat(0.0, s.head_lanes)] * (len(outputs) * (keys_at_once - 1))

            def products(at: ir.Value, *sums: ir.Value, heads: Sequence[ir.Value] = heads) -> list[ir.Value]:
                remaining, result = iter(sums), []
                for u in range(keys_at_once):
                    # Probabilities beyond the block's end are 0 up to a whole vector of keys.
                    place = _min(_add(_add(block.start, at), u), block.last_key)
                    row = [
                        _load(block.values, [self.batch, place, head_of_keys, d], s.head_lanes)
                        for d in channels
                    ]
                    for head in heads:
                        probability = _splat(_get(self.weights, [head, _add(at, u)]), s.head_lanes)
                        result += [self._fma(probability, x, next(remaining)) for x in row]
                return result

            sums = _loop(key, end, keys_at_once, products, [*outputs, *extra])
            for i, (head, d) in enumerate((head, d) for head in heads for d in channels):
                _store(_folded(arith.addf, sums[i :: len(outputs)]), self.outputs, [head, d])
