"""CPU kernels for ``spikingbrain.linear`` with a weight packed by column blocks.

One packed layout, ``[ceil(N / block), K, block]``, serves one row and many, so that a weight is stored once.
A block, or panel, of the weight is multiplied with register tiles of ``rows x block`` accumulators. With one
row the weight streams past them at the speed of memory; with many, the panel stays in the L2 cache.
Weights of 16 bits are made f32 as they are loaded: no arithmetic is in 16 bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith, func, memref, scf, tensor, vector

from spikingbrain.passes.kernels.bodies import widened
from spikingbrain.passes.kernels.builders import (
    LINE_BYTES,
    has_fma,
    index,
    launch,
    mul,
    multiply_add,
    root_module,
)
from spikingbrain.target import Target

PREFETCH_BYTES = 1024  # how far ahead of its use a weight is asked for when two to four rows share it
WORKGROUP_BYTES = 128 << 10  # of weight for one workgroup: takes far longer than starting it
WORKGROUP_ROWS = 1024  # 128 to 512 were slower: a panel is read from memory once per workgroup
UNROLL = 4  # steps of K in the inner loop


@dataclass(frozen=True)
class Schedule:
    """How the work is cut on a target.

    Attributes:
        lanes: values in a vector.
        vectors: vectors in a row of the register tile; they make one column block.
        rows: rows of the register tile; accumulators, a row of weights and a factor fit the registers.
        fma: whether to multiply and add in one instruction.
        streams: places at which one row reads a panel at a time.
        steps: how much of K is done at a time, so that this part of a panel is a quarter of the L2 cache.
        group_panels: panels of a workgroup (first axis of the grid).
        group_rows: rows of a workgroup (second axis of the grid).
    """

    lanes: int
    vectors: int
    rows: int
    fma: bool
    streams: int
    steps: int
    group_panels: int
    group_rows: int

    @property
    def block(self) -> int:
        return self.lanes * self.vectors

    def row_counts(self) -> list[int]:
        """Returns the heights of the tiles that together cover any number of rows, largest first."""
        return [self.rows, *(count for count in (4, 2, 1) if count < self.rows)]


def schedule(k: int, target: Target) -> Schedule:
    """Returns the schedule for ``k`` input channels on a target with vector registers.

    Six rows of four vectors ran as fast as 14 x 2 and 8 x 3 with 32 registers of 512 bits; they leave fewer
    rows over and fit an 8-way L1 cache when the rows of x are a power of two apart.
    """
    lanes = target.vector_lanes_f32
    if not lanes:
        raise ValueError(f"target {target.name!r} has no vector registers: use the portable form")
    rows, vectors = (6, 4) if target.vector_registers >= 32 else (6, 2)
    step_bytes = 4 * lanes * vectors
    passes = max(1, -(-k * step_bytes * 4 // target.tuning.l2_bytes))
    multiple = target.tuning.linear_streams * UNROLL  # of the steps that any inner loop takes at a time
    steps = -(-k // passes // multiple) * multiple
    return Schedule(
        lanes=lanes,
        vectors=vectors,
        rows=rows,
        fma=has_fma(target),
        streams=target.tuning.linear_streams,
        steps=steps,
        group_panels=max(1, WORKGROUP_BYTES // max(1, k * step_bytes)),
        group_rows=-(-WORKGROUP_ROWS // rows) * rows,
    )


def packed_block(target: Target) -> int:
    """Returns how many columns one block of a packed weight holds on ``target``."""
    return schedule(1, target).block


def emit_linear(
    x: ir.Value, weight: ir.Value, columns: int, target: Target, residual: ir.Value | None = None
) -> ir.Value:
    """Emits a launch of ``y = x @ W^T (+ residual)`` at the insertion point; returns y, ``[M, columns]``.

    ``x`` is ``[M, K]`` with M static or dynamic, ``weight`` is packed by ``packed_block(target)``, and
    ``residual`` is ``[M, columns]``, all f32; the weight may be f16 or bf16. The module gets the kernel unless it has it already.
    """
    x_type = ir.RankedTensorType(x.type)
    m, k = x_type.shape
    cut = schedule(k, target)
    panels = -(-columns // cut.block)
    stored = ir.RankedTensorType(weight.type).shape
    element = ir.RankedTensorType(weight.type).element_type
    if stored != [panels, k, cut.block]:
        raise ValueError(f"a packed weight of {columns} columns is {[panels, k, cut.block]}, got {stored}")
    rows = None if x_type.is_dynamic_dim(0) else m
    kind = "" if element == ir.F32Type.get() else f"_{element}"
    name = f"linear{kind}_k{k}_n{columns}_m{'' if rows is None else rows}{'_residual' if residual else ''}"
    module = root_module()
    if name not in ir.SymbolTable(module.operation):
        with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]):
            build_linear(name, k, columns, rows, target, residual is not None, element)

    groups = index(-(-panels // cut.group_panels))
    if rows is None:
        sizes = [tensor.DimOp(x, index(0)).result]
        chunks = arith.CeilDivUIOp(sizes[0], index(cut.group_rows)).result
    else:
        sizes, chunks = [], index(-(-rows // cut.group_rows))
    result = ir.RankedTensorType.get([m, columns], x_type.element_type)
    inputs = [x, weight, *([residual] if residual else [])]
    return launch(name, result, [groups, chunks, index(1)], inputs, sizes).result


def build_linear(
    name: str,
    k: int,
    columns: int,
    rows: int | None,
    target: Target,
    residual: bool = False,
    element: ir.Type | None = None,
) -> func.FuncOp:
    """Builds a kernel function at the insertion point; ``rows`` None means any number of them, ``element`` None a weight of f32.

    Its arguments are the workgroup ids, x ``[rows, k]``, the packed weight, the residual if any, and y
    ``[rows, columns]``. The grid is ``ceil(panels / group_panels) x ceil(rows / group_rows) x 1``.
    """
    cut = schedule(k, target)
    index_type, f32 = ir.IndexType.get(), ir.F32Type.get()
    m = ir.ShapedType.get_dynamic_size() if rows is None else rows
    panels = -(-columns // cut.block)
    x_type, y_type = ir.MemRefType.get([m, k], f32), ir.MemRefType.get([m, columns], f32)
    weight_type = ir.MemRefType.get([panels, k, cut.block], element or f32)
    types = [*[index_type] * 3, x_type, weight_type, *([y_type] if residual else []), y_type]
    function = func.FuncOp(name, (types, []), visibility="private")
    entry = function.add_entry_block()
    with ir.InsertionPoint(entry):
        group, chunk, _, x, weight, *addend, y = entry.arguments
        kernel = LinearKernel(cut, k, columns, x, weight, y, addend[0] if addend else None)
        first_panel = mul(group, cut.group_panels)
        end_panel = kernel.at_most(kernel.plus(first_panel, cut.group_panels), index(panels))
        first_row = mul(chunk, cut.group_rows)
        row_count = memref.DimOp(x, index(0)).result
        end_row = kernel.at_most(kernel.plus(first_row, cut.group_rows), row_count)
        zero, whole_k = index(0), index(k)
        with kernel.loop(first_panel, end_panel, 1) as panel:
            if rows == 1:
                kernel.tile(1, zero, panel, zero, whole_k, resume=False)
            elif cut.steps >= k:
                kernel.rows(first_row, end_row, panel, zero, whole_k, resume=False)
            else:
                with kernel.loop(zero, whole_k, cut.steps) as first_k:
                    end_k = kernel.at_most(kernel.plus(first_k, cut.steps), whole_k)
                    kernel.rows(first_row, end_row, panel, first_k, end_k, resume=True)
        func.ReturnOp([])
    return function


class LinearKernel:
    """Emits the parts of one kernel function at the insertion point.

    Who reads rows or weights from other places says so in ``row_numbers`` and ``weight_at``.
    """

    def __init__(
        self,
        cut: Schedule,
        k: int,
        columns: int,
        x: ir.Value,
        weight: ir.Value,
        y: ir.Value,
        residual: ir.Value | None,
    ) -> None:
        self.cut, self.k, self.columns = cut, k, columns
        self.x, self.weight, self.y, self.residual = x, weight, y, residual
        self.vector = ir.VectorType.get([cut.lanes], ir.F32Type.get())
        self.element = ir.MemRefType(weight.type).element_type
        zero = ir.FloatAttr.get(ir.F32Type.get(), 0.0)
        self.zero = arith.ConstantOp(self.vector, ir.DenseElementsAttr.get_splat(self.vector, zero)).result

    def plus(self, value: ir.Value, offset: int) -> ir.Value:
        return arith.AddIOp(value, index(offset)).result if offset else value

    def at_most(self, value: ir.Value, limit: ir.Value) -> ir.Value:
        return arith.MinUIOp(value, limit).result

    @contextmanager
    def loop(self, first: ir.Value, end: ir.Value, step: int) -> Iterator[ir.Value]:
        op = scf.ForOp(first, end, index(step))
        with ir.InsertionPoint(op.body):
            yield op.induction_variable
            scf.YieldOp([])

    def choose(
        self,
        condition: ir.Value,
        then: Callable[[], list[ir.Value]],
        otherwise: Callable[[], list[ir.Value]],
        results: int,
    ) -> list[ir.Value]:
        """Emits a branch, both sides of which return ``results`` vectors."""
        op = scf.IfOp(condition, [self.vector] * results, has_else=True)
        for block, emit in ((op.then_block, then), (op.else_block, otherwise)):
            with ir.InsertionPoint(block):
                scf.YieldOp(emit())
        return list(op.results)

    def rows(
        self,
        first: ir.Value,
        end: ir.Value,
        panel: ir.Value,
        first_k: ir.Value,
        end_k: ir.Value,
        resume: bool,
    ) -> None:
        """Covers rows ``first`` to ``end`` of one panel with tiles, the largest first."""
        for count in self.cut.row_counts():
            tiles = arith.DivUIOp(arith.SubIOp(end, first).result, index(count)).result
            end_whole = arith.AddIOp(first, mul(tiles, count)).result
            with self.loop(first, end_whole, count) as row:
                self.tile(count, row, panel, first_k, end_k, resume)
            first = end_whole

    def tile(
        self, count: int, row: ir.Value, panel: ir.Value, first_k: ir.Value, end_k: ir.Value, resume: bool
    ) -> None:
        """Computes ``x[:, first_k:end_k] @ W`` for ``count`` rows of one panel.

        With ``resume`` it is added to what y holds, except where ``first_k`` is 0.
        """
        rows = self.row_numbers(row, count)
        size = count * self.cut.vectors

        def fresh() -> list[ir.Value]:
            return [self.zero] * size if self.residual is None else self.load(self.residual, rows, panel)

        if resume:
            at_start = arith.CmpIOp(arith.CmpIPredicate.eq, first_k, index(0)).result
            values = self.choose(at_start, fresh, lambda: self.load(self.y, rows, panel), size)
        else:
            values = fresh()
        # A tile of few rows has accumulators to spare: it computes several runs of K side by side.
        runs = max(1, self.cut.streams // count)
        unroll = UNROLL if runs == 1 else 2
        whole = arith.DivUIOp(arith.SubIOp(end_k, first_k).result, index(runs * unroll)).result
        length = mul(whole, unroll)
        firsts = [first_k]
        for _ in range(runs - 1):
            firsts.append(arith.AddIOp(firsts[-1], length).result)
        values = values + [self.zero] * (size * (runs - 1))
        values = self.accumulate(rows, panel, firsts, length, unroll, values)
        while len(values) > size:
            half = len(values) // 2
            pairs = zip(values[:half], values[half:], strict=True)
            values = [arith.AddFOp(a, b).result for a, b in pairs]
        if self.k % (runs * unroll):
            first_rest = arith.AddIOp(firsts[-1], length).result
            rest = arith.SubIOp(end_k, first_rest).result
            values = self.accumulate(rows, panel, [first_rest], rest, 1, values)
        self.store(self.y, rows, panel, values)

    def row_numbers(self, first: ir.Value, count: int) -> list[ir.Value]:
        """Returns which rows of x and y a tile covers."""
        return [self.plus(first, r) for r in range(count)]

    def weight_at(self, panel: ir.Value, k: ir.Value, column: ir.Value) -> list[ir.Value]:
        """Returns where the weight of a panel's column for one channel is stored."""
        return [panel, k, column]

    def accumulate(
        self,
        rows: list[ir.Value],
        panel: ir.Value,
        firsts: list[ir.Value],
        length: ir.Value,
        unroll: int,
        values: list[ir.Value],
    ) -> list[ir.Value]:
        """Emits the loop over the runs of K that begin at ``firsts``; returns the accumulators after it."""
        vectors = self.cut.vectors
        offsets = [index(v * self.cut.lanes) for v in range(vectors)]
        stored = ir.VectorType.get([self.cut.lanes], self.element)
        bytes_ = 4 if self.element == ir.F32Type.get() else 2
        lines = [index(column) for column in range(0, self.cut.block, LINE_BYTES // bytes_)]
        ahead = -(-PREFETCH_BYTES // (bytes_ * self.cut.block))
        op = scf.ForOp(index(0), length, index(unroll), values)
        with ir.InsertionPoint(op.body):
            values = list(op.inner_iter_args)
            for step, (run, first) in itertools.product(range(unroll), enumerate(firsts)):
                k = arith.AddIOp(first, self.plus(op.induction_variable, step)).result
                places = [self.weight_at(panel, k, at) for at in offsets]
                weights = [widened(vector.LoadOp(stored, self.weight, place).result) for place in places]
                if 1 < len(rows) < self.cut.rows:  # many tiles find the weight in the L2 cache
                    for line in lines:
                        place = self.weight_at(panel, self.plus(k, ahead), line)
                        memref.PrefetchOp(self.weight, place, False, 3, True)
                for r, row in enumerate(rows):
                    value = memref.LoadOp(self.x, [row, k]).result
                    factor = vector.BroadcastOp(self.vector, value).result
                    for v, weight in enumerate(weights):
                        at = (run * len(rows) + r) * vectors + v
                        values[at] = multiply_add(factor, weight, values[at], self.cut.fma)
            scf.YieldOp(values)
        return list(op.results)

    def load(self, source: ir.Value, rows: list[ir.Value], panel: ir.Value) -> list[ir.Value]:
        """Returns a tile of ``[rows, columns]``, zero beyond the last column."""

        def emit(columns: int) -> list[ir.Value]:
            values = []
            for row, column, mask in self.places(rows, panel, columns):
                if mask is None:
                    values.append(self.zero)
                elif mask is True:
                    values.append(vector.LoadOp(self.vector, source, [row, column]).result)
                else:
                    masked = vector.MaskedLoadOp(self.vector, source, [row, column], mask, self.zero)
                    values.append(masked.result)
            return values

        return self.at_edge(panel, emit, len(rows) * self.cut.vectors)

    def store(self, target: ir.Value, rows: list[ir.Value], panel: ir.Value, values: list[ir.Value]) -> None:
        def emit(columns: int) -> list[ir.Value]:
            for value, (row, column, mask) in zip(values, self.places(rows, panel, columns), strict=True):
                if mask is True:
                    vector.StoreOp(value, target, [row, column])
                elif mask is not None:
                    vector.MaskedStoreOp(target, [row, column], mask, value)
            return []

        self.at_edge(panel, emit, 0)

    def at_edge(self, panel: ir.Value, emit: Callable[[int], list[ir.Value]], results: int) -> list[ir.Value]:
        """Emits code for a whole panel and, where the last one is not whole, for that one too."""
        edge = self.columns % self.cut.block
        if not edge:
            return emit(self.cut.block)
        last = index(self.columns // self.cut.block)
        is_whole = arith.CmpIOp(arith.CmpIPredicate.ult, panel, last).result
        return self.choose(is_whole, lambda: emit(self.cut.block), lambda: emit(edge), results)

    def places(
        self, rows: list[ir.Value], panel: ir.Value, columns: int
    ) -> Iterator[tuple[ir.Value, ir.Value, ir.Value | bool | None]]:
        """Yields row, column and mask of each vector of a tile; True means all lanes, None means none."""
        first = mul(panel, self.cut.block)
        mask_type = ir.VectorType.get([self.cut.lanes], ir.IntegerType.get_signless(1))
        for row in rows:
            for v in range(self.cut.vectors):
                count = columns - v * self.cut.lanes
                column = self.plus(first, v * self.cut.lanes)
                if count >= self.cut.lanes:
                    yield row, column, True
                elif count > 0:
                    yield row, column, vector.ConstantMaskOp(mask_type, [count]).result
                else:
                    yield row, column, None
