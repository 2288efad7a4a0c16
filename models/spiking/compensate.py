"""Compensation: weights that expect the rounding of what they multiply.

A layer was made to multiply x and multiplies x^ = V s, what x fires. Of all weights those that come nearest to its outputs over
what it sees are, by least squares,

    W' = E[W x x^T] E[x^ x^T]^-1 = W (1 + (E[x x^T] - E[x^ x^T]) E[x^ x^T]^-1)

where the first x of each product is x, or x^, and the second x^. Rounding errs by as much in each channel, so directions in which
the channels together say little are mostly error: W' trusts them less (a Wiener filter). It helps where channels depend on each
other, as they do in language models, and costs nothing at run time.

Rounding the weights to few bits errs, too. Channel by channel, the error of each is made good by the channels not yet rounded,
again by least squares (Hassibi and Stork, "Optimal brain surgeon", 1993; Frantar et al., "GPTQ", arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikingbrain.models.spiking.calibrate import check_seen, watch_inputs
from spikingbrain.models.spiking.quantise import quantise_weight, weight_scale

DAMPING = 0.01  # of the mean size of a channel's square, added to each: what few tokens say is uncertain
MEMORY = 4 << 30  # bytes of what is gathered in one pass over the calls; a larger model takes several
BLOCK = 128  # channels rounded before their errors reach the rest
Spikes = Callable[[str, Tensor], Tensor]


@dataclass
class Products:
    """Sums over tokens, float64 [C, C]: of x^ x^T, and of (x - x^) x^T."""

    spikes: Tensor
    errors: Tensor
    tokens: int = 0

    def add(self, x: Tensor, told: Tensor) -> None:
        self.spikes += told.mT @ told
        self.errors += (x - told).mT @ told
        self.tokens += len(x)

    def damped(self, damping: float) -> Tensor:
        """Returns the sum of x^ x^T with the ridge on its diagonal."""
        ridge = damping * self.spikes.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        return self.spikes + ridge * torch.eye(
            len(self.spikes), dtype=torch.float64, device=self.spikes.device
        )


class Compensation:
    """What ``layers`` of ``model`` see in ``calls``, gathered when it is asked for, several layers in a pass.

    ``spikes`` gives what the input x [tokens, C] of a layer, by name, is rounded to.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Linear],
        calls: Iterable[Any],
        spikes: Spikes,
        damping: float = DAMPING,
        memory: int = MEMORY,
    ):
        self.model, self.layers, self.calls, self.spikes = model, dict(layers), list(calls), spikes
        self.damping, self.memory = damping, memory
        self.waiting = list(layers)
        self.found: dict[str, Products] = {}

    def products(self, name: str) -> Products:
        """Returns the sums of a layer. Layers are asked for in their order: those before are forgotten."""
        if name not in self.found:
            self.waiting = self.waiting[self.waiting.index(name) :]
            self._gather()
        return self.found[name]

    def weight(self, name: str) -> Tensor:
        """Returns W' [N, C] of a layer, in the dtype of its weights."""
        weight, seen = self.layers[name].weight.detach(), self.products(name)
        change: Tensor = torch.linalg.solve(seen.damped(self.damping), seen.errors.mT).mT
        return weight + (weight.double() @ change).to(weight.dtype)

    def rounded(
        self, name: str, group_size: int | None, bits: int, channels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns W' of a layer, divided by ``channels`` [C], as codes [N, C] and scales [N, G]."""
        weight = self.weight(name)
        if channels is not None:
            weight = weight / channels
        if bits > 4:  # the error of rounding to 8 bits is a hundredth of that of x
            return quantise_weight(weight, group_size, bits)
        products = self.products(name).damped(self.damping)
        if channels is not None:
            products = products * torch.outer(channels, channels)
        scale = weight_scale(weight, group_size, bits)
        codes = rounded_together(weight, scale, products, 2 ** (bits - 1) - 1)
        return codes.to(torch.int8), scale

    def _gather(self) -> None:
        """Calls the model and keeps what the next layers see, as many as fit; layers that share an input share the sums."""
        self.found.clear()
        asked: list[str] = []
        room = self.memory
        for name in self.waiting:
            room -= 16 * self.layers[name].in_features ** 2
            if asked and room < 0:
                break
            asked.append(name)
        self.waiting = self.waiting[len(asked) :]
        last: tuple[Tensor | None, Products | None] = None, None
        leads: set[str] = set()

        def see(name: str, x: Tensor) -> None:
            nonlocal last
            if name not in self.found:
                if x is last[0] and last[1] is not None:
                    self.found[name] = last[1]  # of the layer before, which counts the tokens
                    return
                none = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
                self.found[name] = Products(none, none.clone())
                leads.add(name)
            if name in leads:
                flat = x.flatten(0, -2).float()
                self.found[name].add(flat, self.spikes(name, flat))
                last = x, self.found[name]

        watch_inputs(self.model, {name: self.layers[name] for name in asked}, self.calls, see)
        for name in asked:
            seen = self.found.get(name)
            check_seen(name, seen.tokens if seen else 0, seen.errors if seen else torch.zeros(1))


def rounded_together(weight: Tensor, scale: Tensor, products: Tensor, largest: int) -> Tensor:
    """Returns codes float32 [N, C] for which the error of codes * scale x^ is small: ``products`` [C, C] is the sum of x^ x^T.

    weight [N, C], scale [N, G]. Channels are rounded from the one that says most; each error goes on to the channels left.
    """
    order = products.diagonal().argsort(descending=True)
    # products = M M^T with M upper triangular, so the inverse is U^T U with U = M^-1
    backwards = torch.linalg.cholesky(products[order][:, order].flip(0, 1))
    identity = torch.eye(len(order), dtype=products.dtype, device=products.device)
    upper = torch.linalg.solve_triangular(backwards.flip(0, 1), identity, upper=True)
    left = weight.double()[:, order].clone()
    channels = weight.shape[1]
    scales = scale.double().repeat_interleave(channels // scale.shape[1], 1)[:, order]
    codes = torch.zeros_like(left)
    for start in range(0, channels, BLOCK):
        stop = min(start + BLOCK, channels)
        errors = torch.zeros(len(left), stop - start, dtype=left.dtype, device=left.device)
        for channel in range(start, stop):
            column = left[:, channel]
            codes[:, channel] = (column / scales[:, channel]).round().clamp(-largest, largest)
            error = (column - codes[:, channel] * scales[:, channel]) / upper[channel, channel]
            left[:, channel:stop] -= torch.outer(error, upper[channel, channel:stop])
            errors[:, channel - start] = error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    found = torch.empty_like(codes)
    found[:, order] = codes
    return found.float()
