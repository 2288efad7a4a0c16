"""CPU kernel that sorts rows by the expert that they are sent to: a counting sort, which all products of one routing share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith, func, memref, tensor

from spikingbrain.passes.kernels.builders import (
    add,
    ceil_div,
    compare,
    get,
    i32,
    i32_type,
    index,
    launch,
    loop,
    minimum,
    mul,
    put,
    root_module,
    size,
    when,
)

FEW_ROWS = 8  # not worth sorting: the experts of one token, which are different ones
EXPERT, FIRST, END = range(3)  # the columns of ``Groups.groups``


@dataclass(frozen=True)
class Groups:
    """Rows by their experts, all i32.

    Attributes:
        order: ``[R]``, the rows, those of one expert beside each other and in their order.
        groups: ``[min(R, N + 1), 3]``, for each expert that has rows, by its number, itself and where its rows begin and end
            in ``order``; N is the expert of rows that are sent to none that there is. Unused ones are zeros.
    """

    order: ir.Value
    groups: ir.Value

    def values(self) -> list[ir.Value]:
        return [self.order, self.groups]


Routings = dict[tuple[ir.Value, int], Groups]  # by the experts and their number


def group_types(experts: int, rows: int | None) -> list[tuple[list[int], ir.Type]]:
    """Returns shape and element of each of ``Groups``; ``rows`` None means any number of them."""
    dynamic = ir.ShapedType.get_dynamic_size()
    m, most = (dynamic, dynamic) if rows is None else (rows, min(rows, experts + 1))
    return [([m], i32_type()), ([most, 3], i32_type())]


def emit_group_rows(expert: ir.Value, experts: int) -> Groups:
    """Emits a launch of the kernel on ``[R]`` i64 at the insertion point; the module gets it unless it has it already."""
    type_ = ir.RankedTensorType(expert.type)
    rows = None if type_.is_dynamic_dim(0) else type_.shape[0]
    name = f"group_rows_n{experts}_m{'' if rows is None else rows}"
    module = root_module()
    if name not in ir.SymbolTable(module.operation):
        with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]):
            build_group_rows(name, experts, rows)
    sizes = []
    if rows is None:
        count = tensor.dim(expert, index(0))
        sizes = [count, minimum(count, experts + 1)]
    types = [ir.RankedTensorType.get(shape, kind) for shape, kind in group_types(experts, rows)]
    types.append(ir.RankedTensorType.get([experts + 2], i32_type()))  # the kernel's own
    grid = [index(1)] * 3
    order, groups, _ = launch(name, types, grid, [expert], sizes, [-1] * len(types)).results
    return Groups(order, groups)


def build_group_rows(name: str, experts: int, rows: int | None) -> func.FuncOp:
    """Builds the kernel function: experts, the results in the order of ``Groups``, and ``[N + 2]`` for its counts."""
    i64 = ir.IntegerType.get_signless(64)
    m = ir.ShapedType.get_dynamic_size() if rows is None else rows
    memrefs = [ir.MemRefType.get([m], i64)]
    memrefs += [ir.MemRefType.get(shape, kind) for shape, kind in group_types(experts, rows)]
    memrefs += [ir.MemRefType.get([experts + 2], i32_type())]
    function = func.FuncOp(name, ([ir.IndexType.get()] * 3 + memrefs, []), visibility="private")
    entry = function.add_entry_block()
    with ir.InsertionPoint(entry):
        _, _, _, expert, order, groups, starts = entry.arguments
        count, most = memref.dim(expert, index(0)), memref.dim(groups, index(0))

        def counted(row: ir.Value) -> None:
            at = add(known_expert(get(expert, [row]), experts), 1)
            put(arith.addi(get(starts, [at]), i32(1)), starts, [at])

        def started(e: ir.Value, used: ir.Value, first: ir.Value) -> list[ir.Value]:
            end = arith.addi(first, get(starts, [add(e, 1)]))
            put(end, starts, [add(e, 1)])
            has_rows = compare("slt", first, end)

            def listed() -> None:
                for column, value in ((EXPERT, arith.index_cast(i32_type(), e)), (FIRST, first), (END, end)):
                    put(value, groups, [used, column])

            when(has_rows, listed)
            return [arith.select(has_rows, add(used, 1), used), end]

        def unused(at: ir.Value) -> None:
            for column in (EXPERT, FIRST, END):
                put(i32(0), groups, [at, column])

        def placed(row: ir.Value) -> None:
            e = known_expert(get(expert, [row]), experts)
            at = get(starts, [e])
            put(arith.index_cast(i32_type(), row), order, [arith.index_cast(ir.IndexType.get(), at)])
            put(arith.addi(at, i32(1)), starts, [e])

        loop(0, experts + 2, 1, lambda at: put(i32(0), starts, [at]))
        loop(0, count, 1, counted)
        used, _ = loop(0, experts + 1, 1, started, [index(0), i32(0)])
        loop(used, most, 1, unused)
        loop(0, count, 1, placed)
        func.ReturnOp([])
    return function


@dataclass(frozen=True)
class Routing:
    """How the workgroups of a kernel find their rows: sorted by expert, or, if they are few, each its own.

    ``rows`` None means any number of them.
    """

    experts: int
    rows: int | None

    @property
    def has_few_rows(self) -> bool:
        return self.rows is not None and self.rows <= FEW_ROWS

    def types(self) -> list[ir.Type]:
        """Returns the types of what a kernel takes for it: experts ``[R]``, or the parts of ``Groups``."""
        if self.has_few_rows:
            return [ir.MemRefType.get([self.rows], ir.IntegerType.get_signless(64))]
        return [ir.MemRefType.get(shape, kind) for shape, kind in group_types(self.experts, self.rows)]

    def emit(self, expert: ir.Value, most: int, known: Routings) -> tuple[list[ir.Value], list[ir.Value]]:
        """Returns what a kernel takes, and its grid behind the first axis; a workgroup takes ``most`` rows of an expert.

        Rows that are sorted already are in ``known``, which serves one block of operations.
        """
        if self.has_few_rows:
            return [expert], [index(self.rows), index(1)]
        key = (expert, self.experts)
        if key not in known:
            known[key] = emit_group_rows(expert, self.experts)
        return known[key].values(), [size(known[key].groups, 0), ceil_div(size(expert, 0), most)]

    def place(self, taken: list[ir.Value], y: ir.Value, workgroup: list[ir.Value], most: int) -> Place:
        """Returns where one workgroup works, inside a kernel that takes ``taken`` and writes y."""
        at, chunk = workgroup
        if self.has_few_rows:
            return Place(
                known_expert(get(taken[0], [at]), self.experts), self.experts, at, add(at, 1), None, y
            )
        order, groups = taken
        expert, first, end = (
            arith.index_cast(ir.IndexType.get(), get(groups, [at, column])) for column in (EXPERT, FIRST, END)
        )
        first = minimum(add(first, mul(chunk, most)), end)
        return Place(expert, self.experts, first, minimum(add(first, most), end), order, y)


@dataclass(frozen=True)
class Place:
    """The rows ``first`` to ``end`` of ``order`` (None: in their own order), which go to one of ``experts`` or to none."""

    expert: ir.Value
    experts: int
    first: ir.Value
    end: ir.Value
    order: ir.Value | None
    y: ir.Value

    def rows(self, first: ir.Value, count: int) -> list[ir.Value]:
        """Returns the numbers of some rows."""
        rows = [add(first, r) for r in range(count)]
        if self.order is None:
            return rows
        return [arith.index_cast(ir.IndexType.get(), get(self.order, [row])) for row in rows]

    def fill(self, low: ir.Value, high: ir.Value, body: Callable[[], None]) -> None:
        """Runs ``body``, which computes columns ``low`` to ``high``; without an expert these are NaN."""
        f32 = ir.F32Type.get()
        nan = arith.constant(f32, math.nan)

        def row(at: ir.Value) -> None:
            (number,) = self.rows(at, 1)
            loop(low, high, 1, lambda column: put(nan, self.y, [number, column]))

        def rows() -> None:
            loop(self.first, self.end, 1, row)

        exists = compare("ult", self.expert, index(self.experts))
        when(exists, body, rows)


def known_expert(expert: ir.Value, experts: int) -> ir.Value:
    """Returns an expert's number as an index: from the end where it is negative, ``experts`` where there is no such one."""
    i64 = expert.type
    zero, total = arith.constant(i64, 0), arith.constant(i64, experts)
    expert = arith.select(compare("slt", expert, zero), arith.addi(expert, total), expert)
    # not one unsigned comparison, which becomes arith.minui: MACA C++ has no form for it
    exists = arith.andi(compare("sge", expert, zero), compare("slt", expert, total))
    expert = arith.select(exists, expert, total)
    return arith.index_cast(ir.IndexType.get(), expert)
