"""CPU kernel of pointwise scans: each tensor is streamed once, whatever the body holds in between.

The space is cut into tiles of a few rows of the last axis. A tile's carried values lie in the memory of the final values, small
enough to stay in the cache next to the core; for each step the kernel walks over the tile, one or more vectors at a time.
Long rows matter: the memory of a step lies a whole space behind that of the step before, so that only what is read
within a step is fetched ahead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith, func, memref, tensor

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes.dialect_scans import PointwiseScan, dims
from spikingbrain.passes.kernels.bodies import inlined, shaped, spread
from spikingbrain.passes.kernels.builders import (
    add,
    ceil_div,
    floor_div,
    get,
    index,
    launch,
    load,
    loop,
    minimum,
    mul,
    put,
    rem,
    root_module,
    store,
    sub,
)
from spikingbrain.target import Target

# The share of the L2 cache that carried values may take. On a Zen 5 with 1 MiB, tiles of 128 KiB and more streamed as fast as
# a plain copy, tiles of 16 KiB at two thirds of that.
CACHE_SHARE = 4
SHORT_BODY, MEDIUM_BODY = 24, 64  # ops, for four and for two vectors at a time
LARGEST_TILE = 1 << 20


def has_kernel(scan: PointwiseScan) -> bool:
    """Returns whether each tensor with the last axis of the space has it last: the kernel reads along it."""
    last = scan.rank
    places = [[p for p in dims(m) if p is not None] for m in scan.maps]
    return not last or all(place[-1] == last for place in places if last in place)


def emit_pointwise_scan(scan: PointwiseScan, target: Target) -> list[ir.Value]:
    """Emits the launch of a scan's kernel, made on first use; returns the final and the stacked values.

    Any sizes, also dynamic ones; ``has_kernel`` must hold.
    """
    scan_sizes = scan.sizes()
    maps = [*scan.maps[: len(scan.op.operands)], *scan.maps[: len(scan.final)]]
    maps += scan.maps[len(scan.op.operands) :]
    groups = _groups([dims(m) for m in maps], scan.rank)
    inputs = [_as_bytes(_collapsed(v, dims(m), groups)) for v, m in zip(scan.op.operands, maps, strict=False)]
    results = [v.type for v in inputs[: len(scan.final)]]
    places = [_flat(dims(m), groups) for m in maps]
    axes: list[tuple[int, ...]] = [(0,), *groups]
    sizes = [_product([scan_sizes[d] for d in group]) for group in axes]
    for value, map_ in zip(scan.stacked, maps[len(maps) - len(scan.stacked) :], strict=True):
        flat = _collapsed_type(value.type, dims(map_), groups)
        results.append(ir.RankedTensorType.get(flat.shape, _byte_type(flat.element_type)))
    result_sizes = [
        sizes[axes.index(group)]
        for type_, place in zip(results, places[len(inputs) :], strict=True)
        for group, n in zip(place, ir.RankedTensorType(type_).shape, strict=True)
        if n == ir.ShapedType.get_dynamic_size()
    ]
    kernel = _Kernel(scan, target, axes, places, [*(v.type for v in inputs), *results])
    name = kernel.build_once()
    grid = kernel.grid(sizes)
    made = launch(name, results, grid, inputs, result_sizes, [-1] * len(results))
    return [
        _restored(new, old.type, dims(m), groups, scan_sizes)
        for new, old, m in zip(made.results, scan.op.results, maps[len(inputs) :], strict=True)
    ]


@dataclass
class _Kernel:
    """One kernel: a scan over axes that are merged as far as memory allows.

    Attributes:
        axes: time, then the merged axes of the space; each is a group of axes of the scan.
        places: for each operand and result, the groups that are its axes.
        types: the tensor types of operands and results.
    """

    scan: PointwiseScan
    target: Target
    axes: list[tuple[int, ...]]
    places: list[list[tuple[int, ...]]]
    types: list[ir.Type]

    def __post_init__(self) -> None:
        scan = self.scan
        self.time = self.axes[0]
        self.column = self.axes[-1] if len(self.axes) > 1 else None
        self.row = self.axes[-2] if len(self.axes) > 2 else None
        self.outer = self.axes[1:-2]
        self.carried, self.scanned = len(scan.initial), len(scan.scanned)
        self.operands = len(scan.op.operands)
        widths = [_width(t) for t in self.types]
        lanes = max(1, self.target.vector_bits // max(32, *widths)) if widths else 1
        while lanes > 1 and lanes > self._most_columns():
            lanes //= 2
        self.lanes = lanes
        ops = len(list(scan.body.operations))
        self.vectors = 4 if ops <= SHORT_BODY else 2 if ops <= MEDIUM_BODY else 1
        while self.vectors > 1 and self.vectors * lanes > self._most_columns():
            self.vectors //= 2
        carried_bytes = sum(widths[: self.carried]) // 8 or 1
        block = lanes * self.vectors
        wanted = min(LARGEST_TILE, self.target.tuning.l2_bytes // CACHE_SHARE // carried_bytes)
        self.tile = max(block, wanted // block * block)

    def _most_columns(self) -> int:
        """Returns how long rows are, at most."""
        found = [1] if self.column is None else [LARGEST_TILE]
        for type_, place in zip(self.types, self.places, strict=True):
            if (
                self.column in place
                and (n := ir.RankedTensorType(type_).shape[place.index(self.column)]) >= 0
            ):
                found.append(n)
        return min(found)

    def grid(self, sizes: Sequence[ir.Value]) -> list[ir.Value]:
        """Emits the numbers of workgroups: tiles of columns, blocks of rows, the product of the other axes."""
        columns = sizes[-1] if self.column else index(1)
        rows = sizes[-2] if self.row else index(1)
        return [
            ceil_div(columns, self.tile),
            floor_div(sub(add(rows, self._rows_per_tile(columns)), 1), self._rows_per_tile(columns)),
            _product(sizes[1:-2]),
        ]

    def _rows_per_tile(self, columns: ir.Value) -> ir.Value:
        fitting = floor_div(index(self.tile), arith.maxsi(columns, index(1)))
        return arith.maxsi(fitting, index(1))

    def build_once(self) -> str:
        """Returns the name of the kernel function, which is built at the head of the module if it is not there."""
        scan = self.scan
        body = str(scan.op.regions[0].blocks[0])
        text = f"{body}{self.places}{self.types}{scan.backwards}{self.carried}{self.scanned}{self.tile}{self.lanes}"
        name = f"pointwise_scan_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        module = root_module()
        if name not in ir.SymbolTable(module.operation):
            with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]):
                self._build(name)
        return name

    def _build(self, name: str) -> None:
        ranked = [ir.RankedTensorType(t) for t in self.types]
        memrefs = [ir.MemRefType.get(t.shape, t.element_type) for t in ranked]
        function = func.FuncOp(name, ([ir.IndexType.get()] * 3 + memrefs, []), visibility="private")
        with ir.InsertionPoint(function.add_entry_block()):
            x, y, z, *self.memory = function.arguments
            columns, rows = self._size(self.column), self._size(self.row)
            left = mul(x, self.tile)
            width = minimum(self.tile, sub(columns, left))
            high = self._rows_per_tile(columns)
            top = mul(y, high)
            bottom = minimum(rows, add(top, high))
            at: dict[tuple[int, ...] | None, ir.Value] = {}
            for group in reversed(self.outer):
                at[group] = rem(z, self._size(group))
                z = floor_div(z, self._size(group))

            def over_rows(body: Callable[[], None]) -> None:
                def one(row: ir.Value) -> None:
                    at[self.row] = row
                    body()

                loop(top, bottom, 1, one)

            over_rows(lambda: self._over_columns(left, width, at, self._copy_initial))
            steps = self._size(self.time)

            def step(t: ir.Value) -> None:
                backward = sub(sub(steps, 1), t) if any(self.scan.backwards) else t
                times = [backward if b else t for b in self.scan.backwards]
                over_rows(lambda: self._step(left, width, at, times))

            loop(0, steps, 1, step)
            func.ReturnOp([])

    def _size(self, group: tuple[int, ...] | None) -> ir.Value:
        if group is None:
            return index(1)
        for value, place in zip(self.memory, self.places, strict=True):
            if group in place:
                return self._dim(value, place.index(group))
        raise KeyError(group)

    def _dim(self, value: ir.Value, axis: int) -> ir.Value:
        shape = ir.MemRefType(value.type).shape
        return memref.dim(value, index(axis)) if shape[axis] < 0 else index(shape[axis])

    def _over_columns(
        self,
        left: ir.Value,
        width: ir.Value,
        at: dict[tuple[int, ...] | None, ir.Value],
        body: Callable[[dict[tuple[int, ...] | None, ir.Value], int, int], None],
    ) -> None:
        """Builds the walk over a row: blocks of vectors, single vectors, single elements.

        ``body`` gets the place of its first element, how many vectors it handles and how many lanes they have.
        """
        done: ir.Value | int = 0
        for vectors, lanes in dict.fromkeys([(self.vectors, self.lanes), (1, self.lanes), (1, 1)]):
            block = vectors * lanes
            until = mul(floor_div(width, block), block) if block > 1 else width

            def piece(column: ir.Value, vectors: int = vectors, lanes: int = lanes) -> None:
                body({**at, self.column: add(left, column)}, vectors, lanes)

            loop(done, until, block, piece)
            done = until

    def _copy_initial(self, at: dict[tuple[int, ...] | None, ir.Value], vectors: int, lanes: int) -> None:
        for u in range(vectors):
            here = self._moved(at, u * lanes)
            for i in range(self.carried):
                self._store(self._load(i, here, None, lanes), self.operands + i, here, None, lanes)

    def _step(
        self,
        left: ir.Value,
        width: ir.Value,
        at: dict[tuple[int, ...] | None, ir.Value],
        times: Sequence[ir.Value],
    ) -> None:
        """Builds one step of one row: what is the same along it is loaded once."""
        states = range(self.operands, self.operands + self.carried)  # the final values hold them meanwhile
        read = [*states, *range(self.carried, self.operands)]
        time = (
            [None] * self.carried
            + [*times[: self.scanned]]
            + [None] * (self.operands - self.carried - self.scanned)
        )
        fixed = {
            i: self._load(i, at, t, 1)
            for i, t in zip(read, time, strict=True)
            if self.column not in self.places[i] and self.column is not None
        }

        def piece(here: dict[tuple[int, ...] | None, ir.Value], vectors: int, lanes: int) -> None:
            spots = [self._moved(here, u * lanes) for u in range(vectors)]
            loaded = [
                [
                    spread(fixed[i], lanes) if i in fixed else self._load(i, spot, t, lanes)
                    for i, t in zip(read, time, strict=True)
                ]
                for spot in spots
            ]
            made = [inlined(self.scan.body, values, lanes) for values in loaded]
            for spot, values in zip(spots, made, strict=True):
                for k, value in enumerate(values):
                    when = None if k < self.carried else times[self.scanned + k - self.carried]
                    self._store(value, self.operands + k, spot, when, lanes)

        self._over_columns(left, width, at, piece)

    def _moved(
        self, at: dict[tuple[int, ...] | None, ir.Value], columns: int
    ) -> dict[tuple[int, ...] | None, ir.Value]:
        return {**at, self.column: add(at[self.column], columns)} if columns else at

    def _where(
        self, i: int, at: dict[tuple[int, ...] | None, ir.Value], time: ir.Value | None
    ) -> list[ir.Value]:
        return [time if group == self.time else at[group] for group in self.places[i]]

    def _load(
        self, i: int, at: dict[tuple[int, ...] | None, ir.Value], time: ir.Value | None, lanes: int
    ) -> ir.Value:
        where = self._where(i, at, time)
        value = get(self.memory[i], where) if lanes == 1 else load(self.memory[i], where, lanes)
        if i < self.operands:
            element = ir.RankedTensorType(self.scan.op.operands[i].type).element_type
        else:
            element = ir.RankedTensorType(self.scan.op.results[i - self.operands].type).element_type
        if _width(element) == 1:
            zero = arith.constant(ir.IntegerType.get_signless(8), 0)
            return arith.cmpi(arith.CmpIPredicate.ne, value, spread(zero, lanes))
        return value

    def _store(
        self,
        value: ir.Value,
        i: int,
        at: dict[tuple[int, ...] | None, ir.Value],
        time: ir.Value | None,
        lanes: int,
    ) -> None:
        if _width(value.type) == 1:
            value = arith.extui(shaped(ir.IntegerType.get_signless(8), lanes), value)
        where = self._where(i, at, time)
        if lanes == 1:
            put(value, self.memory[i], where)
        else:
            store(value, self.memory[i], where)


def _width(type_: ir.Type) -> int:
    """Returns the bits of an element, given the type of it or of a tensor or vector of it."""
    if isinstance(type_, ir.ShapedType):
        type_ = ir.ShapedType(type_).element_type
    return int(type_.width)


def _byte_type(element: ir.Type) -> ir.Type:
    return ir.IntegerType.get_signless(8) if _width(element) == 1 else element


def _groups(places: Sequence[list[int | None]], rank: int) -> list[tuple[int, ...]]:
    """Returns the axes of the space, neighbours joined that are neighbours in every tensor that has one of them."""
    groups: list[tuple[int, ...]] = []
    for dim in range(1, rank + 1):
        if groups and all(
            _follows(groups[-1][-1], dim, [p for p in place if p is not None]) for place in places
        ):
            groups[-1] += (dim,)
        else:
            groups.append((dim,))
    return groups


def _follows(first: int, second: int, place: Sequence[int]) -> bool:
    if first not in place and second not in place:
        return True
    return first in place and second in place and place.index(second) == place.index(first) + 1


def _flat(place: Sequence[int | None], groups: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Returns the axes of a tensor as groups."""
    of = {0: (0,), **{dim: group for group in groups for dim in group}}
    return list(dict.fromkeys(of[p] for p in place if p is not None))


def _reassociation(place: Sequence[int | None], groups: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Returns which axes of a tensor become one; those of size 1 go with a neighbour."""
    of = {0: (0,), **{dim: group for group in groups for dim in group}}
    joined: list[list[int]] = []
    current = None
    for axis, p in enumerate(place):
        group = None if p is None else of[p]
        if joined and (group is None or current is None or group == current):
            joined[-1].append(axis)
        else:
            joined.append([axis])
        current = group or current
    return joined if current is not None else []


def _collapsed(value: ir.Value, place: Sequence[int | None], groups: Sequence[tuple[int, ...]]) -> ir.Value:
    """Returns a tensor with one axis for each group."""
    joined = _reassociation(place, groups)
    if len(joined) == len(place):
        return value
    flat = _collapsed_type(value.type, place, groups)
    return tensor.CollapseShapeOp(flat, value, build.reassociation(joined)).result


def _collapsed_type(
    type_: ir.Type, place: Sequence[int | None], groups: Sequence[tuple[int, ...]]
) -> ir.RankedTensorType:
    ranked = ir.RankedTensorType(type_)
    joined = _reassociation(place, groups)
    sizes = [_joined_size([ranked.shape[axis] for axis in axes]) for axes in joined]
    return ir.RankedTensorType.get(sizes, ranked.element_type)


def _restored(
    value: ir.Value,
    type_: ir.Type,
    place: Sequence[int | None],
    groups: Sequence[tuple[int, ...]],
    sizes: Sequence[ir.Value],
) -> ir.Value:
    """Undoes ``_collapsed`` and ``_as_bytes`` on a result."""
    joined = _reassociation(place, groups)
    ranked = ir.RankedTensorType(type_)
    if ir.RankedTensorType(value.type).element_type != ranked.element_type:
        value = _converted(value, ranked.element_type, arith.trunci)
    if len(joined) == len(ranked.shape):
        return value
    dynamic = ir.ShapedType.get_dynamic_size()
    wanted = [sizes[p] for p, n in zip(place, ranked.shape, strict=True) if n == dynamic and p is not None]
    return tensor.ExpandShapeOp(ranked, value, build.reassociation(joined), wanted, list(ranked.shape)).result


def _as_bytes(value: ir.Value) -> ir.Value:
    """Returns a tensor of i8 in place of one of i1, whose memory kernels would take for packed bits."""
    ranked = ir.RankedTensorType(value.type)
    if _width(ranked) != 1:
        return value
    return _converted(value, ir.IntegerType.get_signless(8), arith.extui)


def _converted(value: ir.Value, element: ir.Type, convert: Callable[..., ir.Value]) -> ir.Value:
    ranked = ir.RankedTensorType(value.type)
    type_ = ir.RankedTensorType.get(ranked.shape, element)
    identity = ir.AffineMap.get_identity(len(ranked.shape))
    out = build.empty(type_, build.dynamic_sizes(value))
    return build.generic(
        [value], out, [identity] * 2, ["parallel"] * len(ranked.shape), lambda x, _: convert(element, x)
    )


def _joined_size(sizes: Sequence[int]) -> int:
    total = 1
    for n in sizes:
        total = ir.ShapedType.get_dynamic_size() if n < 0 or total < 0 else total * n
    return total


def _product(values: Sequence[ir.Value]) -> ir.Value:
    total: ir.Value | int = 1
    for value in values:
        total = value if isinstance(total, int) else mul(total, value)
    return index(total)
