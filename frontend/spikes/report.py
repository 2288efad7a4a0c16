"""What became of a spiking projection: one record, which the log and ``explain`` read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class SpikeReport:
    """What became of one product of spike counts.

    Attributes:
        status: "raised" to integers, "float" where it stays as it is written.
        op: "spike_linear", or "" where it stays.
        where: the user's line.
        reason: what it was recognised as, or why it was not.
        inputs, outputs, groups, bits: its sizes, the scales of each row, and the bits of a weight; 0 where unknown.
        k: the firing constant, 0 where unknown.
    """

    status: str
    op: str
    where: str
    reason: str
    inputs: int = 0
    outputs: int = 0
    groups: int = 0
    bits: int = 0
    k: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
