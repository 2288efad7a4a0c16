"""What a table of T x T numbers says as a mask over scores: which decay per step it is, if it is causal and one at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
CLOSE = 1e-4  # tables of decays are computed in float32, powers of up to T


class NotCausal(Exception):
    """Raised for a table that is not that of a recurrence; says why."""


@dataclass(frozen=True)
class Decays:
    """``table[i, j] = decay_i ... decay_(j+1) * weight_j`` for j <= i; ``exclusive``: ones for j < i, 0 on the diagonal.

    ``decay`` and ``weight`` are [..., T], None where all are 1; ``decay`` may be [..., 1], the same for all steps.
    """

    decay: Array | None = None
    weight: Array | None = None
    exclusive: bool = False


def decays_of(table: Array) -> Decays:
    """Reads a table [..., T, T]; raises ``NotCausal``."""
    length = table.shape[-1]
    table = np.asarray(table, dtype=float)
    if not np.isfinite(table).all():
        raise NotCausal("the mask holds infinities")
    if np.triu(table, 1).any():
        raise NotCausal("the mask lets a step see later ones")
    weight = np.diagonal(table, axis1=-2, axis2=-1)
    if not weight.any() and length > 1:
        inner = decays_of(table[..., 1:, :-1])
        if inner.decay is not None or inner.weight is not None or inner.exclusive:
            raise NotCausal("the mask leaves out more than the future and the step itself")
        return Decays(exclusive=True)
    if not weight.all():
        raise NotCausal("the mask leaves out some steps themselves")
    decay = np.ones(table.shape[:-1])
    for i in range(1, length):
        decay[..., i] = table[..., i, i - 1] / weight[..., i - 1]
        expected = decay[..., i, None] * table[..., i - 1, :i]
        if not np.allclose(table[..., i, :i], expected, rtol=CLOSE, atol=1e-37):
            raise NotCausal("the mask is no product of decays from step to step")
    return Decays(_simplest(decay), None if np.all(weight == 1) else weight)


def _simplest(decay: Array) -> Array | None:
    """Returns the decays without time where they do not change (the first has no meaning); None where they are all 1."""
    steps = decay[..., 1:]
    if not steps.size or np.all(steps == 1):
        return None
    first = steps[..., :1]
    return first if np.allclose(steps, first, rtol=CLOSE, atol=0) else decay


def slope_of(table: Array) -> float | None:
    """Returns c where ``table[i, j] = c * (i - j)`` for j <= i, None for another table."""
    length = table.shape[-1]
    if table.ndim != 2 or length < 2:
        return None
    places = np.arange(length)
    slope = float(table[1, 0])
    wanted = slope * (places[:, None] - places[None, :])
    past = places[:, None] >= places[None, :]
    return slope if np.allclose(table[past], wanted[past], rtol=CLOSE, atol=1e-12) else None
