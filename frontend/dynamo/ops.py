"""Which ops are compiled, which are left to torch, and why: the one table that decides.

Every op of a graph falls into one class:

* ``VIEW``: another shape or stride of the same memory; free, taken into whichever region reads it.
* ``COMPILED``: elementwise ops, reductions and the like, which gain from being fused.
* ``LIBRARY``: torch's kernel is faster than generated code (matrix products, convolutions, attention), or nothing is gained by
  fusing it (sorting, scattering). With the option ``library=False`` those that can be compiled are.
* ``KERNEL``: an op of ours that runs on a kernel of the target inside torch (`on_device`).
* ``EAGER``: no lowering that is known to be right. Reported, and an error in strict mode.

The conformance run (``tests/conformance``) holds this table to what was tried, op by op and dtype by dtype.
"""

from __future__ import annotations

import enum
import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from spikingbrain.frontend.checks import draws_random_numbers
from spikingbrain.frontend.dynamo.loops import SCAN, body_of

aten = torch.ops.aten


class Kind(enum.Enum):
    """What becomes of an op."""

    VIEW = "view"
    COMPILED = "compiled"
    LIBRARY = "library"
    EAGER = "eager"
    KERNEL = "kernel"  # an op of ours on a kernel that the target has inside torch
    SCALAR = "scalar"  # arithmetic on sizes, done in Python


@dataclass(frozen=True)
class Verdict:
    """The class of one op in one place, with the reason and what a user could do where it is not compiled.

    ``failed`` tells that the compiler itself stopped on it.
    """

    kind: Kind
    reason: str = ""
    remedy: str = ""
    failed: bool = False


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


VIEWS = _names("""
view _unsafe_view reshape permute transpose t unsqueeze squeeze expand slice select alias detach
split_with_sizes split unbind diagonal view_as
""")

COMPILED = _names("""
abs acos acosh add addcdiv addcmul all amax amin any arange argmax argmin asin asinh atan atan2 atanh bitwise_and
bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor cat ceil clamp clamp_max clamp_min clone
constant_pad_nd copy cos cosh div elu empty eq erf exp exp2 expm1 fill floor fmod full full_like ge gelu gt hardtanh
isinf isnan le leaky_relu lerp lift_fresh_copy log log10 log1p log2 logical_and logical_not logical_or logical_xor lt
maximum mean minimum mul ne neg pow prod reciprocal relu remainder repeat round rsqrt rsub scalar_tensor sigmoid sign
silu sin sinh softplus sqrt square stack sub sum tan tanh tril triu trunc var var_mean where _to_copy _softmax
_log_softmax to prims::convert_element_type masked_fill ones_like zeros_like zeros ones flip
""")
RECURRENCES = _names("linear_recurrence linear_scan selective_scan")  # our own
SPIKES = _names("spike_encode spike_linear spike_grouped_linear")
EXPERTS = _names("grouped_linear grouped_outer")
OURS = RECURRENCES | SPIKES | EXPERTS

# Left to torch, with the reason. Those in BOTH are compiled when `library=False`.
_PRODUCTS = _names("mm bmm addmm baddbmm dot mv matmul linear addmv addbmm _int_mm")
_CONVOLUTIONS = _names("""
convolution convolution_backward mkldnn_convolution _mkldnn_rnn_layer max_pool2d_with_indices
max_pool2d_with_indices_backward avg_pool2d avg_pool2d_backward _adaptive_avg_pool2d _adaptive_avg_pool2d_backward
max_pool3d_with_indices avg_pool3d avg_pool1d adaptive_max_pool2d upsample_bilinear2d upsample_nearest2d
upsample_bicubic2d upsample_bilinear2d_backward upsample_nearest2d_backward upsample_bicubic2d_backward
grid_sampler_2d grid_sampler_2d_backward im2col col2im _upsample_bilinear2d_aa
""")
_ATTENTION = _names("""
_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward
""")
_MOVING = _names("""
sort topk argsort cumsum cumprod cummax cummin logcumsumexp slice_scatter select_scatter as_strided_scatter as_strided
unfold searchsorted bucketize histc bincount kthvalue median mode masked_scatter roll diagonal_scatter
""")
# Compiled code would read or write outside the tensor where torch raises IndexError.
_INDEXING = _names("""
embedding index_select gather index _unsafe_index take embedding_dense_backward _embedding_bag index_put _unsafe_index_put
index_add index_copy index_fill scatter scatter_add scatter_reduce
""")
LIBRARY: dict[str, str] = {
    **dict.fromkeys(_PRODUCTS, "torch's matrix products are faster than generated ones"),
    **dict.fromkeys(_CONVOLUTIONS, "torch's kernel is faster than a generated one"),
    **dict.fromkeys(_ATTENTION, "torch has a fused kernel"),
    "linalg_solve_triangular": "torch's kernel is faster than a loop over rows",  # taken apart with library=False
    **dict.fromkeys(_MOVING, "moves elements: fusing it gains nothing"),
    **dict.fromkeys(_INDEXING, "torch checks the indices"),
}
BOTH = _names("mm bmm addmm baddbmm matmul linear convolution cumsum")

# The same bits come out for uint8 and int8.
_SIGNLESS = _names("""
add bitwise_and bitwise_not bitwise_or bitwise_xor cat clone constant_pad_nd copy empty eq fill flip full full_like
lift_fresh_copy masked_fill mul ne ones ones_like prims::convert_element_type repeat rsub scalar_tensor
stack sub tril triu where zeros zeros_like _to_copy
""")

_DTYPES = {
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
}


def packet_name(target: Any) -> str:
    """Returns ``add`` for ``aten.add.Tensor`` and for an op of ours, and the full name of anything else."""
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name
        return name.removeprefix("aten::").removeprefix("spikingbrain::")
    return str(getattr(target, "__name__", target))


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in a node's value or arguments' values."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def operands(node: fx.Node) -> Iterator[torch.Tensor]:
    for source in node.all_input_nodes:
        yield from tensors_of(source.meta.get("val"))


def classify(node: fx.Node, library: bool = True) -> Verdict:
    """Returns what becomes of a ``call_function`` node."""
    value = node.meta.get("val")
    if not isinstance(node.target, torch._ops.OpOverload):
        if isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return Verdict(Kind.SCALAR)
        if node.target is operator.getitem:  # one of several results: shares its source's fate
            return classify(node.args[0], library)
        if node.target is SCAN:
            return _classify_scan(node)
        return Verdict(Kind.EAGER, f"{packet_name(node.target)} is a higher-order op without a lowering")
    if not any(True for _ in tensors_of(value)):
        if isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)) and not any(
            isinstance(v, torch.Tensor) for v in operands(node)
        ):
            return Verdict(Kind.SCALAR)
        if packet_name(node.target) in ("sym_size", "sym_numel", "sym_stride", "sym_storage_offset"):
            return Verdict(Kind.SCALAR)
        return Verdict(Kind.EAGER, "its result is not a tensor", "keep numbers in tensors")
    if draws_random_numbers(node):
        return Verdict(
            Kind.EAGER, "draws random numbers, by torch's generator, so that torch.manual_seed holds"
        )
    if node.target._schema.is_mutable:
        return Verdict(Kind.EAGER, "writes in place")
    ours = node.target.namespace == "spikingbrain" and packet_name(node.target) in OURS
    if not ours and node.target.namespace not in ("aten", "prims"):
        return Verdict(
            Kind.EAGER, f"{node.target} is a custom op", "write it in plain PyTorch if it should be fused"
        )
    if refused := _refuse_types(node):
        return refused
    name = packet_name(node.target)
    if name == "spike_linear" and argument(node, "activation") is not None:
        return Verdict(
            Kind.LIBRARY, "weights that are trained change at every step: torch's product is exact here, too"
        )
    if name in EXPERTS:
        return Verdict(
            Kind.LIBRARY, "torch's product of each expert's rows is faster where weights may change"
        )
    if ours:
        return Verdict(Kind.COMPILED)
    if name in VIEWS:
        return Verdict(Kind.VIEW)
    if name in LIBRARY and (library or name not in BOTH):
        return Verdict(Kind.LIBRARY, LIBRARY[name])
    if name in COMPILED or name in BOTH:
        if name not in _SIGNLESS and any(
            v.dtype is torch.uint8 for v in [*operands(node), *tensors_of(value)]
        ):
            return Verdict(
                Kind.EAGER, "torch-mlir takes uint8 for int8 in everything that tells them apart", "use int32"
            )
        for when, why in _EXCEPTIONS.get(name, []):
            if when(node):
                return Verdict(Kind.EAGER, why)
        return Verdict(Kind.COMPILED)
    return Verdict(Kind.EAGER, "no lowering that is known to be right")


def _classify_scan(node: fx.Node) -> Verdict:
    """Returns what becomes of a loop over time: its body is compiled whole, or not at all."""
    body = body_of(node.args[0])
    if body is None or not node.args[2]:
        return Verdict(Kind.EAGER, "a scan over nothing" if body else "a scan whose body is not in the graph")
    if refused := _refuse_types(node):
        return refused
    for inner in body.graph.nodes:
        if inner.op != "call_function" or _is_copied_view(inner):
            continue
        verdict = classify(inner, library=False)
        if verdict.kind in (Kind.EAGER, Kind.LIBRARY):
            name = packet_name(inner.target)
            return Verdict(Kind.EAGER, f"{name} in the body of a scan: {verdict.reason}", verdict.remedy)
    return Verdict(Kind.COMPILED)


def _is_copied_view(node: fx.Node) -> bool:
    """Returns whether a node is a view that torch made a copy, as it does in bodies of higher-order ops."""
    name = packet_name(node.target)
    return name.endswith("_copy") and name.removesuffix("_copy") in VIEWS


def _refuse_types(node: fx.Node) -> Verdict | None:
    for value in [*tensors_of(node.meta.get("val")), *operands(node)]:
        if value.layout != torch.strided or value.is_quantized:
            return Verdict(Kind.EAGER, f"tensors of layout {value.layout}")
        if value.device.type != "cpu":
            return Verdict(Kind.EAGER, f"a tensor on {value.device}; the target's memory is the CPU's")
        if value.dtype not in _DTYPES:
            return Verdict(Kind.EAGER, f"element type {str(value.dtype).removeprefix('torch.')}")
        if any(isinstance(s, int) and s == 0 for s in value.shape):
            if isinstance(node.target, torch._ops.OpOverload) and packet_name(node.target) in VIEWS:
                return None  # who reads it is asked the same
            made = node.target == aten.full.default
            return Verdict(Kind.LIBRARY if made else Kind.EAGER, "a tensor without elements")
    return None


def _first(node: fx.Node) -> torch.Tensor:
    return next(
        tensors_of(node.args[0].meta["val"] if isinstance(node.args[0], fx.Node) else node.meta["val"])
    )


def _always(_: fx.Node) -> bool:
    return True


def _integer(node: fx.Node) -> bool:
    return all(not v.is_floating_point() for v in operands(node))


def _double(node: fx.Node) -> bool:
    return any(v.dtype is torch.float64 for v in [*operands(node), *tensors_of(node.meta["val"])])


def _without_axes(node: fx.Node) -> bool:
    return _first(node).dim() == 0


def _rounds(node: fx.Node) -> bool:
    return node.kwargs.get("rounding_mode") is not None and any(v.is_floating_point() for v in operands(node))


def _may_divide_by_zero(node: fx.Node) -> bool:
    """A number is all right as divisor of integers, unless it is 0, or -1, which overflows."""
    if node.target in (aten.div.Tensor, aten.div.Scalar) or not _integer(node):
        return False
    divisor = node.args[1]
    if isinstance(divisor, fx.Node):
        divisor = divisor.args[1] if divisor.target == aten.full.default else 0
    return divisor in (0, -1)


def _shifts_far(node: fx.Node) -> bool:
    """Only a number as distance is known to be less than the bits there are."""
    return isinstance(node.args[1], fx.Node) or not 0 <= node.args[1] < 8


def _transposes_by_channel(node: fx.Node) -> bool:
    return (
        bool(argument(node, "transposed"))
        and argument(node, "groups") > 1
        and node.args[1].meta["val"].shape[1] == 1
    )


def _reduces(node: fx.Node) -> bool:
    return "reduce" in node.target._overloadname


def _bytes(node: fx.Node) -> bool:
    return any(v.dtype is torch.int8 for v in operands(node))


def _risky_power(node: fx.Node) -> bool:
    """A number to the power of a tensor is right for positive numbers, a tensor to that of a number always."""
    base, exponent = node.args[:2]
    if isinstance(exponent, fx.Node) and not _integer(node):
        return isinstance(base, fx.Node) or base <= 0
    return False


# Ops that are compiled except for some arguments: names, when not, and why not.
_DEFECTS: list[tuple[str, Callable[[fx.Node], bool], str]] = [
    ("acosh asinh atanh sinh", _always, "torch-mlir's formula is inaccurate for small and for large numbers"),
    ("tan", _always, "IREE divides approximations of sine and cosine, which is inaccurate near the poles"),
    ("atan2", _always, "IREE's approximation is NaN where both arguments are 0 or infinite"),
    ("fmod", _always, "torch-mlir computes x - trunc(x / y) * y, which is inexact, and NaN for infinite y"),
    ("remainder", _double, "IREE calls fmod of a C library that it is not linked with"),
    (
        "div remainder",
        _may_divide_by_zero,
        "torch raises where an integer is divided by 0, compiled code would crash",
    ),
    ("div", _rounds, "torch-mlir rounds the quotient, torch the exact one: 1.0 // 0.1 differs"),
    (
        "pow",
        _risky_power,
        "IREE computes exp(y * log(x)): too few digits for f64, and NaN for zero and below",
    ),
    (
        "bitwise_left_shift bitwise_right_shift",
        _shifts_far,
        "torch-mlir leaves shifts by all bits or more undefined",
    ),
    (
        "convolution",
        _transposes_by_channel,
        "torch-mlir fails on transposed convolutions of each channel alone",
    ),
    ("scatter", _reduces, "torch-mlir has no scatter that adds or multiplies"),
    ("mm bmm", _bytes, "torch-mlir crashes on products of int8"),
    ("addmm baddbmm", _integer, "torch-mlir adds no integers to a product"),
    ("pow", _integer, "torch-mlir raises no integers to a power"),
    (
        "gather scatter scatter_add prod",
        _without_axes,
        "torch-mlir stops at tensors without axes",
    ),
    (
        "acos asin atan cos log10 log2 sin tanh gelu",
        _double,
        "IREE computes it in f64 by a C library that it is not linked with",
    ),
    ("erf", _double, "IREE has no code for it in f64"),
    (
        "elu expm1 log1p softplus",
        _double,
        "IREE computes it in f64 as exp(x) - 1 or log(1 + x), which is inaccurate near 0",
    ),
]
_EXCEPTIONS: dict[str, list[tuple[Callable[[fx.Node], bool], str]]] = {}
for _ops, _when, _why in _DEFECTS:
    for _name in _ops.split():
        _EXCEPTIONS.setdefault(_name, []).append((_when, _why))


@functools.cache
def default_value(target: torch._ops.OpOverload, name: str) -> Any:
    """Returns the default of an argument of an op."""
    for argument in target._schema.arguments:
        if argument.name == name:
            return argument.default_value
    raise KeyError(name)


def argument(node: fx.Node, name: str) -> Any:
    """Returns an argument of a node by its schema's name, or its default."""
    if name in node.kwargs:
        return node.kwargs[name]
    for i, declared in enumerate(node.target._schema.arguments):
        if declared.name == name and i < len(node.args):
            return node.args[i]
    return default_value(node.target, name)
