"""Several ops in one kernel: a block runs a row of each, one after the other, with barriers between them.

Ops between two launches often share their outermost loops, such as (batch, token). When each touches, of what the others
write, its own row only, one launch does them all: a norm with its sum and its scale, a softmax, rotary positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch_mlir import ir

from spikingbrain.backend_maca.lower.generic import WAVE, Generic
from spikingbrain.backend_maca.lower.mlir import nested
from spikingbrain.backend_maca.lower.places import Count, root, size_of, stays_in_row

LONGEST = 16384  # elements of a row; a longer one would keep too few blocks busy
MOST_STEPS = 1 << 16  # of the loops of an op in a row
FEW = 1024  # rows that leave processors idle if a block has several
SMALL, LARGE = 256, 1024  # threads of a block
LONG_ROW = 2048  # elements from which a block has many threads
MOST_BUFFERS = 96  # of the ops of one kernel
LOOSE = 4096  # elements that one block may do when ops share no loops

# What may stand between the ops of a group: it launches nothing and reads no memory.
TRANSPARENT = (
    "memref.alloc", "memref.dim", "memref.expand_shape", "memref.collapse_shape", "memref.subview", "memref.cast",
    "arith.constant", "cf.assert", "affine.apply",
)  # fmt: skip


@dataclass
class Access:
    """One operand of an op."""

    buffer: ir.Value
    map: ir.AffineMap
    writes: bool


@dataclass
class Member:
    """An op of a group, with what grouping asks of it."""

    generic: Generic
    loops: list[Count] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)

    @staticmethod
    def of(op: ir.Operation) -> Member:
        generic = Generic(op)
        loops = [size_of(*places[0]) for places in generic.places]
        accesses = [
            Access(value, generic.maps[i], i >= generic.inputs_count)
            for i, value in enumerate(generic.operands)
            if isinstance(value.type, ir.MemRefType)
        ]
        loads = [inner for inner in nested(op) if inner.name == "memref.load"]
        accesses += [Access(load.operands[0], _places(load, len(loops)), False) for load in loads]
        return Member(generic, loops, accesses)

    def outer(self, rows: Count) -> int | None:
        """Returns how many of the outermost loops make so many rows."""
        total = Count()
        for number in range(len(self.loops) + 1):
            if total == rows:
                return number
            if number == len(self.loops) or not self.generic.parallel[number]:
                return None
            total = total * self.loops[number]
        return None

    def candidates(self) -> list[Count]:
        """Returns the numbers of rows that the op may have, the largest last."""
        found, total = [Count()], Count()
        for number, size in enumerate(self.loops):
            if not self.generic.parallel[number]:
                break
            total = total * size
            if total not in found:
                found.append(total)
        return found

    def inner(self, rows: Count, parallel: bool = False) -> list[Count]:
        """Returns the lengths of the loops within a row, all or the parallel ones."""
        outer = self.outer(rows) or 0
        kinds = self.generic.parallel[outer:]
        return [n for n, p in zip(self.loops[outer:], kinds, strict=True) if p or not parallel]

    def fits(self, rows: Count) -> bool:
        """Returns whether a row is no more than a block should do."""
        outer = self.outer(rows)
        if outer is None:
            return False
        inner = [size for size in self.inner(rows) if size != Count()]
        if _number(inner) > MOST_STEPS or self.touched(outer) > (LOOSE if rows == Count() else LONGEST):
            return False
        if rows == Count():
            return all(size.static for size in inner)
        open_ = [size for size in inner if not size.static]
        return len(open_) <= 1 and (not open_ or len(inner) == 1)

    def touched(self, outer: int) -> int:
        """Returns how many elements of a buffer it touches in a row, at most."""
        largest = 1
        for access in self.accesses:
            places = list(access.map.results)
            known = all(isinstance(e, ir.AffineDimExpr | ir.AffineConstantExpr) for e in places)
            own = {e.position for e in places if isinstance(e, ir.AffineDimExpr)}
            loops = [n for d, n in enumerate(self.loops) if d >= outer and (d in own or not known)]
            largest = max(largest, _number(loops))
        return largest


@dataclass
class Group:
    """Ops in order, and the numbers of rows that suit them all."""

    members: list[Member]
    rows: list[Count]

    def with_(self, member: Member) -> Group | None:
        """Returns the group with one op more, or None where no number of rows suits it."""
        members = [*self.members, member]
        if len({root(a.buffer) for m in members for a in m.accesses}) > MOST_BUFFERS:
            return None
        rows = [r for r in self.rows if member.fits(r) and _independent(members, r)]
        return Group(members, rows) if rows else None

    @property
    def choice(self) -> Count:
        """Returns the most rows: what a row waits for is then the least."""
        return max(self.rows, key=lambda r: (len(r.symbols), r.number))

    @property
    def each(self) -> int:
        """Returns how many rows a block does: several where they are short and no sum takes a wave."""
        if self.choice == Count() or any(m.generic.wave_combiner() for m in self.members):
            return 1
        inner = [m.inner(self.choice, parallel=True) for m in self.members]
        if any(not size.static for sizes in inner for size in sizes):
            return 1
        is_few = self.choice.static and self.choice.number <= FEW
        return max(1, (WAVE if is_few else SMALL) // max(1, *map(_number, inner)))

    @property
    def threads(self) -> int:
        """Returns the threads of a block: many where rows are long."""
        longest = max(_number(m.inner(self.choice)) for m in self.members)
        return LARGE if longest > LONG_ROW else SMALL


def groups(block: ir.Block) -> list[Group]:
    """Returns the groups of a block's ops, those of a single op too, in order."""
    found: list[Group] = []
    current: Group | None = None
    for op in [view.operation for view in block.operations]:
        if op.name == "linalg.generic":
            member = Member.of(op)
            joined = current.with_(member) if current else None
            if joined is None:
                rows = [r for r in member.candidates() if member.fits(r) and _independent([member], r)]
                joined = Group([member], rows)
                found.append(joined)
            else:
                found[-1] = joined
            current = joined if joined.rows else None
        elif op.name not in TRANSPARENT and not op.name.startswith("arith."):
            current = None
    return found


def _independent(members: Sequence[Member], rows: Count) -> bool:
    """Returns whether no row touches what another row writes."""
    written = {root(a.buffer) for m in members for a in m.accesses if a.writes}
    for member in members:
        outer = member.outer(rows)
        if outer is None:
            return False
        for access in member.accesses:
            if root(access.buffer) in written and not stays_in_row(
                access.buffer, access.map, member.loops, outer, rows
            ):
                return False
    return True


def _places(load: ir.Operation, loops: int) -> ir.AffineMap:
    """Returns the loops that the indices of a load are, and a symbol for each that is computed."""
    places: list[ir.AffineExpr] = []
    symbols = 0
    for owner in [v.owner for v in list(load.operands)[1:]]:
        if not isinstance(owner, ir.Block) and owner.name == "linalg.index":
            places.append(ir.AffineDimExpr.get(owner.attributes["dim"].value))
        else:
            places.append(ir.AffineSymbolExpr.get(symbols))
            symbols += 1
    return ir.AffineMap.get(loops, symbols, places)


def _number(sizes: Sequence[Count]) -> int:
    total = 1
    for size in sizes:
        total *= size.number
    return total


def needs_barrier(before: Sequence[Member], member: Member) -> bool:
    """Returns whether an op has to wait for what the group did since the last barrier."""
    touched = {root(a.buffer) for m in before for a in m.accesses}
    written = {root(a.buffer) for m in before for a in m.accesses if a.writes}
    mine = {root(a.buffer) for a in member.accesses}
    writes = {root(a.buffer) for a in member.accesses if a.writes}
    return bool(mine & written or writes & touched)
