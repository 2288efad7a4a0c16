"""Spike codings: a count as a train of spikes over virtual time steps, and back, exactly.

| coding | spikes | steps | a train's count |
| --- | --- | --- | --- |
| binary | 0, 1 | the largest count | sum of s_t; counts >= 0 |
| ternary | -1, 0, 1 | the largest size | sum of s_t |
| bitwise | 0, 1 | bits of the largest count | sum of 2^t s_t; counts >= 0 |
| bitwise_ternary | -1, 0, 1 | bits of the largest size | sum of 2^t s_t; all spikes of a train have one sign |
| twos_complement | 0, 1 | one more | sum of 2^t s_t, the last step with -2^t |

(SpikingBrain report, arXiv 2509.05276, section 2.3; bitwise_ternary is its "bidirectional bitwise" coding and the default.)
A linear layer then only adds: W s = sum_t 2^t W s_t, the columns of W at which s_t fires.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikingbrain.models.spiking.errors import SpikingError

SIGNED = ("ternary", "bitwise_ternary", "twos_complement")
CODINGS = ("binary", "ternary", "bitwise", "bitwise_ternary", "twos_complement")
DEFAULT = "bitwise_ternary"


def steps_needed(counts: Tensor, coding: str = DEFAULT) -> int:
    """Returns the fewest virtual steps that hold every count."""
    _check(coding)
    counts = _integers(counts)
    if not counts.any():
        return 0
    low, high = int(counts.amin()), int(counts.amax())
    if coding in ("binary", "bitwise") and low < 0:
        raise SpikingError(
            f"a count of {low} in coding {coding!r}",
            why="its spikes are 0 or 1 and all add up",
            hint="counts - counts.min() and a zero point, or ternary, bitwise_ternary, twos_complement",
        )
    size = max(-low, high)
    if coding in ("binary", "ternary"):
        return size
    if coding == "twos_complement":
        return max(high, -low - 1).bit_length() + 1
    return size.bit_length()


def encode(counts: Tensor, coding: str = DEFAULT, steps: int | None = None) -> Tensor:
    """Returns the spike train int8 [steps, *counts.shape] of integer ``counts``; by default of as many steps as are needed.

    Raises SpikingError for counts that are no integers, that need more steps, or are negative where the coding has no sign.
    """
    needed = steps_needed(counts, coding)
    steps = needed if steps is None else steps
    if steps < needed:
        raise SpikingError(
            f"{steps} steps for counts that need {needed} in coding {coding!r}",
            why="the train would stand for other counts",
            hint=f"steps={needed}, or `budget` to split off what remains",
        )
    counts = _integers(counts)
    step = torch.arange(steps, device=counts.device).view(-1, *[1] * counts.ndim)
    size, sign = counts.abs(), counts.sign()
    if coding in ("binary", "ternary"):
        train = (step < size) * sign
    elif coding == "twos_complement":
        train = (counts >> step) & 1  # of a negative number the shift repeats the sign bit
    else:
        train = ((size >> step) & 1) * sign
    return train.to(torch.int8)


def decode(train: Tensor, coding: str = DEFAULT) -> Tensor:
    """Returns the counts int64 [...] of a spike train [steps, ...]."""
    weights = step_weights(train.shape[0], coding, train.device)
    return (train.to(torch.int64) * weights.view(-1, *[1] * (train.ndim - 1))).sum(0)


def step_weights(steps: int, coding: str = DEFAULT, device: torch.device | None = None) -> Tensor:
    """Returns what a spike of each step counts, int64 [steps]."""
    _check(coding)
    if coding in ("binary", "ternary"):
        return torch.ones(steps, dtype=torch.int64, device=device)
    weights = 2 ** torch.arange(steps, dtype=torch.int64, device=device)
    if coding == "twos_complement" and steps:
        weights[-1] = -weights[-1]
    return weights


def held_range(coding: str, steps: int) -> tuple[int, int]:
    """Returns the least and the largest count that a train of so many steps can stand for."""
    _check(coding)
    if coding == "twos_complement":
        return (-(2 ** (steps - 1)), 2 ** (steps - 1) - 1) if steps else (0, 0)
    high = steps if coding in ("binary", "ternary") else 2**steps - 1
    return (0 if coding in ("binary", "bitwise") else -high), high


@dataclass(frozen=True)
class Budget:
    """A fixed number of virtual steps for every token, and what becomes of counts that need more.

    Attributes:
        steps: virtual steps of a train.
        coding: one with signs.
        remainder: "exact": what the train cannot hold is added by other means, and the result is the same as without a budget;
            "drop": counts saturate.
    """

    steps: int
    coding: str = DEFAULT
    remainder: str = "exact"

    def __post_init__(self) -> None:
        if self.steps < 1 or not all(held_range(self.coding, self.steps)):
            raise SpikingError(
                f"a budget of {self.steps} steps in coding {self.coding!r}",
                why="counts have both signs",
                hint="ternary, bitwise_ternary (1 step or more) or twos_complement (2 or more)",
            )
        if self.remainder not in ("exact", "drop"):
            raise SpikingError(f"remainder {self.remainder!r}", hint="exact or drop")


def budget(counts: Tensor, coding: str, steps: int) -> tuple[Tensor, Tensor]:
    """Returns the train of at most ``steps`` steps that comes nearest to each count, and what remains of the counts.

    ``decode(train) + remainder == counts``: hardware with a fixed number of steps fires the train; whoever drops the remainder
    saturates, and the remainder says by how much.
    """
    low, high = held_range(coding, steps)
    counts = _integers(counts)
    if coding in ("binary", "bitwise") and counts.numel() and int(counts.amin()) < 0:
        steps_needed(counts, coding)  # raises
    held = counts.clamp(low, high)
    return encode(held, coding, steps), counts - held


@dataclass(frozen=True)
class Firing:
    """How much a tensor of counts fires.

    Attributes:
        spikes: spikes per value, both signs counted.
        silent: share of values without a spike.
        steps: virtual steps of the train.
        sparsity: share of (value, step) pairs without a spike.
    """

    spikes: float
    silent: float
    steps: int
    sparsity: float


def firing(counts: Tensor, coding: str = DEFAULT) -> Firing:
    """Returns the firing statistics of counts in a coding, without making the train."""
    steps, values = steps_needed(counts, coding), max(counts.numel(), 1)
    spikes = int(spikes_each(counts, coding, steps).sum())
    return Firing(
        spikes / values, int((counts == 0).sum()) / values, steps, 1 - spikes / (values * max(steps, 1))
    )


def spikes_each(counts: Tensor, coding: str, steps: int) -> Tensor:
    """Returns how often each count fires in a train of ``steps`` steps that holds them all, int64 of the counts' shape."""
    counts = _integers(counts)
    if coding in ("binary", "ternary"):
        return counts.abs()
    bits = counts if coding == "twos_complement" else counts.abs()
    spikes = torch.zeros_like(counts)
    for t in range(steps):
        spikes += (bits >> t) & 1
    return spikes


def _integers(counts: Tensor) -> Tensor:
    if counts.dtype.is_floating_point:
        whole = counts.to(torch.int64)
        if not torch.equal(whole.to(counts.dtype), counts) or (counts.abs() >= 2**62).any():
            raise SpikingError(
                "counts that are no integers", why="a spike is there or not", hint="round(x / V)"
            )
        return whole
    return counts.to(torch.int64)


def _check(coding: str) -> None:
    if coding not in CODINGS:
        raise SpikingError(f"unknown coding {coding!r}", hint=", ".join(CODINGS))
