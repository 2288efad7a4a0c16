"""Rows that a kernel computes from other tensors as it reads them: a norm, a gate, a slice of a joint projection.

To compute a row where it is read saves a launch and its way through memory; every block that reads it computes it again. Which
rows are computed so, and how many, is up to the kernel.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir
from spikingbrain.passes.elementwise import (
    VIEWS,
    Applied,
    Element,
    Expressions,
    Linear,
    Node,
    elements,
    emit,
    node_text,
    walk,
)
from spikingbrain.passes.kernels.builders import (
    Index,
    add,
    compare,
    floor_div,
    get,
    index,
    loop,
    put,
    rem,
    when,
)
from spikingbrain.passes.scan_axes import GENERIC
from spikingbrain.passes.wave_kernels.builders import WAVE, barrier, over_lanes, shared, thread, zero

MOST_OPS = 64  # in one body: its values are to fit the registers
_COSTLY = ("arith.divf", "math.")
_COSTLY_OPS = 10  # instructions of one of those, about


@dataclass(frozen=True)
class Read:
    """An element that a row is computed from: ``sources[source][row or 0, channel]``, or the same channel for all."""

    element: Element
    source: int
    by_row: bool
    by_channel: bool
    first: int  # channel of channel 0


@dataclass(frozen=True)
class RowValues:
    """Rows ``[M, K]`` as scalar ops: what is at a channel of a row, and the sums over the row that this takes, in order.

    Attributes:
        channels: K.
        type: of an element.
        sources: the tensors that it is computed from, ``[M, any]``, or ``[1, any]`` of what all rows share.
    """

    node: Node
    sums: list[Applied]
    channels: int
    type: ir.Type
    sources: list[ir.Value]
    reads: list[Read]

    @property
    def cost(self) -> int:
        """Returns about how many instructions an element takes, those of the sums included."""
        inside = {id(n): n for tree in [self.node, *self.sums] for n in walk(tree) if isinstance(n, Applied)}
        names = [o.operation.name for n in inside.values() for o in n.op.regions[0].blocks[0].operations]
        return sum(_COSTLY_OPS if name.startswith(_COSTLY) else 1 for name in names)

    @property
    def source_of_rows(self) -> int:
        """Returns the number of a source that has M rows, where M is not known."""
        return next(read.source for read in self.reads if read.by_row)

    def facts(self) -> str:
        """Returns a text that differs where kernels differ."""
        known = {(r.element.value, r.element.place): n for n, r in enumerate(self.reads)}
        places = [(r.source, r.by_row, r.by_channel, r.first) for r in self.reads]
        shapes = [str(source.type) for source in self.sources]
        return f"{[node_text(n, known) for n in [*self.sums, self.node]]} {places} {shapes}"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.facts().encode()).hexdigest()[:10]

    def at(
        self, buffers: Sequence[ir.Value], row: Index, channel: ir.Value, sums: Sequence[ir.Value]
    ) -> ir.Value:
        """Emits the value at a place."""
        return self._emit(self.node, buffers, row, channel, sums)

    def _emit(
        self, node: Node, buffers: Sequence[ir.Value], row: Index, channel: ir.Value, sums: Sequence[ir.Value]
    ) -> ir.Value:
        wanted = {(e.value, e.place) for e in elements(node)}
        values = {}
        for read in self.reads:
            key = (read.element.value, read.element.place)
            if key in wanted:
                at = add(channel, read.first) if read.by_channel else index(read.first)
                values[key] = get(buffers[read.source], [row if read.by_row else index(0), at])
        return emit(node, [sums[0] if sums else zero(self.type), *sums], values)

    def row_sums(
        self, buffers: Sequence[ir.Value], first: Index, rows: Index, most: int, threads: int
    ) -> Callable[[Index], list[ir.Value]]:
        """Emits the sums of up to ``most`` rows by a block of so many threads; returns what gives those of row i of them.

        Partial sums of waves go through shared memory, and are added in the order of the waves.
        """
        waves, me = threads // WAVE, thread()
        cells: list[ir.Value] = []

        def of_row(i: Index) -> list[ir.Value]:
            found = []
            for parts in cells:
                total = get(parts, [i, 0])
                for wave in range(1, waves):
                    total = arith.addf(total, get(parts, [i, wave]))
                found.append(total)
            return found

        for tree in self.sums:
            parts = shared([most, waves], ir.F32Type.get())

            def one(i: ir.Value, tree: Applied = tree, parts: ir.Value = parts) -> None:
                known = of_row(i)

                def more(channel: ir.Value, total: ir.Value) -> list[ir.Value]:
                    return [arith.addf(total, self._emit(tree, buffers, add(first, i), channel, known))]

                (total,) = loop(me, self.channels, threads, more, [zero(ir.F32Type.get())])
                total = over_lanes(arith.addf, total)
                is_first = compare("eq", rem(me, WAVE), index(0))
                when(is_first, lambda: put(total, parts, [i, floor_div(me, WAVE)]))

            loop(0, rows, 1, one)
            barrier()
            cells.append(parts)
        return of_row


def find(x: ir.Value, readers: Sequence[ir.Operation]) -> RowValues | None:
    """Returns how rows ``x``, ``[..., K]``, are computed from what other ops need too; None where nothing can be saved.

    Nothing but ``readers`` may read them. What is between is elementwise or a sum over a row in f32, and each row depends on that
    row of other tensors only.
    """
    shape = list(ir.RankedTensorType(x.type).shape)
    inside = _inside(x, readers)
    if shape[-1] < 0:
        return None
    reductions = [op for op in inside if "reduction" in str(op.attributes["iterator_types"])]
    given = Expressions(shape, inside, after_given=reductions)
    node = given.at(x, given.here())
    sums = [tree for _, tree in given.sums]
    is_slice = isinstance(node, Element) and ir.RankedTensorType(node.value.type).shape[-1] != shape[-1]
    if node is None or not (isinstance(node, Applied) or is_slice):
        return None
    if any(str(ir.RankedTensorType(s.op.results[0].type).element_type) != "f32" for s in sums):
        return None
    sources: dict[ir.Value, int] = {}
    reads: dict[tuple[ir.Value, tuple[Linear, ...]], Read] = {}
    for element in itertools.chain.from_iterable(elements(tree) for tree in [*sums, node]):
        number = sources.setdefault(element.value, len(sources))
        read = _read(element, shape, number)
        if read is None:
            return None
        reads.setdefault((element.value, element.place), read)
    if any(n < 0 for n in shape[:-1]) and not any(read.by_row for read in reads.values()):
        return None
    type_ = ir.RankedTensorType(x.type).element_type
    found = RowValues(node, sums, shape[-1], type_, list(sources), list(reads.values()))
    return found if found.cost <= MOST_OPS else None


def flat_sources(values: RowValues) -> list[ir.Value]:
    """Emits the sources as ``[rows, any]`` at the insertion point."""
    return [build.flatten_leading(source) for source in values.sources]


def _inside(x: ir.Value, readers: Sequence[ir.Operation]) -> list[ir.Operation]:
    """Returns the linalg ops that make x, and that nothing reads but x and each other."""
    block = readers[0].block
    order = {o.operation: i for i, o in enumerate(block.operations)}
    found = set(readers)

    def makers(values: Sequence[ir.Value]) -> set[ir.Operation]:
        made = [torch_ir.defining(v) for v in values]
        return {m for m in made if m and m in order and (m.name == GENERIC or m.name in VIEWS)}

    waiting = makers([x])
    while waiting:  # an op's users come behind it, and are decided by then
        op = max(waiting, key=order.__getitem__)
        waiting.remove(op)
        users = [
            u.owner.operation for r in op.results for u in r.uses if u.owner.operation.name != "tensor.dim"
        ]
        if all(user in found for user in users):
            found.add(op)
            waiting |= makers(list(op.operands))
    return [op for op in found if op.name == GENERIC]


def _read(element: Element, shape: Sequence[int], source: int) -> Read | None:
    """Returns where an element lies in the rows of its tensor; None where it is in another row."""
    of = list(ir.RankedTensorType(element.value.type).shape)
    if not of:
        return None
    *outer, last = element.place
    long = [axis for axis, n in enumerate(shape[:-1]) if n != 1]

    def leading(form: Linear) -> tuple[int, ...]:
        return tuple(form.factors[axis] for axis in long)

    if any(leading(last)) or last.factors[-1] not in (0, 1) or any(form.factors[-1] for form in outer):
        return None
    by_channel = last.factors[-1] == 1
    if all(n == 1 for n in of[:-1]):
        if any(any(leading(form)) for form in outer) and long:
            return None
        return Read(element, source, False, by_channel, last.constant)
    here = Expressions(shape).here()[:-1]
    axes = [(form, n) for form, n in zip(outer, of[:-1], strict=True) if n != 1]
    wanted = [(here[axis], shape[axis]) for axis in long]
    if _row_number(axes, long) != _row_number(wanted, long):
        return None
    return Read(element, source, True, by_channel, last.constant)


def _row_number(axes: Sequence[tuple[Linear, int]], long: Sequence[int]) -> object:
    """Returns the number of a row as a linear form, or the form of each axis where sizes are not known."""
    forms = [(tuple(form.factors[axis] for axis in long), form.constant) for form, _ in axes]
    sizes = [n for _, n in axes]
    if any(n < 0 for n in sizes[1:]):
        return [*zip(forms, sizes, strict=True)]
    total: tuple[tuple[int, ...], int] = ((0,) * len(long), 0)
    for (factors, constant), n in zip(forms, sizes, strict=True):
        total = (
            tuple(a * n + b for a, b in zip(total[0], factors, strict=True)),
            total[1] * n + constant,
        )
    return total
