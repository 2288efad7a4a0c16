"""Recognises the adaptive-threshold neuron in an ATen graph: round(x / V) with V a clamped fraction of the mean of |x|."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

CASTS = frozenset(
    {aten.to.dtype, aten._to_copy.default, aten.detach.default, aten.alias.default, aten.clone.default}
)
_SHAPES = (
    "view reshape _unsafe_view unflatten flatten permute transpose t movedim moveaxis swapaxes unsqueeze squeeze expand "
    "contiguous mT"
)
_SHAPES_SET = frozenset(_SHAPES.split())


class NotSpiking(Exception):
    """Raised where something looks like a spiking projection and is none that can be raised; says why."""


@dataclass(frozen=True)
class Neuron:
    """Where a graph counts spikes.

    Attributes:
        x: the float32 node whose values fire.
        axis: its axis of channels.
        counts: the node of round(x / V).
        threshold: the node of V.
        k, lower, upper: V = clamp(mean |x| / k, lower, upper).
    """

    x: fx.Node
    axis: int
    counts: fx.Node
    threshold: fx.Node
    k: float
    lower: float
    upper: float


def name_of(node: Any) -> str:
    """Returns the name of an ATen op, such as "mean"; of anything else the empty string."""
    schema = getattr(getattr(node, "target", None), "_schema", None)
    return schema.name.removeprefix("aten::") if schema is not None else ""


def is_shape(node: fx.Node) -> bool:
    """Tells whether a node only gives its first argument another shape."""
    return name_of(node) in _SHAPES_SET


def through(node: Any, shapes: bool = True) -> Any:
    """Returns what a node is made of by casts and, if wanted, changes of shape."""
    while isinstance(node, fx.Node) and (node.target in CASTS or (shapes and is_shape(node))):
        node = node.args[0]
    return node


def number(value: Any) -> float | None:
    """Returns the number that an argument is, or that a node without inputs makes."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    value = through(value)
    if not isinstance(value, fx.Node):
        return None
    place = {"full": 1, "new_full": 2, "full_like": 1, "scalar_tensor": 0}.get(name_of(value))
    if value.target is torch.tensor:
        place = 0
    filled = value.args[place] if place is not None and place < len(value.args) else None
    return float(filled) if isinstance(filled, (int, float)) and not isinstance(filled, bool) else None


def rounded(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Returns a and b where a node is round(a / b), ties to even."""
    if node.target is not aten.round.default and not (
        node.target is aten.round.decimals and not node.kwargs.get("decimals")
    ):
        return None
    quotient = through(node.args[0], shapes=False)
    if getattr(quotient, "target", None) is not aten.div.Tensor or not isinstance(quotient.args[1], fx.Node):
        return None
    return quotient.args[0], quotient.args[1]


def find_neuron(counts: fx.Node) -> Neuron | None:
    """Returns the neuron whose counts a node computes; None where it does nothing of the kind.

    Raises NotSpiking for a threshold made from |x| in a way that the op does not have.
    """
    parts = rounded(counts)
    if parts is None:
        return None
    x, threshold = parts
    steps, averaged = _steps(threshold)
    root = through(x, shapes=False)
    if averaged is None or not isinstance(root, fx.Node):
        return None
    inner, dims, size = averaged
    if through(inner, shapes=False) is not root:
        return None
    value = x.meta["val"]
    if len(dims) != 1:
        raise NotSpiking(f"its threshold is a mean over {len(dims)} axes")
    if value.dtype != torch.float32 or counts.meta["val"].dtype != torch.float32:
        raise NotSpiking(
            f"counts are rounded in {str(value.dtype).removeprefix('torch.')}, the op's in float32"
        )
    k, lower, upper = 1.0 / size, -math.inf, math.inf
    for kind, a, b in reversed(steps):
        if kind == "scale":
            k, lower, upper = k / a, lower * a, upper * a
        else:
            lower, upper = min(max(lower, a), b), min(max(upper, a), b)
    if not (k > 0 and 0 < lower <= upper):
        raise NotSpiking("its threshold has no lower bound above 0, so that a row of zeros divides by 0")
    axis = dims[0] % value.ndim
    return Neuron(
        x, axis, counts, threshold, float(f"{k:.12g}"), float(f"{lower:.12g}"), float(f"{upper:.12g}")
    )


_Steps = list[tuple[str, float, float]]
_SIDES = (("min", -math.inf), ("max", math.inf))


def _steps(node: Any) -> tuple[_Steps, tuple[fx.Node, list[int], float] | None]:
    """Returns what is done to the mean of |x|, last step first, and (x, axes, size of the mean as part of a sum)."""
    steps: _Steps = []
    while isinstance(node, fx.Node):
        name, args = name_of(node), node.args
        if node.target in CASTS or is_shape(node):
            node = args[0]
        elif (bounded := _bounded(node)) is not None:
            node, low, high = bounded
            steps.append(("clamp", low, high))
        elif name == "div" and (by := number(args[1])):
            steps.append(("scale", 1 / by, 0.0))
            node = args[0]
        elif name == "mul" and (by_other := _either_number(args)) is not None and by_other[1] > 0:
            steps.append(("scale", by_other[1], 0.0))
            node = by_other[0]
        elif name in ("mean", "sum") and len(args) > 1 and isinstance(args[1], (list, tuple)):
            sizes = args[0].meta["val"].shape
            size = math.prod(int(sizes[d]) for d in args[1]) if name == "sum" else 1.0
            absolute = through(args[0], shapes=False)
            return steps, (absolute.args[0], list(args[1]), size) if name_of(absolute) == "abs" else None
        elif name == "linalg_vector_norm" and len(args) > 2 and args[1] == 1 and args[2]:
            return steps, (
                args[0],
                list(args[2]),
                math.prod(int(args[0].meta["val"].shape[d]) for d in args[2]),
            )
        else:
            return steps, None
    return steps, None


def _bounded(node: fx.Node) -> tuple[fx.Node, float, float] | None:
    """Returns (x, low, high) where a node is x between two numbers."""
    name, args = name_of(node), node.args
    if name in ("maximum", "minimum"):
        found = _either_number(args)
        if found is None:
            return None
        return (found[0], found[1], math.inf) if name == "maximum" else (found[0], -math.inf, found[1])
    order = {
        "clamp": ("min", "max"),
        "clip": ("min", "max"),
        "clamp_min": ("min",),
        "clamp_max": ("max",),
    }.get(name)
    if order is None:
        return None
    given = {**dict(zip(order, args[1:], strict=False)), **node.kwargs}
    limits = [number(given[side]) if given.get(side) is not None else default for side, default in _SIDES]
    low, high = limits
    return None if low is None or high is None else (args[0], low, high)


def _either_number(args: Any) -> tuple[fx.Node, float] | None:
    for node, other in (args[:2], args[1::-1]):
        if isinstance(node, fx.Node) and (found := number(other)) is not None and number(node) is None:
            return node, found
    return None
