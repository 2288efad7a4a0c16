"""What a machine does for one call: launches and products with all sizes known, and the memory that they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spikingbrain.backend_maca.plan.order import Order
from spikingbrain.backend_maca.plan.workspace import Workspace


@dataclass(frozen=True)
class Launch:
    """A kernel's launch with all sizes known.

    Attributes:
        arguments: (number of a buffer, None) or (None, an integer), one for each parameter; the low bytes of an integer
            are the parameter's.
        widths: bytes of each parameter.
    """

    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    arguments: tuple[tuple[int | None, int | None], ...]
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """A matrix product by the vendor's library: a step of the plan with all sizes known, and its buffers."""

    step: Mapping[str, Any]
    buffers: tuple[int, ...]


@dataclass(frozen=True)
class Steps:
    """What a call of an entry point does for arguments of certain shapes.

    Attributes:
        temporaries: number of a buffer -> its shape.
        outputs: (number of a buffer, shape), one for each result.
        workspace: where the temporaries lie that are no results, if they share memory.
        born: number of a step -> the buffers of the workspace that it is the first to use.
        order: which steps run on which stream and wait for which; None where all run on one, as they stand.
    """

    entry: str
    temporaries: Mapping[int, tuple[int, ...]]
    steps: Sequence[Launch | Product]
    outputs: Sequence[tuple[int, tuple[int, ...]]]
    workspace: Workspace | None = None
    born: Mapping[int, Sequence[int]] = field(default_factory=dict)
    order: Order | None = None
    graphs: dict[Any, Any] = field(default_factory=dict)  # a machine's own: recordings of the steps
