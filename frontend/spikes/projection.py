"""Recognises the projections that read a neuron's counts, and what their integer weights are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from spikingbrain.frontend.spikes.neuron import (
    CASTS,
    FORWARD,
    OUTSIDE,
    Factor,
    Neuron,
    NotSpiking,
    is_shape,
    name_of,
    rounded,
    through,
)
from spikingbrain.models import spiking

aten = torch.ops.aten

_PRODUCTS = frozenset(
    ["linear", "matmul", "mm", "bmm", "addmm", "einsum", "_int_mm", "conv1d", "convolution"]
)
_LONGEST_CHAIN = 16


@dataclass(frozen=True)
class Projection:
    """A product of a neuron's counts and constants, up to where nothing else joins it.

    Attributes:
        product: the node that multiplies.
        results: the nodes that may be taken for the projection's result, the furthest first: the product, and what scales,
            bias and threshold make of it. In all of them an adaptive threshold has been multiplied in once, and ``factor``.
        activation, weight: what is multiplied: the counts, or what they stand for, and the constant side.
        biases: what is added.
        factor: what counts were multiplied with before the product.
        base: the node of counts that has the factor's axes.
    """

    product: fx.Node
    results: list[fx.Node]
    activation: fx.Node
    weight: fx.Node
    biases: Mapping[fx.Node, fx.Node]  # result -> the bias in it
    factor: Factor | None
    base: fx.Node


@dataclass(frozen=True)
class Weight:
    """Integer weights [N, C] and scales [N, G], as nodes and as values.

    ``source`` holds codes as they are, or float weights that are rounded after division by the scale. Without a ``scale``
    the scales are 1. Where ``turned``, the source is [C, N], and scales are stored outputs last.
    """

    source: fx.Node
    scale: fx.Node | None
    codes: Tensor
    scales: Tensor
    turned: bool


class Constants:
    """Which nodes of a graph are made of weights alone, and their values: ``tensors`` gives those of placeholders."""

    def __init__(self, graph: fx.Graph, tensors: Mapping[fx.Node, Tensor]):
        self.tensors = tensors
        self.known: dict[fx.Node, Tensor] = {}
        self.constant: set[fx.Node] = set()
        for node in graph.nodes:
            if (
                node in tensors
                or node.meta.get(FORWARD) in self.constant
                or (
                    node.op == "call_function"
                    and node.all_input_nodes
                    and all(n in self.constant for n in node.all_input_nodes)
                    and isinstance(node.meta.get("val"), Tensor)
                    and not node.meta.get("opaque")
                )
            ):
                self.constant.add(node)

    def __contains__(self, node: object) -> bool:
        return node in self.constant

    def value(self, node: fx.Node) -> Tensor:
        if node not in self.known:
            if node in self.tensors:
                return self.tensors[node].detach().cpu()  # beside what is tried on them
            if FORWARD in node.meta:
                return self.value(node.meta[FORWARD])
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
            with torch.no_grad():
                self.known[node] = node.target(*args, **kwargs)
        return self.known[node]

    def forget(self) -> None:
        """Drops computed values, which may be as large as the weights."""
        self.known.clear()

    def behind(self, node: fx.Node) -> list[fx.Node]:
        """Returns the constant nodes that make a constant node, itself first."""
        found: dict[fx.Node, None] = {}
        todo = [node]
        while todo:
            here = todo.pop()
            if here not in found and here in self.constant:
                found[here] = None
                todo += [here.meta[FORWARD]] if FORWARD in here.meta else here.all_input_nodes
        return list(found)


def find_projections(neuron: Neuron, constants: Constants) -> Iterator[Projection]:
    """Yields the products that read a neuron's counts."""
    yield from _follow(_Path(neuron, constants), neuron.counts, frozenset())


@dataclass(frozen=True)
class _Path:
    """The way from a neuron's counts to a product.

    Attributes:
        factor: what they have been multiplied with.
        base: the node of counts that has the factor's axes.
        turned: whether what is here has other axes than ``base``.
    """

    neuron: Neuron
    constants: Constants
    factor: Factor | None = None
    base: fx.Node | None = None
    turned: bool = False


def _follow(path: _Path, node: fx.Node, seen: frozenset[fx.Node]) -> Iterator[Projection]:
    neuron, constants = path.neuron, path.constants
    for user in _users(node):
        if user in seen:
            continue
        name, inputs = name_of(user), user.all_input_nodes
        if name in _PRODUCTS:
            others = [n for n in inputs if through(n) is not through(node)]
            if others and all(n in constants for n in others):
                yield _chain(path, user, node)
        elif user.target in CASTS:
            if path.factor is None:
                _require_room(user, neuron)
            yield from _follow(path, user, seen | {user})
        elif is_shape(user):
            yield from _follow(replace(path, turned=True), user, seen | {user})
        elif name == "mul" and path.factor is None:
            factor = _other(user, node)
            if factor is not None and (neuron.settings is None or _is_threshold(factor, neuron)):
                base = node if path.turned else neuron.counts
                yield from _follow(replace(path, factor=factor, base=base, turned=False), user, seen | {user})
        elif path.factor is not None and name == "sub" and _is_told_less_input(user, node, neuron):
            for total in (u for passed in _passed(user) for u in _users(passed)):  # x + (V s - x).detach()
                if name_of(total) == "add" and any(_is_input(n, neuron) for n in total.args[:2]):
                    yield from _follow(path, total, seen | {user, total})


def _is_told_less_input(difference: fx.Node, told: fx.Node, neuron: Neuron) -> bool:
    return through(difference.args[0]) is through(told) and _is_input(difference.args[1], neuron)


def _users(node: fx.Node) -> list[fx.Node]:
    """Returns what reads a node, or the autograd.Function's result that it is."""
    outside = node.meta.get(OUTSIDE)
    return [*node.users, *(outside.users if outside is not None else ())]


def _other(product: fx.Node, node: fx.Node) -> Factor | None:
    """Returns what a node is multiplied with."""
    left, right = product.args[:2]
    other = right if through(left) is through(node) else left
    if isinstance(other, fx.Node):
        return None if through(other) is through(node) else other
    return float(other) if isinstance(other, (int, float)) else None


def _require_room(cast: fx.Node, neuron: Neuron) -> None:
    """Raises NotSpiking where a cast of counts may not hold them."""
    value = cast.meta["val"]
    if value.dtype in (torch.int8, torch.uint8, torch.int16, torch.bool):
        low, high = (0, 1) if value.dtype == torch.bool else _range(value.dtype)
        if neuron.low < low or neuron.high > high:
            name = str(value.dtype).removeprefix("torch.")
            raise NotSpiking(f"its counts are cast to {name}, which has no room for all; clamp them before")


def _range(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return info.min, info.max


def _passed(node: fx.Node) -> list[fx.Node]:
    """Returns a node and what casts and detach make of it."""
    return [node, *(p for u in node.users if u.target in CASTS for p in _passed(u))]


def _is_threshold(node: object, neuron: Neuron) -> bool:
    return isinstance(node, fx.Node) and through(node) is through(neuron.threshold)


def _is_input(node: object, neuron: Neuron) -> bool:
    return through(node, shapes=False) is through(neuron.x, shapes=False)


def _chain(path: _Path, product: fx.Node, activation: fx.Node) -> Projection:
    """Follows a product's value as long as only constants, the threshold and sums over groups join it."""
    neuron, constants = path.neuron, path.constants
    activation = next(n for n in product.all_input_nodes if through(n) is through(activation))
    adaptive, scaled = neuron.settings is not None, path.factor is not None
    others = [n for n in product.all_input_nodes if n is not activation]
    bias = None
    if name_of(product) in ("linear", "addmm", "conv1d", "convolution"):
        place = 0 if name_of(product) == "addmm" else 2
        given = product.args[place] if len(product.args) > place else product.kwargs.get("bias")
        bias = given if isinstance(given, fx.Node) else None
    weights = [n for n in others if n is not bias]
    results, biases = [], {}
    node = product
    for _ in range(_LONGEST_CHAIN):
        if (scaled or not adaptive) and node.meta["val"].dtype == torch.float32:
            results.append(node)
            if bias is not None:
                biases[node] = bias
        users = [
            u for u in node.users if name_of(u) != "_assert_tensor_metadata"
        ]  # what export notes of a cast
        if len(users) != 1 or node.meta.get("opaque"):
            break
        (user,) = users
        name = name_of(user)
        rest = [n for n in user.all_input_nodes if n is not node]
        if (
            user.target in CASTS
            or is_shape(user)
            or name == "sum"
            or (
                name in ("mul", "div")
                and all(n in constants for n in rest)
                and user.args[0] is not user.args[1]
            )
        ):
            pass
        elif adaptive and name == "mul" and not scaled and len(rest) == 1 and _is_threshold(rest[0], neuron):
            scaled = True
        elif name == "add" and bias is None and len(rest) == 1 and rest[0] in constants:
            bias = rest[0]
        else:
            break
        node = user
    if len(weights) != 1:
        raise NotSpiking(f"{name_of(product)} of {len(weights)} constants")
    base = path.base or neuron.counts
    return Projection(product, results[::-1], activation, weights[0], biases, path.factor, base)


def find_weights(
    projection: Projection, result: fx.Node, constants: Constants, outputs: int, channels: int
) -> Iterator[Weight]:
    """Yields what the integer weights of a projection may be; only a comparison of results tells which is right."""
    behind = constants.behind(projection.weight)
    scalings = behind + [
        n for m in _multiplied(projection.product, result, constants) for n in constants.behind(m)
    ]
    size = outputs * channels
    for node in behind:
        value = node.meta["val"]
        if node.op == "placeholder" and not value.dtype.is_floating_point and value.numel() == size:
            for turned in (False, True):
                codes = _matrix(constants.value(node), outputs, channels, turned)
                for scale in scalings:
                    if scale is not node and scale.meta["val"].is_floating_point():
                        yield from _with_scales(node, codes, scale, constants, turned)
                yield Weight(node, None, codes, torch.ones(outputs, 1), turned)
        elif (parts := rounded(node)) and value.numel() == size:
            source, scale = through(parts[0]), parts[1]
            if value.dtype != torch.float32 or source not in constants:
                continue
            while scale.op == "call_function" and is_shape(scale):
                scale = scale.args[0]
            for turned in (False, True):
                codes = _matrix(constants.value(node), outputs, channels, turned)
                yield from _with_scales(source, codes, scale, constants, turned)


def _multiplied(product: fx.Node, result: fx.Node, constants: Constants) -> Iterator[fx.Node]:
    """Yields what a product's value is multiplied with on the way to the result."""
    node = result
    while node is not product:
        inner = next(
            n for n in node.all_input_nodes if n not in constants and _reaches(product, n, constants)
        )
        if name_of(node) == "mul":
            yield from (n for n in node.all_input_nodes if n is not inner)
        node = inner


def _reaches(product: fx.Node, node: fx.Node, constants: Constants) -> bool:
    return node is product or any(
        _reaches(product, n, constants) for n in node.all_input_nodes if n not in constants
    )


def _matrix(codes: Tensor, outputs: int, channels: int, turned: bool) -> Tensor:
    return codes.reshape(channels, outputs).mT if turned else codes.reshape(outputs, channels)


def _with_scales(
    source: fx.Node, codes: Tensor, scale: fx.Node, constants: Constants, turned: bool
) -> Iterator[Weight]:
    outputs, channels = codes.shape
    is_computed = scale.op != "placeholder" and not source.meta["val"].is_floating_point()
    if scale not in constants or (is_computed and scale.meta["val"].numel() != outputs):
        return
    values = constants.value(scale)
    if values.numel() % outputs or channels % max(values.numel() // outputs, 1):
        return
    scales = (values.reshape(-1, outputs).mT if turned else values.reshape(outputs, -1)).float()
    if source.meta["val"].is_floating_point():
        weight = _matrix(constants.value(source), outputs, channels, turned)
        if not torch.equal(spiking.weight_codes(weight, scales), codes):
            return  # rounded in another arithmetic
    yield Weight(source, scale, codes, scales, turned)


def evaluate(node: fx.Node, given: Mapping[fx.Node, Tensor], constants: Constants) -> Tensor:
    """Returns the value of a node, for values of some nodes that it is made of; symbolic sizes are those of the example."""
    values: dict[fx.Node, object] = dict(given)

    def value(n: fx.Node) -> object:
        if n in values:
            return values[n]
        fake = n.meta.get("val")
        if isinstance(fake, (torch.SymInt, int)):
            return int(fake.node.hint) if isinstance(fake, torch.SymInt) else fake
        if n in constants:
            return constants.value(n)
        if FORWARD in n.meta:
            return value(n.meta[FORWARD])
        if n.op != "call_function":
            raise NotSpiking(f"{n.name} is neither a weight nor the neuron's input")
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), value)
        values[n] = n.target(*args, **kwargs)
        return values[n]

    with torch.no_grad():
        found = value(node)
    assert isinstance(found, Tensor)
    return found


def hint(size: int | torch.SymInt) -> int:
    """Returns a size, of a symbol that of the example."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size
