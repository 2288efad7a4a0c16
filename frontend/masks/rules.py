"""What each ATen op makes of the values of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from spikingbrain.frontend.masks.values import (
    BLOCKED,
    Added,
    Affine,
    Condition,
    NotShown,
    Number,
    Ones,
    Value,
    affine,
    both,
    broadcast,
    condition_of,
    either,
    filled,
    opposite,
    shape_of,
    sum_of,
    viewed,
)

if TYPE_CHECKING:
    from spikingbrain.frontend.masks.reader import Reader

aten = torch.ops.aten


# Views


def _relabelled(reader: Reader, node: fx.Node, axes: Sequence[int | None]) -> Value:
    """Returns a view whose axis d is axis ``axes[d]`` of its source, or new."""
    shape = shape_of(node)

    rank = len(shape_of(node.args[0]))
    to = {a - rank: d - len(axes) for d, a in enumerate(axes) if a is not None}

    def move(x: Affine) -> Affine:
        return x.moved(shape, [0 if a is None else x.factors[a] for a in axes], to=to)

    return viewed(reader.value(node.args[0]), shape, move)


def _axes(node: fx.Node) -> list[int | None]:
    return list(range(len(shape_of(node.args[0]))))


def _permute(reader: Reader, node: fx.Node, x: fx.Node, *order: Any) -> Value:
    rank = len(shape_of(x))
    return _relabelled(
        reader, node, [d % rank for d in (order[0] if isinstance(order[0], (list, tuple)) else order)]
    )


def _transpose(reader: Reader, node: fx.Node, x: fx.Node, i: int = -2, j: int = -1) -> Value:
    axes = _axes(node)
    if len(axes) > 1:
        axes[i], axes[j] = axes[j], axes[i]
    return _relabelled(reader, node, axes)


def _unsqueeze(reader: Reader, node: fx.Node, x: fx.Node, dim: int) -> Value:
    axes = _axes(node)
    axes.insert(dim % (len(axes) + 1), None)
    return _relabelled(reader, node, axes)


def _by_size(reader: Reader, node: fx.Node, *_: Any) -> Value:
    """A view that keeps the axes longer than 1, in their order."""
    before, after = shape_of(node.args[0]), shape_of(node)
    kept = [d for d, n in enumerate(before) if n != 1]
    if [before[d] for d in kept] != [n for n in after if n != 1]:
        raise NotShown("the mask's axes are split or joined")
    source = iter(kept)
    return _relabelled(reader, node, [None if n == 1 else next(source) for n in after])


def _expand(reader: Reader, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> Value:
    return broadcast(reader.value(x), shape_of(node))


def _same(reader: Reader, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> Value:
    return reader.value(x)


def _slice(
    reader: Reader, node: fx.Node, x: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    size = shape_of(x)[dim]
    first = 0 if start is None else max(0, start + size if start < 0 else start)
    shape = shape_of(node)

    kept = {a - len(shape): a - len(shape) for a in range(len(shape)) if a != dim % len(shape)}
    to = None if shape == shape_of(x) else kept

    def move(a: Affine) -> Affine:
        factors = list(a.factors)
        more = factors[dim] * first
        factors[dim] = factors[dim] * step if shape[dim] != 1 else 0
        return a.moved(shape, factors, more, to)

    return viewed(reader.value(x), shape, move)


def _select(reader: Reader, node: fx.Node, x: fx.Node, dim: int, index: int) -> Value:
    size, shape = shape_of(x), shape_of(node)
    at, place = index % size[dim], dim % len(size)

    rank = len(size)
    to = {a - rank: a - rank + (a < place) for a in range(rank) if a != place}

    def move(a: Affine) -> Affine:
        return a.moved(shape, a.factors[:place] + a.factors[place + 1 :], a.factors[place] * at, to)

    return viewed(reader.value(x), shape, move)


# Tensors that are made


def _arange(reader: Reader, node: fx.Node, *numbers: Any, **_: Any) -> Value:
    if node.meta["val"].dtype.is_floating_point or not all(isinstance(n, int) for n in numbers):
        raise NotShown("positions that are no integers")
    first, step = (0, 1) if len(numbers) == 1 else (numbers[0], numbers[2] if len(numbers) > 2 else 1)
    shape = shape_of(node)
    return Affine(shape, (0 if shape[0] == 1 else step,), first)


def _full(reader: Reader, node: fx.Node, *given: Any, **_: Any) -> Value:
    value = given[-1]
    if isinstance(value, fx.Node):
        raise NotShown("the mask depends on data")
    return filled(node, value)


def _constant(value: float) -> Callable[..., Value]:
    return lambda reader, node, *_, **__: filled(node, value)


def _scalar(reader: Reader, node: fx.Node, value: Any, **_: Any) -> Value:
    return filled(node, value)


def _to(reader: Reader, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> Value:
    value, dtype = reader.value(x), node.meta["val"].dtype
    if isinstance(value, Ones):
        return value.seen if dtype == torch.bool else value
    if isinstance(value, Condition) and dtype != torch.bool:
        return Ones(value)
    kept = (
        True
        if isinstance(value, Condition)
        else dtype.is_floating_point
        if isinstance(value, (Added, Number))
        else dtype in (torch.int32, torch.int64)
    )
    if isinstance(value, Affine) and value.data and not kept:
        raise NotShown("the mask depends on data")
    if not kept:
        raise NotShown(f"the mask is cast to {str(dtype).removeprefix('torch.')}")
    return value


# Arithmetic and comparisons


def _add(reader: Reader, node: fx.Node, a: Any, b: Any, *, alpha: int = 1) -> Value:
    left, right, shape = reader.either(a), reader.either(b), shape_of(node)
    masks = [x for x in (left, right) if isinstance(x, Added)]
    if masks and alpha == 1 and all(isinstance(x, Added) or _is_zero(x) for x in (left, right)):
        return Added(both(shape, *(m.seen for m in masks)))
    return sum_of(affine(left, shape), affine(right, shape), alpha)


def _is_zero(x: Any) -> bool:
    return isinstance(x, Number) and x.value == 0


def _sub(reader: Reader, node: fx.Node, a: Any, b: Any, *, alpha: int = 1) -> Value:
    shape = shape_of(node)
    return sum_of(affine(reader.either(a), shape), affine(reader.either(b), shape), -alpha)


def _times(reader: Reader, node: fx.Node, a: Any, b: Any) -> Value:
    """A product of conditions, or of 1 and 0 with a number far below."""
    left, right, shape = reader.either(a), reader.either(b), shape_of(node)
    if isinstance(left, Ones) and isinstance(right, (int, float)) and right <= BLOCKED:
        return Added(opposite(left.seen))
    if isinstance(left, Affine) and isinstance(right, int):
        whole = affine(left, shape)
        return sum_of(affine(0, shape), whole, right)
    if isinstance(left, Ones) and isinstance(right, Ones):
        return Ones(both(shape, left.seen, right.seen))
    return both(shape, condition_of(left, shape), condition_of(right, shape))


def _rsub(reader: Reader, node: fx.Node, a: Any, b: Any, alpha: int = 1) -> Value:
    source = reader.either(a)
    if isinstance(source, Ones) and b == alpha == 1:
        return Ones(opposite(source.seen))
    return _sub(reader, node, b, a, alpha=alpha)


def _neg(reader: Reader, node: fx.Node, a: fx.Node) -> Value:
    shape = shape_of(node)
    return sum_of(affine(0, shape), affine(reader.value(a), shape), -1)


def _compare(flip: bool, strict: bool) -> Callable[..., Value]:
    """Returns the rule of a <= b (or <, if strict), or with ``flip`` of a >= b."""

    def rule(reader: Reader, node: fx.Node, a: Any, b: Any) -> Value:
        shape = shape_of(node)
        low, high = affine(reader.either(a), shape), affine(reader.either(b), shape)
        if flip:
            low, high = high, low
        return Condition.of(shape, [[sum_of(high, low, -1, -int(strict))]])

    return rule


def _equals(same: bool) -> Callable[..., Value]:
    """Returns the rule of == or !=."""

    def rule(reader: Reader, node: fx.Node, a: fx.Node, b: Any) -> Value:
        source, shape = reader.value(a), shape_of(node)
        if isinstance(source, Ones) and b in (0, 1):
            return source.seen if same == bool(b) else opposite(source.seen)
        left, right = affine(source, shape), affine(reader.either(b), shape)
        equal = Condition.of(shape, [[sum_of(left, right, -1)], [sum_of(right, left, -1)]])
        return equal if same else opposite(equal)

    return rule


# What finds the texts in a row of several: differences of positions, their sums, and what stands at a position


def _diff(
    reader: Reader,
    node: fx.Node,
    x: fx.Node,
    n: int = 1,
    dim: int = -1,
    before: Any = None,
    after: Any = None,
) -> Value:
    shape, source = shape_of(node), reader.value(x)
    if n != 1 or before is None or after is not None or shape_of(before)[dim] != 1:
        raise NotShown("the mask has differences of another kind")
    if isinstance(source, Affine) and source.data:
        raise NotShown("the mask has differences of data")
    step = affine(source, shape).factors[dim]
    to_first = sum_of(affine(source, shape), affine(reader.value(before), shape), -1)
    factors = tuple(0 if d == dim % len(shape) else f for d, f in enumerate(to_first.factors))
    if any(factors) or to_first.constant != step:
        raise NotShown("the mask has differences that are not all the same")
    return Affine(shape, factors, step)


def _cumsum(reader: Reader, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> Value:
    if reader.value(x) != filled(x, False):
        raise NotShown("the mask depends on a running sum")
    return filled(node, 0)


def _index(reader: Reader, node: fx.Node, x: fx.Node, indices: Sequence[fx.Node | None]) -> Value:
    shape, source = shape_of(node), reader.value(x)
    if not isinstance(source, Affine) or source.data or len(indices) != len(source.shape) or None in indices:
        raise NotShown("the mask is indexed by tensors")
    made = Affine(shape, (0,) * len(shape), source.constant)
    for factor, index in zip(source.factors, indices, strict=True):
        made = sum_of(made, affine(reader.either(index), shape), factor)
    return made


# Logic


def _both(reader: Reader, node: fx.Node, a: fx.Node, b: fx.Node) -> Value:
    shape = shape_of(node)
    return both(shape, *(condition_of(reader.value(x), shape) for x in (a, b)))


def _any(reader: Reader, node: fx.Node, a: fx.Node, b: fx.Node) -> Value:
    shape = shape_of(node)
    left, right = (condition_of(reader.value(x), shape) for x in (a, b))
    return either(shape, left, right)


def _negated(reader: Reader, node: fx.Node, a: fx.Node) -> Value:
    return opposite(condition_of(reader.value(a), shape_of(node)))


def _chosen(shape: Sequence[int], condition: Condition, there: Any, elsewhere: Any) -> Value:
    """Returns a mask that is added, from a choice between numbers and masks."""
    condition = condition_of(condition, shape)
    parts = []
    for when, x in ((condition, there), (opposite(condition), elsewhere)):
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            x = Number(tuple(shape), float(x))
        if isinstance(x, Affine) and not any(x.factors) and not x.data:
            x = Number(x.shape, float(x.constant))
        if isinstance(x, Number) and x.value <= BLOCKED:
            parts.append(opposite(when))
        elif isinstance(x, Added):
            parts.append(either(shape, opposite(when), x.seen))
        elif not _is_zero(x):
            raise NotShown("the mask holds numbers that are neither 0 nor far below")
    return Added(both(shape, *parts))


def _where(reader: Reader, node: fx.Node, condition: fx.Node, there: Any, elsewhere: Any) -> Value:
    shape = shape_of(node)
    at = condition_of(reader.value(condition), shape)
    left, right = reader.either(there), reader.either(elsewhere)
    if isinstance(left, Condition) and isinstance(right, Condition):
        return both(shape, either(shape, opposite(at), left), either(shape, at, right))
    return _chosen(shape, at, left, right)


def _masked_fill(reader: Reader, node: fx.Node, x: fx.Node, condition: fx.Node, value: Any) -> Value:
    shape = shape_of(node)
    at, source = condition_of(reader.value(condition), shape), reader.value(x)
    if isinstance(source, Condition) and not isinstance(value, fx.Node):
        return either(shape, at, source) if value else both(shape, opposite(at), source)
    return _chosen(shape, at, reader.either(value), source)


def _triangle(lower: bool) -> Callable[..., Value]:
    """Returns the rule of tril, which keeps column <= row + diagonal, or of triu."""

    def rule(reader: Reader, node: fx.Node, x: fx.Node, diagonal: int = 0) -> Value:
        shape, source = shape_of(node), reader.value(x)
        sign = 1 if lower else -1
        factors = [0] * (len(shape) - 2) + [sign * int(shape[-2] > 1), -sign * int(shape[-1] > 1)]
        kept = Condition.of(shape, [[Affine(shape, tuple(factors), sign * diagonal)]])
        if isinstance(source, Condition):
            return both(shape, kept, source)
        if isinstance(source, Number) and source.value <= BLOCKED:  # 0 elsewhere
            return Added(opposite(kept))
        constant = isinstance(source, Number) or (
            isinstance(source, Affine) and not any(source.factors) and not source.data
        )
        if constant:
            one = source.value if isinstance(source, Number) else source.constant  # type: ignore[union-attr]
            if one == 1:
                return Ones(kept)
        raise NotShown("a triangle of other numbers than 1 or minus infinity")

    return rule


def _rules() -> Iterator[tuple[Any, Callable[..., Any]]]:
    for op in (aten.permute.default,):
        yield op, _permute
    for op in (aten.transpose.int, aten.swapaxes.default, aten.t.default, aten.mT.default):
        yield op, _transpose
    yield aten.unsqueeze.default, _unsqueeze
    for op in (
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.flatten.using_ints,
        aten.view_as.default,
    ):
        yield op, _by_size
    for op in (aten.expand.default, aten.expand_as.default):
        yield op, _expand
    for op in (
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.contiguous.default,
        aten.lift_fresh_copy.default,
    ):
        yield op, _same
    yield aten.slice.Tensor, _slice
    yield aten.select.int, _select
    for op in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        yield op, _arange
    for op in (aten.full.default, aten.full_like.default, aten.new_full.default):
        yield op, _full
    yield aten.scalar_tensor.default, _scalar
    for op in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        yield op, _constant(0)
    for op in (aten.ones.default, aten.ones_like.default, aten.new_ones.default):
        yield op, _constant(1)
    for op in (
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten._to_copy.default,
        aten.type_as.default,
    ):
        yield op, _to
    for op in (aten.add.Tensor, aten.add.Scalar):
        yield op, _add
    for op in (aten.sub.Tensor, aten.sub.Scalar):
        yield op, _sub
    for op in (aten.rsub.Tensor, aten.rsub.Scalar):
        yield op, _rsub
    yield aten.neg.default, _neg
    for name, flip, strict in (
        ("le", False, False),
        ("lt", False, True),
        ("ge", True, False),
        ("gt", True, True),
    ):
        for overload in ("Tensor", "Scalar"):
            yield getattr(getattr(aten, name), overload), _compare(flip, strict)
    for name, same in (("eq", True), ("ne", False)):
        for overload in ("Tensor", "Scalar"):
            yield getattr(getattr(aten, name), overload), _equals(same)
    yield aten.diff.default, _diff
    yield aten.cumsum.default, _cumsum
    yield aten.index.Tensor, _index
    for op in (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor):
        yield op, _both
    for op in (aten.mul.Tensor, aten.mul.Scalar):
        yield op, _times
    for op in (aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor):
        yield op, _any
    for op in (aten.logical_not.default, aten.bitwise_not.default):
        yield op, _negated
    yield aten.where.self, _where
    yield aten.where.ScalarSelf, _where
    yield aten.where.ScalarOther, _where
    yield aten.where.Scalar, _where
    yield aten.masked_fill.Scalar, _masked_fill
    yield aten.masked_fill.Tensor, _masked_fill
    yield aten.tril.default, _triangle(lower=True)
    yield aten.triu.default, _triangle(lower=False)


RULES: dict[Any, Callable[..., Value]] = dict(_rules())
