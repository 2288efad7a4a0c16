"""A ``linalg.generic`` on buffers: its loops, what it loads and stores, and its body for one element."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import inf

from torch_mlir import ir
from torch_mlir.dialects import affine, arith, cf, memref, scf

from spikingbrain.backend_maca.lower.bodies import copy_body
from spikingbrain.backend_maca.lower.index import index, size
from spikingbrain.backend_maca.lower.mlir import constant, source_of
from spikingbrain.errors import UnsupportedOp

WAVE = 64
BLOCK = 256  # four waves; 1024 is the machine's limit, smaller blocks leave it room to overlap them
WAVE_FORM_FROM = 2 * WAVE  # a shorter reduced axis of known length stays in one thread

# What a wave can combine with one 4-byte shuffle, with the value that changes nothing.
COMBINERS: dict[str, float] = {
    "arith.addf": 0.0,
    "arith.addi": 0,
    "arith.maximumf": -inf,
    "arith.maxnumf": -inf,
    "arith.minimumf": inf,
    "arith.minnumf": inf,
}
SHUFFLED_TYPES = ("f32", "i32")


class Generic:
    """A ``linalg.generic`` on buffers, read once."""

    def __init__(self, op: ir.Operation):
        self.op = op
        self.maps = [ir.AffineMapAttr(a).value for a in op.attributes["indexing_maps"]]
        self.parallel = ["parallel" in str(a) for a in op.attributes["iterator_types"]]
        self.inputs_count = op.attributes["operandSegmentSizes"][0]
        self.operands = list(op.operands)
        self.body = op.regions[0].blocks[0]
        self.outputs = self.operands[self.inputs_count :]
        *_, self.terminator = (v.operation for v in self.body.operations)
        if not all(isinstance(v.type, ir.MemRefType) for v in self.outputs):
            raise UnsupportedOp("a linalg op without buffers", where=source_of(op.location))
        self.places = self._find_places()

    def _find_places(self) -> list[list[tuple[ir.Value, int]]]:
        """Returns for every loop the (buffer, axis) pairs whose size is its length."""
        places: list[list[tuple[ir.Value, int]]] = [[] for _ in self.parallel]
        for value, affine_map in zip(self.operands, self.maps, strict=True):
            for axis, expression in enumerate(affine_map.results):
                if isinstance(expression, ir.AffineDimExpr):
                    places[expression.position].append((value, axis))
        if not all(places):
            raise UnsupportedOp("a loop whose length no operand tells", where=source_of(self.op.location))
        return places

    def sizes(self, *, parallel: bool) -> list[ir.Value]:
        """Returns the lengths of the parallel, or of the reduced, loops."""
        return [
            size(*p[0]) for p, wanted in zip(self.places, self.parallel, strict=True) if wanted is parallel
        ]

    def check_sizes(self) -> None:
        """Emits a check for every loop that operands could disagree about; known sizes fold away."""
        label = self.op.location.name_str if isinstance(self.op.location, ir.NameLoc) else self.op.name
        for (first, axis), *rest in self.places:
            for other, other_axis in rest:
                same = arith.cmpi(arith.CmpIPredicate.eq, size(first, axis), size(other, other_axis))
                cf.assert_(same, f"sizes of the operands of {label} differ, at {source_of(self.op.location)}")

    def coordinates(self, parallel: list[ir.Value], reduced: list[ir.Value]) -> list[ir.Value]:
        """Returns the values of all loops in the op's order."""
        left, right = iter(parallel), iter(reduced)
        return [next(left) if p else next(right) for p in self.parallel]

    def _at(self, number: int, loops: list[ir.Value]) -> list[ir.Value]:
        whole = self.maps[number]
        single = [ir.AffineMap.get(whole.n_dims, 0, [e]) for e in whole.results]
        return [affine.apply(m, loops) for m in single]

    def load(self, number: int, loops: list[ir.Value]) -> ir.Value:
        """Loads the element of an operand at these loop values; a scalar operand is its own element."""
        value = self.operands[number]
        return memref.load(value, self._at(number, loops)) if isinstance(value.type, ir.MemRefType) else value

    def store(self, values: Sequence[ir.Value], loops: list[ir.Value]) -> None:
        """Stores one element of every output."""
        for number, value in enumerate(values, self.inputs_count):
            memref.store(value, self.operands[number], self._at(number, loops))

    def fold_fill(self) -> None:
        """Lets the op start from a number where its output was filled with it, and nothing else has used that."""
        if (
            len(self.outputs) != 1
            or all(self.parallel)
            or not isinstance(self.outputs[0].type, ir.MemRefType)
        ):
            return
        places = [e.position for e in self.maps[-1].results if isinstance(e, ir.AffineDimExpr)]
        if len(set(places)) != ir.MemRefType(self.outputs[0].type).rank:
            return  # it may not write all that was filled
        if found := fill_before(self.op, self.outputs[0]):
            fill, self.op.attributes["maca.start"] = found
            fill.erase()

    def initial(self, loops: list[ir.Value]) -> list[ir.Value]:
        """Loads what the outputs hold; outputs that the body does not read are not loaded."""
        if "maca.start" in self.op.attributes:
            kind = ir.MemRefType(self.outputs[0].type).element_type
            return [arith.constant(kind, self.op.attributes["maca.start"])]
        used = [bool(list(a.uses)) for a in list(self.body.arguments)[self.inputs_count :]]
        return [self.load(n, loops) if u else None for n, u in enumerate(used, self.inputs_count)]

    def compute(self, loops: list[ir.Value], outputs: Sequence[ir.Value]) -> list[ir.Value]:
        """Copies the body here for these loop values and values of the outputs; returns what it yields."""
        inputs = list(self.body.arguments)[: self.inputs_count]
        loaded = [self.load(n, loops) if list(a.uses) else None for n, a in enumerate(inputs)]
        return copy_body(self.body, [*loaded, *outputs], loops)

    def element(self, at: list[ir.Value]) -> None:
        """Computes and stores one element of the outputs here; reduced loops run with sums in registers."""

        def loop(sizes: list[ir.Value], reduced: list[ir.Value], values: list[ir.Value]) -> list[ir.Value]:
            if not sizes:
                return self.compute(self.coordinates(at, reduced), values)
            inner = scf.ForOp(index(0), sizes[0], index(1), values)
            with ir.InsertionPoint(inner.body):
                scf.yield_(loop(sizes[1:], [*reduced, inner.induction_variable], list(inner.inner_iter_args)))
            return list(inner.results)

        sizes = self.sizes(parallel=False)
        first = self.coordinates(at, [index(0)] * len(sizes))  # outputs do not depend on them
        self.store(loop(sizes, [], self.initial(first)), first)

    def wave_combiner(self) -> ir.Operation | None:
        """Returns the op that reduces, when a wave can share the work of it."""
        reduced = [p for p, is_parallel in zip(self.places, self.parallel, strict=True) if not is_parallel]
        if len(reduced) != 1 or len(self.outputs) != 1:
            return None
        length = ir.MemRefType(reduced[0][0][0].type).shape[reduced[0][0][1]]
        last = self.terminator.operands[0].owner
        accumulator = list(self.body.arguments)[-1]
        if (
            isinstance(last, ir.Block)
            or last.name not in COMBINERS
            or list(last.operands).count(accumulator) != 1
        ):
            return None
        short = length != ir.ShapedType.get_dynamic_size() and length < WAVE_FORM_FROM
        shuffles = str(accumulator.type) in SHUFFLED_TYPES and len(list(accumulator.uses)) == 1
        return None if short or not shuffles else last.operation


def fill_before(op: ir.Operation, buffer: ir.Value) -> tuple[ir.Operation, ir.Attribute] | None:
    """Returns the op that fills a buffer, and the number, when nothing else uses the buffer before ``op``."""
    users = {use.owner.operation for use in buffer.uses if use.owner.operation.name != "memref.dim"} - {op}
    if any(user.block != op.block for user in users):
        return None  # a loop or another op's body may come in between
    before = itertools.takewhile(lambda v: v.operation != op, op.block.operations)
    found = [v.operation for v in before if v.operation in users]
    number = _filled_with(found[0], buffer) if len(found) == 1 else None
    return None if number is None else (found[0], number)


def _filled_with(op: ir.Operation, buffer: ir.Value) -> ir.Attribute | None:
    """Returns the number that an op fills a buffer with."""
    if op.name != "linalg.generic" or list(op.operands)[-1] != buffer:
        return None
    if not ir.AffineMapAttr(list(op.attributes["indexing_maps"])[-1]).value.is_permutation:
        return None  # it may not write all of the buffer
    block = op.regions[0].blocks[0]
    value = _last(block).operands[0]
    arguments = list(block.arguments)
    if value in arguments[:-1] and not isinstance(op.operands[arguments.index(value)].type, ir.MemRefType):
        value = op.operands[arguments.index(value)]
    return None if constant(value) is None else value.owner.attributes["value"]


def _last(block: ir.Block) -> ir.Operation:
    *_, last = block.operations
    return last.operation
