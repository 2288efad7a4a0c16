"""CPU kernel for ``spikingbrain.spike_linear``: exact sums of small integers, on packed weights.

As in the float kernel (``linear.py``), a panel of columns is multiplied with register tiles of rows; with one row the weight
streams past at the speed of memory. A sum runs over one group of channels in i32, then enters the result by its scale. What a
count has beyond a byte is in a short list for each row (``spike_encode.py``): the same weights serve it, 256 times. Rows
that the encoder marked are computed again at the end, in f64: exact there too as far as 2**53, NaN and infinity included.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith, func, math, memref, tensor, vector

from spikingbrain.passes.kernels.builders import (
    add,
    ceil_div,
    compare,
    get,
    has_fma,
    i32,
    index,
    launch,
    load,
    loop,
    minimum,
    mul,
    multiply_add,
    root_module,
    splat,
    store,
    sub,
    when,
)
from spikingbrain.passes.kernels.spike_dot import ChannelDot, Dot, sums_type
from spikingbrain.passes.kernels.spike_encode import EVENT_ROWS, Encoding, Spikes
from spikingbrain.target import Target

WORKGROUP_BYTES = 128 << 10  # of weight for one workgroup
WORKGROUP_ROWS = 1024
UNROLL = 4  # stored vectors of a column in the inner loop

_GroupSums = Callable[[list[ir.Value], ir.Value, ir.Value], list[ir.Value]]


@dataclass(frozen=True)
class Shape:
    """One projection: the counts' encoding, the columns, rows (None: any number), with a bias or without."""

    cut: Encoding
    columns: int
    rows: int | None
    bias: bool

    def name(self, dot: Dot) -> str:
        m = "" if self.rows is None else self.rows
        bias = "_bias" if self.bias else ""
        way = "events" if isinstance(dot, ChannelDot) else "linear"
        return f"spike_{way}_i{dot.bits}_k{self.cut.channels}_g{self.cut.groups}_n{self.columns}_m{m}{bias}"


def scale_recipe(dot: Dot) -> str:
    """Returns the step that packs ``[N, G]`` scales as ``[panels, G, block]``."""
    return f"pack_columns block={dot.block}"


def emit_spike_linear(
    spikes: Spikes,
    weight: ir.Value,
    scale: ir.Value,
    bias: ir.Value | None,
    dot: Dot,
    shape: Shape,
    target: Target,
) -> ir.Value:
    """Emits a launch of the kernel at the insertion point; returns y, ``[M, N]`` f32.

    ``weight`` is packed by ``dot.recipe()``, ``scale`` by ``scale_recipe``, ``bias`` is ``[N]``. The module gets the
    kernel unless it has it already.
    """
    name = shape.name(dot)
    module = root_module()
    if name not in ir.SymbolTable(module.operation):
        with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]):
            build_spike_linear(name, dot, shape, target)
    panels = -(-shape.columns // dot.block)
    groups = index(-(-panels // panels_of_workgroup(dot, shape.cut)))
    most = rows_of_workgroup(dot)
    if shape.rows is None:
        sizes = [tensor.dim(spikes.x, index(0))]
        chunks = ceil_div(sizes[0], most)
    else:
        sizes, chunks = [], index(-(-shape.rows // most))
    m = ir.ShapedType.get_dynamic_size() if shape.rows is None else shape.rows
    result = ir.RankedTensorType.get([m, shape.columns], ir.F32Type.get())
    inputs = [*spikes.values(), weight, scale, *([] if bias is None else [bias])]
    return launch(name, result, [groups, chunks, index(1)], inputs, sizes).result


def build_spike_linear(name: str, dot: Dot, shape: Shape, target: Target) -> func.FuncOp:
    """Builds the kernel function: the parts of ``Spikes``, weight, scale, bias if any, and y ``[rows, columns]``.

    The grid is groups of panels x groups of rows x 1.
    """
    m = ir.ShapedType.get_dynamic_size() if shape.rows is None else shape.rows
    cut, f32 = shape.cut, ir.F32Type.get()
    panels = -(-shape.columns // dot.block)
    stored = dot.stored_type(shape.columns, cut.channels)
    memrefs = [ir.MemRefType.get(sizes, kind) for sizes, kind in cut.types(m)]
    memrefs += [ir.MemRefType.get(stored.shape, stored.element_type)]
    memrefs += [ir.MemRefType.get([panels, cut.groups, dot.block], f32)]
    memrefs += [ir.MemRefType.get([shape.columns], f32)] * shape.bias
    memrefs += [ir.MemRefType.get([m, shape.columns], f32)]
    function = func.FuncOp(name, ([ir.IndexType.get()] * 3 + memrefs, []), visibility="private")
    entry = function.add_entry_block()
    with ir.InsertionPoint(entry):
        group, chunk, _, *buffers = entry.arguments
        spikes = Spikes(*buffers[: len(cut.types(m))])
        kernel = SpikeKernel(dot, shape, target, spikes, buffers[len(cut.types(m)) :])
        first_panel = mul(group, panels_of_workgroup(dot, shape.cut))
        end_panel = minimum(add(first_panel, panels_of_workgroup(dot, shape.cut)), panels)
        first_row = mul(chunk, rows_of_workgroup(dot))
        end_row = minimum(add(first_row, rows_of_workgroup(dot)), memref.dim(buffers[0], index(0)))
        loop(first_panel, end_panel, 1, lambda panel: kernel.panel(panel, first_row, end_row))
        func.ReturnOp([])
    return function


def panels_of_workgroup(dot: Dot, cut: Encoding) -> int:
    panel = dot.block * cut.channels * dot.bits // 8
    return max(1, WORKGROUP_BYTES // panel)


def rows_of_workgroup(dot: Dot) -> int:
    return -(-WORKGROUP_ROWS // dot.rows) * dot.rows


class SpikeKernel:
    """Emits the parts of one kernel function at the insertion point; who reads other rows says so in ``row_numbers``."""

    def __init__(
        self, dot: Dot, shape: Shape, target: Target, spikes: Spikes, buffers: list[ir.Value]
    ) -> None:
        self.dot, self.shape, self.fma, self.tuning = dot, shape, has_fma(target), target.tuning
        self.spikes = spikes
        self.weight, self.scale, *bias, self.y = buffers
        self.bias = bias[0] if bias else None
        self.sums = sums_type(dot.lanes)
        self.floats = ir.VectorType.get([dot.lanes], ir.F32Type.get())
        self.few_fire = self._few_fire() if shape.cut.events else None

    def _few_fire(self) -> ir.Value:
        """Returns whether all rows together have so few spikes that each is computed from the channels that fire."""
        rows, cut, ends = memref.dim(self.spikes.x, index(0)), self.shape.cut, self.spikes.active_ends
        (steps,) = loop(
            0,
            minimum(rows, EVENT_ROWS),
            1,
            lambda row, so_far: [arith.addi(so_far, get(ends, [row, cut.groups - 1]))],
            [i32(0)],
        )
        limit = i32(self.tuning.firing_percent * cut.channels // (100 * cut.width))
        return arith.andi(compare("ule", rows, index(EVENT_ROWS)), compare("sle", steps, limit))

    def panel(self, panel: ir.Value, first: ir.Value, end: ir.Value) -> None:
        """Computes one panel for rows ``first`` to ``end``."""
        if self.few_fire is None:
            self.dense(panel, first, end)
            return

        def events() -> None:
            for body in (self.event_row, self.again):
                loop(first, end, 1, lambda row, do=body: do(row, panel))

        when(self.few_fire, events, lambda: self.dense(panel, first, end))

    def event_row(self, row: ir.Value, panel: ir.Value) -> None:
        self.tile([row], panel, self.event_sums)

    def event_sums(self, rows: list[ir.Value], panel: ir.Value, g: ir.Value) -> list[ir.Value]:
        """Returns the sums of one group from the channels that fire."""
        dot, (row,) = self.dot, rows
        assert isinstance(dot, ChannelDot)
        to_index, ends = ir.IndexType.get(), self.spikes.active_ends
        before = arith.maxsi(sub(g, 1), index(0))
        start = arith.select(compare("eq", g, index(0)), i32(0), get(ends, [row, before]))
        low, high = (arith.index_cast(to_index, e) for e in (start, get(ends, [row, g])))

        def channels(step: ir.Value) -> list[ir.Value]:
            places = [add(mul(step, dot.width), j) for j in range(dot.width)]
            return [arith.index_cast(to_index, get(self.spikes.active, [row, place])) for place in places]

        last = sub(high, 1)

        def step(at: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            if ahead := self.tuning.event_steps_ahead:
                for channel in channels(minimum(add(at, ahead), last)):
                    dot.prefetch_channel(self.weight, panel, channel)
            counts = dot.counts_at(self.spikes.fired, row, at)
            weights = dot.gathered(self.weight, panel, channels(at))
            return [dot.multiply_add(s, w, counts) for s, (w,) in zip(sums, weights, strict=True)]

        sums = loop(low, high, 1, step, self.first_sums(rows, g))
        return sums if dot.width == 2 else self.wide_sums(rows, panel, g, sums)

    def dense(self, panel: ir.Value, first: ir.Value, end: ir.Value) -> None:
        """Computes one panel for rows ``first`` to ``end`` with tiles, the largest first."""
        if self.shape.rows == 1:
            (row,) = self.row_numbers(first, 1)
            self.tile([row], panel, self.group_sums)
            self.again(row, panel)
            return
        at = first
        for count in tile_heights(self.dot.rows):
            whole = add(at, mul(arith.divui(sub(end, at), index(count)), count))
            loop(
                at,
                whole,
                count,
                lambda row, n=count: self.tile(self.row_numbers(row, n), panel, self.group_sums),
            )
            at = whole
        loop(first, end, 1, lambda row: self.again(self.row_numbers(row, 1)[0], panel))

    def row_numbers(self, first: ir.Value, count: int) -> list[ir.Value]:
        """Returns which rows a tile covers."""
        return [add(first, r) for r in range(count)]

    def tile(self, rows: list[ir.Value], panel: ir.Value, group_sums: _GroupSums) -> None:
        """Computes some rows of one panel."""
        groups, size = self.shape.cut.groups, len(rows) * self.dot.vectors
        if groups == 1:
            sums = group_sums(rows, panel, index(0))
            totals = [arith.mulf(value, s) for value, s in self.with_scales(sums, panel, index(0))]
        else:

            def group(g: ir.Value, *totals: ir.Value) -> list[ir.Value]:
                scaled = self.with_scales(group_sums(rows, panel, g), panel, g)
                return [
                    multiply_add(value, s, total, self.fma)
                    for (value, s), total in zip(scaled, totals, strict=True)
                ]

            totals = loop(0, groups, 1, group, [splat(0.0, self.dot.lanes)] * size)
        for r, at in enumerate(rows):
            self.finish(at, panel, totals[r * self.dot.vectors : (r + 1) * self.dot.vectors])

    def with_scales(
        self, sums: list[ir.Value], panel: ir.Value, g: ir.Value
    ) -> list[tuple[ir.Value, ir.Value]]:
        """Returns each sum as a float beside the scale of its column."""
        dot = self.dot
        scales = [load(self.scale, [panel, g, v * dot.lanes], dot.lanes) for v in range(dot.vectors)]
        return [
            (arith.sitofp(self.floats, value), scale)
            for value, scale in zip(sums, itertools.cycle(scales), strict=False)
        ]

    def finish(self, row: ir.Value, panel: ir.Value, totals: list[ir.Value]) -> None:
        """Writes ``threshold * total + bias`` of one row."""
        dot, columns = self.dot, self.shape.columns
        threshold = splat(get(self.spikes.threshold, [row]), dot.lanes)
        first = mul(panel, dot.block)

        def emit(inside: int) -> None:
            for v, total in enumerate(totals):
                count = min(dot.lanes, inside - v * dot.lanes)
                if count <= 0:
                    continue
                at = add(first, v * dot.lanes)
                value = arith.mulf(total, threshold)
                if self.bias is not None:
                    value = arith.addf(value, self.load_some(self.bias, [at], count))
                self.store_some(value, self.y, [row, at], count)

        edge = columns % dot.block
        if not edge:
            emit(dot.block)
        elif columns < dot.block:
            emit(edge)
        else:
            is_whole = compare("ult", panel, index(columns // dot.block))
            when(is_whole, lambda: emit(dot.block), lambda: emit(edge))

    def load_some(self, source: ir.Value, at: list[ir.Value], count: int) -> ir.Value:
        if count == self.dot.lanes:
            return load(source, at, count)
        zeros = splat(0.0, self.dot.lanes)
        return vector.maskedload(self.floats, source, at, self.mask(count), zeros)

    def store_some(self, value: ir.Value, target: ir.Value, at: list[ir.Value], count: int) -> None:
        if count == self.dot.lanes:
            store(value, target, at)
        else:
            vector.maskedstore(target, at, self.mask(count), value)

    def mask(self, count: int) -> ir.Value:
        kind = ir.VectorType.get([self.dot.lanes], ir.IntegerType.get_signless(1))
        return vector.constant_mask(kind, [count])

    def first_sums(self, rows: list[ir.Value], g: ir.Value) -> list[ir.Value]:
        """Returns what the sums of one group start at: what takes the offset from its codes."""
        dot, values = self.dot, []
        for row in rows:
            start = i32(0)
            if dot.offset:
                start = arith.muli(get(self.spikes.sums, [row, g]), i32(-dot.offset))
            values += [splat(start, dot.lanes)] * dot.vectors
        return values

    def group_sums(self, rows: list[ir.Value], panel: ir.Value, g: ir.Value) -> list[ir.Value]:
        """Returns the sums of one group, row by row, ``vectors`` for each."""
        dot, cut = self.dot, self.shape.cut
        steps = dot.steps(cut.channels) if cut.groups == 1 else cut.channels // cut.groups // dot.width
        values = self.first_sums(rows, g)
        chunk = dot.steps_per_vector * UNROLL
        first = mul(g, steps)
        whole = steps // chunk * chunk

        def several(at: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            result = list(sums)
            for i in range(0, chunk, dot.steps_per_vector):
                result = self.stored_vector(rows, panel, add(add(first, at), i), result)
            return result

        def one(at: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            return self.stored_vector(rows, panel, add(first, at), list(sums))

        values = loop(0, whole, chunk, several, values)
        if steps > whole:
            values = loop(whole, steps, dot.steps_per_vector, one, values)
        return values if dot.width == 2 else self.wide_sums(rows, panel, g, values)

    def stored_vector(
        self, rows: list[ir.Value], panel: ir.Value, step: ir.Value, sums: list[ir.Value]
    ) -> list[ir.Value]:
        """Adds the products of one step, or of the two whose nibbles are stored together."""
        dot, sums = self.dot, list(sums)
        at = arith.divui(step, index(2)) if dot.steps_per_vector == 2 else step
        weights = dot.weights(self.weight, panel, at)
        ahead = -(-self.tuning.spike_ahead_bytes // dot.step_bytes)
        # unpacking nibbles leaves too little time: 20% slower with it
        if ahead and len(rows) == 1 and dot.bits != 4:
            dot.prefetch(self.weight, panel, add(at, ahead))
        for part, (r, row) in itertools.product(range(dot.steps_per_vector), enumerate(rows)):
            counts = dot.counts_at(self.spikes.plane, row, add(step, part))
            for v in range(dot.vectors):
                i = r * dot.vectors + v
                sums[i] = dot.multiply_add(sums[i], weights[v][part], counts)
        return sums

    def wide_sums(
        self, rows: list[ir.Value], panel: ir.Value, g: ir.Value, sums: list[ir.Value]
    ) -> list[ir.Value]:
        """Adds what the listed counts of one group have beyond a byte."""
        dot, n = self.dot, self.dot.vectors
        result: list[ir.Value] = []
        for r, row in enumerate(rows):
            ends = [get(self.spikes.ends, [row, add(g, i)]) for i in range(2)]
            ends[0] = arith.maxsi(ends[0], i32(0))  # the mark stands where the list begins
            low, high = (arith.index_cast(ir.IndexType.get(), e) for e in ends)

            def entry(i: ir.Value, *values: ir.Value, row: ir.Value = row) -> list[ir.Value]:
                step = arith.index_cast(ir.IndexType.get(), get(self.spikes.wide, [row, i, 0]))
                counts = dot.counts(get(self.spikes.wide, [row, i, 1]))
                weights = self.weights_of_step(panel, step)
                return [
                    arith.addi(value, self.shifted(dot.multiply_add(splat(0, dot.lanes), w, counts)))
                    for value, w in zip(values, weights, strict=True)
                ]

            result += loop(low, high, 1, entry, sums[r * n : (r + 1) * n])
        return result

    def shifted(self, value: ir.Value) -> ir.Value:
        return arith.shli(value, splat(8, self.dot.lanes))

    def weights_of_step(self, panel: ir.Value, step: ir.Value) -> list[ir.Value]:
        """Returns the weights of a step that is known only at run time."""
        dot = self.dot
        if dot.steps_per_vector == 1:
            return [parts[0] for parts in dot.weights(self.weight, panel, step)]
        at, odd = arith.divui(step, index(2)), compare("ne", arith.remui(step, index(2)), index(0))
        return [arith.select(odd, high, low) for low, high in dot.weights(self.weight, panel, at)]

    # Marked rows

    def again(self, row: ir.Value, panel: ir.Value) -> None:
        """Computes a marked row of one panel from x, in f64."""
        marked = compare("slt", get(self.spikes.ends, [row, 0]), i32(0))
        when(marked, lambda: self.marked_row(row, panel))

    def marked_row(self, row: ir.Value, panel: ir.Value) -> None:
        dot, cut = self.dot, self.shape.cut
        f64 = ir.F64Type.get()
        doubles = ir.VectorType.get([dot.lanes], f64)
        zero = arith.constant(doubles, ir.DenseElementsAttr.get_splat(doubles, ir.FloatAttr.get(f64, 0.0)))
        width = cut.channels // cut.groups
        threshold = get(self.spikes.threshold, [row])

        def group(g: ir.Value, *totals: ir.Value) -> list[ir.Value]:
            def channel(at: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                k = add(mul(g, width), at)
                count = math.roundeven(arith.divf(get(self.spikes.x, [row, k]), threshold))
                factor = vector.broadcast(doubles, arith.extf(f64, count))
                codes = self.codes(panel, k)
                return [
                    arith.addf(s, arith.mulf(factor, arith.sitofp(doubles, c)))
                    for s, c in zip(sums, codes, strict=True)
                ]

            sums = loop(0, width, 1, channel, [zero] * dot.vectors)
            result = []
            for v, (value, total) in enumerate(zip(sums, totals, strict=True)):
                scale = load(self.scale, [panel, g, v * dot.lanes], dot.lanes)
                result.append(multiply_add(arith.truncf(self.floats, value), scale, total, self.fma))
            return result

        totals = loop(0, cut.groups, 1, group, [splat(0.0, dot.lanes)] * dot.vectors)
        self.finish(row, panel, totals)

    def codes(self, panel: ir.Value, channel: ir.Value) -> list[ir.Value]:
        """Returns the codes of one channel as i32, a vector for each of the panel's."""
        dot = self.dot
        bits = 32 // dot.width
        step = arith.divui(channel, index(dot.width))
        part = arith.remui(channel, index(dot.width))
        # to the top of each lane, then down again with the sign; stored codes with an offset are unsigned
        up = arith.muli(sub(dot.width - 1, part), index(bits))
        shift = splat(arith.index_cast(self.sums.element_type, up), dot.lanes)
        down: Callable[..., ir.Value] = arith.shrui if dot.offset else arith.shrsi
        result = []
        for weights in self.weights_of_step(panel, step):
            lanes = arith.shli(vector.bitcast(self.sums, weights), shift)
            value = down(lanes, splat(32 - bits, dot.lanes))
            result.append(arith.subi(value, splat(dot.offset, dot.lanes)))
        return result


def tile_heights(rows: int) -> list[int]:
    """Returns the heights of the tiles that together cover any number of rows, largest first."""
    return [rows, *(count for count in (4, 2, 1) if count < rows)]
