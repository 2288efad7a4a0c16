"""Puts the channels between layers in the order of their activity, so that silent ones lie together.

What a layer computes does not change: with the columns of its weights go the rows of those layers that make its input. It serves
hardware that skips blocks of neighbouring channels (`blocks`); where weights are stored channel by channel, any order is as good.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikingbrain.models.spiking.blocks import BLOCKS, silent_blocks
from spikingbrain.models.spiking.calibrate import watch_inputs
from spikingbrain.models.spiking.errors import SpikingError
from spikingbrain.models.spiking.linear import SpikeLinear

_Layer = nn.Linear | SpikeLinear


@dataclass(frozen=True)
class Ordered:
    """What became of one layer's channels.

    Attributes:
        order: int64 [C]: which channel lies where now.
        before, after: the share of weight blocks that are skipped, by their size in bytes, weights of one byte. The order is
            taken from the first half of the tokens, the shares from the second.
    """

    order: Tensor
    before: dict[int, float]
    after: dict[int, float]


@torch.no_grad()
def order_channels(
    model: nn.Module, calls: Iterable[Any], producers: Mapping[str, str | Sequence[str]]
) -> dict[str, Ordered]:
    """Orders the input channels of layers by how often they fire in ``calls``, the busiest first, in place.

    Args:
        calls: each a tuple of arguments, or the only one.
        producers: for each layer to order, by name, the layers whose outputs make its input, channel by channel:
            ``{"down": "up"}``, ``{"mlp.down": ["mlp.up", "mlp.gate"]}``. Functions of one channel, such as ReLU, may lie between.

    Raises SpikingError, with the model unchanged, for names of other layers, weights whose scale is that of a group of channels,
    fewer than two tokens, and if a layer's input is not made channel by channel by its producers alone.
    """
    calls = list(calls)
    made = {name: [of] if isinstance(of, str) else list(of) for name, of in producers.items()}
    layers = {name: _layer(model, name) for name in {*made, *(n for of in made.values() for n in of)}}
    for name, of in made.items():
        _check(name, layers[name], {n: layers[n] for n in of})
    consumers = {name: layers[name] for name in made}
    inputs = _inputs(model, consumers, calls)
    orders, found = {}, {}
    for name, x in inputs.items():
        layer = consumers[name]
        active = (layer.counts(x)[0] if isinstance(layer, SpikeLinear) else x) != 0
        first, second = active[: len(active) // 2], active[len(active) // 2 :]
        orders[name] = first.sum(0).argsort(descending=True, stable=True)
        shares = [{size: _share(seen, size) for size in BLOCKS} for seen in (second, second[:, orders[name]])]
        found[name] = Ordered(orders[name], *shares)
    _move(made, layers, orders)
    for name, x in _inputs(model, consumers, calls).items():
        if not torch.allclose(x, inputs[name][:, orders[name]], rtol=1e-4, atol=1e-6):
            _move(made, layers, {n: order.argsort() for n, order in reversed(orders.items())})
            raise SpikingError(
                f"its input is not made channel by channel by {', '.join(made[name])}",
                where=name,
                why="their outputs in another order did not give its input in that order",
                hint="all layers that make it, with nothing between that mixes channels or has a weight for each",
            )
    return found


def _layer(model: nn.Module, name: str) -> _Layer:
    layer = dict(model.named_modules()).get(name)
    if not isinstance(layer, nn.Linear | SpikeLinear):
        raise SpikingError(f"no linear layer is called {name!r}", hint="names of model.named_modules()")
    return layer


def _check(name: str, consumer: _Layer, producers: Mapping[str, _Layer]) -> None:
    weight = _weight(consumer)
    for other, layer in producers.items():
        if _weight(layer).shape[0] != weight.shape[1]:
            raise SpikingError(
                f"{other} has {_weight(layer).shape[0]} outputs, the layer {weight.shape[1]} inputs",
                where=name,
            )
    if isinstance(consumer, SpikeLinear) and consumer.scale.shape[1] > 1:
        raise SpikingError(
            f"weights with a scale for each of {consumer.scale.shape[1]} groups of channels",
            where=name,
            why="channels in another order would share other scales",
            hint="order_channels before spike, or group_size=None",
        )


def _inputs(model: nn.Module, layers: Mapping[str, _Layer], calls: Sequence[Any]) -> dict[str, Tensor]:
    """Returns what each layer reads in all calls, [tokens, C]."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    watch_inputs(model, layers, calls, lambda name, x: seen[name].append(x.flatten(0, -2).clone()))
    for name, parts in seen.items():
        if sum(map(len, parts)) < 2:
            raise SpikingError(
                "an order of channels from less than two tokens", where=name, hint="more calls"
            )
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _share(active: Tensor, size: int) -> float:
    silent, blocks = silent_blocks(active, size)
    return silent / blocks


def _move(
    made: Mapping[str, Sequence[str]], layers: Mapping[str, _Layer], orders: Mapping[str, Tensor]
) -> None:
    """Moves the columns of each ordered layer, and the rows of its producers."""
    for name, order in orders.items():
        consumer = layers[name]
        _take(_weight(consumer), order, 1)
        if isinstance(consumer, SpikeLinear):
            _take(consumer.channel_scale, order, 0)
        for producer in map(layers.__getitem__, made[name]):
            _take(_weight(producer), order, 0)
            _take(producer.bias, order, 0)
            if isinstance(producer, SpikeLinear):
                _take(producer.scale, order, 0)


def _take(tensor: Tensor | None, order: Tensor, axis: int) -> None:
    if tensor is not None:
        tensor.copy_(tensor.index_select(axis, order))


def _weight(layer: _Layer) -> Tensor:
    return layer.codes if isinstance(layer, SpikeLinear) else layer.weight
