"""CPU kernel for ``spikingbrain.spike_encode``: rows of floats become rows of small integers, nothing clamped.

Where dot products take bytes, a row is the plane of its counts' low bytes, and a list of the few groups of 4 channels in which a
count needs more: their index and their high bytes, ``(count - low) / 256``. Where they take words, the plane holds whole counts.
A row that does not fit is marked, and computed from x by whoever reads it: one with NaN or infinity, with a count of more
than 16 bits, or so large in all that its products could exceed 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch_mlir import ir
from torch_mlir.dialects import arith, func, math, memref, scf, tensor, vector

from spikingbrain.passes.kernels.builders import (
    ROUNDER,
    add,
    ceil_div,
    compare,
    compressed,
    f32,
    floor_div,
    folded,
    greater,
    i32,
    i32_type,
    index,
    larger,
    launch,
    less,
    load,
    loop,
    minimum,
    mul,
    no_larger,
    put,
    reduced,
    reduced_float,
    root_module,
    round_up,
    splat,
    store,
    when,
)
from spikingbrain.passes.kernels.spike_dot import Dot

WORKGROUP_ROWS = 8
MARKED = -1
LARGEST_CHANNELS = 1 << 16  # so that sums of words fit 32 bits
BEYOND = 1 << 16  # what larger counts become, larger than any that fits
ROUNDER_BITS = 0x4B400000  # of the float ROUNDER
EVENT_ROWS = 8  # of which the channels that fire are listed: with more of them, few are silent in all
SUM_VECTORS = 4  # accumulators of the mean, to hide the latency of an addition


@dataclass(frozen=True)
class Spikes:
    """Rows of counts as kernels read them; what is not said to be else is of i32.

    Attributes:
        x: the floats, ``[M, K]`` f32.
        plane: ``[M, steps * width]``, counts as words, or their low bytes, zeros behind the channels.
        threshold: ``[M]`` f32.
        sums: ``[M, G]``, the sum of a group's counts.
        ends: ``[M, 1 + G]``: MARKED or 0, then where each group ends in the list.
        wide: ``[M, steps, 2]``, the list: step and high bytes.

    Where the weights are stored by channel, of rows up to EVENT_ROWS in all, also which channels fire:

        active: ``[R, places]``, the channels whose count is not 0, group by group, each padded to whole steps.
        fired: ``[R, places]``, their counts as in the plane.
        active_ends: ``[R, G]``, the step at which each group ends in these lists.
    """

    x: ir.Value
    plane: ir.Value
    threshold: ir.Value
    sums: ir.Value
    ends: ir.Value
    wide: ir.Value
    active: ir.Value | None = None
    fired: ir.Value | None = None
    active_ends: ir.Value | None = None

    def values(self) -> list[ir.Value]:
        events = [v for v in (self.active, self.fired, self.active_ends) if v is not None]
        return [self.x, self.plane, self.threshold, self.sums, self.ends, self.wide, *events]


@dataclass(frozen=True)
class Encoding:
    """What a kernel is made for.

    Attributes:
        channels, groups: K and G; with more than one group, each is a whole number of steps.
        lanes: floats in a vector.
        width: channels in a step, 4 (bytes) or 2 (words).
        steps: in a row.
        largest_count: magnitude of counts that fit.
        largest_sum: of the magnitudes in a row, so that products fit 32 bits.
        k, lower, upper: of the op.
        events: whether to list the channels that fire.
    """

    channels: int
    groups: int
    lanes: int
    width: int
    steps: int
    largest_count: int
    largest_sum: int
    k: float
    lower: float
    upper: float
    events: bool = False

    @property
    def part(self) -> ir.Type:
        """Returns the type of one count in the plane."""
        return ir.IntegerType.get_signless(32 // self.width)

    @property
    def name(self) -> str:
        numbers = [self.lanes, self.width, self.largest_sum, self.k, self.lower, self.upper]
        settings = "_".join(map(repr, numbers)).replace("-", "m").replace("+", "").replace(".", "p")
        events = "_events" if self.events else ""
        return f"spike_encode_k{self.channels}_g{self.groups}_{settings}{events}"

    @property
    def places(self) -> int:
        """Returns how long the lists of channels are: with what is stored behind the last one."""
        return self.channels + self.groups * (self.width - 1) + 2 * self.lanes

    def types(self, rows: int) -> list[tuple[list[int], ir.Type]]:
        """Returns shape and element of x and of each result."""
        i32s = i32_type()
        return [
            ([rows, self.channels], ir.F32Type.get()),
            ([rows, self.steps * self.width], self.part),
            ([rows], ir.F32Type.get()),
            ([rows, self.groups], i32s),
            ([rows, 1 + self.groups], i32s),
            ([rows, self.steps if self.width == 4 else 1, 2], i32s),
            *self.event_types(rows),
        ]

    def event_types(self, rows: int) -> list[tuple[list[int], ir.Type]]:
        """Returns shape and element of the lists of channels that fire, if they are made."""
        if not self.events:
            return []
        rows = rows if rows == ir.ShapedType.get_dynamic_size() else min(rows, EVENT_ROWS)
        i32s = i32_type()
        return [([rows, self.places], i32s), ([rows, self.places], self.part), ([rows, self.groups], i32s)]


def encoding(
    dot: Dot,
    channels: int,
    groups: int,
    k: float,
    lower: float,
    upper: float,
    events: bool = False,
) -> Encoding:
    """Returns the encoding that ``dot`` reads; one for all codes of up to 8 bits."""
    largest_code = 1 << (max(dot.bits, 8) - 1)
    steps = -(-channels // 8) * (8 // dot.width)  # even, as nibbles want it, whatever the codes
    return Encoding(
        channels,
        groups,
        dot.lanes,
        dot.width,
        steps,
        dot.largest_count,
        (2**31 - 1) // largest_code,
        k,
        lower,
        upper,
        events,
    )


def emit_spike_encode(x: ir.Value, cut: Encoding) -> Spikes:
    """Emits a launch of the kernel on ``[M, K]`` at the insertion point; the module gets it unless it has it already."""
    x_type = ir.RankedTensorType(x.type)
    is_dynamic = x_type.is_dynamic_dim(0)
    m = x_type.shape[0]
    name = cut.name + ("_m" if is_dynamic else f"_m{m}")
    module = root_module()
    if name not in ir.SymbolTable(module.operation):
        with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]):
            build_spike_encode(name, cut, m)
    types = [ir.RankedTensorType.get(shape, kind) for shape, kind in cut.types(m)[1:]]
    rows = tensor.dim(x, index(0)) if is_dynamic else index(m)
    lists = len(cut.event_types(m))
    sizes = [rows] * (len(types) - lists) + [minimum(rows, EVENT_ROWS)] * lists if is_dynamic else []
    grid = [ceil_div(rows, WORKGROUP_ROWS), index(1), index(1)]
    return Spikes(x, *launch(name, types, grid, [x], sizes, [-1] * len(types)).results)


def build_spike_encode(name: str, cut: Encoding, rows: int) -> func.FuncOp:
    """Builds the kernel function: x, then the results in the order of ``Spikes``; some rows for each workgroup."""
    memrefs = [ir.MemRefType.get(shape, kind) for shape, kind in cut.types(rows)]
    function = func.FuncOp(name, ([ir.IndexType.get()] * 3 + memrefs, []), visibility="private")
    entry = function.add_entry_block()
    with ir.InsertionPoint(entry):
        group, _, _, *buffers = entry.arguments
        first = mul(group, WORKGROUP_ROWS)
        end = minimum(add(first, WORKGROUP_ROWS), memref.dim(buffers[0], index(0)))
        kernel = _Kernel(cut, Spikes(*buffers))
        loop(first, end, 1, kernel.row)
        if cut.events:
            few = compare("ule", memref.dim(buffers[0], index(0)), index(EVENT_ROWS))
            when(few, lambda: kernel.list_events(first, end))
        func.ReturnOp([])
    return function


class _Kernel:
    def __init__(self, cut: Encoding, to: Spikes) -> None:
        self.cut, self.to = cut, to
        self.floats = ir.VectorType.get([cut.lanes], ir.F32Type.get())
        self.integers = ir.VectorType.get([cut.lanes], i32_type())
        self.zeros = splat(0.0, cut.lanes)
        parts = ir.VectorType.get([cut.lanes], cut.part)
        self.nothing = arith.constant(
            parts, ir.DenseElementsAttr.get_splat(parts, ir.IntegerAttr.get(cut.part, 0))
        )

    def row(self, row: ir.Value) -> None:
        cut, to = self.cut, self.to
        threshold = self.threshold(row)
        put(threshold, to.threshold, [row])
        width = cut.channels // cut.groups
        by = splat(threshold, cut.lanes)

        def group(g: ir.Value, *carried: ir.Value) -> list[ir.Value]:
            return self.group(row, g, width, by, list(carried))

        none, zero = i32(0), splat(0, cut.lanes)
        largest, total, _ = loop(0, cut.groups, 1, group, [zero, zero, none])
        fits = folded(
            arith.andi,
            [
                compare("sle", reduced("maxsi", largest), i32(cut.largest_count)),
                compare("ule", reduced("add", total), i32(cut.largest_sum)),
                no_larger(threshold, threshold),  # not NaN
            ],
        )
        put(arith.select(fits, none, i32(MARKED)), to.ends, [row, 0])
        for at in range(cut.channels, cut.steps * cut.width):
            put(arith.constant(cut.part, 0), to.plane, [row, at])

    def threshold(self, row: ir.Value) -> ir.Value:
        cut, f64 = self.cut, ir.F64Type.get()
        kind = ir.VectorType.get([cut.lanes], f64)
        zero = arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, ir.FloatAttr.get(f64, 0.0)))

        def added(at: ir.Value, total: ir.Value, count: int | None = None) -> ir.Value:
            return arith.addf(total, arith.extf(kind, math.absf(self.x(row, at, count))))

        def several(at: ir.Value, *totals: ir.Value) -> list[ir.Value]:
            return [added(add(at, i * cut.lanes), t) for i, t in enumerate(totals)]

        chunk = SUM_VECTORS * cut.lanes
        whole, vectors = cut.channels // chunk * chunk, cut.channels // cut.lanes * cut.lanes
        totals = loop(0, whole, chunk, several, [zero] * SUM_VECTORS)
        (total,) = loop(whole, vectors, cut.lanes, lambda at, t: [added(at, t)], [folded(arith.addf, totals)])
        if cut.channels > vectors:
            total = added(index(vectors), total, cut.channels - vectors)
        mean = arith.divf(reduced_float(arith.addf, total), arith.constant(f64, float(cut.channels)))
        value = arith.divf(arith.truncf(ir.F32Type.get(), mean), f32(cut.k))
        lower, upper = f32(cut.lower), f32(cut.upper)
        value = arith.select(less(value, lower), lower, value)  # NaN stays
        return arith.select(greater(value, upper), upper, value)

    def group(
        self, row: ir.Value, g: ir.Value, width: int, by: ir.Value, carried: list[ir.Value]
    ) -> list[ir.Value]:
        """Writes the counts of one group; carries the largest, the sum of magnitudes and the list's end."""
        cut, to = self.cut, self.to
        first = mul(g, width)
        whole = width // cut.lanes * cut.lanes

        def vector_of(at: ir.Value, *state: ir.Value, count: int | None = None) -> list[ir.Value]:
            largest, total, end, total_signed = state
            counts = self.rounded(arith.divf(self.x(row, add(first, at), count), by))
            magnitudes = math.absi(counts)
            end = self.write(row, add(first, at), counts, end, count)
            return [
                arith.maxsi(largest, magnitudes),
                arith.addi(total, magnitudes),
                end,
                arith.addi(total_signed, counts),
            ]

        state = [*carried, splat(0, cut.lanes)]
        state = loop(0, whole, cut.lanes, vector_of, state)
        if whole < width:
            state = vector_of(index(whole), *state, count=width - whole)
        *carried, total_signed = state
        put(reduced("add", total_signed), to.sums, [row, g])
        put(carried[2], to.ends, [row, add(g, 1)])
        return carried

    def rounded(self, values: ir.Value) -> ir.Value:
        """Returns the nearest integers, of two the even one; BEYOND for what is larger, something for NaN.

        Added to ROUNDER, the integer stands in the low bits. (IREE expands ``math.roundeven`` into thirty instructions.)
        """
        lanes = self.cut.lanes
        low, high = splat(-float(BEYOND), lanes), splat(float(BEYOND), lanes)
        values = larger(values, low)
        values = arith.select(less(values, high), values, high)
        bits = arith.bitcast(self.integers, arith.addf(values, splat(ROUNDER, lanes)))
        return arith.subi(bits, splat(ROUNDER_BITS, lanes))

    def x(self, row: ir.Value, at: ir.Value, count: int | None = None) -> ir.Value:
        """Returns floats of x, the first ``count`` of a vector or all; zeros behind them."""
        if count is None:
            return load(self.to.x, [row, at], self.cut.lanes)
        return vector.maskedload(self.floats, self.to.x, [row, at], self.mask(count), self.zeros)

    def mask(self, count: int) -> ir.Value:
        kind = ir.VectorType.get([self.cut.lanes], ir.IntegerType.get_signless(1))
        return vector.constant_mask(kind, [count])

    def write(
        self, row: ir.Value, at: ir.Value, counts: ir.Value, end: ir.Value, count: int | None
    ) -> ir.Value:
        """Writes the counts of some channels to the plane, and what does not fit to the list; returns its end."""
        cut, to = self.cut, self.to
        low = arith.trunci(ir.VectorType.get([cut.lanes], cut.part), counts)
        if count is None:
            store(low, to.plane, [row, at])
        else:
            vector.maskedstore(to.plane, [row, at], self.mask(count), low)
        if cut.width == 2:
            return end
        high = arith.shrsi(arith.addi(counts, splat(128, cut.lanes)), splat(8, cut.lanes))
        wide = arith.cmpi(arith.CmpIPredicate.ne, high, splat(0, cut.lanes))

        def listed() -> list[ir.Value]:
            last, step = end, arith.divui(at, index(cut.width))
            packed = self.packed(high)
            for i in range(cut.lanes // cut.width if count is None else -(-count // cut.width)):
                bytes_ = vector.extract(packed, [], [i])
                place = [row, arith.index_cast(ir.IndexType.get(), last)]
                put(arith.index_cast(i32_type(), add(step, i)), to.wide, [*place, 0])
                put(bytes_, to.wide, [*place, 1])
                last = arith.addi(last, arith.extui(i32_type(), compare("ne", bytes_, i32(0))))
            return [last]

        return _if(reduced("or", wide), listed, [end])[0]

    def list_events(self, first: ir.Value, end: ir.Value) -> None:
        loop(first, end, 1, self.events)

    def events(self, row: ir.Value) -> None:
        """Lists the channels of a row that fire. A count whose low byte is 0 has all of it in the list of high bytes."""
        cut, to = self.cut, self.to
        assert to.active is not None and to.fired is not None and to.active_ends is not None
        width = cut.channels // cut.groups
        whole = width // cut.lanes * cut.lanes

        def group(g: ir.Value, end: ir.Value) -> list[ir.Value]:
            first = mul(g, width)

            def vector_of(at: ir.Value, end: ir.Value, count: int | None = None) -> list[ir.Value]:
                return [self.append(row, add(first, at), end, count)]

            (end,) = loop(0, whole, cut.lanes, vector_of, [end])
            if whole < width:
                (end,) = vector_of(index(whole), end, width - whole)
            store(splat(arith.index_cast(i32_type(), first), cut.lanes), to.active, [row, end])
            store(self.nothing, to.fired, [row, end])
            end = round_up(end, cut.width)
            steps = floor_div(end, cut.width)
            put(arith.index_cast(i32_type(), steps), to.active_ends, [row, g])
            return [end]

        loop(0, cut.groups, 1, group, [index(0)])

    def append(self, row: ir.Value, at: ir.Value, end: ir.Value, count: int | None) -> ir.Value:
        """Appends those of a vector's channels that fire to the lists; returns their end."""
        cut, to = self.cut, self.to
        assert to.active is not None and to.fired is not None
        kind = self.nothing.type
        if count is None:
            parts = load(to.plane, [row, at], cut.lanes)
        else:
            parts = vector.maskedload(kind, to.plane, [row, at], self.mask(count), self.nothing)
        fires = arith.cmpi(arith.CmpIPredicate.ne, parts, self.nothing)
        lanes = np.arange(cut.lanes, dtype=np.int32)
        each = arith.constant(self.integers, ir.DenseElementsAttr.get(lanes, type=self.integers))
        channels = arith.addi(splat(arith.index_cast(i32_type(), at), cut.lanes), each)
        store(compressed(channels, fires), to.active, [row, end])
        counts = compressed(arith.extsi(self.integers, parts), fires)
        store(arith.trunci(kind, counts), to.fired, [row, end])
        bits = ir.IntegerType.get_signless(cut.lanes)
        mask = vector.extract(vector.bitcast(ir.VectorType.get([1], bits), fires), [], [0])
        number = math.ctpop(arith.extui(i32_type(), mask))
        return add(end, arith.index_cast(ir.IndexType.get(), number))

    def packed(self, counts: ir.Value) -> ir.Value:
        """Returns the low parts of counts, ``width`` of them in each i32."""
        cut = self.cut
        steps = ir.VectorType.get([cut.lanes // cut.width], i32_type())
        return vector.bitcast(steps, arith.trunci(ir.VectorType.get([cut.lanes], cut.part), counts))


def _if(condition: ir.Value, then: Callable[[], list[ir.Value]], otherwise: list[ir.Value]) -> list[ir.Value]:
    """Emits a branch with results; without the condition they are ``otherwise``."""
    branch = scf.IfOp(condition, [v.type for v in otherwise], has_else=True)
    for block, emit in ((branch.then_block, then), (branch.else_block, lambda: otherwise)):
        with ir.InsertionPoint(block):
            scf.YieldOp(emit())
    return list(branch.results)
