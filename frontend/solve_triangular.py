"""`linalg.solve_triangular` in ops that are compiled: forward substitution, row by row in a loop, in halves if there are many.

A zero on the diagonal makes what it makes in torch: infinities and NaN in its row and those that need it, and no other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikingbrain.frontend.dynamo.loops import SCAN

aten = torch.ops.aten
_SMALL = 64  # rows of one loop; more are two systems, and a product between them


def solve_triangular(
    a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Any:
    """Solves A X = B, or X A = B, of a [..., N, N] and b [..., N, M], or [..., M, N]; leading axes broadcast."""
    if not b.is_floating_point():
        return NotImplemented
    if not left:
        turned: Tensor = solve_triangular(a.mT, b.mT, upper=not upper, unitriangular=unitriangular)
        return turned.mT
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    a, b = a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])
    if 0 in b.shape:
        return b.clone()
    if upper:  # the last row is the first that is known
        return _lower(a.flip(-2, -1), b.flip(-2), unitriangular).flip(-2)
    return _lower(a, b, unitriangular)


def _lower(a: Tensor, b: Tensor, unit: bool) -> Tensor:
    size = a.shape[-1]
    if not isinstance(size, int) or size <= _SMALL:
        return _by_rows(a, b, unit)
    half = size // 2
    first = _lower(a[..., :half, :half], b[..., :half, :], unit)
    rest = b[..., half:, :] - a[..., half:, :half] @ first
    return torch.cat((first, _lower(a[..., half:, half:], rest, unit)), -2)


def _by_rows(a: Tensor, b: Tensor, unit: bool) -> Tensor:
    """Each turn of the loop finds a row of X from those above it: x_i = (b_i - sum_j<i a_ij x_j) / a_ii."""
    place = torch.arange(a.shape[-1], device=a.device)
    zero = torch.zeros((), dtype=a.dtype, device=a.device)

    def row(found: Tensor, a_row: Tensor, b_row: Tensor, i: Tensor, place: Tensor, zero: Tensor) -> Any:
        above, here = (place < i).unsqueeze(-1), place == i
        known = torch.where(above, a_row.unsqueeze(-1) * found, zero).sum(-2)
        x = b_row - known
        if not unit:
            x = x / torch.where(here, a_row, zero).sum(-1, keepdim=True)
        return [torch.where(here.unsqueeze(-1), x.unsqueeze(-2), found)]

    start = torch.zeros_like(b, memory_format=torch.contiguous_format)
    rows = (_first(a), _first(b), place)
    solved: Tensor = SCAN(row, [start], list(rows), (place, zero))[0]
    return solved


def _first(x: Tensor) -> Tensor:
    """Moves the axis of rows to the front."""
    return x.movedim(-2, 0).contiguous()
