"""Several ops in one kernel: a block runs a row of each, one after the other, with barriers between them.

Ops between two launches often share their outermost loops, such as (batch, token). When each touches, of what the others
write, its own row only, one launch does them all: a norm with its sum and its scale, a softmax, rotary positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch_mlir import ir

from spikingbrain.backend_maca.lower.generic import Generic
from spikingbrain.backend_maca.lower.mlir import nested
from spikingbrain.backend_maca.lower.places import Count, root, size_of, stays_in_row

LONGEST = 16384  # elements of a row; a longer one would keep too few blocks busy
SHORTEST = 16  # elements of a row for which a block is worth it, unless there are only ...
FEW = 1024  # ... rows
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

    def fits(self, rows: Count) -> bool:
        """Returns whether a row is no more than a block should do."""
        outer = self.outer(rows)
        if outer is None:
            return False
        inner = [size for size in self.loops[outer:] if size != Count()]
        if rows == Count():
            return all(size.static for size in inner) and _number(inner) <= LOOSE
        open_ = [size for size in inner if not size.static]
        return _number(inner) <= LONGEST and len(open_) <= 1 and (not open_ or len(inner) == 1)


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

    def parts(self) -> list[Group]:
        """Returns the group, or one of each op where rows would not keep blocks busy."""
        if len(self.members) == 1 or any(_busy(self.members, r) for r in self.rows):
            return [self]
        return [Group([member], self.rows) for member in self.members]

    @property
    def choice(self) -> Count:
        """Returns the most rows that keep their blocks busy."""
        rows = [r for r in self.rows if _busy(self.members, r)]
        return max(rows, key=lambda r: (len(r.symbols), r.number))


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
    return [part for group in found for part in group.parts()]


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
        if _captures(member, written):
            return rows == Count()
    return True


def _busy(members: Sequence[Member], rows: Count) -> bool:
    """Returns whether rows are long enough for a block each, or few."""
    if rows.static and rows.number <= FEW:
        return True
    inner = [member.loops[member.outer(rows) or 0 :] for member in members]
    return any(_number(sizes) >= SHORTEST or not all(size.static for size in sizes) for sizes in inner)


def _captures(member: Member, written: set[ir.Value]) -> bool:
    """Returns whether the body itself loads from a buffer that the group writes, at a place that nobody knows."""
    loads = [o.operands[0] for o in nested(member.generic.op) if o.name == "memref.load"]
    return any(root(buffer) in written for buffer in loads)


def _number(sizes: Sequence[Count]) -> int:
    total = 1
    for size in sizes:
        total *= size.number
    return total


def needs_barrier(before: Sequence[Member], member: Member) -> bool:
    """Returns whether an op has to wait for what the group did since the last barrier."""
    touched = {root(a.buffer) for m in before for a in m.accesses}
    written = {root(a.buffer) for m in before for a in m.accesses if a.writes}
    loads = {root(o.operands[0]) for o in nested(member.generic.op) if o.name == "memref.load"}
    mine = {root(a.buffer) for a in member.accesses} | loads
    writes = {root(a.buffer) for a in member.accesses if a.writes}
    return bool(mine & written or writes & touched)
