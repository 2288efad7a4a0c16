"""Reshapes with several dynamic dimensions, lowered exactly.

torch-mlir lowers ``view`` by assuming that at most one dimension is dynamic: with two it guesses that one of them is 1
(``[B, T, 32] -> [B * T, 32]`` becomes a cast to ``[?, 1, 32]``) and the program reads garbage. Here the symbolic shapes of the
exported graph decide: dimensions are grouped into runs of equal product, each run is collapsed and expanded.
Can go when ``tests/passes/view-two-dynamic.mlir`` lowers correctly through torch-mlir alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import sympy
import torch
from torch_mlir import ir


@dataclass(frozen=True)
class Run:
    """Consecutive source dimensions that together become consecutive result dimensions."""

    source: tuple[int, ...]
    result: tuple[int, ...]


def _expr(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def group(source: Sequence[int | torch.SymInt], result: Sequence[int | torch.SymInt]) -> list[Run]:
    """Returns the finest grouping of a reshape into runs of equal product, in order.

    Where algebra does not show that the shapes hold equally many elements (sizes made by division), all dimensions
    are one run: torch has checked the view. Raises ValueError if they certainly differ.
    """
    a, b = [_expr(s) for s in source], [_expr(s) for s in result]
    difference = sympy.expand(prod(a, start=sympy.Integer(1)) - prod(b, start=sympy.Integer(1)))
    if difference.is_number and difference != 0:
        raise ValueError(f"cannot view {list(source)} as {list(result)}")
    if difference != 0:
        return [Run(tuple(range(len(a))), tuple(range(len(b))))]
    runs: list[Run] = []
    i = j = 0
    while i < len(a) or j < len(b):
        p, q = _next_run(a, b, i, j)
        runs.append(Run(tuple(range(i, p)), tuple(range(j, q))))
        i, j = p, q
    return runs


def _next_run(a: list[Any], b: list[Any], i: int, j: int) -> tuple[int, int]:
    if i == len(a) or j == len(b):  # only ones are left on the other side
        return len(a), len(b)
    for total in range(2, len(a) - i + len(b) - j + 1):
        for taken in range(1, total):
            p, q = i + taken, j + total - taken
            if p > len(a) or q > len(b):
                continue
            if sympy.expand(prod(a[i:p], start=sympy.Integer(1)) - prod(b[j:q], start=sympy.Integer(1))) == 0:
                return p, q
    return len(a), len(b)


def is_ambiguous(source: Sequence[Any], result: Sequence[Any]) -> bool:
    """Returns whether torch-mlir's own lowering may guess wrongly: two or more dynamic dimensions on a side."""
    return any(sum(isinstance(s, torch.SymInt) for s in shape) > 1 for shape in (source, result))


def emit(value: ir.Value, runs: Sequence[Run], sizes: Sequence[int | ir.Value | None]) -> ir.Value:
    """Emits the reshape of a builtin tensor at the current insertion point.

    ``sizes`` are the result's sizes: a number, an index value, or None where the caller does not know it (at most one
    per run; it is then computed from the source).
    """
    from torch_mlir.dialects import arith, tensor

    dynamic = ir.ShapedType.get_dynamic_size()
    source_type = ir.RankedTensorType(value.type)
    index = ir.IndexType.get()

    def constant(n: int) -> ir.Value:
        return arith.ConstantOp(index, ir.IntegerAttr.get(index, n)).result

    def source_size(d: int) -> ir.Value:
        n = source_type.shape[d]
        return tensor.DimOp(value, constant(d)).result if n == dynamic else constant(n)

    def product(values: Sequence[ir.Value]) -> ir.Value:
        total = constant(1)
        for v in values:
            total = arith.MulIOp(total, v).result
        return total

    collapsed_shape: list[int] = []
    result_shape: list[int] = []
    output_sizes: list[ir.Value] = []
    for run in runs:
        of_source = [source_type.shape[d] for d in run.source]
        collapsed_shape.append(dynamic if dynamic in of_source else prod(of_source))
        known = {d: sizes[d] for d in run.result}
        if sum(size is None for size in known.values()) > 1:
            raise ValueError("two sizes of one run are unknown")
        for d in run.result:
            size = known[d]
            if size is None:
                others = [
                    constant(s) if isinstance(s, int) else s
                    for e, s in known.items()
                    if e != d and s is not None
                ]
                size = arith.DivUIOp(product([source_size(s) for s in run.source]), product(others)).result
            if isinstance(size, ir.Value):
                output_sizes.append(size)
            result_shape.append(dynamic if isinstance(size, ir.Value) else size)

    element = source_type.element_type
    # Runs without source dimensions hold only ones: fold them into a neighbour so that every run collapses something.
    source_groups = [list(r.source) for r in runs]
    result_groups = [list(r.result) for r in runs]
    if not all(source_groups) or not all(result_groups):
        source_groups, result_groups = (
            [[d for g in source_groups for d in g]],
            [[d for g in result_groups for d in g]],
        )
        collapsed_shape = [dynamic if dynamic in source_type.shape else prod(source_type.shape)]
    flat = value
    if any(len(g) > 1 for g in source_groups):
        flat = ir.Operation.create(
            "tensor.collapse_shape",
            [ir.RankedTensorType.get(collapsed_shape, element)],
            [value],
            {"reassociation": _reassociation(source_groups)},
        ).result
    if all(len(g) == 1 for g in result_groups):
        return flat
    return tensor.ExpandShapeOp(
        ir.RankedTensorType.get(result_shape, element),
        flat,
        _reassociation(result_groups),
        output_sizes,
        result_shape,
    ).result


def _reassociation(groups: Sequence[Sequence[int]]) -> ir.ArrayAttr:
    i64 = ir.IntegerType.get_signless(64)
    return ir.ArrayAttr.get([ir.ArrayAttr.get([ir.IntegerAttr.get(i64, d) for d in g]) for g in groups])
