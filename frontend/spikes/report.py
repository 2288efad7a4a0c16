"""What became of a spiking projection: one record, which the log and ``explain`` read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from spikingbrain.passes.spike_forms import form


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
        layer: the path of the module that it is in, "" outside of any.
        silent: the share of counts that are 0, 0 where nobody has measured it.
        form: how a CPU computes it: "dense", all channels, or "events", those that fire; "" where it stays.
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
    layer: str = ""
    silent: float = 0.0

    @property
    def form(self) -> str:
        return form(self.silent) if self.status == "raised" else ""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "form": self.form}
