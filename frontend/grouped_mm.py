"""Products of sorted rows with the weights of their groups, written as ``spikingbrain::grouped_linear``.

``torch._grouped_mm``, which is ``F.grouped_mm``, and the op by which transformers does without it take rows that are sorted by
group and where each group ends. The group of a row is the number of groups that end before it, so no size depends on values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

import spikingbrain.frontend.ops  # noqa: F401  (registers the ops)

aten = torch.ops.aten
_LINEAR = torch.ops.spikingbrain.grouped_linear.default
_OUTER = torch.ops.spikingbrain.grouped_outer.default


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Returns op overload -> decomposition; the ops of transformers only if the program imported them."""
    found: dict[Any, Callable[..., Any]] = {aten._grouped_mm.default: grouped_mm}
    theirs = torch.ops.transformers
    if hasattr(theirs, "grouped_mm_fallback"):
        found[theirs.grouped_mm_fallback.default] = _rows_by_matrices
        found[theirs.grouped_mm_fallback_backward.default] = _backward
    return found


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Any:
    """Computes ``torch._grouped_mm``; ``offs`` [N] are the ends of the groups on the axis that the two matrices make one.

    [S, K] x [N, K, O]: rows by their matrix. [N, M, K] x [K, S]: columns by their matrix. [M, S] x [S, O]: a product of each
    group's columns and rows. [N, M, K] x [N, K, O]: no groups.
    """
    if bias is not None or out_dtype not in (None, a.dtype):
        return NotImplemented
    if offs is None:
        return aten.bmm.default(a, b)
    if a.dim() == 2 and b.dim() == 3:
        return _rows_by_matrices(a, b, offs)
    if a.dim() == 3:
        turned = _rows_by_matrices(_turned(b), _turned(a), offs)
        return _turned(turned)
    group, within = _groups(offs, b.shape[0])
    return _OUTER(_where(within, _turned(a)), _where(within, b), group, offs.shape[0])


def _rows_by_matrices(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Returns [S, O] of rows [S, K] and matrices [N, K, O]; a row after the last end is 0."""
    group, within = _groups(ends, rows.shape[0])
    return _where(within, _LINEAR(rows, matrices, group, True))


def _backward(rows: Tensor, matrices: Tensor, ends: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    group, within = _groups(ends, rows.shape[0])
    of_rows = _where(within, _LINEAR(gradient, matrices, group))
    return of_rows, _OUTER(_where(within, rows), _where(within, gradient), group, ends.shape[0])


def _groups(ends: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
    """Returns the group of each row, int64, and whether it is in one."""
    row = torch.arange(rows, dtype=ends.dtype, device=ends.device)
    passed = (ends.unsqueeze(0) <= row.unsqueeze(1)).sum(1, dtype=torch.int64)
    within = passed < ends.shape[0]
    return passed.clamp(max=ends.shape[0] - 1), within


def _where(within: Tensor, x: Tensor) -> Tensor:
    return torch.where(within.unsqueeze(1), x, torch.zeros((), dtype=x.dtype, device=x.device))


def _turned(x: Tensor) -> Tensor:
    turned: Tensor = aten.transpose.int(x, -2, -1)
    return turned


def read_weights_in_place(graph: fx.Graph) -> int:
    """Lets ``grouped_linear`` read a weight as it is stored where a graph hands it a transposed view; returns how many."""
    changed = 0
    for node in graph.find_nodes(op="call_function", target=_LINEAR):
        source = _transposed(node.args[1])
        if source is not None:
            turned = node.args[3] if len(node.args) > 3 else node.kwargs.get("transposed", False)
            node.args, node.kwargs = (node.args[0], source, node.args[2], not turned), {}
            changed += 1
    if changed:
        graph.eliminate_dead_code()
    return changed


def _transposed(weight: fx.Node) -> fx.Node | None:
    if weight.op != "call_function":
        return None
    swapped = weight.target == aten.transpose.int and {d % 3 for d in weight.args[1:]} == {1, 2}
    permuted = weight.target == aten.permute.default and [d % 3 for d in weight.args[1]] == [0, 2, 1]
    return weight.args[0] if swapped or permuted else None
