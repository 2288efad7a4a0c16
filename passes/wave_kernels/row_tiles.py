"""Which rows a block works on: neighbours, or those that are sent to one expert."""

from __future__ import annotations

from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes.kernels.builders import add, compare, get, minimum, sub


@dataclass(frozen=True)
class Rows:
    """The rows ``first`` to ``end``, at least one, of ``order`` (None: in their own order)."""

    first: ir.Value
    end: ir.Value
    order: ir.Value | None = None

    def number(self, i: ir.Value | int) -> ir.Value:
        """Returns the number of row i of the tile; of the last one where there are not so many."""
        return self.at(minimum(add(self.first, i), sub(self.end, 1)))

    def at(self, at: ir.Value) -> ir.Value:
        """Returns the number of the row at a place, ``first`` to ``end - 1``."""
        if self.order is None:
            return at
        return arith.index_cast(ir.IndexType.get(), get(self.order, [at]))

    def has(self, i: ir.Value | int) -> ir.Value:
        """Returns whether there is a row i."""
        return compare("slt", add(self.first, i), self.end)
