"""Elementwise ops at the edges of their domains, which the samples of the op database stay away from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor


def _words(text: str) -> list[str]:
    return text.split()


INF, NAN = float("inf"), float("nan")

UNARY: dict[str, Callable[[Tensor], Any]] = {
    name: getattr(torch, name)
    for name in _words("""
    abs acos acosh asin asinh atan atanh ceil cos cosh erf exp exp2 expm1 floor isfinite isinf isnan log log10 log1p
    log2 logical_not neg reciprocal relu round rsqrt sigmoid sign sin sinh sqrt square tan tanh trunc bitwise_not
    sgn signbit frac erfc positive
    """)
}
UNARY |= {
    "elu": F.elu, "gelu": F.gelu, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu, "logsigmoid": F.logsigmoid, "mish": F.mish, "relu6": F.relu6, "selu": F.selu,
    "silu": F.silu, "softplus": F.softplus, "softsign": F.softsign, "tanhshrink": F.tanhshrink,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "clamp": lambda x: torch.clamp(x, 0, 1),
    "clamp_min": lambda x: torch.clamp(x, min=1),
    "clamp_max": lambda x: torch.clamp(x, max=1),
    "x + 1": lambda x: x + 1,
    "x + 0.5": lambda x: x + 0.5,
    "1 - x": lambda x: 1 - x,
    "x * 3": lambda x: x * 3,
    "x / 2": lambda x: x / 2,
    "x / 3": lambda x: x / 3,
    "x // 3": lambda x: x // 3,
    "x // -3": lambda x: x // -3,
    "x % 3": lambda x: x % 3,
    "x % -3": lambda x: x % -3,
    "7 // x": lambda x: 7 // x,
    "div trunc 3": lambda x: torch.div(x, 3, rounding_mode="trunc"),
    "fmod 3": lambda x: torch.fmod(x, 3),
    "fmod -3": lambda x: torch.fmod(x, -3),
    "x ** 2": lambda x: x**2,
    "x ** 3": lambda x: x**3,
    "x ** 0": lambda x: x**0,
    "x ** -1": lambda x: x**-1,
    "x ** 0.5": lambda x: x**0.5,
    "x ** -0.5": lambda x: x**-0.5,
    "x ** 2.5": lambda x: x**2.5,
    "2 ** x": lambda x: 2**x,
    "x > 0": lambda x: x > 0,
    "x <= 100": lambda x: x <= 100,
    "x == 0": lambda x: x == 0,
    "x != 1.5": lambda x: x != 1.5,
    "x < 1.5": lambda x: x < 1.5,
    "x << 1": lambda x: x << 1,
    "x >> 1": lambda x: x >> 1,
    "x & 5": lambda x: x & 5,
    "x | 5": lambda x: x | 5,
    "x ^ 5": lambda x: x ^ 5,
    "where x>0 x 0": lambda x: torch.where(x > 0, x, 0),
    "where x>0 x 0.5": lambda x: torch.where(x > 0, x, 0.5),
    "masked_fill": lambda x: x.masked_fill(x == 0, 1),
    "nan_to_num": torch.nan_to_num,
    "x.sum()": lambda x: x.sum(),
    "x.sum(0)": lambda x: x.sum(0),
    "x.prod()": lambda x: x[:6].prod(),
    "x.amax()": lambda x: x.amax(),
    "x.amin()": lambda x: x.amin(),
    "x.max(0)": lambda x: x.max(0),
    "x.min(0)": lambda x: x.min(0),
    "x.argmax()": lambda x: x.argmax(),
    "x.argmin()": lambda x: x.argmin(),
    "finite max": lambda x: x.nan_to_num(0).amax(),
    "finite argmax": lambda x: x.nan_to_num(0).argmax(),
    "finite argmin": lambda x: x.nan_to_num(0).argmin(),
    "x.any()": lambda x: x.any(),
    "x.all()": lambda x: x.all(),
    "x.mean()": lambda x: x.mean(),
    "x.var()": lambda x: x.var(),
    "x.var one": lambda x: x[:1].var(),
    "x.var correction 0": lambda x: x[:4].var(correction=0),
    "x.cumsum": lambda x: x.cumsum(0),
    "softmax": lambda x: x.softmax(0),
    "softmax -inf row": lambda x: torch.full_like(x, -INF).softmax(0),
    "log_softmax": lambda x: x.log_softmax(0),
    "flip": lambda x: x.flip(0),
    "cat": lambda x: torch.cat([x, x]),
    "repeat": lambda x: x.repeat(2),
    "full_like": lambda x: torch.full_like(x, 1),
    "x.tril": lambda x: x[:4].reshape(2, 2).tril(),
}  # fmt: skip
UNARY |= {f"to {name}": lambda x, d=dtype: x.to(d) for name, dtype in harness.DTYPES.items()}

BINARY: dict[str, Callable[[Tensor, Tensor], Any]] = {
    name: getattr(torch, name)
    for name in _words("""
    add sub mul div remainder fmod floor_divide pow maximum minimum fmax fmin atan2 eq ne lt le gt ge logical_and logical_or
    logical_xor bitwise_and bitwise_or bitwise_xor copysign hypot
    """)
}
BINARY |= {
    "div trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "where": lambda x, y: torch.where(x > y, x, y),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=2),
    "clamp tensors": lambda x, y: torch.clamp(x, y, y + 1),
    "shift left": lambda x, y: x << (y & 7),
    "shift right": lambda x, y: x >> (y & 7),
    "add 0-d": lambda x, y: x + y[0],
    "add alpha": lambda x, y: torch.add(x, y, alpha=2),
    "sub alpha": lambda x, y: torch.sub(x, y, alpha=3),
    "xlogy": torch.xlogy,
    "logaddexp": torch.logaddexp,
}
# Mixed types: the second operand is of another type than the first.
MIXED = ["add", "mul", "div", "lt", "eq", "maximum", "where", "remainder", "add 0-d"]


def values(dtype: torch.dtype) -> Tensor:
    """Returns one value of every kind that a dtype has."""
    if dtype is torch.bool:
        return torch.tensor([True, False, True, True, False])
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        found = {0, 1, 2, 3, 5, 7, 8, 100, info.max, info.max - 1, info.max // 2 + 1, info.max // 2}
        if info.min:
            found |= {-1, -2, -3, -5, -7, -8, -100, info.min, info.min + 1}
        if info.bits >= 32:
            found |= {2**24 + 1, -(2**24) - 1, 2**31 - 1}
        if info.bits == 64:
            found |= {2**53 + 1, 2**31, 2**32 + 5}
        return torch.tensor(sorted(found), dtype=dtype)
    info = torch.finfo(dtype)
    sizes = [0.0, 1e-3, 0.25, 0.5, 1.0, 1.5, 2.5, 3.0, 7.0, 88.0, 100.25, 1e4, info.max, info.tiny * 4, INF]
    sizes += [1e10, 3e9, 1e-7, 1e-30, 1e11] if info.max > 1e30 else [60000.0]
    return torch.tensor([v * sign for v in sizes for sign in (1, -1)] + [NAN], dtype=dtype)


def pairs(dtype: torch.dtype, other: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b = values(dtype), values(other)
    grid = list(itertools.product(range(len(a)), range(len(b))))
    return a[[i for i, _ in grid]].clone(), b[[j for _, j in grid]].clone()


def divides_by_zero(name: str) -> bool:
    return name in ("remainder", "fmod", "floor_divide", "div trunc", "7 // x")


def unary_samples(dtype: torch.dtype) -> Iterator[harness.Sample]:
    for name, function in UNARY.items():
        x = values(dtype)
        if divides_by_zero(name) and not dtype.is_floating_point:
            x = x[x != 0].clone()
        if name in ("sin", "cos"):
            x = x[(x.double().abs() < 2**31) | ~x.double().isfinite()].clone()  # beyond, f64 does not suffice
        if name.startswith("to ") and dtype.is_floating_point:  # what does not fit is anything
            x = x[x.abs() < 100].clone() if name in ("to i8", "to i16") else x
            x = x[(x >= 0) & (x < 200)].clone() if name == "to u8" else x
            x = x[x.abs() < 2**31].clone() if name in ("to i32", "to i64") else x
        if made := _sample(name, function, [x]):
            yield made


def binary_samples(dtype: torch.dtype) -> Iterator[harness.Sample]:
    for name, function in BINARY.items():
        others = harness.DTYPES.values() if name in MIXED else [dtype]
        for other in others:
            x, y = pairs(dtype, other)
            if divides_by_zero(name) and not torch.result_type(x, y).is_floating_point:
                fits = (y != 0) & (
                    (y != -1) | (x > 0)
                )  # the least integer divided by -1 crashes torch itself
                x, y = x[fits].clone(), y[fits].clone()
            if name == "remainder" and torch.result_type(x, y).is_floating_point:
                fits = ~((x.double() / y.double()).abs() > 1e6)  # torch gives up on larger quotients: NaN
                x, y = x[fits].clone(), y[fits].clone()
            if name == "pow" and not dtype.is_floating_point:
                x, y = x[y >= 0].clone(), y[y >= 0].clone()
            if made := _sample(f"{name} {str(other)[6:]}" if other != dtype else name, function, [x, y]):
                yield made


def _sample(name: str, function: Callable[..., Any], tensors: list[Tensor]) -> harness.Sample | None:
    """Returns the call, if torch allows it for these types."""

    def run(given: Sequence[Tensor]) -> list[Tensor]:
        return torch.utils._pytree.tree_leaves(function(*given))

    if tensors[0].dtype is torch.bool and ("<<" in name or ">>" in name or name.startswith("shift")):
        return None  # torch itself does not trace these
    try:
        run(tensors)
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    return harness.Sample(run, tensors, name)


# Differences of nearly equal numbers, whose last bits depend on how they are written.
CANCELS = (
    "elu",
    "selu",
    "gelu",
    "gelu tanh",
    "tanhshrink",
    "erf",
    "logaddexp",
    "silu",
    "mish",
    "softplus",
    "logsigmoid",
)


def difference(name: str, actual: Tensor, expected: Tensor, given: Sequence[Tensor]) -> str:
    """Returns where two results differ, by an example: integers, infinities and NaN must be equal."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return f"{actual.dtype} {list(actual.shape)} instead of {expected.dtype} {list(expected.shape)}"
    if expected.dtype.is_floating_point:
        x, y = actual.double(), expected.double()
        rtol = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[
            expected.dtype
        ]
        tiny = torch.finfo(expected.dtype).tiny if name not in CANCELS else 1e-7
        good = (x == y) | (x.isnan() & y.isnan()) | ((x - y).abs() <= rtol * y.abs() + 64 * tiny)
    else:
        good = actual == expected
    if good.all():
        return ""
    at = int((~good).flatten().nonzero()[0])
    from_ = [t.flatten()[at].item() for t in given if t.shape == expected.shape]
    a, e = actual.flatten()[at].item(), expected.flatten()[at].item()
    return f"{int((~good).sum())} of {good.numel()}: {a} instead of {e} for {from_}"
