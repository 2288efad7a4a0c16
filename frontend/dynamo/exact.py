"""Ops rewritten where torch-mlir or IREE compute other values than torch, or nothing at all.

Each is a decomposition in AOTAutograd's sense: it returns NotImplemented where the op is right as it is. Each says what is wrong
upstream; the minimal case of each is in ``tests/conformance/test_extremes.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table, get_decompositions
from torch._prims_common import elementwise_dtypes

aten = torch.ops.aten
_KIND = torch._prims_common.ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT

EXACT: dict[Any, Callable[..., Any]] = {}


def _replaces(*ops: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        EXACT.update(dict.fromkeys(ops, function))
        return function

    return note


def _constant(value: Any, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    made: Tensor = aten.full.default([], value, dtype=dtype or like.dtype, device=like.device)
    return made


def _axes(dims: Sequence[int], rank: int) -> list[int]:
    return sorted(d % rank for d in dims) if rank else []


@_replaces(aten.squeeze.dims)
def squeeze(x: Tensor, dims: Sequence[int]) -> Tensor:
    """torch-mlir has no squeeze of several axes. (The decomposition of ``squeeze.dim``, into this, is left out.)"""
    for d in reversed(_axes(dims, x.dim())):
        x = aten.squeeze.dim(x, d)
    return x


@_replaces(aten.gelu.default)
def gelu(x: Tensor, approximate: str = "none") -> Any:
    """torch-mlir rounds a constant of the tanh form: 3e-5 off."""
    if approximate == "none":
        return NotImplemented
    return decomposition_table[aten.gelu.default](x, approximate=approximate)


@_replaces(aten.elu.default)
def elu(x: Tensor, *args: Any) -> Any:
    """torch-mlir computes exp(x) - 1, in the type of x: inaccurate near 0."""
    return decomposition_table[aten.elu.default](x, *args)


@_replaces(aten.maximum.default)
def maximum(a: Tensor, b: Tensor) -> Any:
    """torch-mlir forgets NaN in the first operand, and the sign of uint8."""
    return _pick(a, b, aten.gt.Tensor)


@_replaces(aten.minimum.default)
def minimum(a: Tensor, b: Tensor) -> Any:
    return _pick(a, b, aten.lt.Tensor)


def _pick(a: Tensor, b: Tensor, compare: Callable[..., Tensor]) -> Any:
    if torch.result_type(a, b).is_floating_point:
        a, b = _promoted(a, b)
        return aten.where.self(aten.logical_or.default(compare(a, b), aten.isnan.default(a)), a, b)
    return NotImplemented if _is_alike(a, b) else aten.where.self(compare(a, b), *_promoted(a, b))


def _promoted(*values: Any) -> tuple[Any, ...]:
    _, dtype = elementwise_dtypes(*(v for v in values if v is not None), type_promotion_kind=_KIND)
    return tuple(
        (v if v.dtype == dtype else aten._to_copy.default(v, dtype=dtype)) if isinstance(v, Tensor) else v
        for v in values
    )


@_replaces(aten.fmax.default)
def fmax(a: Tensor, b: Tensor) -> Any:
    return _pick_number(a, b, aten.ge.Tensor)


@_replaces(aten.fmin.default)
def fmin(a: Tensor, b: Tensor) -> Any:
    return _pick_number(a, b, aten.le.Tensor)


def _pick_number(a: Tensor, b: Tensor, compare: Callable[..., Tensor]) -> Any:
    a, b = _promoted(a, b)
    return aten.where.self(aten.logical_or.default(compare(a, b), aten.isnan.default(b)), a, b)


@_replaces(aten.clamp.default, aten.clamp.Tensor)
def clamp(x: Tensor, min: Any = None, max: Any = None) -> Any:
    """torch-mlir's clamps and hardtanh lose NaN, and it knows bounds that are tensors for some ranks only."""
    x, min, max = _promoted(x, min, max)
    for bound, beyond in ((min, aten.lt.Tensor), (max, aten.gt.Tensor)):
        if bound is None:
            continue
        limit = bound if isinstance(bound, Tensor) else _constant(bound, x)
        outside = beyond(x, limit)
        if isinstance(bound, Tensor) and x.is_floating_point():
            outside = aten.logical_or.default(outside, aten.isnan.default(limit))
        x = aten.where.self(outside, limit, x)
    return x


@_replaces(aten.hardtanh.default)
def hardtanh(x: Tensor, min_val: Any = -1, max_val: Any = 1) -> Any:
    return clamp(x, min_val, max_val) if x.is_floating_point() else clamp(x, int(min_val), int(max_val))


@_replaces(aten.clamp_min.default, aten.clamp_min.Tensor)
def clamp_min(x: Tensor, min: Any) -> Any:
    return clamp(x, min, None)


@_replaces(aten.clamp_max.default, aten.clamp_max.Tensor)
def clamp_max(x: Tensor, max: Any) -> Any:
    return clamp(x, None, max)


@_replaces(aten.sin.default)
def sin(x: Tensor) -> Any:
    """IREE approximates the sine of large arguments badly (1e-4 off at 1e4, infinite at 1e10)."""
    return _sine(x, 0.0)


@_replaces(aten.cos.default)
def cos(x: Tensor) -> Any:
    return _sine(x, 0.5)


_reduced = [False]


def _sine(x: Tensor, shift: float) -> Any:
    """Takes half turns off first, in f64; beyond 2**40, where numbers are many turns apart, the result is 0."""
    if x.dtype is torch.float64 or _reduced[0]:
        return NotImplemented
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    x = x if x.is_floating_point() else aten._to_copy.default(x, dtype=dtype)
    wide = aten._to_copy.default(x, dtype=torch.float64)
    turns = aten.round.default(aten.add.Tensor(aten.mul.Tensor(wide, 1 / math.pi), shift))
    angle = aten.sub.Tensor(wide, aten.mul.Tensor(aten.sub.Tensor(turns, shift), math.pi))
    near = aten.lt.Scalar(aten.abs.default(wide), 2.0**40)
    angle = aten.where.self(near, angle, aten.mul.Tensor(wide, 0.0))
    odd = aten.sub.Tensor(turns, aten.mul.Tensor(aten.floor.default(aten.mul.Tensor(turns, 0.5)), 2.0))
    sign = aten.add.Tensor(aten.mul.Tensor(odd, -2.0), 1.0)
    sign = aten.where.self(aten.lt.Scalar(angle, 0.0), aten.mul.Tensor(sign, -1.0), sign)
    sign = aten._to_copy.default(sign, dtype=torch.float32)
    _reduced[0] = True
    try:  # of a small negative number IREE takes the cosine of nearly a quarter turn
        found = aten.sin.default(aten._to_copy.default(aten.abs.default(angle), dtype=torch.float32))
    finally:
        _reduced[0] = False
    found = aten.mul.Tensor(found, sign)
    return found if dtype is torch.float32 else aten._to_copy.default(found, dtype=dtype)


@_replaces(aten.log10.default)
def log10(x: Tensor) -> Any:
    """IREE calls ``log10f`` of a C library that it is not linked with."""
    if x.dtype is torch.float64:
        return NotImplemented
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    found = aten.mul.Tensor(aten.log.default(aten._to_copy.default(x, dtype=torch.float32)), 1 / math.log(10))
    return found if dtype is torch.float32 else aten._to_copy.default(found, dtype=dtype)


@_replaces(aten.neg.default)
def neg(x: Tensor) -> Any:
    """torch-mlir negates integers as f64."""
    return NotImplemented if x.is_floating_point() or x.is_complex() else aten.mul.Tensor(x, _constant(-1, x))


@_replaces(aten.div.Tensor_mode, aten.div.Scalar_mode)
def divide(a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    """torch-mlir divides integers with rounding down as f64, and crashes on a number with bytes."""
    if (
        isinstance(b, Tensor)
        or not isinstance(b, int)
        or rounding_mode is None
        or a.dtype in (torch.bool, torch.uint8)
    ):
        return NotImplemented
    if a.is_floating_point() or a.is_complex():
        return NotImplemented
    b = _constant(b, a)
    whole = aten.div.Tensor_mode(a, b, rounding_mode="trunc")
    if rounding_mode == "trunc":
        return whole
    rest = aten.sub.Tensor(a, aten.mul.Tensor(whole, b))
    apart = aten.ne.Tensor(aten.lt.Scalar(rest, 0), aten.lt.Scalar(b, 0))
    down = aten.logical_and.default(aten.ne.Scalar(rest, 0), apart)
    return aten.sub.Tensor(whole, aten._to_copy.default(down, dtype=whole.dtype))


@_replaces(aten.remainder.Scalar)
def remainder(x: Tensor, divisor: Any) -> Any:
    return aten.remainder.Tensor(x, _constant(divisor, x)) if x.dtype is torch.int8 else NotImplemented


@_replaces(aten.pow.Tensor_Scalar)
def power(x: Tensor, exponent: Any) -> Any:
    """torch-mlir raises no integers to a power, and halfs without the precision of f32."""
    if x.dtype in (torch.float16, torch.bfloat16):
        wide = aten._to_copy.default(x, dtype=torch.float32)
        return aten._to_copy.default(aten.pow.Tensor_Scalar(wide, exponent), dtype=x.dtype)
    if x.is_floating_point() or x.is_complex() or x.dtype is torch.bool or not isinstance(exponent, int):
        return NotImplemented
    if not 0 < exponent <= 4:
        return NotImplemented
    found = x
    for _ in range(exponent - 1):
        found = aten.mul.Tensor(found, x)
    return found


@_replaces(aten.pow.Tensor_Tensor)
def power_of_tensors(x: Tensor, exponent: Tensor) -> Any:
    """IREE computes exp(y * log(x)) in f32: NaN for zero and below, and few digits where y * log(x) is large."""
    dtype = torch.result_type(x, exponent)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return NotImplemented
    x, y = (aten._to_copy.default(v, dtype=torch.float64) for v in _promoted(x, exponent))
    return aten._to_copy.default(_wide_power(x, y), dtype=dtype)


@_replaces(aten.pow.Scalar)
def power_of_number(base: Any, exponent: Tensor) -> Any:
    if base > 0:
        return NotImplemented
    return power_of_tensors(_constant(base, exponent, torch.result_type(base, exponent)), exponent)


def _wide_power(x: Tensor, y: Tensor) -> Tensor:
    """Computes x^y of f64 that hold f32, of which exp and log then lose no digit; the cases are those of C's pow."""
    one, nan, infinite = (_constant(c, x) for c in (1.0, math.nan, math.inf))
    size, lowest = aten.abs.default(x), aten.floor.default(y)
    bounded = clamp(y, -1e11, 1e11)  # so that 1 to any power is 1; other f32 are 0 or infinite there
    found = aten.exp.default(aten.mul.Tensor(bounded, aten.log.default(size)))
    half = aten.mul.Tensor(y, 0.5)
    odd = aten.eq.Scalar(aten.sub.Tensor(half, aten.floor.default(half)), 0.5)  # not of infinity
    signed = aten.where.self(aten.eq.Scalar(x, 0.0), aten.div.Tensor(one, x), x)  # of -0, too
    turned = aten.logical_and.default(odd, aten.lt.Scalar(signed, 0.0))
    found = aten.where.self(turned, aten.neg.default(found), found)
    below = aten.logical_and.default(aten.lt.Scalar(x, 0.0), aten.lt.Tensor(size, infinite))
    broken = aten.logical_and.default(below, aten.ne.Tensor(lowest, y))
    found = aten.where.self(broken, nan, found)
    sure = aten.logical_or.default(aten.eq.Scalar(y, 0.0), aten.eq.Scalar(x, 1.0))  # whatever the other is
    power: Tensor = aten.where.self(sure, one, found)
    return power


@_replaces(aten.reciprocal.default)
def reciprocal(x: Tensor) -> Any:
    """torch-mlir asserts that no element is 0."""
    return aten.div.Tensor(_constant(1, x), x)


@_replaces(aten.arange.start_step)
def arange(*args: Any, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """torch-mlir crashes on a range of bytes, of which torch makes the identity matrix."""
    if dtype is not torch.uint8:
        return NotImplemented
    wide = aten.arange.start_step(*args, dtype=torch.int32, **options)
    return aten._to_copy.default(wide, dtype=torch.uint8)


@_replaces(aten.empty_permuted.default)
def empty_permuted(size: Sequence[Any], physical_layout: Sequence[int], **options: Any) -> Any:
    """torch-mlir knows memory in the usual order alone."""
    made = aten.empty.memory_format([size[d] for d in physical_layout], **options)
    if list(physical_layout) == sorted(physical_layout):
        return made
    return aten.permute.default(made, [list(physical_layout).index(d) for d in range(len(size))])


@_replaces(aten.eq.Tensor)
def equal(a: Tensor, b: Tensor) -> Any:
    """torch-mlir takes ``x == x`` for true, which it is not for NaN."""
    if a is b and a.is_floating_point():
        return aten.logical_not.default(aten.isnan.default(a))
    return _alike(aten.eq.Tensor)(a, b)


for _name in ("bitwise_or", "bitwise_xor", "bitwise_and"):
    _packet = getattr(aten, _name)

    def _with_tensor(x: Tensor, value: Any, packet: Any = _packet) -> Any:
        """torch-mlir lacks the form with a number."""
        return packet.Tensor(x, _constant(value, x, torch.result_type(x, value)))

    EXACT[_packet.Scalar] = _with_tensor


@_replaces(aten.constant_pad_nd.default)
def constant_pad(x: Tensor, pad: Sequence[int], value: Any = 0) -> Any:
    """IREE stops at negative padding: takes the slice first."""
    if all(not isinstance(p, int) or p >= 0 for p in pad):
        return NotImplemented
    for i in range(len(pad) // 2):
        axis, before, after = x.dim() - 1 - i, pad[2 * i], pad[2 * i + 1]
        start, end = max(-before, 0), x.shape[axis] - max(-after, 0)
        x = aten.slice.Tensor(x, axis, start, end)
    rest = [max(p, 0) for p in pad]
    return aten.constant_pad_nd.default(x, rest, value) if any(rest) else aten.clone.default(x)


def _with_axis(op: Any) -> Callable[..., Any]:
    """torch-mlir hangs or stops where an op along an axis is given a tensor without axes."""

    def function(x: Tensor, dim: int, *args: Any, **kwargs: Any) -> Any:
        if x.dim():
            return NotImplemented
        return aten.squeeze.dim(op(aten.unsqueeze.default(x, 0), 0, *args, **kwargs), 0)

    return function


EXACT |= {
    op: _with_axis(op) for op in (aten._softmax.default, aten._log_softmax.default, aten.cumsum.default)
}


@_replaces(aten.amax.default)
def amax(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    return _over_all(aten.amax.default, x, dim, keepdim)


@_replaces(aten.amin.default)
def amin(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    return _over_all(aten.amin.default, x, dim, keepdim)


def _over_all(op: Any, x: Tensor, dim: Sequence[int], keepdim: bool) -> Any:
    """torch-mlir wants the axes named."""
    if not x.dim():
        return aten.clone.default(x)
    return NotImplemented if len(dim) else op(x, list(range(x.dim())), keepdim)


def _flattened(op: Any) -> Callable[..., Any]:
    """IREE stops at a reduction of several axes of a product that broadcasts: makes neighbouring axes one."""

    def function(x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, **kwargs: Any) -> Any:
        axes = _axes(dim, x.dim()) if dim else list(range(x.dim()))
        first, count = (axes[0], len(axes)) if axes else (0, 0)
        neighbours = axes == list(range(first, first + count))
        if count < 2 or not neighbours or not all(isinstance(n, int) and n for n in x.shape):
            return NotImplemented
        joined = aten.reshape.default(x, [*x.shape[:first], -1, *x.shape[first + count :]])
        found = op(joined, [first], False, **kwargs)
        for axis in axes if keepdim else []:
            found = aten.unsqueeze.default(found, axis)
        return found

    return function


EXACT |= {op: _flattened(op) for op in (aten.sum.dim_IntList, aten.mean.dim)}


@_replaces(aten.sum.default)
def total(x: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    return (
        aten.sum.dim_IntList(x, list(range(x.dim())), False, dtype=dtype) if x.dim() > 1 else NotImplemented
    )


@_replaces(aten.mean.default)
def average(x: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    return aten.mean.dim(x, list(range(x.dim())), False, dtype=dtype) if x.dim() > 1 else NotImplemented


@_replaces(aten.max.default)
def largest(x: Tensor) -> Any:
    return aten.amax.default(x, list(range(x.dim())))


@_replaces(aten.min.default)
def smallest(x: Tensor) -> Any:
    return aten.amin.default(x, list(range(x.dim())))


@_replaces(aten.max.dim)
def largest_along(x: Tensor, dim: int, keepdim: bool = False) -> Any:
    return _value_and_index(aten.amax.default, aten.argmax.default, x, dim, keepdim)


@_replaces(aten.min.dim)
def smallest_along(x: Tensor, dim: int, keepdim: bool = False) -> Any:
    return _value_and_index(aten.amin.default, aten.argmin.default, x, dim, keepdim)


def _value_and_index(value: Any, index: Any, x: Tensor, dim: int, keepdim: bool) -> Any:
    """There is no lowering of both at once. Where only one is read the other falls away."""
    if not x.dim():
        return aten.clone.default(x), _constant(0, x, torch.int64)
    if not x.is_floating_point():
        comparable = aten._to_copy.default(x, dtype=torch.int8) if x.dtype is torch.bool else x
        return value(x, [dim], keepdim), index(comparable, dim, keepdim)
    best = value(x, [dim], True)
    found = best, _first_equal(x, best, dim)
    return found if keepdim else tuple(aten.squeeze.dim(part, dim) for part in found)


@_replaces(aten.argmax.default)
def place_of_largest(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    return _place(aten.amax.default, aten.argmax.default, x, dim, keepdim)


@_replaces(aten.argmin.default)
def place_of_smallest(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    return _place(aten.amin.default, aten.argmin.default, x, dim, keepdim)


def _place(value: Any, index: Any, x: Tensor, dim: int | None, keepdim: bool) -> Any:
    """torch-mlir skips NaN, and stops at tensors without axes."""
    if not x.dim():
        return _constant(0, x, torch.int64)
    if not x.is_floating_point():
        return NotImplemented
    if dim is None:
        found = index(aten.reshape.default(x, [-1]), 0, keepdim)
        return aten.reshape.default(found, [1] * x.dim()) if keepdim else found
    found = _first_equal(x, value(x, [dim], True), dim)
    return found if keepdim else aten.squeeze.dim(found, dim)


def _first_equal(x: Tensor, best: Tensor, dim: int) -> Tensor:
    """Returns where the best along an axis stands first, and that axis of size 1; the best is NaN where there is one."""
    dim %= x.dim()
    place = aten.arange.default(x.shape[dim], dtype=torch.int64, device=x.device)
    place = aten.reshape.default(place, [-1 if d == dim else 1 for d in range(x.dim())])
    hit = aten.logical_or.default(aten.eq.Tensor(x, best), aten.isnan.default(x))
    none = _constant(torch.iinfo(torch.int64).max, place)
    first: Tensor = aten.amin.default(aten.where.self(hit, place, none), [dim], True)
    return first


@_replaces(aten.new_empty_strided.default)
def new_empty_strided(x: Tensor, size: Sequence[int], stride: Sequence[int], **kwargs: Any) -> Any:
    """torch-mlir has tensors in the order of their axes only: makes one, whose axes it permutes."""
    order = sorted(range(len(size)), key=lambda d: (-stride[d], d))
    expected = 1
    for d in reversed(order):
        if size[d] != 1 and stride[d] != expected:
            return NotImplemented
        expected *= size[d]
    made = aten.empty.memory_format(
        [size[d] for d in order],
        dtype=kwargs.get("dtype") or x.dtype,
        device=kwargs.get("device") or x.device,
    )
    return (
        made
        if order == list(range(len(size)))
        else aten.permute.default(made, [order.index(d) for d in range(len(size))])
    )


@_replaces(aten._to_copy.default)
def cast(x: Tensor, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """torch-mlir takes uint8 for int8 when it widens, and ends at 127 when it makes one of a floating number."""
    if torch.uint8 not in (x.dtype, dtype) or dtype in (None, x.dtype, torch.bool) or x.dtype is torch.bool:
        return NotImplemented
    if x.dtype is torch.uint8:
        wide = torch.ops.prims.convert_element_type.default(x, torch.int32)
        wide = aten.bitwise_and.Tensor(wide, _constant(255, wide))
        return wide if dtype is torch.int32 else aten._to_copy.default(wide, dtype=dtype)
    if x.is_floating_point():
        return aten._to_copy.default(aten._to_copy.default(x, dtype=torch.int32), dtype=torch.uint8)
    return NotImplemented


def _alike(op: Any) -> Callable[..., Any]:
    """torch-mlir mixes types wrongly (it extends bool and uint8 by their highest bit), or crashes: converts first."""

    def function(a: Any, b: Any, **kwargs: Any) -> Any:
        if isinstance(a, Tensor) and isinstance(b, int) and a.dtype in (torch.int8, torch.uint8):
            b = _constant(b, a)  # torch-mlir crashes on a number with bytes
        elif kwargs and isinstance(b, Tensor) and b.dtype in (torch.int8, torch.uint8):
            b = aten.mul.Tensor(b, _constant(kwargs.pop("alpha"), b))
        elif _is_alike(a, b):
            return NotImplemented
        return op(*_promoted(a, b), **kwargs)

    return function


def _is_alike(a: Any, b: Any) -> bool:
    _, dtype = elementwise_dtypes(a, b, type_promotion_kind=_KIND)
    return all(v.dtype == dtype for v in (a, b) if isinstance(v, Tensor))


for _op in (aten.add, aten.sub, aten.mul, aten.div, aten.lt, aten.le, aten.gt, aten.ge, aten.ne, aten.remainder,
            aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor):  # fmt: skip
    EXACT[_op.Tensor] = _alike(_op.Tensor)


@_replaces(aten.where.self)
def where(condition: Tensor, a: Tensor, b: Tensor) -> Any:
    return NotImplemented if _is_alike(a, b) else aten.where.self(condition, *_promoted(a, b))


EXACT |= get_decompositions([aten.linalg_vector_norm])
