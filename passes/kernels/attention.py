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

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from spikingbrain.errors import UnsupportedOp
from spikingbrain.target import Target
from torch_mlir import ir
from torch_mlir.dialects import arith, func, memref, scf, tensor, vector

SCRATCH_BYTES = 30 << 10  # IREE allows a dispatch 32 KB of stack unless told otherwise
ROW_LIMIT = 64  # more query rows per block gained nothing
DECODE_KEY_BLOCK = 128
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


@dataclass(frozen=True)
class _Problem:
    """The static facts of an attention op."""

    heads: int
    key_heads: int
    head_size: int
    scale: float
    window: int
    sinks: int
    segments: int

    @property
    def group(self) -> int:
        return self.heads // self.key_heads


def emit_attention_launch(op: Any, target: Target) -> ir.Operation:
    """Replaces a ``spikingbrain.attention`` op by the launch of a kernel for ``target``; returns the launch.

    The kernel function is created at the end of the module unless an equal one exists. Raises UnsupportedOp,
    with the module unchanged, when the target has no vectors or the op is of a kind that the kernels do not
    handle; ``attention_portable`` then does.
    """
    problem = _problem_of(op)
    decode = ir.RankedTensorType(op.query.type).shape[1] == 1
    schedule = plan(problem.heads, problem.key_heads, problem.head_size, target)
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
                grid = [_index(problem.key_heads), batch, _index(1)]
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


def plan(heads: int, key_heads: int, head_size: int, target: Target) -> Schedule:
    """Returns the blocking for a target; raises UnsupportedOp when the kernels cannot serve it."""
    lanes = target.vector_lanes_f32
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
    row_vectors, key_tile = (4, 4) if many else (2, 4)
    head_vectors = head_size // head_lanes
    value_vectors = next(n for n in (4, 3, 2, 1) if head_vectors % n == 0) if many else (2 - head_vectors % 2)
    key_block = 32
    step = lanes * row_vectors
    # Scratch holds the transposed queries, one block of scores, and four values per row.
    fitting = SCRATCH_BYTES // (4 * (head_size + key_block + 4)) // step * step
    if not fitting and row_vectors > 1:
        row_vectors, step = 1, lanes
        fitting = SCRATCH_BYTES // (4 * (head_size + key_block + 4)) // step * step
    if not fitting:
        raise UnsupportedOp(
            f"no attention kernel for heads of {head_size}",
            why=f"a block of queries exceeds {SCRATCH_BYTES} bytes of scratch",
            hint="the portable form",
        )
    return Schedule(
        lanes=lanes,
        head_lanes=head_lanes,
        row_vectors=row_vectors,
        key_tile=key_tile,
        rows=max(step, min(fitting, ROW_LIMIT // step * step)),
        key_block=key_block,
        value_rows=4,
        value_vectors=value_vectors,
        fused=target.arch == "aarch64" or bool(target.features & {"fma", "avx512f"}),
    )


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
        segments=1 if op.cache_keys is None else 2,
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


def _grouped_lane_sums(products: Callable[[int], list[ir.Value]], lanes: int, width: int) -> list[ir.Value]:
    """Returns vectors of ``lanes`` sums: lane i of vector g sums the ``width`` lanes of ``products(i)[g]``.

    The tree is walked depth first, so that few vectors live at a time.
    """

    def tree(first: int, stride: int, base: int) -> list[ir.Value]:
        if stride == width:
            return products(base + first)
        pairs = zip(tree(first, stride * 2, base), tree(first + stride, stride * 2, base), strict=True)
        return [arith.addf(*_shuffled_halves(a, b, stride)) for a, b in pairs]

    parts = [tree(0, 1, base) for base in range(0, lanes, width)]
    while len(parts) > 1:  # heads narrower than a vector of keys: join the pieces
        parts = [
            [
                vector.shuffle(a, b, list(range(2 * ir.VectorType(a.type).shape[0])))
                for a, b in zip(x, y, strict=True)
            ]
            for x, y in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


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
            self.key_head, self.batch, _ = self.workgroup
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
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Copies a block of key positions to scratch, -1 beyond ``count``.

        Returns the smallest position of the filled slots, the largest, and the smallest of all slots.
        """
        lanes = self.schedule.lanes
        narrow = ir.VectorType.get([lanes], _i32_type())

        def whole() -> None:
            for i in range(0, block, lanes):
                wide = _load(source, [self.batch, _add(start, i)], lanes)
                _store(arith.trunci(narrow, wide), scratch, [i])

        def part() -> None:
            for i in range(0, block, lanes):
                _store(_splat(-1, lanes), scratch, [i])
            _loop(
                0,
                count,
                1,
                lambda i: _put(self._position(source, [self.batch, _add(start, i)]), scratch, [i]),
            )

        _when(_compare("eq", count, _index(block)), whole, part)
        filled, high, every = _splat(MAX_POSITION, lanes), _splat(-1, lanes), _splat(MAX_POSITION, lanes)
        for i in range(0, block, lanes):
            position = _load(scratch, [i], lanes)
            empty = _compare("slt", position, _splat(0, lanes))
            filled = arith.minsi(filled, arith.select(empty, _splat(MAX_POSITION, lanes), position))
            high, every = arith.maxsi(high, position), arith.minsi(every, position)
        kinds = vector.CombiningKind
        reduced = [(filled, kinds.MINSI), (high, kinds.MAXSI), (every, kinds.MINSI)]
        low, top, bottom = (
            vector.reduction(_i32_type(), ir.Attribute.parse(f"#vector.kind<{kind.name.lower()}>"), v)
            for v, kind in reduced
        )
        return low, top, bottom

    def _block_visibility(
        self, keys: tuple[ir.Value, ir.Value, ir.Value], first: ir.Value, last: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Returns whether any query between two positions may see a key block, and whether all see all."""
        low, high, every = keys
        some = _compare("sle", low, last)
        whole = arith.andi(_compare("sge", every, _i32(0)), _compare("sle", high, first))
        if self.problem.window:
            window, sinks = _i32(self.problem.window), _i32(self.problem.sinks)
            reached = _compare("sgt", high, arith.subi(first, window))
            some = arith.andi(some, arith.ori(reached, _compare("slt", low, sinks)))
            kept = _compare("sgt", low, arith.subi(last, window))
            whole = arith.andi(whole, arith.ori(kept, _compare("slt", high, sinks)))
        return some, whole

    def _visible(self, query: ir.Value, key: ir.Value) -> ir.Value:
        """Returns the lanes where the key position is visible from the query position; vectors of i32."""
        lanes = ir.VectorType(key.type).shape[0]
        seen = arith.andi(_compare("sge", key, _splat(0, lanes)), _compare("sle", key, query))
        if self.problem.window:
            near = _compare("sgt", key, arith.subi(query, _splat(self.problem.window, lanes)))
            if self.problem.sinks:
                near = arith.ori(near, _compare("slt", key, _splat(self.problem.sinks, lanes)))
            seen = arith.andi(seen, near)
        return seen

    def _key_blocks(self, block: int, body: Callable[[list[ir.Value], ir.Value, ir.Value], None]) -> None:
        """Visits the key blocks of all segments: ``body(segment, start, count)``."""
        for segment in self.segments:
            size = _size(segment[0], 1)

            def visit(start: ir.Value, segment: list[ir.Value] = segment, size: ir.Value = size) -> None:
                body(segment, start, _min(_sub(size, start), block))

            _loop(0, size, block, visit)

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

        def visit(segment: list[ir.Value], start: ir.Value, count: ir.Value) -> None:
            keys, values, key_positions = segment
            extent = self._read_positions(key_positions, start, count, s.key_block, positions)
            some, whole = self._block_visibility(extent, first, last)

            def scored(masked: bool) -> None:
                self._score_block(keys, start, count, positions if masked else None)

            def attended() -> None:
                _when(whole, lambda: scored(False), lambda: scored(True))
                self._accumulate_values(values, start, count)

            _when(some, attended)

        self._key_blocks(s.key_block, visit)
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

    def _score_block(
        self, keys: ir.Value, start: ir.Value, count: ir.Value, positions: ir.Value | None
    ) -> None:
        """Leaves the block's unnormalised probabilities in scratch; updates all maxima and sums."""
        p, s = self.problem, self.schedule
        last_key = _sub(_size(keys, 1), 1)

        def row_group(row: ir.Value) -> None:
            at = [_add(row, v * s.lanes) for v in range(s.row_vectors)]
            old = [_load(self.maxima, [a], s.lanes) for a in at]
            queries = [_load(self.row_positions, [a], s.lanes) for a in at] if positions is not None else []

            def tile(key: ir.Value, *largest: ir.Value) -> list[ir.Value]:
                # Beyond the segment's end the last key is read again; its position in scratch is -1.
                index = [_min(_add(_add(start, key), i), last_key) for i in range(s.key_tile)]

                def products(d: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                    columns = [_load(self.columns, [d, a], s.lanes) for a in at]
                    result = []
                    for i in range(s.key_tile):
                        k = _splat(_get(keys, [self.batch, index[i], self.key_head, d]), s.lanes)
                        base = i * s.row_vectors
                        result += [self._fma(k, c, sums[base + v]) for v, c in enumerate(columns)]
                    return result

                zeros = [_splat(0.0, s.lanes)] * (s.key_tile * s.row_vectors)
                scores = _loop(0, p.head_size, 1, products, zeros)
                maxima = list(largest)
                for i in range(s.key_tile):
                    position = (
                        _splat(_get(positions, [_add(key, i)]), s.lanes) if positions is not None else None
                    )
                    for v in range(s.row_vectors):
                        score = scores[i * s.row_vectors + v]
                        if position is not None:
                            seen = self._visible(queries[v], position)
                            score = arith.select(seen, score, _splat(MASKED, s.lanes))
                        maxima[v] = _larger(score, maxima[v])
                        _store(score, self.scores, [_add(key, i), at[v]])
                return maxima

            new = _loop(0, _round_up(count, s.key_tile), s.key_tile, tile, old)

            def probabilities(key: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                result = []
                for v, total in enumerate(sums):
                    exponent = arith.subf(_load(self.scores, [key, at[v]], s.lanes), new[v])
                    probability = self._exp2(exponent)
                    _store(probability, self.scores, [key, at[v]])
                    result.append(arith.addf(total, probability))
                return result

            sums = _loop(0, count, 1, probabilities, [_splat(0.0, s.lanes)] * s.row_vectors)
            for v, a in enumerate(at):
                factor = self._exp2(arith.subf(old[v], new[v]))
                _store(new[v], self.maxima, [a])
                _store(factor, self.factors, [a])
                _store(self._fma(_load(self.sums, [a], s.lanes), factor, sums[v]), self.sums, [a])

        _loop(0, self.row_count, s.row_vectors * s.lanes, row_group)

    def _accumulate_values(self, values: ir.Value, start: ir.Value, count: ir.Value) -> None:
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
                    index = [self.batch, _add(start, key), self.key_head]
                    loaded = [_load(values, [*index, a], s.head_lanes) for a in at]
                    result = []
                    for i in range(rows):
                        probability = _splat(_get(self.scores, [key, _add(row, i)]), s.head_lanes)
                        base = i * s.value_vectors
                        result += [self._fma(probability, x, sums[base + v]) for v, x in enumerate(loaded)]
                    return result

                sums = _loop(0, count, 1, products, sums)
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

    # Decode

    def _decode(self) -> None:
        p, s = self.problem, self.schedule
        f32, i32 = ir.F32Type.get(), _i32_type()
        head = _mul(self.key_head, p.group)
        steps = range(0, p.head_size, s.head_lanes)
        queries, outputs, scores, sums, maxima, positions = _scratch(
            [
                ([p.group, p.head_size], f32),
                ([p.group, p.head_size], f32),
                ([p.group, DECODE_KEY_BLOCK], f32),
                ([p.group, s.lanes], f32),
                ([p.group], f32),
                ([DECODE_KEY_BLOCK], i32),
            ]
        )
        for g in range(p.group):
            for d in steps:
                query = _load(self.query, [self.batch, 0, _add(head, g), d], s.head_lanes)
                _store(arith.mulf(query, _splat(self._score_scale(), s.head_lanes)), queries, [g, d])
                _store(_splat(0.0, s.head_lanes), outputs, [g, d])
            _put(_f32(FLOOR), maxima, [g])
            _store(_splat(0.0, s.lanes), sums, [g, 0])
        query_position = self._position(self.query_positions, [self.batch, 0])

        def visit(segment: list[ir.Value], start: ir.Value, count: ir.Value) -> None:
            keys, values, key_positions = segment
            extent = self._read_positions(key_positions, start, count, DECODE_KEY_BLOCK, positions)
            some, _ = self._block_visibility(extent, query_position, query_position)
            last_key = _sub(_size(keys, 1), 1)

            def score_tile(key: ir.Value, *largest: ir.Value) -> list[ir.Value]:
                base = _add(start, key)
                index = [_min(_add(base, i), last_key) for i in range(s.lanes)]
                seen = self._visible(_splat(query_position, s.lanes), _load(positions, [key], s.lanes))
                result = []
                for tile_scores, old in zip(self._dot_products(keys, index, queries), largest, strict=True):
                    score = arith.select(seen, tile_scores, _splat(MASKED, s.lanes))
                    _store(score, scores, [len(result), key])
                    result.append(_larger(score, old))
                return result

            def attended() -> None:
                tiles = _round_up(count, s.lanes)
                old = [_get(maxima, [g]) for g in range(p.group)]
                largest = _loop(0, tiles, s.lanes, score_tile, [_splat(m, s.lanes) for m in old])
                kind = ir.Attribute.parse("#vector.kind<maxnumf>")
                new = [vector.reduction(f32, kind, m) for m in largest]
                factors = []
                for g in range(p.group):
                    change = _splat(arith.subf(old[g], new[g]), s.lanes)
                    factors.append(self._exp2(change))
                    _put(new[g], maxima, [g])

                def probabilities(key: ir.Value, *totals: ir.Value) -> list[ir.Value]:
                    result = []
                    for g, total in enumerate(totals):
                        exponent = arith.subf(_load(scores, [g, key], s.lanes), _splat(new[g], s.lanes))
                        probability = self._exp2(exponent)
                        _store(probability, scores, [g, key])
                        result.append(arith.addf(total, probability))
                    return result

                totals = [arith.mulf(_load(sums, [g, 0], s.lanes), factors[g]) for g in range(p.group)]
                totals = _loop(0, tiles, s.lanes, probabilities, totals)
                for g, total in enumerate(totals):
                    _store(total, sums, [g, 0])
                scalars = [vector.extract(f, [], [0]) for f in factors]
                self._accumulate_one(values, start, count, last_key, scores, scalars, outputs)

            _when(some, attended)

        self._key_blocks(DECODE_KEY_BLOCK, visit)
        kind = ir.Attribute.parse("#vector.kind<add>")
        for g in range(p.group):
            total = vector.reduction(f32, kind, _load(sums, [g, 0], s.lanes))
            factor = _splat(self._inverse(total), s.head_lanes)
            for d in steps:
                value = arith.mulf(_load(outputs, [g, d], s.head_lanes), factor)
                _store(value, self.out, [self.batch, 0, _add(head, g), d])

    def _dot_products(self, keys: ir.Value, index: Sequence[ir.Value], queries: ir.Value) -> list[ir.Value]:
        """Returns, for each head of the group, the products of its query with ``lanes`` keys."""
        p, s = self.problem, self.schedule
        steps = range(0, p.head_size, s.head_lanes)

        def products(key: int) -> list[ir.Value]:
            rows = [_load(keys, [self.batch, index[key], self.key_head, d], s.head_lanes) for d in steps]
            result = []
            for g in range(p.group):
                query = [_load(queries, [g, d], s.head_lanes) for d in steps]
                total = arith.mulf(query[0], rows[0])
                for q, k in zip(query[1:], rows[1:], strict=True):
                    total = self._fma(q, k, total)
                result.append(total)
            return result

        return _grouped_lane_sums(products, s.lanes, s.head_lanes)

    def _accumulate_one(
        self,
        values: ir.Value,
        start: ir.Value,
        count: ir.Value,
        last_key: ir.Value,
        scores: ir.Value,
        factors: Sequence[ir.Value],
        outputs: ir.Value,
    ) -> None:
        """Scales the outputs of the group's heads by ``factors`` and adds probabilities times values."""
        p, s = self.problem, self.schedule
        vectors = p.head_size // s.head_lanes
        group_tile = max(1, min(p.group, 16 // vectors))
        # A few independent sums per output hide the latency of the additions.
        keys_at_once = next(n for n in (4, 2, 1) if n * group_tile * vectors <= 16 or n == 1)
        at = [v * s.head_lanes for v in range(vectors)]
        for first in range(0, p.group, group_tile):
            heads = range(first, min(first + group_tile, p.group))
            sums = []
            for u in range(keys_at_once):
                for g in heads:
                    factor = _splat(factors[g], s.head_lanes)
                    for d in at:
                        old = arith.mulf(_load(outputs, [g, d], s.head_lanes), factor)
                        sums.append(_splat(0.0, s.head_lanes) if u else old)

            def products(key: ir.Value, *sums: ir.Value, heads: range = heads) -> list[ir.Value]:
                sums, result = iter(sums), []
                for u in range(keys_at_once):
                    # Probabilities beyond the count are 0 up to a whole vector of keys.
                    place = _min(_add(_add(start, key), u), last_key)
                    loaded = [_load(values, [self.batch, place, self.key_head, d], s.head_lanes) for d in at]
                    for g in heads:
                        probability = _splat(_get(scores, [g, _add(key, u)]), s.head_lanes)
                        result += [self._fma(probability, x, next(sums)) for x in loaded]
                return result

            sums = _loop(0, count, keys_at_once, products, sums)
            width = len(heads) * len(at)
            for i in range(width):
                total = sums[i]
                for u in range(1, keys_at_once):
                    total = arith.addf(total, sums[u * width + i])
                _store(total, outputs, [heads[i // len(at)], at[i % len(at)]])
