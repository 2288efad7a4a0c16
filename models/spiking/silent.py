"""Telling a compiler how many channels of a layer are silent: it need not read their weights. Results do not depend on it."""

from __future__ import annotations

import contextlib
from typing import Any

from torch.fx.traceback import annotate

from spikingbrain.models.spiking.errors import SpikingError

SILENT_NOTE = "spikingbrain.silent"  # under which a graph's node holds the share, in its meta["custom"]


def telling(silent: float | None) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which ops are traced with ``silent``, the share of counts that are 0, if it is known.

        with telling(0.9):
            y = torch.nn.functional.linear(torch.round(x / v) * v, weight)

    Raises SpikingError for what is no share.
    """
    return contextlib.nullcontext() if silent is None else annotate({SILENT_NOTE: share(silent)})


def share(silent: float | None) -> float:
    """Returns a share of silent channels, 0 where it is not known. Raises SpikingError for what is no share."""
    if silent is not None and not 0 <= silent <= 1:
        raise SpikingError(f"silent = {silent}", why="it is a share of channels", hint="0 to 1, or None")
    return float(silent or 0.0)
