"""What all layers of one call share: where its tokens are in the text, and which keys they see.

Softmax attention keeps keys and values in slots. Sinks have slots of their own in front. A window is a ring behind them: the
token at position p goes to slot `sinks + (p - sinks) % window`, and takes the place of the token that left the window. Full
attention has a slot per position. Letters in tensor names: see `model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spikingbrain.models.cache import Kept
from spikingbrain.models.spikingbrain.config import Softmax, SpikingBrainConfig

Cache = tuple[Kept, Kept]  # keys and values [B, R, S, D]


@dataclass(frozen=True)
class View:
    """What one kind of softmax attention does with the tokens of a call."""

    slots_BT: Tensor  # where their keys and values are kept; the last slot if they are not
    mask_B1TN: Tensor  # which of the keys, cached and new, each token sees


@dataclass(frozen=True)
class Moment:
    rotation: tuple[Tensor, Tensor]  # cosine and sine [B, T, 1, D] of rotary position embedding
    views: Mapping[str, View]
    live_BT: Tensor | None  # which tokens are text; None: all of them
    next_position: Tensor  # [B] of the token after them


def slots_of(kind: Softmax, config: SpikingBrainConfig, capacity: int | None) -> int:
    """Returns the slots that a cache has, the spill slot included."""
    if kind == "window":
        return config.sinks + config.window + 1
    return (config.context if capacity is None else capacity) + 1


def moment_of_text(
    config: SpikingBrainConfig,
    position_B: Tensor,
    tokens: int,
    lengths_B: Tensor | None,
    slots: Mapping[str, int],
    dtype: torch.dtype,
) -> Moment:
    """Describes a call with ``tokens`` tokens, of which ``lengths_B`` count, in texts that are at ``position_B``."""
    steps = torch.arange(tokens, device=position_B.device)
    positions_BT = position_B[:, None] + steps
    live_BT = None if lengths_B is None else steps < lengths_B[:, None]
    next_position = position_B + (tokens if lengths_B is None else lengths_B)
    views = {}
    for kind, count in slots.items():
        spill, ring = count - 1, kind == "window"
        if ring:
            held_BR = _held_in_ring(config, position_B, spill)
            kept_BT = positions_BT >= next_position[:, None] - config.window
            slots_BT = config.sinks + (positions_BT - config.sinks) % config.window
        else:
            held_BR = _held_in_order(position_B, spill)
            kept_BT = positions_BT < spill
            slots_BT = positions_BT
        if live_BT is not None:
            kept_BT = kept_BT & live_BT
        keys_BN = torch.cat([held_BR, positions_BT], dim=1)
        mask_B1TN = _visible(config, positions_BT, keys_BN, ring)
        views[kind] = View(torch.where(kept_BT, slots_BT, spill), mask_B1TN)
    return Moment(_rotary(config, positions_BT, dtype), views, live_BT, next_position)


def moment_of_sinks(
    config: SpikingBrainConfig, position_B: Tensor, slots: Mapping[str, int], dtype: torch.dtype
) -> Moment:
    """Describes the call that takes the sinks into an empty state: they see each other, later ones too."""
    positions_BT = position_B[:, None] + torch.arange(config.sinks, device=position_B.device)
    views = {}
    for kind, count in slots.items():
        sees = torch.arange(count + config.sinks, device=position_B.device) >= count
        views[kind] = View(positions_BT, sees.expand(len(position_B), 1, config.sinks, -1))
    return Moment(_rotary(config, positions_BT, dtype), views, None, position_B + config.sinks)


def _held_in_ring(config: SpikingBrainConfig, position_B: Tensor, spill: int) -> Tensor:
    """Returns the position of the token that each slot holds [B, R], -1 where there is none."""
    slots = torch.arange(spill + 1, device=position_B.device)
    # the newest token before `position` whose place in the ring is this slot
    last = position_B[:, None] - 1
    newest = last - (last - slots) % config.window
    held = torch.where(slots < config.sinks, slots, newest)
    return torch.where((held >= config.sinks) | (slots < config.sinks), held, -1).masked_fill(
        slots == spill, -1
    )


def _held_in_order(position_B: Tensor, spill: int) -> Tensor:
    slots = torch.arange(spill + 1, device=position_B.device)
    return torch.where((slots < position_B[:, None]) & (slots < spill), slots, -1)


def _visible(config: SpikingBrainConfig, positions_BT: Tensor, keys_BN: Tensor, ring: bool) -> Tensor:
    key, query = keys_BN[:, None, None, :], positions_BT[:, None, :, None]
    mask = (key >= 0) & (key <= query)
    if ring:
        near = key > query - config.window
        mask = mask & (near | (key < config.sinks) if config.sinks else near)
    return mask


def _rotary(config: SpikingBrainConfig, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine [B, T, 1, D] of rotary embedding; angles are float32 in any model."""
    pairs = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=positions_BT.device)
    frequencies = config.rope_base ** (-pairs / config.head_size)
    angles = positions_BT[:, :, None, None].float() * frequencies
    angles_BT1D = torch.cat([angles, angles], dim=-1)
    return angles_BT1D.cos().to(dtype), angles_BT1D.sin().to(dtype)
