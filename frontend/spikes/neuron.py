"""Recognises what counts in an ATen graph: the adaptive-threshold neuron, which is an op, and all else that gives integers.

The neuron is round(x / V) with V a clamped fraction of the mean of |x|. Of other counts (static thresholds, clamped counts,
floor) it is only known that they are whole numbers; they are computed as they are written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import fx

aten = torch.ops.aten

CASTS = frozenset(
    {aten.to.dtype, aten._to_copy.default, aten.detach.default, aten.alias.default, aten.clone.default}
)
FORWARD = "forward"  # in the meta of what an autograd.Function returns: the node that computes the same, of ATen ops
OUTSIDE = "outside"  # and back
_SHAPES = (
    "view reshape _unsafe_view unflatten flatten permute transpose t movedim moveaxis swapaxes unsqueeze squeeze expand "
    "contiguous mT"
)
_SHAPES_SET = frozenset(_SHAPES.split())


class NotSpiking(Exception):
    """Raised where something looks like a spiking projection and is none that can be raised; says why."""


Factor: TypeAlias = "fx.Node | float"


@dataclass(frozen=True)
class Neuron:
    """Where a graph counts spikes.

    Attributes:
        x: the node whose values fire; float32 where the threshold is adaptive.
        axis: its axis of channels; -1 where only a product tells.
        counts: the node of round(x / V), or of other whole numbers.
        low, high: the bounds of counts.
        threshold: what counts are multiplied with; None where only a product tells.
        settings: k, lower and upper of V = clamp(mean |x| / k, lower, upper); None for counts that are computed as written.
        why: why they are.
    """

    x: fx.Node
    axis: int
    counts: fx.Node
    low: float = -math.inf
    high: float = math.inf
    threshold: Factor | None = None
    settings: tuple[float, float, float] | None = None
    why: str = ""

    @property
    def k(self) -> float:
        return self.settings[0] if self.settings else 0.0


def name_of(node: Any) -> str:
    """Returns the name of an ATen op, such as "mean"; of anything else the empty string."""
    schema = getattr(getattr(node, "target", None), "_schema", None)
    return schema.name.removeprefix("aten::") if schema is not None else ""


def is_shape(node: fx.Node) -> bool:
    """Tells whether a node only gives its first argument another shape."""
    return name_of(node) in _SHAPES_SET


def through(node: Any, shapes: bool = True) -> Any:
    """Returns what a node is made of by casts and, if wanted, changes of shape."""
    while isinstance(node, fx.Node):
        if FORWARD in node.meta:
            node = node.meta[FORWARD]
        elif node.target in CASTS or (shapes and is_shape(node)):
            node = node.args[0]
        else:
            break
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
    if not _is_round(node):
        return None
    quotient = through(node.args[0], shapes=False)
    if getattr(quotient, "target", None) is not aten.div.Tensor or not isinstance(quotient.args[1], fx.Node):
        return None
    return quotient.args[0], quotient.args[1]


def _is_round(node: fx.Node) -> bool:
    return node.target is aten.round.default or (
        node.target is aten.round.decimals and not node.kwargs.get("decimals")
    )


def whole(node: Any) -> tuple[fx.Node, float, float] | None:
    """Returns what is rounded in a node whose values are integers, and their bounds; None where it is not known to be so."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.meta.get("opaque"):
        return None
    if _is_round(node) or name_of(node) in ("floor", "ceil", "trunc", "fix"):
        return node.args[0], -math.inf, math.inf
    bounded = _bounded(node)
    if bounded is not None and all(math.isinf(b) or b == round(b) for b in bounded[1:]):
        inner = whole(through(bounded[0], shapes=False))
        if inner is None:
            return None
        low, high = (min(max(b, bounded[1]), bounded[2]) for b in inner[1:])
        return inner[0], low, high
    return whole(_straight_through(node))


def _straight_through(node: fx.Node) -> fx.Node | None:
    """Returns round(q) where a node is q + (round(q) - q): the same number, since the difference has no rounding error."""
    if name_of(node) != "add" or node.kwargs or len(node.args) != 2:
        return None
    for q, other in (node.args, node.args[::-1]):
        difference = through(other, shapes=False)
        if isinstance(q, fx.Node) and name_of(difference) == "sub" and not difference.kwargs:
            inner, same = (through(n, shapes=False) for n in difference.args[:2])
            q = through(q, shapes=False)
            if same is q and isinstance(inner, fx.Node) and _is_round(inner):
                return inner if through(inner.args[0], shapes=False) is q else None
    return None


def find_neuron(counts: fx.Node) -> Neuron | None:
    """Returns the neuron whose counts a node computes; None where it does nothing of the kind."""
    found = whole(counts)
    if found is None:
        return None
    inner, low, high = found
    quotient = through(inner, shapes=False)
    x = quotient.args[0] if name_of(quotient) in ("div", "mul") else inner
    if not isinstance(x, fx.Node):
        return None
    as_written = Neuron(x, -1, counts, low, high)
    try:
        return _adaptive(counts) or as_written
    except NotSpiking as why:
        return replace(as_written, why=str(why))


def _adaptive(counts: fx.Node) -> Neuron | None:
    """Returns the adaptive-threshold neuron whose counts a node computes.

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
    for node, what in ((x, "counts are rounded"), (threshold, "its threshold is computed")):
        dtype = node.meta["val"].dtype
        if dtype != torch.float32:
            raise NotSpiking(f"{what} in {str(dtype).removeprefix('torch.')}, the op's in float32")
    k, lower, upper = 1.0 / size, -math.inf, math.inf
    for kind, a, b in reversed(steps):
        if kind == "scale":
            k, lower, upper = k / a, lower * a, upper * a
        else:
            lower, upper = min(max(lower, a), b), min(max(upper, a), b)
    if not (k > 0 and 0 < lower <= upper):
        raise NotSpiking("its threshold has no lower bound above 0, so that a row of zeros divides by 0")
    k, lower, upper = (float(f"{number:.12g}") for number in (k, lower, upper))
    return Neuron(x, dims[0] % value.ndim, counts, threshold=threshold, settings=(k, lower, upper))


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
    if name == "relu":
        return args[0], 0.0, math.inf
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
