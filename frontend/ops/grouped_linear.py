"""`spikingbrain::grouped_linear`, rows times the weights of the experts that they are sent to, and its gradient for the weights.

Each is the other's derivative, so that both can be differentiated as often as one likes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spikingbrain.errors import ShapeError


@torch.library.custom_op("spikingbrain::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, expert: Tensor, transposed: bool = False) -> Tensor:
    """Returns y [R, O], y_r = weight[expert_r] x_r, of x [R, K], weight [N, O, K] and expert [R] int64.

    With ``transposed`` the weight is [N, K, O]. Experts are counted from the end where they are negative. Each expert that has
    rows is one matrix product; compiled, a kernel finds the rows, and a row for an expert that does not exist is NaN.

    Raises:
        ShapeError: shapes or dtypes do not fit each other.
        IndexError: an expert that does not exist.
    """
    _check(x, weight, expert, transposed)
    order, groups = by_expert(expert, weight.shape[0])
    sorted_x = x[order]
    sorted_y = x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])
    for e, first, end in groups:
        factor = weight[e] if transposed else weight[e].mT
        torch.mm(sorted_x[first:end], factor, out=sorted_y[first:end])
    return torch.empty_like(sorted_y).index_copy_(0, order, sorted_y)


@torch.library.custom_op("spikingbrain::grouped_outer", mutates_args=())
def grouped_outer(a: Tensor, b: Tensor, expert: Tensor, experts: int) -> Tensor:
    """Returns [N, A, B]: for each of N experts the sum of a_r b_r^T over its rows, of a [R, A], b [R, B], expert [R] int64.

    It is the gradient of the weights of `grouped_linear`, where a is that of y and b is x.

    Raises:
        ShapeError: shapes or dtypes do not fit each other.
        IndexError: an expert that does not exist.
    """
    _check_outer(a, b, expert)
    order, groups = by_expert(expert, experts)
    sorted_a, sorted_b = a[order], b[order]
    result = a.new_zeros(experts, a.shape[1], b.shape[1])
    for e, first, end in groups:
        torch.mm(sorted_a[first:end].mT, sorted_b[first:end], out=result[e])
    return result


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, expert: Tensor, transposed: bool = False) -> Tensor:
    _check(x, weight, expert, transposed)
    return x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])


@grouped_outer.register_fake
def _(a: Tensor, b: Tensor, expert: Tensor, experts: int) -> Tensor:
    _check_outer(a, b, expert)
    return a.new_empty(experts, a.shape[1], b.shape[1])


def _check(x: Tensor, weight: Tensor, expert: Tensor, transposed: bool) -> None:
    fits = x.ndim == 2 and weight.ndim == 3 and expert.ndim == 1 and expert.shape[0] == x.shape[0]
    if not fits or x.shape[1] != weight.shape[1 if transposed else 2]:
        shapes = ", ".join(str(list(t.shape)) for t in (x, weight, expert))
        weights = "[N, K, O]" if transposed else "[N, O, K]"
        raise ShapeError(f"grouped_linear: shapes {shapes}", why=f"they must be [R, K], {weights} and [R]")
    _check_types("grouped_linear", x, weight, expert)


def _check_outer(a: Tensor, b: Tensor, expert: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or expert.ndim != 1 or not a.shape[0] == b.shape[0] == expert.shape[0]:
        shapes = ", ".join(str(list(t.shape)) for t in (a, b, expert))
        raise ShapeError(f"grouped_outer: shapes {shapes}", why="they must be [R, A], [R, B] and [R]")
    _check_types("grouped_outer", a, b, expert)


def _check_types(op: str, a: Tensor, b: Tensor, expert: Tensor) -> None:
    if a.dtype != b.dtype or not a.is_floating_point() or expert.dtype != torch.int64:
        raise ShapeError(
            f"{op}: dtypes {a.dtype}, {b.dtype} and {expert.dtype}",
            why="they must be one floating dtype twice, and int64",
        )


def by_expert(expert: Tensor, experts: int) -> tuple[Tensor, Iterator[tuple[int, int, int]]]:
    """Returns the rows in the order of their experts, and for each expert that has any: itself, its first and its end there."""
    if expert.numel():
        low, high = int(expert.min()), int(expert.max())
        if not -experts <= low <= high < experts:
            wrong = high if high >= experts else low
            raise IndexError(f"expert {wrong} is out of bounds for {experts} experts")
        if low < 0:
            expert = expert.where(expert >= 0, expert + experts)
    counts: list[int] = torch.bincount(expert, minlength=experts).tolist()
    return expert.argsort(stable=True), _groups(counts)


def _groups(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    first = 0
    for e, count in enumerate(counts):
        if count:
            yield e, first, first + count
        first += count


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, expert, ctx.transposed = inputs
    ctx.save_for_backward(x, weight, expert)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, expert = ctx.saved_tensors
    of_x = of_weight = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.spikingbrain.grouped_linear(gradient, weight, expert, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        a, b = (x, gradient) if ctx.transposed else (gradient, x)
        of_weight = torch.ops.spikingbrain.grouped_outer(a, b, expert, weight.shape[0])
    return of_x, of_weight, None, None


def _save_outer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, expert, _ = inputs
    ctx.save_for_backward(a, b, expert)


def _backward_outer(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    a, b, expert = ctx.saved_tensors
    of_a = of_b = None
    if ctx.needs_input_grad[0]:
        of_a = torch.ops.spikingbrain.grouped_linear(b, gradient, expert)
    if ctx.needs_input_grad[1]:
        of_b = torch.ops.spikingbrain.grouped_linear(a, gradient, expert, True)
    return of_a, of_b, None, None


grouped_linear.register_autograd(_backward, setup_context=_save)
grouped_outer.register_autograd(_backward_outer, setup_context=_save_outer)
