"""Compensation: weights that expect the rounding of what they multiply.

A layer was made to multiply x and multiplies x^ = V s, what x fires. Of all weights those that come nearest to its outputs over
what it sees are, by least squares,

    W' = E[W x x^T] E[x^ x^T]^-1 = W (1 + (E[x x^T] - E[x^ x^T]) E[x^ x^T]^-1)

where the first x of each product is x, or x^, and the second x^. Rounding errs by as much in each channel, so directions in which
the channels together say little are mostly error: W' trusts them less (a Wiener filter). It helps where channels depend on each
other, and costs nothing at run time.

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
from spikingbrain.models.spiking.quantise import weight_codes, weight_scale
from spikingbrain.models.spikingbrain.experts import ExpertLinear

DAMPING = 0.01  # of the mean size of a channel's square, added to each: what few tokens say is uncertain
MEMORY = 4 << 30  # bytes of what is gathered in one pass over the calls; a larger model takes several
ROWS = 4  # rows for each channel that an expert must have seen: with fewer, what they tell is mostly chance
BLOCK = 128  # channels rounded before their errors reach the rest
Spikes = Callable[[str, Tensor], Tensor]


@dataclass
class Products:
    """Sums over tokens, float64 [C, C]: of x^ x^T, and of (x - x^) x^T."""

    spikes: Tensor
    errors: Tensor
    tokens: int = 0

    @classmethod
    def none(cls, channels: int, device: torch.device) -> Products:
        zeros = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone())

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

    ``spikes`` gives what the input x [tokens, C] of a layer, by name, is rounded to; the same for layers that share an input.
    Of layers of experts, each expert has sums of its own, over the rows that are sent to it.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Linear | ExpertLinear],
        calls: Iterable[Any],
        spikes: Spikes,
        damping: float = DAMPING,
        memory: int = MEMORY,
    ):
        self.model, self.layers, self.calls, self.spikes = model, dict(layers), list(calls), spikes
        self.damping, self.memory = damping, memory
        self.waiting = list(layers)
        self.found: dict[str, list[Products]] = {}

    def products(self, name: str) -> list[Products]:
        """Returns the sums of a layer, one, or one for each expert.

        Layers are asked for in their order: those before are forgotten.
        """
        if name not in self.found:
            self.waiting = self.waiting[self.waiting.index(name) :]
            self._gather()
        return self.found[name]

    def unfitted(self, name: str) -> list[int]:
        """Returns the experts of a layer that keep their weights: too few rows were sent to them to tell others."""
        if isinstance(self.layers[name], nn.Linear):
            return []
        return [e for e, seen in enumerate(self.products(name)) if seen.tokens < ROWS * len(seen.spikes)]

    def weight(self, name: str) -> Tensor:
        """Returns W' of a layer, [N, C] or [experts, N, C], in the dtype of its weights."""
        stack = self._stack(name)
        kept = self.unfitted(name)
        fitted = [
            weight if e in kept else self._fitted(weight, seen)
            for e, (weight, seen) in enumerate(zip(stack, self.products(name), strict=True))
        ]
        return torch.stack(fitted).view_as(self.layers[name].weight)

    def rounded(
        self, name: str, group_size: int | None, bits: int, channels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns W' of a layer, divided by ``channels`` [C], as codes [..., N, C] and scales [..., N, G]."""
        weight = self.weight(name)
        if channels is not None:
            weight = weight / channels
        shape = weight.shape[:-1]
        kept = self.unfitted(name)
        scale = weight_scale(weight.flatten(0, -2), group_size, bits).view(*shape, -1)
        stacks = (t.view(-1, *t.shape[-2:]) for t in (weight, scale))
        each = []
        for e, (one, scales, seen) in enumerate(zip(*stacks, self.products(name), strict=True)):
            if e in kept:
                each.append(weight_codes(one, scales))
                continue
            products = seen.damped(self.damping)
            if channels is not None:
                products = products * torch.outer(channels, channels)
            each.append(rounded_together(one, scales, products, 2 ** (bits - 1) - 1))
        return torch.stack(each).view(*shape, -1).to(torch.int8), scale

    def _stack(self, name: str) -> Tensor:
        weight = self.layers[name].weight.detach()
        return weight.view(-1, *weight.shape[-2:])

    def _fitted(self, weight: Tensor, seen: Products) -> Tensor:
        change: Tensor = torch.linalg.solve(seen.damped(self.damping), seen.errors.mT).mT
        return weight + (weight.double() @ change).to(weight.dtype)

    def _gather(self) -> None:
        """Calls the model and keeps what the next layers see, as many as fit; layers that share an input share the sums."""
        self.found.clear()
        asked: list[str] = []
        room = self.memory
        for name in self.waiting:
            experts, _, channels = self._stack(name).shape
            room -= 16 * experts * channels**2
            if asked and room < 0:
                break
            asked.append(name)
        self.waiting = self.waiting[len(asked) :]
        last: tuple[Tensor | None, list[Products]] = None, []
        leads: set[str] = set()

        def see(name: str, x: Tensor, expert: Tensor | None = None) -> None:
            nonlocal last
            if name not in self.found:
                if x is last[0]:
                    self.found[name] = last[1]  # of the layer before, which counts the tokens
                    return
                experts, _, channels = self._stack(name).shape
                self.found[name] = [Products.none(channels, x.device) for _ in range(experts)]
                leads.add(name)
            if name not in leads:
                return
            flat = x.flatten(0, -2).float()
            told = self.spikes(name, flat)
            if expert is None:
                self.found[name][0].add(flat, told)
            else:
                for e in sorted(set(expert.tolist())):
                    self.found[name][e].add(flat[expert == e], told[expert == e])
            last = x, self.found[name]

        watch_inputs(self.model, {name: self.layers[name] for name in asked}, self.calls, see)
        for name in asked:
            seen = self.found.get(name, [])
            check_seen(
                name, sum(s.tokens for s in seen), sum((s.errors.sum() for s in seen), torch.zeros(()))
            )


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
