"""The debug mode ``check_finite``: what a compiled program returns besides, and the error that is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from spikingbrain.errors import NotFinite

NAN, INFINITY = 1, 2  # bits of a row's state


@dataclass(frozen=True)
class WatchedLayer:
    """A spiking layer whose input is looked at: the path of its module ("" outside modules), and the user's line."""

    layer: str
    where: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_finite(layers: Sequence[WatchedLayer], states: Sequence[np.ndarray[Any, Any]]) -> None:
    """Raises NotFinite for the first layer in the program's order whose state, an integer for each row, is not all 0."""
    for layer, state in zip(layers, states, strict=True):
        if not state.any():
            continue
        rows = np.argwhere(state)
        row = tuple(map(int, rows[0]))
        found = {NAN: "NaN", INFINITY: "infinity", NAN | INFINITY: "NaN and infinity"}[int(state[row])]
        name = f" {layer.layer!r}" if layer.layer else ""
        place = f" in row {list(row)}" if row else ""
        raise NotFinite(
            f"the input of spiking layer{name} holds {found}{place}",
            where=layer.where,
            why=f"{len(rows)} of {state.size} rows are not finite, and all layers before it had finite inputs",
            hint="look at what computes this layer's input; without check_finite results are those of eager",
        )
